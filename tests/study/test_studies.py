"Studies: scales, arms, comparisons, variants of schedules, killed sweeps, and a smoke test of every report."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import numpy as np
import psutil
import pytest
import torch

from copd_nb.study import jobs as jobs_module
from copd_nb.study import workers as workers_module
from copd_nb.schedule.paradigms import merged_experts, mixed_rlvr
from copd_nb.analysis.criticism import sources
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.training import train
from copd_nb.policy.suites import load_suite
from copd_nb.data.names import json_or_text
from copd_nb.study.jobs import Job
from copd_nb.study.workers import prepare
from copd_nb.signals.objectives import low_probability_advantages
from copd_nb.analysis.records import read_results
from copd_nb.report.driver import run_report
from copd_nb.report.overview import STUDIES
from copd_nb.report.parameters import notebook_of, parameters_of
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, Phase, Update
from copd_nb.study.grid import SCALES, Arm, Study, run_studies, scale_of, skills_suite
from copd_nb.study.outcomes import (
    accuracy_of, combined, difference_of, over_runs, ranking, run_scores, sentences)
from copd_nb.study.variants import with_frozen_teachers, with_signals

pytestmark = pytest.mark.integration

NAMES = ["digits", "sort"]  # learnt soonest: a base that fails everything tells no arms apart


def tiny(folder, names=NAMES):
    return f"skills?names={','.join(names)}&warm=200&hidden=48&layers=2&folder={folder}/bases"


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def outcome(folder):
    scale = replace(SCALES["smoke"], seeds=(0, 1))
    arms = {"CoPD": copd(NAMES, 2, 1, 1), "mixed RLVR": mixed_rlvr(NAMES, 8),
            "merged experts": merged_experts(NAMES, 4), "reset": Arm(copd(NAMES, 2, 1, 1),
                                                                     dict(optimizer_state="reset"))}
    return Study(tiny(folder), scale, folder / "store", workers=1).run(arms)


def test_scales():
    assert scale_of("standard").seeds == (0, 1, 2) and scale_of("quick", [7]).seeds == (7,)
    assert scale_of("standard").steps == 60
    assert replace(scale_of("full"), seeds=()) == replace(scale_of("standard"), seeds=())
    with pytest.raises(ValueError, match="unknown preset 'huge': smoke, quick"): scale_of("huge")


def test_a_suite_of_skills_is_a_line_of_text():
    assert skills_suite(NAMES, SCALES["standard"], warm=100, noise=0.1) == "skills?names=digits,sort&warm=100&noise=0.1"
    assert "warm=2" in skills_suite(NAMES, SCALES["smoke"], warm=10)


def test_arms_share_everything_but_what_is_asked(outcome):
    assert outcome.labels == ["CoPD", "mixed RLVR", "merged experts", "reset"]
    assert len({j.name for j in outcome.jobs.values()}) == 8
    one, other = outcome.jobs["CoPD", 0], outcome.jobs["reset", 0]
    assert one.config == replace(other.config, optimizer_state=one.config.optimizer_state)
    assert one.schedule == other.schedule
    assert all(s.shape == (2, 16) for label in ("base", *outcome.labels) for s in combined(outcome, label).values())


def test_every_arm_is_judged_on_the_same_prompts(outcome):
    prompts = {key: tuple(rows[rows.model == "result"][["capability", "example"]].itertuples(index=False))
               if "example" in rows else len(rows[rows.model == "result"]) for key, rows in outcome.scores.items()}
    assert len(set(prompts.values())) == 1


def test_ranking_is_sorted_paired_and_consistent(outcome):
    table = ranking(outcome, "CoPD")
    assert list(table.accuracy) == sorted(table.accuracy, reverse=True)
    own = table.set_index("arm").loc["CoPD"]
    assert own.difference == own.difference_low == own.difference_high == 0
    for row in table.itertuples():
        assert row.difference == pytest.approx(row.accuracy - own.accuracy)
        assert row.accuracy == pytest.approx(100 * accuracy_of(outcome, row.arm).mean)
    assert list(ranking(outcome, "CoPD", ["reset"]).arm) == ["reset"]


def test_both_is_the_mean_of_greedy_and_sampled_and_a_capability_can_be_picked(outcome):
    parts = [combined(outcome, "CoPD", m)["digits"] for m in ("greedy", "sampled")]
    assert np.allclose(combined(outcome, "CoPD")["digits"], sum(parts) / 2)
    assert list(combined(outcome, "CoPD", capability="sort")) == ["sort"]
    one = difference_of(outcome, "CoPD", "reset", capability="sort")
    assert one.examples == 16 and one.seeds == 2


def test_branches_of_merges_are_judged_too(outcome):
    assert combined(outcome, "CoPD", model="digits")["digits"].shape == (2, 16)
    assert set(outcome.arrays("greedy", "digits")) == {"base", "CoPD", "reset"}


def test_sentences_and_runs(outcome):
    said = sentences(outcome, "CoPD")
    assert len(said) == 3 and all("CoPD" in s for s in said)
    table, family = over_runs(outcome, "CoPD")
    assert set(table.arm) == set(outcome.labels) and "of 3 paired comparisons" in family
    assert np.isnan(table.set_index("arm").p_holm["CoPD"])
    assert run_scores(outcome, ["CoPD"])["CoPD"].shape == (2, 2)
    assert run_scores(outcome)["CoPD"].mean() == pytest.approx(accuracy_of(outcome, "CoPD").mean)


def test_events_carry_their_seed(outcome): assert set(outcome.events("CoPD").seed) == {0, 1}


def test_several_studies_at_once_do_equal_jobs_once(folder, outcome, monkeypatch):
    monkeypatch.setattr(workers_module, "do", lambda *a: pytest.fail("done again"))
    found = run_studies({"a": (outcome.study, {"CoPD": copd(NAMES, 2, 1, 1)}),
                         "b": (outcome.study, {"same": copd(NAMES, 2, 1, 1)})})
    assert found["a"].jobs["CoPD", 0] == found["b"].jobs["same", 0]


# variants of a schedule

def test_signals_can_be_taken_away_and_phases_go_with_their_last():
    whole = copd(NAMES, 2, 1, 1)
    one_way = with_signals(whole, lambda u: u.rl if u.branch == "digits" else u.signals)
    assert one_way.links() == {("sort", "digits")} and one_way.total_steps == whole.total_steps
    assert one_way.name == whole.name
    assert with_signals(whole, lambda u: u.rl, "alone").links() == set()
    untaught = with_signals(whole, lambda u: u.opd)
    assert len(untaught.phases) == 2 and all("OPD" in p.name for p in untaught.phases)


def test_frozen_teachers_are_copies_that_never_learn(suite_and_run):
    schedule, run, live = suite_and_run
    assert {"digits-1", "sort-1", "digits-2", "sort-2"} <= set(schedule.starts)
    assert not {u.branch for p in schedule.phases for u in p.updates} & {"digits-1", "sort-1", "digits-2", "sort-2"}
    assert run.finished and schedule.total_steps == live.total_steps


@pytest.fixture(scope="module")
def suite_and_run(folder):
    live = copd(NAMES, 2, 1, 2)
    frozen = with_frozen_teachers(live)
    capabilities, base = load_suite(tiny(folder))
    return frozen, train(frozen, capabilities, base, SCALES["smoke"].config, folder / "frozen"), live


# starts

def moved(base, by=0.01):
    policy = base.clone("moved")
    with torch.no_grad():
        for p in policy.model.parameters(): p.add_(by)
    return policy


def distil():
    return Schedule("distil", ["digits", "teacher"],
                    [Phase("OPD", 1, [Update("digits", [OPD("digits", "teacher", 1.0)])])], "digits")


def test_a_branch_can_start_from_a_policy_of_its_own_and_a_run_knows_it(folder, tmp_path):
    capabilities, base = load_suite(tiny(folder))
    config, other = SCALES["smoke"].config, moved(base)
    run = train(distil(), capabilities, base, config, tmp_path / "run", starts={"digits": other})
    plain = train(distil(), capabilities, base, config, tmp_path / "plain")
    assert run.manifest["starts"].keys() == {"digits"} and "starts" not in plain.manifest
    def distance(run, policy):
        return max((a - b).abs().max().item() for a, b in zip(run.result.model.parameters(), policy.model.parameters()))
    assert distance(run, other) < 0.005 < distance(run, base)
    with pytest.raises(ValueError):
        train(distil(), capabilities, base, config, tmp_path / "run",
              starts={"digits": moved(base, 0.02)})  # another run's folder


def test_bad_starts_are_named(folder, tmp_path):
    capabilities, base = load_suite(tiny(folder))
    with pytest.raises(ValueError, match=r"unknown branches \['other'\]"):
        train(distil(), capabilities, base, SCALES["smoke"].config, tmp_path / "a", starts={"other": base})
    larger = load_suite(tiny(folder).replace("hidden=48", "hidden=32").replace("warm=200", "warm=2"))[1]
    with pytest.raises(ValueError, match="'digits' starts from has other parameters"):
        train(distil(), capabilities, base, SCALES["smoke"].config, tmp_path / "b", starts={"digits": larger})


def test_jobs_start_from_folders(folder, tmp_path):
    capabilities, base = load_suite(tiny(folder))
    moved(base).save(tmp_path / "student")
    config = SCALES["smoke"].config
    plain, job = Job(distil(), config, tiny(folder), 8, 1), Job(distil(), config, tiny(folder), 8, 1,
                                                                (("digits", str(tmp_path / "student")),))
    assert plain.name != job.name
    jobs_module.do(job, tmp_path / "store")
    direct = train(distil(), capabilities, base, config, tmp_path / "direct", starts={"digits": moved(base)})
    for a, b in zip(jobs_module.run_of(job, tmp_path / "store").result.model.parameters(),
                    direct.result.model.parameters()):
        assert torch.equal(a, b)


# suites with arguments

@pytest.mark.parametrize("text, value", [("3", 3), ("0.5", 0.5), ("[1, 2]", [1, 2]), ("add,mirror", "add,mirror"),
                                         ("true", True), ("", "")])
def test_json_or_text(text, value): assert json_or_text(text) == value


@pytest.mark.parametrize("suite, said", [("skills?nam=add", "nam"), ("skills?names", "bad query"),
                                         ("skills?names=add,nothing", "nothing")])
def test_bad_arguments_of_a_suite_are_named(suite, said):
    with pytest.raises(ValueError, match=said): load_suite(suite)


def test_suites_are_prepared_once_each(monkeypatch):
    seen = []
    monkeypatch.setattr(workers_module, "load_suite", seen.append)
    prepare(["a", "b", "a"], workers=1)
    assert seen == ["a", "b"]


# the control without a teacher

def test_unlikely_tokens_are_pushed_down_whoever_is_right():
    logp = torch.log(torch.tensor([[0.05, 0.1001, 0.9]]))
    assert low_probability_advantages(logp, 2.0).tolist() == [[-2, 0, 0]]
    assert low_probability_advantages(logp, 1.0, below=1.0).tolist() == [[-1, -1, -1]]
    with pytest.raises(ValueError, match="below=0"): low_probability_advantages(logp, below=0)
    assert not OPD("digits", "base", 0.1, "unlikely").taught and OPD("digits", "base", 0.1).taught


def test_the_control_asks_no_teacher(folder, tmp_path):
    capabilities, base = load_suite(tiny(folder))
    plan = Schedule("control", ["digits"],
                    [Phase("II OPD", 1, [Update("digits", [RL("digits"), OPD("sort", "base", 0.1, "unlikely")])])],
                    "digits")
    events = train(plan, capabilities, base, SCALES["smoke"].config, tmp_path / "run").events
    rows = events[(events.kind == "train") & events.stream.fillna("").str.startswith("opd")]
    assert len(rows) and (rows.scored == 0).all() and (rows.generated > 0).all()


# a sweep that is killed

SWEEP = """
import sys
from dataclasses import replace
from copd_nb.study.grid import SCALES, Study
from copd_nb.schedule.paradigms import mixed_rlvr
from copd_nb.schedule.copd_schedules import copd
study = Study(sys.argv[2], replace(SCALES["smoke"], seeds=(0, 1, 2)), sys.argv[1], workers=1)
study.run({"CoPD": copd(["digits", "sort"], 2, 1, 1), "mixed RLVR": mixed_rlvr(["digits", "sort"], 8)})
"""


def finished(store):
    "Run folders with scores of every capability."
    return sorted(p.parent for p in store.glob("*/scores") if len(list(p.glob("*.parquet"))) == len(NAMES))


def test_a_killed_sweep_goes_on_where_it_was_and_ends_with_the_same_numbers(folder, outcome, tmp_path):
    store, env = tmp_path / "store", os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
    command = [sys.executable, "-c", SWEEP, str(store), tiny(folder)]
    process = subprocess.Popen(command, env=env)
    while len(finished(store)) < 3 and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    done = finished(store)
    assert 3 <= len(done) < 6
    def state():
        return {f: (f.read_bytes(), f.stat().st_mtime_ns) for path in done
                for f in (path / "events.jsonl", *path.glob("scores/*.parquet"), *path.rglob("*.safetensors"))}
    before = state()
    assert len(before) >= 3 * len(done)
    subprocess.run(command, env=env, check=True)
    assert state() == before and len(finished(store)) == 6
    arms = {"CoPD": copd(NAMES, 2, 1, 1), "mixed RLVR": mixed_rlvr(NAMES, 8)}
    scale = replace(SCALES["smoke"], seeds=(0, 1, 2))
    resumed, whole = (Study(tiny(folder), scale, s, workers=1).run(arms) for s in (store, folder / "store"))
    for label in arms:
        for metric in ("greedy", "sampled"):
            for c in NAMES: assert np.array_equal(resumed.arrays(metric)[label][c], whole.arrays(metric)[label][c])


def test_workers_end_with_a_killed_parent(folder, tmp_path):
    "Nobody would take their results; the next call goes on from the checkpoints."
    long = SWEEP.replace("workers=1", "workers=2").replace('"sort"], 8)', '"sort"], 100_000)')
    process = subprocess.Popen([sys.executable, "-c", long, str(tmp_path), tiny(folder)])
    while not list(tmp_path.glob("*/events.jsonl")) and process.poll() is None: time.sleep(0.05)
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    alive = psutil.wait_procs(left, timeout=60)[1]
    for worker in alive: worker.kill()
    assert len(left) >= 2 and not alive


# every report

SMALL = [s for s in STUDIES if s != "experiment"]
ALSO = dict(  # questions about experiments that a study answers, too
    pilot={"semi_over_live"},
    ablation={f"{claim}_{order}_{part}" for claim, part in (("ablation_without", "opd"), ("merged_over", "branch"))
              for order in ("first", "second")})


def asked(name, folder):
    "Parameters of a smoke run: the skills that are learnt soonest, where a report can be told."
    names = ["digits", "sort", "add"][:3 if name == "student" else 2]
    small = f"skills?names={','.join(names)}&warm=2&hidden=16&layers=1&folder={folder}/bases"
    told = {k: v for k, v in dict(names=names, suite=small, betas=[0.01, 3.0]).items()
            if k in parameters_of(name)}
    return dict(preset="smoke", store=str(folder / "stores" / name), workers=1) | told


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("pilot", "regimes", "ablation"))) for name in SMALL])
def test_smoke_run_of_a_study(name, folder, monkeypatch):
    monkeypatch.chdir(folder)  # bases that a report can't be told about
    run_report(name, asked(name, folder), folder / name, progress=False)
    record = read_results(folder / name / "results.json")
    assert record["report"] == name and record["parameters"]["preset"] == "smoke"
    assert record["limits"] and record["headline"]
    claims = {c.id for listed in sources().values() for c in listed if c.report == name}
    found = {key.split("/")[0] for key in record["claims"]}
    claims |= ALSO.get(name, set())
    assert found == claims or name == "pilot" and found < claims  # students that don't differ have no correlation
    page = (folder / name / f"{name}.html").read_text()
    assert "<img" in page and "http://" not in page.replace("http://www.w3.org", "") and len(page) < 2_000_000


def test_every_cell_of_the_map_has_a_plan_that_can_be_read():
    cells = [c.source for c in nbformat.read(notebook_of("regimes"), 4).cells if c.cell_type == "code"]
    names = {}
    for source in [cells[0], 'preset = "full"', *cells[1:3]]: exec(source, names)
    assert len(names["CELLS"]) > 16
    for name, cell in names["CELLS"].items():  # a number of steps that is no whole number of cycles is refused
        planned = names["experiment_of"](name)
        assert planned.steps == cell["steps"] and len(planned.seeds) == cell.get("seeds", 5)


@pytest.mark.slow
def test_a_map_grows_from_its_own_record(folder, monkeypatch):
    monkeypatch.chdir(folder)
    told = asked("regimes", folder)
    run_report("regimes", told | dict(cells=["separate"]), folder / "first", progress=False)
    grown = told | dict(records=[str(folder / "first")])
    elsewhere = dict(cells=["separate"], store=str(folder / "nothing"))
    run_report("regimes", grown | elsewhere, folder / "same", progress=False)
    first, same = (read_results(folder / name / "results.json") for name in ("first", "same"))
    assert not (folder / "nothing").exists()  # no run was needed
    assert {k: v for k, v in first.items() if k not in ("environment", "parameters")} == {
        k: v for k, v in same.items() if k not in ("environment", "parameters")}
    run_report("regimes", grown | dict(cells=["related"]), folder / "more", progress=False)
    more = read_results(folder / "more" / "results.json")
    assert list(more["cells"]) == ["related", "separate"] and more["cells"]["separate"] == first["cells"]["separate"]
    own = told | dict(cells=["separate"], records=[str(folder / "same")], store=str(folder / "nothing"))
    run_report("regimes", own, folder / "same", progress=False)  # a map may read the record that it replaces
    assert read_results(folder / "same" / "results.json")["cells"] == first["cells"]
    with pytest.raises(ValueError, match="cell 'separate' was made with other seeds than the plan asks for"):
        run_report("regimes", grown | dict(cells=["related"], seeds=[3]), folder / "other", progress=False)
