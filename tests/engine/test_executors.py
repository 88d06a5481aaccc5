"Executors: branches apart train as they do together; lost workers are replaced; a run without room is refused."
import copy
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from same_runs import PAIR, TINY, same, small_base, small_suite
from transformers.utils import chat_template_utils

from copd_nb.engine import step as step_module
from copd_nb.engine import training as train_module
from copd_nb.scale import cluster as cluster_module
from copd_nb.schedule.paradigms import expert, mixed_rlvr, mopd, static_opd
from copd_nb.schedule.control import capability_progress, gradient_share
from copd_nb.schedule.neighbours import codistill_grpo, reward_and_teacher
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.live import follow
from copd_nb.engine.executors import Cluster, cluster_from, missing
from copd_nb.engine.training import train
from copd_nb.policy.core import weights_hash
from copd_nb.policy.lora_branches import lora
from copd_nb.engine.runs import request_stop
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, Merge, Phase, Update

ray = pytest.importorskip("ray")
from ray import cloudpickle  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
COPD = copd(PAIR, cycles=2, s_rl=1, s_opd=1, beta=0.5)


@pytest.fixture(scope="module")
def start(): return small_base()


@pytest.fixture(scope="module")
def suite(): return small_suite()


class Handle:
    "A pickled value; it arrives opened as an argument, and stays closed inside lists and dictionaries."
    def __init__(self, data): self.data = data


class Apart:
    "An executor whose branches share this process and nothing else: whatever goes from one to another is pickled."
    parallel = True

    def __init__(self, cluster, make, shared, own):
        self.cluster, self.shard_bytes, self.sent = cluster, cluster.shard_bytes, []
        self.states = {n: make(*self.copied((*shared, *more)), place=(0, 1, None), executor=self) for n,
                       more in own.items()}

    def copied(self, values): return cloudpickle.loads(cloudpickle.dumps(tuple(map(self.get, values))))

    def at(self, name, work, *args, parts=None):
        found = work(self.states[name], *self.copied(args))
        handles = [Handle(cloudpickle.dumps(x)) for x in (found if parts is not None else [found])]
        self.sent += [(work.__name__, len(h.data)) for h in handles]
        return handles if parts is not None else handles[0]

    defer = at

    def fence(self, handle): pass

    def get(self, handle): return cloudpickle.loads(handle.data) if isinstance(handle, Handle) else handle

    def close(self): pass


@pytest.fixture
def apart(monkeypatch):
    "Branches that share nothing, without Ray."
    made = []

    def executor(*args):
        made.append(Apart(*args))
        return made[-1]
    monkeypatch.setattr(cluster_module, "RayExecutor", executor)
    return made


FROZEN = Schedule("frozen", {"student": "base", "teacher": "base"},
                  [Phase("OPD", 2,
                         [Update("student", [RL("text"), OPD("text", "teacher", 0.5, "reverse"),
                                             OPD("image", "base", 0.5, "topk")])])], "student")
BORROWED = Schedule("borrowed", {"student": "base", "frozen": "base", "live": "base"},
                    [Phase("first", 1, [Update("frozen", [RL("text")])]),
                     Phase("OPD", 2, [Update("student", [OPD("text", "frozen", 0.5, rollouts="teacher"),
                                                         OPD("image", "base", 0.5, "topk", rollouts="live"),
                                                         OPD("image", "frozen", 0.5, "reverse", rollouts="base")]),
                                      Update("live", [RL("image")])])], "student")
SCHEDULES = {
    "CoPD, topk, TIES": replace(copd(PAIR, cycles=1, s_rl=1, s_opd=2, beta=0.5, estimator="topk"),
                                result=Merge(tuple(PAIR), "ties", density=0.5)),
    "one expert teaches the other": static_opd("text", "image", 1, 2),
    "the base and a frozen branch teach": FROZEN,
    "completions of the base, of a frozen branch and of a live one": BORROWED,
    "completions that are lent": codistill_grpo(PAIR, 2),
    "a reward beside a teacher, gated": reward_and_teacher(PAIR, 1, 2, gate="verified", residual="centred"),
}
MORE = {
    "a control": copd(PAIR, cycles=2, s_rl=1, s_opd=1, control=gradient_share(0.3)),
    "a student of experts": mopd(PAIR, 1, 2),
    "reverse KL, DARE": replace(copd(PAIR, cycles=1, s_rl=1, s_opd=2, beta=0.5, estimator="reverse"),
                                result=Merge(tuple(PAIR), "dare", density=0.5)),
    "SLERP": replace(COPD, result=Merge(tuple(PAIR), "slerp")),
    "student hub": copd(PAIR, cycles=1, s_rl=1, s_opd=1, topology="student"),
    "mixed RLVR": mixed_rlvr(PAIR, 2),
    "one expert": expert("text", 2),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [*SCHEDULES, *(pytest.param(n, marks=SLOW) for n in MORE)])
def test_branches_apart_give_what_they_give_together(name, suite, start, tmp_path, apart):
    "Every paradigm, bit for bit, with weights in pieces of 200 KB; only pickled values go from branch to branch."
    config = replace(TINY, optimizer_state="reset") if name == "a control" else TINY
    here = train((SCHEDULES | MORE)[name], suite, start, config, tmp_path / "here", progress=False)
    same(here, train((SCHEDULES | MORE)[name], suite, start, config, tmp_path / "apart", progress=False,
                     cluster=Cluster(shard_bytes=200_000)))
    assert apart and apart[0].sent


@pytest.mark.parametrize("changes", [dict(updates="sequential", shared_prompt=False),
                                     pytest.param(dict(epochs=2, pack=False, optimizer_state="separate"), marks=SLOW),
                                     pytest.param(dict(micro_prompts=2, micro_tokens=40, rollout_rows=8), marks=SLOW)],
                         ids=lambda c: ", ".join(f"{k}={v}" for k, v in c.items()))
def test_every_way_of_computing_is_the_same_apart(changes, suite, start, tmp_path, apart):
    "Options of the engine."
    schedule = copd(PAIR, cycles=1, s_rl=1, s_opd=2, beta=0.5, estimator="reverse" if "epochs" in changes else "topk")
    config = replace(TINY, eval_every=0, probe_every=0, **changes)
    same(*(train(schedule, suite, start, config, tmp_path / f"{cluster is None}", progress=False, cluster=cluster)
           for cluster in (None, "ray")))


def test_the_date_of_a_run_goes_where_its_branches_go(suite, start, tmp_path, apart, monkeypatch):
    "Templates show the day on which the run began, in every branch, though the next one has come."
    class Clock(datetime):
        today = datetime(2026, 5, 1)

        @classmethod
        def now(cls, tz=None): return cls.today
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    keep = train_module.keep_prompts

    def night(training):
        keep(training)
        Clock.today = datetime(2026, 5, 2)
    monkeypatch.setattr(train_module, "keep_prompts", night)
    runs = []
    for cluster in (None, Cluster(shard_bytes=200_000)):
        Clock.today = datetime(2026, 5, 1)
        shown = start.clone("base")
        shown.processor = copy.deepcopy(start.processor)
        shown.processor.chat_template = "{{ strftime_now('%d') }}" + start.processor.chat_template
        runs.append(train(COPD, suite, shown, TINY, tmp_path / f"{cluster is None}", progress=False, cluster=cluster))
    same(*runs)
    assert [run.date for run in runs] == [datetime(2026, 5, 1)] * 2
    assert runs[0].manifest["prompts"] == runs[1].manifest["prompts"]


def test_followers_averages_and_rates_apart(suite, start, tmp_path, apart):
    "Teachers that follow a branch live where it does; all hear of a control that moves steps, so rates are the same."
    control = capability_progress(power=20.0, floor=0.25)
    schedule = follow(copd(PAIR, cycles=2, s_rl=4, s_opd=1, beta=0.5, control=control), every=2)
    config = replace(TINY, rate="linear", average=0.5, checkpoint_every=1)
    runs = [train(schedule, suite, start, config, tmp_path / f"{cluster is None}", progress=False, cluster=cluster)
            for cluster in (None, Cluster(shard_bytes=200_000))]
    same(*runs)
    assert runs[0].schedule.steps_of("text") != schedule.steps_of("text")
    for name in ("result", *PAIR): assert len({weights_hash(run.average(name)) for run in runs}) == 1


@SLOW
def test_adapters_apart(suite, start, tmp_path, apart):
    "LoRA branches: adapters travel, and merge to the same adapter."
    small = lora(start.clone("base"), 2)
    same(*(train(COPD, suite, small, TINY, tmp_path / f"{cluster is None}", progress=False, cluster=cluster)
           for cluster in (None, "ray")))


@pytest.mark.slow
def test_given_policies_apart(suite, start, tmp_path, apart):
    "A branch that begins from a policy of its own is sent that policy."
    moved = start.clone("moved")
    with torch.no_grad(): next(iter(moved.parameters())).add_(0.01)
    same(*(train(FROZEN, suite, start, TINY, tmp_path / f"{cluster is None}", progress=False,
                 starts=dict(teacher=moved), cluster=cluster) for cluster in (None, "ray")))


@pytest.mark.slow
def test_an_expert_is_trained_once_for_both(suite, start, tmp_path, apart):
    "Experts in the store are the same, whoever has trained them."
    schedule = mopd(PAIR, 2, 1)
    first = train(schedule, suite, start, TINY, tmp_path / "here", tmp_path / "experts", progress=False)
    trained = len([s for s, _ in apart[0].sent if s == "update"]) if apart else 0
    second = train(schedule, suite, start, TINY, tmp_path / "apart", tmp_path / "experts", progress=False,
                   cluster="ray")
    same(first, second)
    assert trained == 0 and [s for s,
                             _ in apart[0].sent].count("update") == 1  # the student's step; experts came from the store


def test_only_completions_and_few_numbers_travel(suite, start, tmp_path, apart):
    "A question is four bytes a token, the reply one or k + 1 numbers a token; no prompt, no picture, no logits."
    for estimator, numbers in (("sampled", 1), ("topk", TINY.opd_top_k + 2)):
        schedule = copd(PAIR, cycles=1, s_rl=1, s_opd=1, beta=0.5, estimator=estimator)
        train(schedule, suite, start, replace(TINY, probe_every=0, eval_every=0, opd_prompts=64), tmp_path / estimator,
              progress=False, cluster="ray")
        sizes = {}
        for work, size in apart[-1].sent: sizes.setdefault(work, []).append(size)
        tokens = 64 * TINY.group_size * TINY.max_new_tokens
        kept = 4 * TINY.opd_top_k if estimator == "topk" else 0
        assert max(sizes["rollouts"]) < (4 + kept) * tokens + 2_000
        assert max(sizes["teacher_scores"]) < 4 * numbers * tokens + 2_000


def test_a_run_goes_on_in_another_crew(suite, start, tmp_path, apart):
    "Stopped here, resumed apart, stopped again, resumed here: as if it had never been interrupted."
    whole = train(COPD, suite, start, TINY, tmp_path / "whole", progress=False)
    for number, cluster in enumerate([None, "ray", None]):
        real, left = step_module.train_step, iter([True, number == 2, number == 2, number == 2])
        def step(training, phase, n):
            if not next(left, True): request_stop(training.run.path)
            return real(training, phase, n)
        step_module.train_step = step
        try: run = train(COPD, suite, start, TINY, tmp_path / "parts", progress=False, cluster=cluster)
        finally: step_module.train_step = real
    assert run.finished
    same(whole, run)


def test_what_a_user_writes_becomes_a_cluster():
    "Forms that are allowed, and what is said of others."
    assert cluster_from("ray") == Cluster() and cluster_from(dict(gpus=1)).gpus == 1
    assert cluster_from("ray://head:10001").address == "ray://head:10001"
    for wrong, told in (("slurm", "host:port"), (dict(gpu=1), "unknown cluster fields"), (3, "host:port")):
        with pytest.raises(ValueError, match=told): cluster_from(wrong)
    for field, value, told in (("cpus", 0, "positive"), ("gpus", -1, "0 or more"),
                               ("strategy", "pack", "STRICT_SPREAD"),
                               ("special", dict(text=dict(threads=2)), "cpus, gpus and ranks")):
        with pytest.raises(ValueError, match=told): Cluster(**{field: value})


def test_what_is_missing_is_said():
    "The sentence names every resource that is short, or the node that would be needed."
    pair = [dict(CPU=2, GPU=1)] * 2
    assert "2 GPU are needed, the cluster has 1, 0 of them free" in missing(pair, dict(CPU=8, GPU=1), dict(CPU=8), [])
    assert "no node has 2 CPU and 1 GPU" in missing(pair, dict(CPU=8, GPU=2), dict(CPU=8, GPU=2), [dict(CPU=8),
                                                                                                   dict(GPU=2)])
    assert "too small" in missing(pair, dict(CPU=8, GPU=2), dict(CPU=8, GPU=2), [dict(CPU=8, GPU=2)])
