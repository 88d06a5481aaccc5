"Samplers and learners that an experiment names: what trains and judges, what is refused, who runs beside whom."
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from copd_nb.engine import request
from copd_nb.engine.config import LEARNERS, SAMPLERS, Config, part_text
from copd_nb.engine.evaluation import evaluate
from copd_nb.engine.request import part_from, sampler_for
from copd_nb.engine.temperatures import evaluate_at
from copd_nb.policy.toys import minis, tiny_policy
from copd_nb.report.command import main
from copd_nb.schedule.paradigms import mixed_rlvr
from copd_nb.signals.sampling import sample_many
from copd_nb.study import loading, workers
from copd_nb.study.checking import own_code
from copd_nb.study.experiment import Experiment
from copd_nb.study.grid import Scale, Study
from copd_nb.study.jobs import Job
from copd_nb.study.memory import plan_for

PAIR = ("text", "image")
SMALL = dict(prompts=2, group_size=2, max_new_tokens=4, probe_every=0, eval_every=1, eval_prompts=2, eval_samples=1,
             device="cpu")
OWN = '''
from copd_nb.signals.sampling import sample_many
from copd_nb.engine.update import Learner

CALLS = []

class Counts:
    "The engine's sampler, counted."
    evaluates = True
    def __init__(self, said="", times: int = 1): self.said, self.times = said, times
    def __call__(self, policy, requests, *rest):
        CALLS.append((self.said, self.times, sum(r.greedy for r in requests)))
        return sample_many(policy, requests, *rest)

class Kept(Counts): reusable = True

class Trains(Counts): evaluates = False

class Mine(Learner): pass
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "ownparts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(request, "_REUSED", {})
    yield "ownparts"
    sys.modules.pop("ownparts", None)


def experiment(folder, **run):
    return Experiment(suite="minis", together=dict(two=list(PAIR)), paradigms=("mixed",), steps=2, seeds=(0,),
                      config=SMALL, evaluation=dict(prompts=2, samples=1, temperatures=[0.5]),
                      run=dict(store=str(folder / "store"), workers=1) | run)


def test_it_trains_and_judges_and_has_runs_of_its_own(own, tmp_path):
    plain, = experiment(tmp_path).train("mixed").values()
    asked = experiment(tmp_path, sampler={f"{own}:Counts": dict(said="a b", times=3)}, learner=f"{own}:Mine")
    run, = asked.train("mixed").values()
    calls = sys.modules[own].CALLS
    assert set(calls) == {("a b", 3, greedy) for greedy in (0, 2)}  # rollouts and heat; evaluations
    assert run.manifest["sampler"] == "Counts" and run.manifest["learner"] == "Mine" and run.path != plain.path
    shown = ["reward", "loss", "greedy", "sampled"]
    pd.testing.assert_frame_equal(run.events[shown], plain.events[shown])  # the same sampler in another coat
    files = [sorted(f.name for f in (r.path / "scores").iterdir()) for r in (run, plain)]
    assert len(files[0]) == len(files[1]) == 4 and not {*files[0]} & {*files[1]}
    before = len(calls)
    asked.train("mixed")
    assert len(calls) == before  # finished: loaded


def test_a_sampler_that_does_not_evaluate_leaves_it_to_the_engine(own, tmp_path):
    "It may be wrong on purpose: an evaluation is of the policy."
    plain, = experiment(tmp_path).train("mixed").values()
    run, = experiment(tmp_path, sampler=f"{own}:Trains").train("mixed").values()
    assert {greedy for *_, greedy in sys.modules[own].CALLS} == {0} and run.manifest["sampler"] == "Trains"
    assert {f.name for f in (run.path / "scores").iterdir()} == {f.name for f in (plain.path / "scores").iterdir()}


def test_the_base_is_judged_by_the_same_sampler(own, tmp_path):
    store = tmp_path / "store"
    study = Study("minis", Scale((0,), prompts=2, samples=1, config=Config(**SMALL)), store, 1, PAIR, f"{own}:Counts")
    assert study.run({"mixed": mixed_rlvr(PAIR, 1)}).table("greedy").paradigm.tolist().count("base") == 3
    assert len(list(store.glob(".bases/*/scores/*"))) == 3
    again = Study(study.suite, study.scale, store, 1, PAIR)
    assert again.run({"mixed": mixed_rlvr(PAIR, 1)}).base_scores is not None
    assert len(list(store.glob(".bases/*/scores/*"))) == 6  # the engine's own scores stand beside


@pytest.mark.parametrize("sampler, said", [
    ("vlm", "run.sampler: there is no sampler 'vlm': vllm, or package.module:name"),
    ({"vllm": {}, "mine:S": {}}, "one name with its options is needed"), (3, "run.sampler"), ({}, "one name")])
def test_what_cannot_be_a_sampler_is_said(sampler, said, tmp_path):
    with pytest.raises(ValueError, match=said): experiment(tmp_path, sampler=sampler)


def test_a_learner_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="run.learner: there is no learner 'tlr': trl, or package.module:name"):
        experiment(tmp_path, learner="tlr")


@pytest.mark.parametrize("text, said", [
    ("{own}:Counts?time=2", r"sampler Counts 'time' \(did you mean 'times'"), ("{own}:Counts?times=x", "times='x'"),
    ("json:loads?a=1", "only a class takes options, not a function"), ("{own}:Counts?times", "write name.option=value"),
    ("{own}:None_", "has no None_")])
def test_options_that_do_not_fit_are_said(text, said, own):
    with pytest.raises(ValueError, match=said): part_from(text.format(own=own), SAMPLERS, "sampler", "__call__")


def test_the_two_ways_to_write_options_are_one(own):
    options = dict(said="50 % & more", times=2)
    made = part_from(part_text({f"{own}:Counts": options}), SAMPLERS, "sampler", "__call__")
    assert vars(made) == options
    assert part_text(None) is None and part_text("trl") == "trl" and part_text({"trl": {}}) == "trl"
    assert part_from(None, LEARNERS, "learner", "optimizer") is None


def test_nothing_of_an_experiment_is_imported_to_check_it(own, tmp_path):
    found = own_code(experiment(tmp_path, sampler={f"{own}:Counts": {}}, learner=f"{own}:Mine?a=1"))
    assert found.name.tolist() == [f"{own}:Counts", f"{own}:Mine"] and own not in sys.modules
    assert found.place.tolist() == ["run.sampler", "run.learner"]


def test_only_a_reusable_sampler_is_used_again_and_one_at_a_time(own):
    assert sampler_for(f"{own}:Counts", "b") is not sampler_for(f"{own}:Counts", "b")
    first = sampler_for(f"{own}:Kept", "b")
    assert sampler_for(f"{own}:Kept", "b") is first and sampler_for(None, "b") is None
    second = sampler_for(f"{own}:Kept", "other base")
    assert second is not first and list(request._REUSED.values()) == [second]


def test_a_package_that_is_missing_is_said_before_anything_is_trained(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    file = tmp_path / "mine.yaml"
    file.write_text("suite: minis\ntogether: {two: [text, image]}\nparadigms: [mixed]\nsteps: 2\nseeds: [0]\n"
                    "run: {store: kept, sampler: {vllm: {max_model_len: 64}}}\n")
    assert main(["train", "mine.yaml", "mixed"]) == 2
    assert "sampling with vLLM needs the package vllm: pip install copd_nb[vllm]" in capsys.readouterr().err
    assert not list((tmp_path / "kept").glob("mixed*"))


def test_a_card_and_a_sampler_have_the_machine_for_themselves(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 8)
    job = Job(mixed_rlvr(PAIR, 1), Config(**SMALL))
    assert workers._processes(None, [job]) == 8 == workers._processes(None) and workers._processes(3, [job]) == 3
    assert workers._processes(None, [job, Job(job.schedule, job.config, sampler="vllm")]) == 1
    monkeypatch.setattr(workers, "accelerator_for",
                        lambda config: SimpleNamespace(device=SimpleNamespace(type="cuda")))
    assert workers._processes(None, [job]) == 1 and workers._processes(2, [job]) == 2
    assert workers._processes("ray", [job]) is None


def test_processes_are_as_many_as_have_room(tmp_path, monkeypatch):
    exp = experiment(tmp_path, workers=None)
    peak, free = plan_for(exp).rows.GiB.max() + loading.BESIDE, []
    monkeypatch.setattr(loading, "cores", lambda: 8)
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=free[-1] * 2 ** 30))
    for times, wanted in ((0.5, 1), (1.5, 1), (3.5, 3), (100, 8)):
        free.append(times * peak)
        assert loading.workers_of(exp) == wanted == next(iter(exp.studies().values()))[0].workers
    assert [loading.workers_of(experiment(tmp_path, **run)) for run in (
        dict(workers=20), dict(cluster="ray"), dict(workers=None, sampler="vllm"))] == [20, "ray", None]


def test_evaluations_take_a_sampler():
    policy, suite, seen = tiny_policy(hidden=16, layers=1), minis(PAIR), []
    def watched(*args):
        seen.append(len(args[1]))
        return sample_many(*args)
    own, other = (evaluate(policy, suite, 3, 2, 4, **more) for more in ({}, dict(sampler=watched)))
    pd.testing.assert_frame_equal(own, other)
    heated = [evaluate_at(policy, suite, (0.5, 1), 3, 2, 4, **more) for more in ({}, dict(sampler=watched))]
    pd.testing.assert_frame_equal(*heated, check_exact=False, atol=1e-5)  # prompts are read once, or for each heat
    assert seen == [2, 2, 2]
