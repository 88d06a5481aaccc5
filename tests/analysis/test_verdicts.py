"Who leads: ties, one model, one seed; experts under labels of one's own; claims of settings that are not the paper's."
import numpy as np
import pytest

from copd_nb.analysis.setting_claims import Judged, is_paper, own_findings, paper_findings
from copd_nb.analysis.verdicts import (
    against_sentence, base_sentence, detectable, experts_of, leader_sentence, leaders, listed_names, seed_table,
    sure_sentence, with_experts)
from copd_nb.schedule.rows import Choice, Setting, paradigms, settings_of


def scores(seeds=2, examples=40, **means):
    "The same examples right in every seed: intervals of width 0 between equal rows."
    return {label: {c: np.tile(np.arange(examples) < m * examples, (seeds, 1)).astype(float) for c in ("a", "b")}
            for label, m in means.items()}


def test_a_leader_is_ahead_of_every_other():
    table = leaders(scores(base=0.1, low=0.2, top=0.9, mid=0.5), ["low", "mid", "top"], ["a", "b"])
    assert list(table.paradigm) == ["top", "mid", "low"] and table.lead.iloc[1:].round(6).tolist() == [40, 70]
    assert leader_sentence(table).startswith("top leads with 90.0 % [")
    assert "its smallest lead, over mid, is 40.0 points [" in leader_sentence(table)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equal_means_have_no_winner(share):
    table = leaders(scores(x=share, y=share, z=share), ["x", "y", "z"], ["a", "b"])
    words = leader_sentence(table)
    assert words == f"No model leads: all 3 unified models have the same mean, {100 * share:.1f} %."


def test_some_share_the_highest_mean_and_others_are_near():
    drawn = scores(x=0.5, y=0.5, far=0.1)
    drawn["near"] = {c: np.roll(t, 1, axis=1) for c, t in drawn["x"].items()}  # other examples, as many
    drawn["near"]["a"] = drawn["near"]["a"] * (np.arange(40) != 3)
    table = leaders(drawn, list(drawn), ["a", "b"])
    words = leader_sentence(table)
    assert words.startswith("No model leads: x and y share the highest mean, 50.0 %") and "near (1.2 points" in words
    assert "far" not in words


def test_one_model_against_others():
    drawn = scores(mine=0.5, up=0.75, down=0.25, same=0.5)
    said = against_sentence(drawn, "mine", ["up", "down", "same"], ["a", "b"])
    assert said.startswith("mine is below up (25.0 points [") and "; above down (25.0 points [" in said
    assert said.endswith("]); not told apart from same.")
    assert against_sentence(drawn, "mine", ["same"], ["a"]) == "mine is not told apart from same."


def test_the_base_and_what_is_sure():
    drawn = scores(base=0.3, up=0.6, down=0.1, same=0.3)
    assert base_sentence(drawn, ["up", "down", "same"], ["a"]).endswith("): 1 of 3; lower: down.")
    assert base_sentence(drawn, ["same"], ["a"]).endswith("): none.")
    assert np.isnan(detectable(drawn, ["up", "same"], ["a"]))  # seeds that don't differ have no such number
    assert np.isnan(detectable(drawn, ["up"], ["a"]))
    assert "detectable" not in sure_sentence(2, {"a": np.nan}) and "a 3.1 points." in sure_sentence(2, {"a": 3.14})


def test_names_in_a_sentence():
    assert [listed_names("abcdef"[:n]) for n in (0, 1, 2, 3, 6)] == ["", "a", "a and b", "a, b and c",
                                                                    "a, b, c, d and 2 more"]


def test_experts_are_found_by_family_and_the_first_counts():
    setting = settings_of(["a", "b"])["two_branch"]
    rows = paradigms(setting, 20, None, [("expert", Choice(label="slow")), ("expert", Choice(label="fast")), "mixed"])
    assert experts_of(rows) == {"a": "slow: a expert", "b": "slow: b expert"}
    drawn = scores(**{p.label: 0.5 for p in rows})
    found = with_experts(drawn, rows)
    assert found["a expert"] is drawn["slow: a expert"] and with_experts(drawn, rows[1:2] + rows[4:]) is None


def test_the_table_of_seeds_has_every_run():
    table = seed_table({"x": dict(a=np.array([[1, 0], [1, 1]]), b=np.array([[0, 0], [1, 1]]))}, ["a", "b"], [3, 7])
    found = table.set_index(["capability", "seed"]).accuracy
    assert found["a", 3] == 50 and found["b", 7] == 100 and found["mean", 3] == 25


def judged(setting, wanted, **means):
    rows = tuple(paradigms(setting, 20, None, wanted))
    drawn = {p.label: {c: scores(x=means.get(p.family, 0.5))["x"]["a"] for c in setting.capabilities} for p in rows}
    return Judged(setting, rows, drawn, "sampled")


def test_the_papers_settings_are_known_by_name_and_capabilities():
    assert all(map(is_paper, settings_of().values()))
    assert not any(map(is_paper, settings_of(["text", "math"]).values()))
    assert not is_paper(Setting("mine", ("text", "image"), "pairwise"))


def test_further_copd_rows_have_findings_of_their_own():
    two = [("copd", Choice(label=l)) for l in ("gentle", "strong")]
    found = paper_findings([judged(s, ["mixed", *two], copd=0.8, mixed=0.6) for s in settings_of().values()])
    assert set(found) == {f"copd_over_mixed_{n}{l}" for n in ("two", "three") for l in ("", "/strong")}
    assert "(gentle, sampled)" in found["copd_over_mixed_two"]["sentence"]
    assert {f["verdict"] for id, f in found.items() if id.startswith("copd_over_mixed_two")} == {"holds"}


def test_claims_about_other_settings_have_their_own_words():
    mine = judged(settings_of(["a", "b"])["two_branch"], ["expert", "mixed", "opd", "copd"], copd=0.8, mixed=0.2)
    found = own_findings([mine])
    opd = found["copd_over_opd/two_branch/CoPD/sampled"]
    assert opd["text"] == "CoPD is more accurate than OPD a→b and OPD b→a" and opd["verdict"] == "holds"
    assert found["mixed_seesaw/two_branch/mixed RLVR/sampled"]["sentence"].startswith("Mixed RLVR falls below")
    assert own_findings([judged(settings_of()["two_branch"], ["mixed", "copd"])]) == {}
    assert own_findings([judged(mine.setting, ["merged"])]) == {}  # neither CoPD nor mixed RLVR
    assert opd["where"] == "a, b; sampled"
