"Jobs: names, order, resumption, and numbers that don't depend on the number of processes."
import os
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.study import workers as workers_module
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.paradigms import expert, merged_experts, mixed_rlvr
from copd_nb.engine.config import Config
from copd_nb.policy.suites import load_suite
from copd_nb.engine.runs import Run
from copd_nb.study.experiment import Experiment
from copd_nb.study.grid import SCALES, Study
from copd_nb.study.jobs import Job, base_scores, do, heated_scores, is_done, run_of, scores_of
from copd_nb.study.workers import do_all, in_order

TINY = Config(prompts=4, group_size=4, probe_every=0, eval_every=0, device="cpu")


def job(schedule, **options): return Job(schedule, TINY, **{"prompts": 8, "samples": 2, **options})


def free(jobs): return [(j, []) for j in jobs]


def test_names_tell_content_apart():
    names = [job(expert("text", 1)), job(expert("text", 2)), job(expert("image", 1)),
             replace(job(expert("text", 1)), config=replace(TINY, seed=1))]
    assert len({j.name for j in names}) == 4
    assert job(expert("text", 1)).name == job(expert("text", 1), prompts=0).name  # judging is no part of the run


@pytest.mark.parametrize("suite", ["copd_nb.minis:nothing", "no_such_module:suite", "copd_nb.minis"])
def test_unknown_suite_is_named(suite):
    with pytest.raises(ValueError, match=f"suite '{suite}'"): load_suite(suite)


def test_jobs_of_one_suite_share_it_however_many_suites_there_are(tmp_path, monkeypatch):
    "Twenty suites in turn, twice: more than are kept."
    (tmp_path / "counted.py").write_text("from copd_nb import minis, minis_base\nmade = []\n\n\ndef suite(x=0):\n"
                                         "    made.append(x)\n    return minis(('text',)), minis_base()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    jobs = [job(expert("text", steps), suite=f"counted:suite?x={x}") for steps in (1, 2) for x in range(20)]
    workers_module._open(free(jobs), tmp_path / "store")
    assert len(sys.modules["counted"].made) == 20


def test_processes_do_not_change_numbers(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    listed = [job(mixed_rlvr(["text", "image"], 1)), job(expert("text", 1))]
    torch.set_num_threads(1)  # as in a worker process
    try: do_all(free(listed), tmp_path / "one", workers=1)
    finally: torch.set_num_threads(threads)
    do_all(free(listed), tmp_path / "two", workers=2)
    for j in listed:
        a, b = (run_of(j, tmp_path / n) for n in ("one", "two"))
        pd.testing.assert_frame_equal(a.events.drop(columns="seconds"), b.events.drop(columns="seconds"))
        pd.testing.assert_frame_equal(scores_of(a, j), scores_of(b, j))
    monkeypatch.setattr(workers_module, "do", lambda *a: pytest.fail("done again"))
    do_all(free(listed), tmp_path / "two", workers=1)


def test_workers_share_the_cores_whatever_the_environment_says(monkeypatch):
    "torch asks MKL's variable, too: two processes of two threads on two cores were seven times slower."
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    monkeypatch.setattr(workers_module, "cores", lambda: 2)
    with workers_module._workers(2) as pool: assert pool.submit(torch.get_num_threads).result() == 1
    assert os.environ["MKL_NUM_THREADS"] == "64"


def test_judged_later_without_training_again(tmp_path, monkeypatch):
    quick, full = job(expert("text", 1), prompts=0), job(expert("text", 1))
    do_all(free([quick]), tmp_path, workers=1)
    assert is_done(quick, tmp_path) and not is_done(full, tmp_path)
    monkeypatch.setattr("copd_nb.engine.phase.train_step", lambda *a: pytest.fail("trained again"))
    do_all(free([full]), tmp_path, workers=1)
    assert is_done(full, tmp_path) and len(scores_of(run_of(full, tmp_path), full)) == 24


def test_temperatures_are_judged_later_and_leave_the_run_as_it_was(tmp_path, monkeypatch):
    "A trained run keeps its name and files; only further temperatures are judged, each once."
    plain = job(expert("text", 1))
    further = replace(plain, temperatures=(0.5, 1.0, 0.25))
    assert further.name == plain.name and set(plain.key) < set(further.key)
    do_all(free([plain]), tmp_path, workers=1)
    folder = tmp_path / plain.name
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr("copd_nb.engine.phase.train_step", lambda *a: pytest.fail("trained again"))
    assert is_done(plain, tmp_path) and not is_done(further, tmp_path)
    do_all(free([further]), tmp_path, workers=1)
    assert is_done(further, tmp_path) and all(p.read_bytes() == data for p, data in before.items())
    rows = heated_scores(run_of(plain, tmp_path), further)
    assert set(rows.temperature) == {0.25, 0.5} and len(rows) == 2 * 24 and set(rows.model) == {"result"}
    judged = []
    monkeypatch.setattr("copd_nb.study.jobs.evaluate_at", lambda p, c, heats, *a: judged.append(heats) or rows)
    do_all(free([replace(plain, temperatures=(0.5,))]), tmp_path, workers=1)
    assert not judged and heated_scores(run_of(plain, tmp_path), plain).empty
    assert set(base_scores(replace(plain, temperatures=(1.0,)), tmp_path, heated=True)) == set()


@settings(deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n),
                                                     st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)),
                                                              max_size=12))))
def test_jobs_come_after_what_they_need(graph):
    n, edges = graph
    jobs = [job(expert("text", i + 1)) for i in range(n)]
    needs = {i: {b for a, b in edges if a == i and b < i} for i in range(n)}  # to smaller numbers: no circle
    shown = [jobs[i] for i in reversed(range(n))]
    ordered = list(in_order([(jobs[i], {jobs[k].key for k in needs[i]}) for i in reversed(range(n))]))
    place = {j.name: i for i, j in enumerate(ordered)}
    assert sorted(place) == sorted(j.name for j in jobs)
    assert all(place[jobs[k].name] < place[jobs[i].name] for i in needs for k in needs[i])
    assert ordered == shown or any(needs.values())  # else as they stand


def test_jobs_that_need_each_other_are_refused(tmp_path):
    a, b = job(expert("text", 1)), job(expert("text", 2))
    for workers in (1, 2):
        with pytest.raises(ValueError, match="jobs need each other"):
            do_all([(a, [b]), (b, [a])], tmp_path, workers=workers)


def test_a_job_waits_for_what_it_needs(tmp_path):
    short, long = job(expert("text", 1), prompts=0), job(expert("text", 2))
    do_all([(long, [short]), (short, [])], tmp_path, workers=2)
    began = [run_of(j, tmp_path).manifest["started"] for j in (short, long)]
    assert began == sorted(began)
    assert len(list((tmp_path / ".experts").glob("*/[0-9]*"))) == 2  # the longer one continued from the shorter


def test_an_error_in_a_worker_is_raised(tmp_path):
    with pytest.raises(ValueError, match="unknown capability 'audio'"):
        do_all(free([job(expert("audio", 1))]), tmp_path, workers=2)


def test_branches_of_co_training_are_judged_and_merged_experts_are_not(tmp_path):
    from copd_nb.schedule.copd_schedules import copd
    co, merged = job(copd(["text", "image"], 1, 1, 1)), job(merged_experts(["text", "image"], 1))
    do_all(free([co, merged]), tmp_path, workers=1)
    assert set(scores_of(run_of(co, tmp_path), co).model) == {"result", "text", "image"}
    assert set(scores_of(run_of(merged, tmp_path), merged).model) == {"result"}


def test_only_the_capabilities_of_some_setting_are_judged():
    "An experiment with two of the suite's three capabilities spends nothing on the third."
    def files(**together):
        exp = Experiment(suite="minis", together=together, paradigms=("mixed",), steps=2, seeds=(0,),
                         config=TINY, evaluation=dict(temperatures=[0.5]))
        return {name: [*study.job(next(iter(arms.values())), 0).scores_files("run")]
                for name, (study, arms) in exp.studies().items()}
    assert files(pair=["text", "image"]) == dict(pair=["text", "image"])
    every = ["text", "image", "video"]
    assert files(pair=["image", "text"], all=every) == dict(pair=every, all=every)


def test_the_result_and_its_average_are_judged_at_every_temperature(tmp_path):
    "Branches that are merged are judged as they end; their averages, and further temperatures of theirs, are not."
    pair = ("text", "image")
    asked = Job(copd(pair, cycles=1, s_rl=1, s_opd=1), replace(TINY, average=0.5), prompts=2, samples=1,
                temperatures=(0.5,), judged=pair)
    run = Run(do(asked, tmp_path))
    scores, heated = scores_of(run, asked), heated_scores(run, asked)
    assert set(scores.model) == {"result", "result (average)", *pair} and set(scores.capability) == set(pair)
    assert set(heated.model) == {"result", "result (average)"} and set(heated.capability) == set(pair)
    assert heated.groupby(["model", "capability"]).size().eq(2).all()
    fewer = replace(asked, judged=("text",))
    assert {f.name for f in fewer.files("")} < {f.name for f in asked.files("")} and is_done(fewer, tmp_path)


def test_a_capability_to_judge_that_the_suite_lacks_is_refused_before_training(tmp_path):
    study = Study("minis", SCALES["smoke"], tmp_path, judged=("text", "imgae"))
    with pytest.raises(ValueError, match="imgae"): study.run({"mixed RLVR": mixed_rlvr(["text", "image"], 1)})
    assert not list(tmp_path.glob("mixed*"))
