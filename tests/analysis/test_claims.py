"Claims: the paper's numbers by hand, verdicts at their edges, the table with reports that are missing."
import re
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from copd_nb.analysis.claims import CLAIMS, claim
from copd_nb.analysis.evidence import evidence_of, phase_change
from copd_nb.analysis.findings import finding, finding_of, of_all, of_some
from copd_nb.analysis.tests import ONE_SEED
from copd_nb.analysis.paper import paper_lead, paper_summary, paper_table
from copd_nb.analysis.records import VERDICTS
from copd_nb.analysis.intervals import Interval, macro_difference

IDS = """
copd_over_mixed_two copd_over_mixed_three copd_over_static_opd copd_over_mopd copd_over_own_expert mixed_seesaw
ablation_without_first_opd ablation_without_second_opd merged_over_first_branch merged_over_second_branch
overlap_predicts_gain absorption_rises_with_overlap drift_kl_rises drift_overlap_falls overlap_falls_in_rl
overlap_recovers_in_opd overlap_above_090 copd_closer_than_static ratio_best hub_three_branches copd_over_merged
copd_over_mixed_equal_tokens copd_over_mixed_critical_path
""".split()
numbers = st.floats(-100, 100, allow_nan=False)


@pytest.mark.parametrize("name, shape", [("two_branch", (12, 9)), ("three_branch", (16, 9)), ("ablation", (5, 16))])
def test_paper_tables(name, shape):
    assert paper_table(name).shape == shape and not paper_table(name).isna().any().any()
    assert list(paper_summary(name).columns) == ["paradigm", "capability", "mean"]


def test_paper_values():
    two, ablation = (paper_summary(n).set_index(["paradigm", "capability"])["mean"] for n in ("two_branch", "ablation"))
    for c in ("image", "text", "mean"):
        assert two["copd", c] == pytest.approx(ablation["copd", c], abs=0.01)  # 56.97, 58.76, 57.71
    assert paper_table("three_branch").set_index("benchmark").loc["MMMU", "copd"] == 67.78
    with pytest.raises(ValueError, match="two_branch.*three_branch.*ablation"): paper_table("four_branch")
    with pytest.raises(KeyError): paper_lead("two_branch", "copd", "mopd")


def test_every_claim_is_there_once_and_complete():
    assert sorted(c.id for c in CLAIMS) == sorted(IDS)
    for c in CLAIMS:
        assert c.text[0].isupper() and not c.text.endswith(".") and c.note.endswith(".") and c.unit and c.report
    assert {c.id for c in CLAIMS if "Asked by reviewers" in c.note} == {i for i in IDS if claim(i).paper is None} - {
        "ratio_best", "drift_overlap_falls", "overlap_falls_in_rl", "overlap_recovers_in_opd",
        "copd_closer_than_static"}
    with pytest.raises(ValueError, match="unknown claim 'copd_wins': copd_over_mixed_two, "): claim("copd_wins")


def column(name, paradigm, capability=None):
    "A column of a table of the paper, averaged without the library."
    rows = paper_table(name)
    return mean(v for v, c in zip(rows[paradigm], rows["capability"]) if capability in (None, c))


def test_numbers_of_the_paper_by_hand():
    paper = {c.id: c.paper for c in CLAIMS}
    assert paper["copd_over_mixed_two"] == pytest.approx(column("two_branch", "copd") - column("two_branch",
                                                                                               "mixed_rlvr"))
    assert paper["copd_over_mixed_three"] == pytest.approx(column("three_branch", "copd") - column("three_branch",
                                                                                                   "mixed_rlvr"))
    assert paper["copd_over_mopd"] == pytest.approx(column("three_branch", "copd") - column("three_branch", "mopd"))
    better = column("two_branch", "opd_text_to_image")  # the better direction
    assert paper["copd_over_static_opd"] == pytest.approx(column("two_branch", "copd") - better)
    closest = column("three_branch", "video_expert", "video")  # the closest expert
    assert paper["copd_over_own_expert"] == pytest.approx(column("three_branch", "copd", "video") - closest)
    loser = column("three_branch", "mixed_rlvr", "text")  # text loses most
    assert paper["mixed_seesaw"] == pytest.approx(column("three_branch", "text_expert", "text") - loser)
    assert paper["hub_three_branches"] == pytest.approx(min(paper["copd_over_mixed_three"], paper["copd_over_mopd"]))
    overall = paper_table("ablation").set_index("variant")["overall"]
    for id, variant in dict(ablation_without_first_opd="without_text_opd",
                            ablation_without_second_opd="without_image_opd",
                            merged_over_first_branch="text_branch_only",
                            merged_over_second_branch="image_branch_only").items():
        assert paper[id] == pytest.approx(overall["copd"] - overall[variant])
    rounded = {i: round(paper[i], 2) for i in ("copd_over_mixed_two", "copd_over_mopd", "mixed_seesaw",
                                               "merged_over_second_branch")}
    assert rounded == dict(copd_over_mixed_two=2.11, copd_over_mopd=1.13, mixed_seesaw=2.5,
                           merged_over_second_branch=0.77)
    assert paper["overlap_predicts_gain"] == 0.89
    assert paper["overlap_predicts_gain"] ** 2 == pytest.approx(0.79, abs=0.005)


@pytest.mark.parametrize("id, low, high, verdict", [
    ("copd_over_mopd", 1e-9, 2, "holds"), ("copd_over_mopd", 0, 2, "not detected"),
    ("copd_over_mopd", -1, 0, "not detected"), ("copd_over_mopd", -2, -1e-9, "does not hold"),
    ("overlap_above_090", 0.9001, 0.95, "holds"), ("overlap_above_090", 0.9, 0.95, "not detected"),
    ("overlap_above_090", 0.5, 0.8999, "does not hold"), ("drift_kl_rises", 0.9, 3, "not detected"),
    ("copd_over_mopd", None, None, "not testable here"), ("copd_over_mopd", float("nan"), 1, "not testable here"),
    ("copd_over_mopd", -1, float("inf"), "not testable here")])
def test_verdicts_at_their_edges(id, low, high, verdict):
    found = finding(id, 1.0, low, high, 3)
    assert found["verdict"] == verdict and f": {verdict}, " in found["sentence"]
    if verdict == "not testable here":
        assert found["low"] is found["high"] is None and "no interval" in found["sentence"]


def test_no_value_has_no_interval():
    found = finding("copd_over_mopd", None, 1.0, 2.0, 3)
    assert (found["value"], found["low"], found["high"], found["verdict"]) == (None, None, None, "not testable here")
    with pytest.raises(ValueError, match=r"copd_over_mopd: the interval \[2, 1\] has its ends exchanged"):
        finding("copd_over_mopd", 1.5, 2, 1, 3)


@given(st.sampled_from(IDS), numbers, numbers, numbers, st.integers(1, 5))
def test_findings_say_what_they_found(id, value, a, b, seeds):
    found = finding(id, value, min(a, b), max(a, b), seeds, "here")
    assert found["verdict"] in VERDICTS and (ONE_SEED in found["sentence"]) == (seeds == 1)
    assert found["sentence"].startswith(f"{claim(id).text} (here): {found['verdict']}")
    assert not re.search(r"-\d", found["sentence"])
    assert ("the paper has" in found["sentence"]) == (claim(id).paper is not None)


def test_points_are_hundredths_and_other_units_are_not():
    points, share = Interval(0.02, 0.01, 0.03, 3, 8), Interval(0.93, 0.91, 0.95, 1, 8)
    assert finding_of("copd_over_mopd", points) == finding("copd_over_mopd", 2.0, 1.0, 3.0, 3)
    assert finding_of("overlap_above_090", share)["low"] == 0.91
    assert finding_of("copd_over_mopd", points, scale=1)["value"] == 0.02


def test_all_is_the_weakest_and_some_is_the_strongest():
    def leads(level):
        more = {0.95: 0.0, 0.975: 0.01}[level]
        return [Interval(0.03, 0.01 - more, 0.06 + more, 3, 8, level),
                Interval(0.02, -0.01 - more, 0.05 + more, 3, 9, level)]
    assert of_all(leads) == Interval(0.02, -0.01, pytest.approx(0.06), 3, 9, 0.95)
    assert of_some(leads) == Interval(0.03, pytest.approx(0.0), 0.06, 3, 9, 0.95)
    one, other = Interval(0.03, 0.01, 0.06, 3, 8), Interval(0, 0, 0, 1, 8)
    assert of_all(lambda level: [one]) == of_some(lambda level: [one]) == one
    for of in (of_all, of_some):
        with pytest.raises(ValueError, match="no interval"): of(lambda level: [])
        with pytest.raises(ValueError, match=r"rest on \[1, 3\] seeds"): of(lambda level: [one, other])


def test_some_rarely_hold_and_all_rarely_fail_by_chance():
    "Without any effect, the extremes of three differences stay within their intervals as often as promised."
    rng, hits, loose = np.random.default_rng(0), dict(some=0, all=0), 0
    for _ in range(200):
        pairs = rng.normal(0.5, 0.1, (3, 2, 4, 60)).clip(0, 1)
        def those(level, pairs=pairs): return [macro_difference([a], [b], 400, level) for a, b in pairs]
        hits["some"] += of_some(those).low > 0
        hits["all"] += of_all(those).high < 0
        loose += max(i.low for i in those(0.95)) > 0
    assert max(hits.values()) <= 0.05 * 200 and loose > hits["some"]


def test_an_interval_over_groups_is_tested_over_groups():
    "The t interval of twelve groups gives back its own p value, whatever the number of seeds."
    values = np.random.default_rng(0).normal(1, 1.5, 12)
    t = stats.ttest_1samp(values, 0)
    interval = t.confidence_interval(0.95)
    found = finding("drift_overlap_falls", values.mean(), interval.low, interval.high, 3, groups=12)
    record = dict(report="pilot", claims=dict(drift_overlap_falls=found), parameters={}, environment={})
    [e] = evidence_of(record, "here")
    assert e.p == pytest.approx(t.pvalue) and e.sd == pytest.approx(values.std(ddof=1)) and e.repeats == 12
    assert "12 groups" in found["sentence"] and e.seeds == 3
    assert "groups" not in finding("drift_overlap_falls", 1, 0, 2, 3)


def test_kl_in_opd_phases_comes_from_the_phases_of_an_older_record():
    "By hand: two seeds, whose KL falls by 0.03 and 0.05 in OPD phases; a record that has the claim keeps its own."
    falls = {0: (-0.02, -0.04), 1: (-0.05, -0.05)}
    rows = [dict(seed=s, phase="II OPD", change=c, metric="symmetric_kl") for s, own in falls.items() for c in own]
    rows += [dict(seed=s, phase="I RLVR", change=9.0, metric="symmetric_kl") for s in falls]
    rows += [dict(seed=s, phase="II OPD", change=9.0, metric="overlap") for s in falls]
    record = dict(report="dynamics", parameters={}, claims={}, tables=dict(changes=rows), engine=10 ** 6)
    assert phase_change(rows, "symmetric_kl", False).mean == phase_change(rows, "overlap", True).mean == 9
    with pytest.raises(ValueError, match="at least one value"): phase_change(rows, "overlap", False)
    found, = evidence_of(record, "a record")
    half = stats.t.ppf(0.975, 1) * np.std([0.03, 0.05], ddof=1) / np.sqrt(2)
    assert (found.claim, found.seeds) == ("kl_falls_in_opd", 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.04, 0.04 - half, 0.04 + half))
    own = dict(value=0.5, low=0.4, high=0.6, seeds=2)
    assert [e.value for e in evidence_of(record | dict(claims=dict(kl_falls_in_opd=own)), "a record")] == [0.5]
    assert not evidence_of(record | dict(tables={}), "a record")
