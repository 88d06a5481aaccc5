"All axes in one run: syncs, completions of others, reward beside a teacher, followers, falling rates, live signals."
from dataclasses import replace

import pytest
from same_runs import PAIR, TINY, same, small_base, small_suite
from test_executors import Apart

from copd_nb.engine import phase as phase_module
from copd_nb.engine.executors import Cluster
from copd_nb.engine.runs import AVERAGE
from copd_nb.engine.training import train
from copd_nb.policy.lora_branches import lora
from copd_nb.scale import cluster as cluster_module
from copd_nb.schedule.core import Schedule, Sync
from copd_nb.schedule.live import Average, Snapshot
from copd_nb.schedule.parts import OPD, RL, Merge, Phase, Update

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT, IMAGE = PAIR
CONFIG = replace(TINY, average=0.5, rate="cosine", signals_every=2, probe_every=2, checkpoint_every=1)
ROUND = [Phase("alone", 1, [Update(TEXT, [RL(TEXT)]), Update(IMAGE, [RL(IMAGE)])]),
         Phase("together", 2, [Update(TEXT, [RL(TEXT, Snapshot(IMAGE, 2), 0.3, "centred"),
                                             OPD(IMAGE, Average(IMAGE, 0.5))]),
                               Update(IMAGE, [RL(IMAGE), OPD(TEXT, TEXT, 0.5, rollouts=TEXT)])])]
ALL = Schedule("axes", PAIR, [*[replace(p, cycle=1) for p in ROUND],
                              Sync(PAIR, outer_lr=0.7, outer_momentum=0.5, cycle=1),
                              *[replace(p, cycle=2) for p in ROUND]], Merge(PAIR))
READ = [OPD(TEXT, TEXT, rollouts=TEXT), OPD(IMAGE, "base", 0.2)]
AGAIN = [OPD(TEXT, IMAGE, rollouts=TEXT), OPD(IMAGE, IMAGE, rollouts="base")]
WRITTEN = [*ROUND, Sync(PAIR), Phase("read", 2, [Update("student", READ)]), Sync([TEXT, "student"], moments="keep"),
           Phase("again", 2, [Update("student", AGAIN)])]
KEPT = Schedule("kept", {TEXT: "base", IMAGE: "base", "student": Merge(PAIR)}, WRITTEN, "student")
CASES = dict(all=(ALL, CONFIG), kept=(KEPT, CONFIG), adapters=(ALL, CONFIG))


@pytest.fixture(scope="module")
def suite(): return small_suite()


@pytest.fixture(scope="module")
def start(): return small_base()


def go(name, suite, start, out, **how):
    schedule, config = CASES[name]
    base = lora(start.clone("base"), 2) if name == "adapters" else start
    return train(schedule, suite, base, config, out, progress=False, **how)


class Killed(BaseException): "A process that ends."


NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("kept", "adapters"))) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_killed_after_each_step_is_the_run_that_was_not(name, suite, start, tmp_path, monkeypatch):
    whole, real = go(name, suite, start, tmp_path / "whole"), phase_module.train_step
    for _ in range(40):
        count = iter(range(1))

        def once(*args, count=count, **how):
            if next(count, None) is None: raise Killed
            return real(*args, **how)
        with monkeypatch.context() as patch:
            patch.setattr(phase_module, "train_step", once)
            try: run = go(name, suite, start, tmp_path / "parts")
            except Killed: continue
        break
    assert run.finished
    same(whole, run)
    kinds = set(whole.events.kind)
    assert {"train", "sync", "signal", "probe", "eval"} <= kinds
    assert f"result{AVERAGE}" in set(whole.events.query("kind == 'eval'").model)


@pytest.mark.parametrize("name", NAMES)
def test_branches_apart_do_as_they_do_together(name, suite, start, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster_module, "RayExecutor", Apart)
    same(go(name, suite, start, tmp_path / "here"), go(name, suite, start, tmp_path / "apart", cluster=Cluster()))


def test_a_branch_that_a_sync_has_changed_rolls_out_anew(suite, start, tmp_path, monkeypatch):
    "Kept completions belong to the weights that made them."
    from copd_nb.engine import whose
    asked, real = [], whose.roll

    def noted(training, learner, signal, roller, address, picks=None):
        asked.append((roller, whose.age_of(training, roller)))
        return real(training, learner, signal, roller, address, picks)
    monkeypatch.setattr(whose, "roll", noted)
    go("kept", suite, start, tmp_path / "run")
    ages = sorted({age for roller, age in asked if roller == TEXT})
    assert ages[-2:] == [4, 5]  # three steps and a sync; then another sync


def test_the_schedule_survives_json_words_and_drawing():
    for schedule in (ALL, KEPT):
        assert Schedule.from_dict(schedule.validate().to_dict()) == schedule
        assert "copied every 2 steps" in schedule.describe() and "<svg" in schedule.svg()


@pytest.mark.parametrize("signal, message", [
    (RL(TEXT, Average(IMAGE), gate="verified"), "a gate asks how often the teacher itself succeeds"),
    (OPD(TEXT, Snapshot(IMAGE, 2), rollouts="teacher"), "'image@every=2' only scores completions; take .*='image'"),
    (RL(TEXT, rollouts="image@every=2"), "'image@every=2' only scores completions"),
    (RL(TEXT, "vidoe@every=2"), "unknown teacher 'vidoe@every=2'")])
def test_followers_score_and_nothing_else(signal, message):
    phases = [Phase("p", 2, [Update(TEXT, [signal]), Update(IMAGE, [RL(IMAGE)])])]
    with pytest.raises(ValueError, match=message): Schedule("s", PAIR, phases, TEXT).validate()
