"Paired differences at equal budgets: pairs of one's own budget, no extrapolation, Holm, words."
import numpy as np
import pandas as pd
import pytest

from copd_nb.analysis.budgets import COMPARED, budget_cells, budget_leads, budget_sentences
from copd_nb.analysis.tests import holm
from copd_nb.analysis.typical import typical_interval, typical_p


def curve(paradigm, seed=0, at=(10, 20, 40), accuracy=(50.0, 60.0, 70.0), tokens=1.0, chain=1.0):
    steps = np.array(at, float)
    return pd.DataFrame(dict(paradigm=paradigm, seed=seed, total_steps=steps, tokens=tokens * steps,
                             critical_steps=chain * steps, accuracy=np.array(accuracy, float)))


def seeds(label, lead=0.0, n=5, noise=0.0, **more):
    luck = np.random.default_rng(sum(map(ord, label))).standard_normal(n)
    return [curve(label, s, **more).assign(accuracy=lambda t, s=s: t.accuracy + lead + noise * luck[s])
            for s in range(n)]


def test_each_pair_has_the_budget_that_both_reach():
    table = budget_leads(pd.concat([curve("CoPD", tokens=2), curve("short", at=(10, 20), accuracy=(40, 44)),
                                    curve("mixed", accuracy=(50, 60, 72))]), "CoPD").set_index(["paradigm", "budget"])
    assert table["at"].to_dict() == {
        ("short", "total_steps"): 20, ("short", "tokens"): 20, ("short", "critical_steps"): 20,
        ("mixed", "total_steps"): 40, ("mixed", "tokens"): 40, ("mixed", "critical_steps"): 40}
    assert table.difference["short", "total_steps"] == 44 - 60  # CoPD after 20 steps
    assert table.difference["short", "tokens"] == 44 - 50  # after 10, which have cost 20 tokens
    assert table.difference["mixed", "total_steps"] == 2 and table.difference["mixed", "tokens"] == 72 - 60
    assert table.reference_accuracy["mixed", "tokens"] == 60 and table.accuracy["mixed", "tokens"] == 72


def test_a_curve_that_begins_later_has_no_difference():
    table = budget_leads(pd.concat([curve("CoPD", at=(1, 2, 5)), curve("MOPD", at=(30, 40, 50))]), "CoPD")
    assert table.difference.isna().all() and table.p_holm.isna().all() and table["at"].eq(5).all()
    assert budget_sentences(table) == [] and (budget_cells(table) == "none yet").all().all()


def test_differences_are_those_of_the_typical_run_with_one_correction():
    curves = pd.concat([*seeds("CoPD", noise=1), *seeds("up", 8, noise=1), *seeds("same", noise=1)])
    table = budget_leads(curves, "CoPD")
    last = curves[curves.total_steps == 40].pivot(index="seed", columns="paradigm", values="accuracy")
    for label in ("up", "same"):
        expected = last[label] - last.CoPD
        row = table[(table.paradigm == label) & (table.budget == "total_steps")].iloc[0]
        interval = typical_interval(expected)
        assert (row.difference, row.low, row.high) == pytest.approx((interval.mean, interval.low, interval.high))
        assert row.p == pytest.approx(typical_p(expected)) and row.seeds == 5
    assert table.p_holm.tolist() == pytest.approx(list(holm(table.p)))
    said = budget_sentences(table)
    assert len(said) == len(COMPARED)
    assert said[0].startswith("At equal total steps, points [95 % interval], 5 seeds: higher than CoPD")
    assert "higher than CoPD: up " in said[0] and "not told apart from CoPD: same " in said[0]
    assert list(budget_cells(table)) == list(COMPARED.values()) and list(budget_cells(table).index) == ["up", "same"]


def test_an_interval_without_zero_that_the_correction_does_not_leave_is_named_apart():
    row = dict(budget="tokens", at=1.0, reference="CoPD", accuracy=1.0, reference_accuracy=1.0, p=0.02, seeds=5)
    table = pd.DataFrame([row | dict(paradigm=p, difference=d, low=d - 1, high=d + 1, p_holm=q)
                          for p, d, q in (("behind", -1.5, 0.06), ("level", 0.5, 0.3), ("ahead", 3.0, 0.01))])
    assert budget_sentences(table) == [
        "At equal tokens, points [95 % interval], 5 seeds: higher than CoPD: ahead 3.0 [2.0, 4.0]; not told apart after"
        " the correction from CoPD: behind −1.5 [−2.5, −0.5]; not told apart from CoPD: level 0.5 [−0.5, 1.5]."]


def test_one_seed_is_not_tested():
    table = budget_leads(pd.concat([curve("CoPD"), curve("mixed", accuracy=(51, 62, 73))]), "CoPD")
    assert table.p_holm.isna().all() and table.difference.eq(3).all()
    assert budget_sentences(table)[1].endswith(": not told apart from CoPD: mixed 3.0; one seed can't be tested.")


def test_bad_curves_are_named():
    with pytest.raises(ValueError, match="no 'CoPD': mixed"): budget_leads(curve("mixed"), "CoPD")
    with pytest.raises(ValueError, match=r"mixed has seeds \[1\], CoPD has \[0\]"):
        budget_leads(pd.concat([curve("CoPD"), curve("mixed", 1)]), "CoPD")
    with pytest.raises(ValueError, match="lacks columns .'tokens'."):
        budget_leads(curve("CoPD").drop(columns="tokens"), "CoPD")
    assert budget_leads(curve("CoPD"), "CoPD").empty
