"Rates over a whole training, teachers that follow a branch, and moving averages of weights."
import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from same_runs import PAIR, TINY, same, small_base, small_suite

from copd_nb.engine import phase as phase_module
from copd_nb.engine import step as step_module
from copd_nb.engine import streams as streams_module
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import CORRECTION, Config
from copd_nb.engine.experts import expert_key
from copd_nb.engine.manifest import NO_CONTENT, manifest_of
from copd_nb.engine.state import Training
from copd_nb.engine.step import train_step
from copd_nb.engine.training import train
from copd_nb.policy.core import weights_hash
from copd_nb.policy.lora_branches import lora
from copd_nb.schedule.control import divergence_band
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.live import Average, Snapshot, follow
from copd_nb.schedule.merging import merge
from copd_nb.schedule.paradigms import expert, merged_experts, static_opd
from copd_nb.schedule.parts import OPD, RL, Merge, Phase, Update
from copd_nb.study.grid import SCALES, Study, job_plan
from copd_nb.study.jobs import do, run_of, scores_of
from copd_nb.study.memory import memory_plan
from copd_nb.engine.state import model_shape

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = ("rate", "rate_floor", "average", "optimizer", "signals_every", "graphs", *CORRECTION)


@pytest.fixture(scope="module")
def start(): return small_base()


@pytest.fixture(scope="module")
def suite(): return small_suite()


def rates(run, branch: str) -> list[float]:
    "The learning rate of each update of a branch, from the log."
    rows = run.events[(run.events.kind == "train") & (run.events.branch == branch)]
    return rows.groupby("global_step", sort=True).learning_rate.first().tolist()


def began(schedule, suite, start, **changes) -> Training:
    "A training without a run folder."
    config = replace(TINY, learning_rate=1e-3, **changes)
    return Training(schedule, suite, start, config, accelerator_for(config), run=None)


def vector(policy) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in policy.parameters()])


# rates

@pytest.mark.parametrize("changes, wanted", [
    (dict(), [0.5, 1, 1, 1]), (dict(rate="linear"), [0.5, 0.75, 0.5, 0.25]),
    (dict(rate="linear", rate_floor=0.2), [0.5, 0.8, 0.6, 0.4]),
    (dict(rate="cosine"), [0.5, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])])
def test_rates_by_hand(changes, wanted, suite, start, tmp_path):
    config = replace(TINY, probe_every=0, eval_every=0, **changes)
    run = train(expert("text", 4), suite, start, config, tmp_path / "run", progress=False)
    assert rates(run, "text") == pytest.approx([1e-4 * x for x in wanted], rel=1e-12)


def test_steps_are_counted_over_all_phases_of_a_branch(suite, start, tmp_path):
    "Phases of unequal length, a factor of one of them, epochs, and a branch that begins where another one ended."
    config = replace(TINY, probe_every=0, eval_every=0, warmup=1, rate="linear", epochs=2)
    text, image = Update("text", [RL("text")]), Update("image", [RL("image")])
    phases = [Phase("a", 1, [text]), Phase("b", 1, [text, image], lr=0.5), Phase("c", 2, [text, image])]
    run = train(Schedule("three", {"text": "base", "image": "text"}, phases, "image"), suite, start, config,
                tmp_path / "run", progress=False)
    latest = [1e-4 * (1 - u / 8) for u in (1, 3, 5, 7)]  # the rate of the second epoch is the one that is logged
    assert rates(run, "text") == pytest.approx([latest[0], latest[1] / 2, *latest[2:]], rel=1e-12)
    assert rates(run, "image") == pytest.approx([1e-4 * x for x in (5 / 6 / 2, 3 / 6, 1 / 6)], rel=1e-12)


def test_a_control_that_moves_steps_moves_the_rates(suite, start, tmp_path):
    "Fewer steps without a teacher, more with one: the rate is that of the schedule as it is now."
    schedule = copd(PAIR, cycles=3, s_rl=2, s_opd=1, beta=0.5, control=divergence_band(0.0, 1e-6, step=1))
    config = replace(TINY, probe_every=1, eval_every=0, warmup=1, rate="linear")
    run = train(schedule, suite, start, config, tmp_path / "run", progress=False)
    total = run.schedule.steps_of("text")
    assert rates(run, "text")[-1] == pytest.approx(1e-4 / total, rel=1e-12)


@pytest.mark.parametrize("values, told", [
    (dict(rate="step"), "rate='step': one of constant, linear, cosine"),
    (dict(rate="linear", rate_floor=1.0), "rate_floor=1.0: must be 0 or more and less than 1"),
    (dict(rate="linear", rate_floor=-0.1), "rate_floor=-0.1: must be 0 or more and less than 1"),
    (dict(rate_floor=0.1), "rate_floor=0.1: only a rate that falls has a floor"),
    (dict(average=1.0), "average=1.0: must be 0 or more and less than 1"), (dict(average="0.9"), "average")])
def test_settings_that_can_not_be_meant(values, told):
    with pytest.raises(ValueError, match=told): Config(**values)


def test_runs_without_the_new_fields_are_the_same_runs(suite, start):
    "Their defaults are no part of a content hash; other values are."
    def made(**changes):
        return manifest_of(expert("text", 2), suite, start, replace(TINY, **changes), {})["content_hash"]
    content = TINY.content(NO_CONTENT)
    assert content.keys() == asdict(TINY).keys() - {*NO_CONTENT, *NEW}
    assert len({made(), made(rate="linear"), made(rate="cosine"), made(average=0.9)}) == 4
    assert made() == made(rate="constant", rate_floor=0.0, average=0.0)


# experts

def test_a_shorter_expert_is_a_beginning_only_where_the_rate_is_constant(suite, start, tmp_path):
    def key(steps, **changes):
        training = began(expert("text", steps), suite, start, eval_every=0, **changes)
        training.run = type("Run", (), dict(manifest={}))()
        return expert_key(training, training.schedule.phases[0])
    assert key(2) == key(4) and key(2, rate="linear") != key(4, rate="linear") == key(4, rate="linear")
    assert len({key(2), key(2, average=0.5), key(2, rate="linear")}) == 3


ONWARD = Schedule("onward", ["text"], [Phase("expert text", 4, [Update("text", [RL("text")])]),
                                       Phase("more", 2, [Update("text", [RL("text"), RL("image")])])], "text")


@pytest.mark.parametrize("rate", [pytest.param("constant", marks=pytest.mark.slow), "linear"])
def test_experts_from_a_store_are_those_of_the_run(rate, suite, start, tmp_path):
    "Two steps, then four, of one expert; two experts that are merged; one that goes on learning."
    config = replace(TINY, rate=rate, average=0.5, eval_every=0, probe_every=2, warmup=1)
    schedules = expert("text", 2), expert("text", 4), merged_experts(PAIR, 4), ONWARD
    def made(where, number, store):
        return train(schedules[number], suite, start, config, tmp_path / f"{where}{number}", store, progress=False)
    for number in range(len(schedules)): same(made("stored", number, tmp_path / "store"), made("alone", number, None))
    lengths = [sorted(int(p.name) for p in key.glob("[0-9]*")) for key in (tmp_path / "store").iterdir()]
    assert sorted(lengths) == ([[2, 4], [4]] if rate == "constant" else [[2], [4], [4], [4]])


@pytest.mark.parametrize("rate", ["constant", "cosine"])
def test_jobs_wait_for_the_experts_that_they_share(rate, suite, start):
    "With a rate that falls, an expert of another length has its own chain, and one that goes on is no job of its own."
    study = Study((suite, start), replace(SCALES["smoke"], config=replace(TINY, rate=rate)))
    jobs = study.jobs(dict(short=merged_experts(PAIR, 2), long=merged_experts(PAIR, 4), onward=ONWARD))
    plan, own = job_plan(jobs.values()), list(jobs.values())
    waits = [len(next(needs for job, needs in plan if job is mine)) for mine in own]
    between = [len(needs) for job, needs in plan if job not in own]
    constant = rate == "constant"
    assert waits == [2, 2, constant]
    assert sorted(between) == ([0, 0, 1, 1] if constant else [0, 0, 0, 0])


# teachers that follow a branch

def test_names_and_json():
    schedule = follow(copd(PAIR, cycles=1, s_rl=1, s_opd=1), every=3).validate(PAIR)
    data = json.loads(json.dumps(schedule.to_dict()))
    again = Schedule.from_dict(data).validate(PAIR)
    assert again == schedule and again.content_hash() == schedule.content_hash()
    assert schedule.followers() == ("image@every=3", "text@every=3") and schedule.followers("text") == ("text@every=3",)
    assert data["phases"][1]["updates"][0]["signals"][1]["teacher"] == "image@every=3"
    assert OPD("text", Average("image", 0.5)) == OPD("text", "image@decay=0.5")
    assert "teacher image (copied every 3 steps) on" in schedule.describe() and "stroke-dasharray" in schedule.svg()
    assert Average("a", 1e-5).name == "a@decay=1e-05" and Average("a", "0.5") == Average("a", 0.5)


@pytest.mark.parametrize("teacher, told", [
    ("image@every=0", "every must be an integer ≥ 1, not '0'"), ("image@every=two", "not 'two'"),
    ("image@decay=1.0", "decay must be at least 0 and less than 1"), ("image@decay=nan", "decay must be"),
    ("image@late=3", "allowed: image@every=10 for a copy every 10 steps, image@decay=0.99"),
    ("image@every=03", "is to be written 'image@every=3'"), ("base@every=3", "the base, which is frozen"),
    ("quiet@every=3", "branch 'quiet', which never learns; allowed: teacher='quiet'"),
    ("imag@every=3", "unknown teacher 'imag@every=3'"), (Snapshot("image", 0), "integer ≥ 1"),
    (Average("image", 1), "less than 1"), ("text", "cannot teach itself")])
def test_followers_that_can_not_be(teacher, told):
    updates = [Update("text", [RL("text"), OPD("image", teacher)]), Update("image", [RL("image")])]
    schedule = Schedule("odd", ["text", "image", "quiet"], [Phase("a", 2, updates)], "text")
    with pytest.raises(ValueError, match=told): schedule.validate(PAIR)


def test_follow_takes_one_kind():
    with pytest.raises(ValueError, match="either every"): follow(copd(PAIR), every=2, decay=0.5)
    assert follow(static_opd("text", "image", 1, 1), every=2).phases[-1].updates[0].teachers == ("text@every=2",)


FOLLOWED = Schedule("followed", ["text", "image"], [
    Phase("alone", 1, [Update("text", [RL("text")])]),
    Phase("together", 3, [Update("text", [RL("text"), OPD("image", Average("text", 0.5))]),
                          Update("image", [RL("image"), OPD("text", Snapshot("text", 3)),
                                           OPD("text", Average("text", 0.9)), OPD("text", "text")])])],
    Merge(["text", "image"]))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_followers_against_a_second_implementation(kind, epochs, suite, start):
    "All weights of a branch are kept here; snapshots are looked up, averages are weighted sums in fp64."
    base = lora(start, rank=2) if kind == "lora" else start
    training, seen = began(FOLLOWED, suite, base, average=0.7, epochs=epochs), {}
    begin = vector(base)
    for phase in FOLLOWED.phases:
        for step in range(phase.steps):
            teachers = {n: vector(training.policy(n)) for n in FOLLOWED.followers()}
            past = [begin, *seen.get("text", [])]
            assert torch.equal(teachers["text@every=3"], past[(len(past) - 1) // 3 * 3])
            train_step(training, phase, step)
            for u in phase.updates: seen.setdefault(u.branch, []).append(vector(training.policy(u.branch)))
    assert not torch.equal(seen["text"][0], seen["text"][1])
    names = ("text@decay=0.5", "text@decay=0.9", "text@decay=0.7", "image@decay=0.7")
    for name in names:
        branch, decay = name.split("@")[0], float(name.split("=")[1])
        shares = [decay ** (len(seen[branch]) - 1 - s) for s in range(len(seen[branch]))]
        wanted = sum(w * x.double() for w, x in zip(shares, seen[branch])) / sum(shares)
        assert torch.allclose(vector(training.policy(name)).double(), wanted, atol=2e-7), name
    assert set(training.branch("text").followers) == {"text@every=3", *names[:3]}
    assert set(training.branch("image").followers) == {"image@decay=0.7"}


def test_a_teacher_that_is_renewed_at_every_step_is_the_live_teacher(suite, start, monkeypatch):
    "With the random numbers of the live stream: bit for bit the same weights; a rarer copy gives others."
    plain = streams_module.generator
    monkeypatch.setattr(streams_module, "generator",
                        lambda *parts: plain(*(p.partition("@")[0] if isinstance(p, str) else p for p in parts)))
    live = copd(PAIR, cycles=2, s_rl=1, s_opd=2, beta=1.0)
    def end(schedule, **changes):
        training = began(schedule, suite, start, **changes)
        for phase in schedule.phases:
            for step in range(phase.steps): train_step(training, phase, step)
        return vector(training.policy("text"))
    now = end(live)
    assert torch.equal(now, end(follow(live, every=1))) and torch.equal(now, end(follow(live, decay=0)))
    assert not torch.equal(now, end(follow(live, every=3))) and not torch.equal(now, end(follow(live, decay=0.9)))
    in_turn = end(live, updates="sequential")
    assert torch.equal(in_turn, end(follow(live, every=1), updates="sequential")) and not torch.equal(now, in_turn)


def test_a_skipped_update_is_a_step_of_the_average(suite, start, monkeypatch):
    training = began(expert("text", 3), suite, start, average=0.5)
    phase, step = training.schedule.phases[0], itertools.count()
    monkeypatch.setattr(step_module, "_fault", lambda *_: "made up" if next(step) == 1 else None)
    seen = []
    for number in range(3):
        train_step(training, phase, number)
        seen.append(vector(training.policy("text")).double())
    assert torch.equal(seen[0], seen[1])
    wanted = (seen[0] + 2 * seen[1] + 4 * seen[2]) / 7
    assert torch.allclose(vector(training.policy("text@decay=0.5")).double(), wanted, atol=2e-7)


# whole runs

CONFIG = replace(TINY, learning_rate=1e-3, rate="cosine", rate_floor=0.1, average=0.8, eval_every=2, probe_every=2,
                 checkpoint_every=1)
STEPS = sum(p.steps for p in FOLLOWED.phases)


@pytest.fixture(scope="module")
def whole(suite, start, tmp_path_factory):
    "Uninterrupted runs, of all weights and of adapters."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    def made(kind, base): return train(FOLLOWED, suite, base, CONFIG, folder / kind, progress=False)
    return dict(full=made("full", start), lora=made("lora", lora(start, rank=2)))


def alike(a, b):
    "Events, branches, results and moving averages are the same, bit for bit."
    same(a, b)
    for name in ("result", *PAIR): assert weights_hash(a.average(name)) == weights_hash(b.average(name))


KILLED = [pytest.param(kind, step, every, marks=[pytest.mark.slow] * (every == 1 or step % 2 == (kind == "full")))
          for kind in ("full", "lora") for step in range(STEPS) for every in (1, 2)]


@pytest.mark.parametrize("kind, step, every", KILLED)
def test_a_run_killed_at_any_step_goes_on_to_the_same_numbers(kind, step, every, whole, suite, start, tmp_path,
                                                              monkeypatch):
    base, config = lora(start, rank=2) if kind == "lora" else start, replace(CONFIG, checkpoint_every=every)
    calls, plain = itertools.count(), train_step
    def dying(*args):
        if next(calls) == step: raise RuntimeError("killed")
        return plain(*args)
    with monkeypatch.context() as m:
        m.setattr(phase_module, "train_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(FOLLOWED, suite, base, config, tmp_path / "cut", progress=False)
    alike(whole[kind], train(FOLLOWED, suite, base, config, tmp_path / "cut", progress=False))


def test_a_checkpoint_of_adapters_holds_followers_as_adapters(suite, start, tmp_path, monkeypatch):
    calls, plain = itertools.count(), train_step
    def dying(*args):
        if next(calls) == 3: raise RuntimeError("killed")
        return plain(*args)
    monkeypatch.setattr(phase_module, "train_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(FOLLOWED, suite, lora(start, rank=2), CONFIG, tmp_path / "cut", progress=False)
    folder = next((tmp_path / "cut" / "checkpoints").iterdir())
    sizes = {p.name: p.stat().st_size for p in folder.glob("text~*.safetensors")}
    assert {f"text~{n}.safetensors" for n in ("every-3", "decay-0.5", "decay-0.9", "decay-0.8")} < sizes.keys()
    assert len({sizes[f"text~{n}.safetensors"] for n in ("weights", "every-3", "decay-0.5")}) == 1


def test_averages_are_judged_beside_the_last_weights(whole):
    run = whole["full"]
    scores = run.events[run.events.kind == "eval"]
    assert list(dict.fromkeys(scores.model)) == ["text", "text (average)", "result", "result (average)"]
    for _, at in scores.groupby("global_step"): assert len(at) == 2 * at.model.str.endswith("(average)").sum()
    assert set(run.events.teacher.dropna()) == {"text", *FOLLOWED.followers()}
    assert {"text@every=3", "text@decay=0.9"} <= set(run.events[run.events.kind == "probe"].b)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_average_of_a_merged_result_is_the_merge_of_averages(kind, whole):
    run = whole[kind]
    if kind == "full": assert weights_hash(merge([run.average(n) for n in PAIR])) == weights_hash(run.average())
    assert {p.name for p in (run.path / "branches-average").iterdir()} == set(PAIR)
    assert weights_hash(run.average("text")) != weights_hash(run.branch("text"))
    assert weights_hash(run.average()) != weights_hash(run.result)
    with pytest.raises(KeyError, match="no moving average of 'video'"): run.average("video")


def test_a_run_without_averages_says_so(suite, start, tmp_path):
    run = train(expert("text", 1), suite, start, replace(TINY, probe_every=0), tmp_path / "run", progress=False)
    assert not (run.path / "branches-average").exists() and "(average)" not in "".join(run.events.model.dropna())
    with pytest.raises(KeyError, match=r"no moving average of 'result': config average=0.0"): run.average()


def test_the_final_evaluation_judges_averages_of_every_arm(suite, start, tmp_path):
    scale = replace(SCALES["smoke"], config=replace(TINY, average=0.5, eval_every=0), prompts=4, samples=1)
    study = Study((suite, start), scale, tmp_path)
    trained = copd(PAIR, cycles=1, s_rl=1, s_opd=1)
    arms, found = {"expert": expert("text", 2), "merged": merged_experts(PAIR, 1), "CoPD": trained}, {}
    for (label, _), job in study.jobs(arms).items():
        do(job, tmp_path)
        found[label] = list(dict.fromkeys(scores_of(run_of(job, tmp_path), job).model))
    pair = ["result", "result (average)"]
    assert {label: sorted(models) for label, models in found.items()} == {
        "expert": pair, "merged": pair, "CoPD": sorted([*pair, *PAIR])}


def test_memory_counts_copies(start):
    shape, text = model_shape(start), start.model.config.get_text_config()
    def gib(schedule, **changes):
        table = memory_plan(text, shape, schedule, replace(TINY, **changes)).set_index("item").GiB
        return round(table.get("followers", 0.0) * 2 ** 30 / (4 * shape.size))
    assert gib(copd(PAIR)) == 0 and gib(copd(PAIR), average=0.9) == 2 and gib(FOLLOWED) == 3
    assert gib(FOLLOWED, average=0.8) == 5 and gib(FOLLOWED, average=0.9) == 4  # the same decay: the same copy
