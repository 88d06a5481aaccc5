"One step: the calls to the loss, lazy handles, one graph at a time, estimators of one's own."
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

import copd_nb
from copd_nb.engine import update as update_module
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import Config
from copd_nb.engine.executors import LocalExecutor, stopwatch
from copd_nb.engine.runs import Run
from copd_nb.engine.state import Training
from copd_nb.engine.step import train_step
from copd_nb.engine.training import train
from copd_nb.policy.core import Policy
from copd_nb.policy.toys import minis, tiny_policy
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule
from copd_nb.signals import estimators as estimators_module
from copd_nb.signals.estimators import Sampled, WholeVocabulary

SMALL = dict(hidden=32, layers=2, vision_hidden=16, vision_depth=2)
TINY = Config(prompts=2, opd_prompts=2, group_size=4, max_new_tokens=4, probe_every=0, eval_every=0,
              learning_rate=1e-3, warmup=1, device="cpu")
PAIR = ["text", "image"]
COPD = copd(PAIR, cycles=1, s_rl=1, s_opd=1, beta=0.5)


def cubes(completions, examples): return [(sum(map(ord, c)) % 7) / 7 for c in completions]


@pytest.fixture(scope="module")
def suite(): return {name: replace(c, reward=cubes) for name, c in minis(tuple(PAIR)).items()}


@pytest.fixture(scope="module")
def base(): return tiny_policy(**SMALL)


def begin(schedule, suite, base, config, folder) -> Training:
    "A training that has not made a step."
    (folder / "events.jsonl").touch()
    run = Run.__new__(Run)
    run.path = folder
    return Training(schedule, suite, base.clone("base"), config, accelerator_for(config), run)


class Reached(Exception): pass


def calls_to(monkeypatch, module, schedule, suite, base, folder) -> list[str]:
    "Functions of the package between `train_step` and the formula of the loss, as it is imported by a module."
    found, home = [], str(Path(copd_nb.__file__).parent)

    def formula(*args, **options):
        frame = sys._getframe(1)
        while frame.f_code.co_name != "train_step":
            if frame.f_code.co_filename.startswith(home): found.insert(0, frame.f_code.co_name)
            frame = frame.f_back
        raise Reached
    with monkeypatch.context() as patch:
        patch.setattr(module, "clipped_surrogate", formula)
        with pytest.raises(Reached):
            train_step(begin(schedule, suite, base, replace(TINY, skip_flat=False), folder), schedule.phases[-1], 0)
    return [*found, "clipped_surrogate"]


def test_seven_calls_lead_to_the_formula_of_the_loss(monkeypatch, suite, base, tmp_path):
    "Of GRPO, and of the paper's OPD: executor, stage, learner, stream, rows, objective, formula."
    path = ["get", "gradients", "gradients", "stream_gradient", "_backward", "loss", "clipped_surrogate"]
    assert calls_to(monkeypatch, update_module, COPD, suite, base, tmp_path) == path
    only_opd = copd(PAIR, cycles=1, s_rl=1, s_opd=1)
    signals = [replace(u, signals=u.opd) for u in only_opd.phases[-1].updates]
    only_opd = replace(only_opd, phases=(replace(only_opd.phases[-1], updates=tuple(signals)),))
    assert calls_to(monkeypatch, estimators_module, only_opd, suite, base, tmp_path) == path


def test_stages_of_a_branch_are_done_before_the_next_branch_begins(suite, base, tmp_path):
    "Nobody moves before everybody has gradients; sequential branches move one after the other."
    def order(updates):
        training = begin(COPD, suite, base, replace(TINY, updates=updates), tmp_path)
        with stopwatch() as notes: train_step(training, COPD.phases[1], 0)
        return [name for name, _, _ in notes]
    stages = ["rollouts", "teacher scores", "gradients"]
    assert order("simultaneous") == stages * 2 + ["update"] * 2
    assert order("sequential") == [*stages, "update"] * 2


def test_one_graph_at_a_time(suite, base, tmp_path, monkeypatch):
    "When a branch samples, the prefill of the branch before it is gone; after the step no branch holds any."
    alive, seen, real = [], [], Policy.prefill

    def prefill(self, prompts):
        found = real(self, prompts)
        if found.hidden.requires_grad and not any(ref() is found for ref in alive): alive.append(weakref.ref(found))
        seen.append(sum(ref() is not None for ref in alive))
        return found
    monkeypatch.setattr(Policy, "prefill", prefill)
    training = begin(COPD, suite, base, TINY, tmp_path)
    train_step(training, COPD.phases[1], 0)
    assert len(alive) >= 2 and max(seen) <= 2  # one for each stream of a branch
    assert all(branch.step is None for branch in training.branches.values()) and not any(ref() for ref in alive)


def test_deferred_work_is_done_once_and_lets_go_of_its_arguments():
    calls, executor = [], LocalExecutor(None)
    def work(state, *args):
        calls.append(args)
        return [len(calls), "second"]
    first, second = executor.defer("a", work, 1, parts=2)
    other = executor.defer("a", work, first)
    assert calls == [] and executor.get(second) == "second" and calls == [(1,)]
    assert executor.get(other) == [2, "second"] and calls == [(1,), (1,)] and other.args is None
    executor.fence(other)
    assert len(calls) == 2


def test_an_update_without_gradients_is_refused(suite, base, tmp_path):
    from copd_nb.engine.step import update
    training = begin(COPD, suite, base, TINY, tmp_path)
    with pytest.raises(RuntimeError, match="no gradients for branch 'text'.*worker lost"): update(training, "text", {},
                                                                                                  1.0)


class Bounded(Sampled):
    "The sampled estimator with a bound on every advantage."
    def advantages(self, teacher_logp, old_logp, beta, config):
        return super().advantages(teacher_logp, old_logp, beta, config).clamp(-0.1, 0.1)


def same_as_reverse(log_s, log_t): return (log_s.exp() * (log_s - log_t)).sum(-1)


bounded, plain = Bounded(), WholeVocabulary(same_as_reverse)


def rows_of(estimator, suite, base, folder):
    schedule = copd(PAIR, cycles=1, s_rl=1, s_opd=1, beta=0.5, estimator=estimator)
    return train(schedule, suite, base, TINY, folder, progress=False).events.drop(columns="seconds")


def test_an_estimator_of_ones_own_by_object_and_by_name(suite, base, tmp_path):
    by_object = rows_of(bounded, suite, base, tmp_path / "object")
    by_name = rows_of(f"{__name__}:bounded", suite, base, tmp_path / "name")
    assert by_object.equals(by_name)
    assert Run(tmp_path / "object").schedule.phases[1].updates[0].opd[0].estimator == f"{__name__}:bounded"
    own, built_in = (rows_of(e, suite, base, tmp_path / n) for n, e in (("own", plain), ("built in", "reverse")))
    opd = own.stream.str.startswith("opd", na=False)
    assert (own.loss - built_in.loss)[opd].abs().max() < 1e-4 and own.flops.equals(built_in.flops)


def test_an_estimator_that_has_no_name_is_refused_before_the_run(suite, base, tmp_path):
    schedule = copd(PAIR, cycles=1, s_rl=1, s_opd=1, estimator=Bounded())
    assert isinstance(schedule, Schedule) and schedule.validate()
    with pytest.raises(ValueError, match="estimator .* has no name to be written by"):
        train(schedule, suite, base, TINY, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="no module nowhere"):
        train(copd(PAIR, estimator="nowhere:x"), suite, base, TINY, tmp_path / "run", progress=False)
    with pytest.raises(TypeError, match="'json:dumps' is a function without teacher"):
        train(copd(PAIR, estimator="json:dumps"), suite, base, TINY, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_old_name_of_the_penalty_gives_the_same_run(suite, base, tmp_path):
    old, new = (rows_of(e, suite, base, tmp_path / e) for e in ("unlikely", "low_probability"))
    assert old.equals(new) and (new.scored.fillna(0) == 0).all() and new.loss.abs().max() < 10


def test_a_learner_of_version_0_1_is_used_and_told_the_new_names(suite, base, tmp_path):
    calls = []
    with pytest.warns(FutureWarning, match="OldLearner: the method (weigh|move) is called"):
        class OldLearner(update_module.Learner):
            def weigh(self, *args):
                calls.append("weigh")
                return super().weigh(*args)

            def move(self, *args):
                calls.append("move")
                return super().move(*args)
    train(COPD, suite, base, TINY, tmp_path / "run", progress=False, learner=OldLearner())
    assert calls == ["weigh", "weigh", "move", "move"] * 2  # both branches in both phases, nobody moves first
