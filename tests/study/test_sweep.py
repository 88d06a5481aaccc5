"Tuning that is fair: equal trials, own seeds and prompts, winners that are written into the file."
import pandas as pd
import pytest

from copd_nb.data.yaml_files import parse_yaml
from copd_nb.policy.suites import load_suite
from copd_nb.study.experiment import Experiment, read_experiment, rows_of
from copd_nb.study.sweep import (
    best, criterion, left_out, made_of, names_of, run_trials, save_winners, sweep, sweep_jobs, trials, tuned_note,
    tuning_split, tuning_suite, with_winners)

SMALL = dict(prompts=2, opd_prompts=2, group_size=2, warmup=1, max_new_tokens=4)
TEXT = """suite: minis
together: {pair: [text, image]}
paradigms:
  - expert  # first
  - mopd
  - copd: {s_rl: 1, s_opd: 1, label: mine}
steps: 2
"""


@pytest.fixture
def exp(tmp_path):
    (tmp_path / "mine.yaml").write_text(TEXT)
    tuning = dict(seeds=[7], prompts=4, samples=1, number=2)
    return read_experiment(tmp_path / "mine.yaml", config=SMALL, seeds=[0], tuning=tuning,
                           run=dict(store=str(tmp_path / "store"), workers=1))


def test_tuning_prompts_are_training_prompts_of_which_none_is_judged_on(exp):
    tuned, whole = load_suite(tuning_suite(exp))[0], exp.load()[0]
    for name, c in tuned.items():
        train, test = {e.id for e in whole[name].train}, {e.id for e in whole[name].test}
        held, used = {e.id for e in c.test}, {e.id for e in c.train}
        assert len(held) == 4 and held <= train and used < train and not held & used and not held & test
        assert c.reward == whole[name].reward
    assert {e.id for e in tuning_split(whole["text"], 4).test} == {e.id for e in tuned["text"].test}


def test_trials_keep_what_the_row_says_of_itself():
    "A batch, β and arguments of the schedule stay where a trial changes the rate alone; a trial's own value wins."
    rows = [{"mixed": dict(prompts=96, steps=80, label="wide")}, {"copd": dict(beta=0.03, topology="hub")}]
    grid = [dict(rate=0.5), dict(rate=2.0, beta=0.5)]
    tuning = dict(seeds=[100], trials={"wide": [dict(rate=0.5), dict(rate=2.0)], "copd": grid})
    found = trials(read_experiment("minis", paradigms=rows, tuning=tuning))
    assert [(t["prompts"], t["steps"]) for t in found["wide"]] == [(96, 80)] * 2 and "label" not in found["wide"][0]
    assert [(t["beta"], t["topology"]) for t in found["copd"]] == [(0.03, "hub"), (0.5, "hub")]


def test_every_row_has_the_same_number_of_different_trials():
    listed = trials(read_experiment("minis"))
    assert {len(t) for t in listed.values()} == {6}
    for t in listed.values(): assert len({str(sorted(values.items())) for values in t}) == 6
    own = Experiment(suite="minis", steps=20, tuning=dict(trials=dict(copd=[dict(beta=0.5)])))
    with pytest.raises(ValueError, match="every row needs as many"): trials(own)


def test_rates_are_multiples_and_opd_starts_from_the_best_expert():
    exp = Experiment(suite="minis", steps=20, config=dict(learning_rate=1e-4))
    assert [t["learning_rate"] for t in trials(exp)["mixed"]] == [2.5e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 4e-4]
    assert {t["learning_rate"] for t in trials(exp, 3e-4)["mopd"]} == {3e-4}
    assert {t["s_rl"] + t["s_opd"] for t in trials(exp)["copd"]} == {20}


def test_rows_of_one_paradigm_need_labels():
    twice = ("copd", {"copd": {"beta": 0.1}})
    with pytest.raises(ValueError, match="listed twice: give each a label"):
        names_of(Experiment(suite="minis", steps=20, paradigms=twice))
    assert names_of(Experiment(suite="minis", steps=20, paradigms=("copd", {"copd": {"label": "b"}}))) == dict(
        copd="copd", b="copd")


def test_rows_that_a_sweep_leaves_out_are_known_without_it_even_where_two_have_one_name():
    rows = ["mixed", {"mixed": {"prompts": 8}}, "semi_opd", "camopd", {"placebo_copd": {"label": "taught by the base"}}]
    made = Experiment(suite="minis", steps=20, paradigms=rows, tuning={"trials": {"semi_opd": [{"rate": 1.0}]}})
    assert left_out(made) == ["camopd", "taught by the base"]


def test_criterion_weighs_capabilities_equally_and_ties_go_to_the_first():
    rows = pd.DataFrame([("result", "a", 1.0, 0.5)] * 3 + [("result", "b", 0.0, 0.0), ("branch", "a", 0.0, 0.0)],
                        columns=["model", "capability", "greedy", "sampled"])
    assert criterion(rows, ["a", "b"]) == 0.375 and criterion(rows, ["a"]) == 0.75
    table = pd.DataFrame([("x", 0, 0.5), ("x", 1, 0.5), ("y", 0, 0.1), ("y", 1, 0.3)],
                         columns=["paradigm", "trial", "criterion"])
    assert best(table) == dict(x=0, y=1)


def test_jobs_are_quiet_and_seeded(exp):
    jobs = sweep_jobs(exp, "mine", trials(exp)["mine"])
    assert {(i, seed) for i, seed, _ in jobs} == {(0, 7), (1, 7)}
    assert all(j.config.probe_every == j.config.eval_every == 0 and j.config.seed == 7 for j, _ in jobs.values())
    experts = sweep_jobs(exp, "expert", trials(exp)["expert"])
    assert {label: counts for (_, _, label), (_, counts) in experts.items()} == {
        "text expert": ["text"], "image expert": ["image"]}


def test_a_sweep_writes_its_winners_and_knows_for_what(exp):
    table, chosen = sweep(exp)
    assert set(table.paradigm) == {"expert", "mopd", "mine"} and set(table.trial) == {0, 1}
    for key, own in table.groupby("paradigm"):
        means = own.groupby("trial").criterion.mean()
        rate = chosen["expert"]["learning_rate"]
        assert chosen[key] == trials(exp, rate)[key][means.idxmax()]
    again = run_trials(exp, {"mine": trials(exp)["mine"]})
    assert list(again.criterion) == list(table[table.paradigm == "mine"].criterion)
    save_winners(exp, chosen)
    text = exp.file.read_text()
    assert "# first" in text and parse_yaml(text).value["tuned"]["of"] == made_of(exp)
    after = read_experiment(exp.file)
    assert after.paradigms[2] == {"copd": {"s_rl": 1, "s_opd": 1, "label": "mine"} | chosen["mine"]}
    assert len(rows_of(after)["pair"]) == 5
    assert "as many trials" in tuned_note(after) and "trials 2" in tuned_note(after)
    assert "Nothing was tuned" in tuned_note(exp) and "as many trials" in tuned_note(read_experiment("minis"))
    assert "nobody knows" in tuned_note(read_experiment(exp.file, tuned=dict(trials=3)))
    of = dict(after.tuned, of=dict(after.tuned["of"], base="another"))
    assert "but for another base" in tuned_note(read_experiment(exp.file, tuned=of))
    assert with_winners(text, after, {}) != TEXT


def test_an_experiment_without_a_file_has_nowhere_to_write():
    with pytest.raises(ValueError, match="has no file to write the winners into"):
        save_winners(Experiment(suite="minis", steps=20), {})
