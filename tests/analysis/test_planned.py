"Planned comparisons: which pairs, one correction over all settings, and what is said of each."
import numpy as np
import pytest
from scipy import stats

from copd_nb.analysis.planned import planned_seeds, planned_sentences, planned_table

PAIRS = dict(two=[("CoPD", "mixed RLVR")], three=[("CoPD", "mixed RLVR"), ("CoPD", "merged")])


def scores(means, seeds=10, spread=0.004, prompts=200, key=0):
    "label → capability → (S, E): every row has the prompts of the others, and seeds that differ by `spread`."
    rng = np.random.default_rng(key)
    luck = rng.random((1, prompts))
    return {label: {"sums": np.clip(mean + 0.1 * (luck - 0.5) + spread * rng.standard_normal((seeds, 1)), 0, 1)}
            for label, mean in means.items()}


def decided(means, matters=1.5, **options):
    labels = [l for l in means if l != "CoPD"]
    pairs = dict(all=[("CoPD", l) for l in labels])
    table = planned_table(dict(all=scores(means, **options)), dict(all=["sums"]), pairs, matters)
    return table.set_index("b")


def test_every_verdict():
    found = decided({"CoPD": 0.7, "far below": 0.6, "far above": 0.8, "near below": 0.693, "level": 0.7}).verdict
    assert dict(found) == {"far below": "above", "far above": "below", "near below": "slightly above",
                           "level": "equal within 1.5"}
    loud = decided({"CoPD": 0.7, "level": 0.7}, spread=0.05).verdict
    assert list(loud) == ["undecided"] and list(decided({"CoPD": 0.7, "a": 0.1}, seeds=1).verdict) == ["untested"]
    bare = decided({"CoPD": 0.7, "near below": 0.693, "level": 0.7}, matters=None).verdict
    assert list(bare) == ["above", "undecided"]  # nobody said what matters


def test_seeds_alone_decide_nothing_where_other_prompts_might():
    "Eight prompts and seeds that agree: the test over seeds is clear, the interval over prompts is not."
    rng = np.random.default_rng(3)
    a = np.tile(rng.random(8) < 0.5, (10, 1)).astype(float)
    b = np.tile(rng.random(8) < 0.5, (10, 1)).astype(float)
    a[:, 0], b[:, 0] = rng.random(10) < 0.9, rng.random(10) < 0.1
    row = planned_table(dict(all={"x": dict(c=a), "y": dict(c=b)}), dict(all=["c"]), dict(all=[("x", "y")]), 1).iloc[0]
    assert row.p < 0.05 and row.low < 0 < row.high and row.verdict == "undecided"


def test_one_correction_over_all_settings_of_the_paired_t_test():
    arrays = dict(two=scores({"CoPD": 0.7, "mixed RLVR": 0.697}), three=scores(
        {"CoPD": 0.7, "mixed RLVR": 0.702, "merged": 0.695}, key=1))
    names = dict.fromkeys(arrays, ["sums"])
    table = planned_table(arrays, names, PAIRS, 1.5)
    for r in table.itertuples():
        a, b = (arrays[r.setting][label]["sums"].mean(1) for label in (r.a, r.b))
        assert r.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert r.sd == pytest.approx(100 * np.std(a - b, ddof=1))
    ordered = table.sort_values("p")
    expected = np.minimum(np.maximum.accumulate(ordered.p.to_numpy() * [3, 2, 1]), 1)
    assert ordered.p_holm.to_numpy() == pytest.approx(expected) and table.detectable.gt(0).all()
    runs = planned_seeds(arrays, names, PAIRS, range(10))
    assert runs.groupby(["setting", "b"], sort=False).difference.mean().to_numpy() == pytest.approx(table.difference)


def test_what_is_said():
    table = decided({"CoPD": 0.7, "x": 0.6, "y": 0.7, "z": 0.8}).reset_index()
    plan, said = planned_sentences(table, "greedy", 1.5)
    assert plan.endswith("over 3 comparisons, 1.5 points matter: 1 above, 1 below, 1 equal within 1.5.")
    assert "one Holm correction" in plan
    assert said.startswith("CoPD is above x (") and "; below z (" in said and "; equal within 1.5 points to y (" in said
    assert "p < 0.001" in said
    alone = planned_sentences(decided({"CoPD": 0.7, "x": 0.6}).reset_index(), "greedy", 1.5)
    assert alone[0].endswith("last weights, 1 comparison, 1.5 points matter: 1 above.")
    one = planned_sentences(decided({"CoPD": 0.7, "x": 0.6}, seeds=1).reset_index(), "sampled")
    assert "one training seed, so nothing is tested: 1 comparison:" in one[0] and "untested against x" in one[1]
    assert planned_sentences(table.iloc[:0], "greedy") == []
