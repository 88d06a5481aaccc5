"What an experiment names as primary: the pairs, in every setting that has both rows, and what is refused."
import pytest

from copd_nb.report.command import main
from copd_nb.study.experiment import Experiment, primary_pairs, reference_of, rows_of

PRESENT = dict(suite="minis", together=dict(two=["text", "image"], three=["text", "image", "video"]), steps=20,
               paradigms=("expert", "merged", "mixed", {"copd": dict(s_rl=6, s_opd=4)}))


def planned(**primary): return primary_pairs(Experiment(**PRESENT, primary=primary))


def test_nothing_is_compared_without_a_plan():
    assert primary_pairs(Experiment(**PRESENT)) == {}


def test_without_pairs_the_reference_is_compared_with_every_other_unified_model():
    two = [("CoPD", "merged experts"), ("CoPD", "mixed RLVR")]
    assert planned(metric="sampled") == dict(two=two, three=two)


def test_the_reference_is_copd_or_the_first_unified_model():
    rows = rows_of(Experiment(**PRESENT))["two"]
    assert reference_of(rows) == "CoPD"
    assert reference_of(rows[:-1]) == rows[2].label == "merged experts" and reference_of(rows[:2]) is None


def test_a_pair_counts_wherever_both_rows_are():
    assert planned(compare=[["mixed RLVR", "CoPD"]]) == dict.fromkeys(["two", "three"], [("mixed RLVR", "CoPD")])
    opd = dict(PRESENT, paradigms=("opd", "mixed"))  # static OPD is for two
    label = next(p.label for p in rows_of(Experiment(**opd))["two"] if p.family == "opd")
    found = primary_pairs(Experiment(**opd, primary=dict(compare=[[label, "mixed RLVR"]])))
    assert found == dict(two=[(label, "mixed RLVR")], three=[])


@pytest.mark.parametrize("label", ["mixed RLRV", "text expert"])
def test_a_row_that_no_setting_has_as_a_unified_model(label):
    with pytest.raises(ValueError, match=f"no unified model '{label}'.*: merged experts, mixed RLVR, CoPD"):
        planned(compare=[["CoPD", label]])


def test_check_shows_the_pairs_and_refuses_unknown_rows(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    text = "suite: minis\ntogether: {two: [text, image]}\nsteps: 20\nparadigms: [merged, mixed]\nprimary: "
    file.write_text(text + "{matters: 1.5}\n")
    assert main(["check", str(file), "--prompts", "0"]) == 0
    assert "two: primary is merged experts against mixed RLVR" in capsys.readouterr().out
    file.write_text(text + "{compare: [[mixed RLVR, merged]]}\n")
    assert main(["check", str(file), "--prompts", "0"]) == 2
    assert "there is no unified model 'merged'" in capsys.readouterr().err


@pytest.mark.parametrize("primary,words", [
    (dict(compare=[["CoPD", "CoPD"]]), "'CoPD' can't be compared with itself"),
    (dict(compare=[["CoPD", "mixed RLVR"], ["mixed RLVR", "CoPD"]]), "mixed RLVR and CoPD are listed twice"),
    (dict(metric="best"), "greedy"), (dict(matters=0), "0"), (dict(compare=[["CoPD"]]), "CoPD"),
    (dict(metrics="greedy"), "metrics")])
def test_faults_of_a_plan(primary, words):
    with pytest.raises(ValueError, match=words): Experiment(suite="minis", primary=primary)
