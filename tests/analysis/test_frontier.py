"Accuracy at equal entropy: interpolation, pairing, ranges, and what one seed or another set of seeds gives."
import numpy as np
import pandas as pd
import pytest

from copd_nb.analysis.frontier import (
    accuracy_at, common_entropy, entropy_sentences, equal_entropy, mean_curves)

HEATS = (0, 0.25, 0.5, 0.75, 1)


def bent(entropy): return 51 + 38 * np.exp(-np.asarray(entropy) / 0.28)


def run(label, seed, entropies, lead=0.0):
    return pd.DataFrame(dict(paradigm=label, seed=seed, temperature=HEATS, entropy=entropies,
                             accuracy=bent(entropies) + lead))


def table(lead=0.0, seeds=4, noise=0.0):
    rng, rows = np.random.default_rng(0), []
    for s in range(seeds):
        rows += [run("soft", s, np.array([0, 0.025, 0.07, 0.14, 0.302]) * (1 + 0.02 * s)),
                 run("sharp", s, np.array([0, 0.02, 0.048, 0.104, 0.247]), lead + noise * rng.standard_normal())]
    return pd.concat(rows)


def test_two_runs_on_one_bent_curve_are_equal_wherever_they_were_evaluated():
    found = equal_entropy(table(), "soft").set_index("where")
    assert found.entropy["range"] == pytest.approx(0.247)
    assert abs(found.difference["range"]) < 0.03 and found.difference.abs().max() < 0.15


def test_a_lead_is_found_at_every_entropy():
    found = equal_entropy(table(2.0, noise=0.1), "soft")
    assert found.difference.between(1.7, 2.3).all() and found.p_holm.dropna().lt(0.05).all()
    assert "sharp is higher than soft" in entropy_sentences(found)[0]


def test_only_the_ranges_are_corrected_together():
    curves = pd.concat([table(1.0, noise=0.5), table(0.5, noise=0.5).replace("sharp", "other")]).drop_duplicates()
    found = equal_entropy(curves[~curves.duplicated(["paradigm", "seed", "temperature"])], "soft")
    ranges = found[found["where"] == "range"]
    assert found.p_holm.notna().sum() == 2 and (ranges.p_holm >= ranges.p).all()


def test_the_shared_range_is_that_of_the_pair():
    curves = pd.concat([table(), *(run("cold", s, np.array(HEATS) * 0.01) for s in range(4))])
    found = equal_entropy(curves, "soft", ["sharp", "cold"]).query("where == 'range'").set_index("paradigm").entropy
    assert found["cold"] == pytest.approx(0.01) and found["sharp"] == pytest.approx(0.247)
    assert common_entropy(curves) == pytest.approx(0.01)


def test_outside_of_what_was_evaluated_there_is_nothing():
    own = run("a", 0, [0, 0.1, 0.2, 0.3, 0.4])
    assert np.isnan(accuracy_at(own, [-0.1, 0.5])).all() and accuracy_at(own, [0.4])[0] == pytest.approx(bent(0.4))


def test_entropies_that_are_equal_or_fall_are_one_point():
    own = run("a", 0, [0, 0.1, 0.09, 0.3, 0.4]).assign(accuracy=[90, 80, 70, 60, 50])
    assert accuracy_at(own, [0.1])[0] == 75
    assert accuracy_at(run("a", 0, [0.0] * 5), [0])[0] == pytest.approx(bent(0))


def test_one_seed_is_not_tested():
    found = equal_entropy(table(2.0, seeds=1), "soft")
    assert found.p_holm.isna().all() and "one seed can't be tested" in entropy_sentences(found)[0]


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="no 'nobody': soft, sharp"): equal_entropy(table(), "nobody")
    odd = table()[lambda t: (t.paradigm == "soft") | (t.seed < 3)]
    with pytest.raises(ValueError, match=r"sharp has seeds \[0, 1, 2\], soft has \[0, 1, 2, 3\]"):
        equal_entropy(odd, "soft")
    rows = table().assign(capability="text")
    with pytest.raises(ValueError, match="temperature 0: needs scores of all of text, image"):
        mean_curves(rows, ["text", "image"])
