"Whose completions are scored, and a teacher beside a reward: equalities, resumes, costs, refusals."
from dataclasses import replace

import pytest
import torch
from same_runs import same
from test_freeze import CONFIG, PAIR, adapters, base, suite

from copd_nb.engine import whose as whose_module
from copd_nb.engine.training import train
from copd_nb.engine.update import Learner
from copd_nb.engine.workload import workload
from copd_nb.policy.core import Policy
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.neighbours import camopd, codistill_grpo, reward_and_teacher, semi_opd
from copd_nb.schedule.parts import OPD, RL, Phase, Update
from copd_nb.schedule.paradigms import mixed_rlvr
from copd_nb.signals.estimators import AdvantageEstimator, Sampled
from copd_nb.signals.sampling import sample_many

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = replace(CONFIG, probe_every=0, eval_every=0)


def alone(*signals, steps=4, first=()):
    "A student with these signals; experts that are named first are trained before it."
    experts = [Phase(f"expert {n}", 2, [Update(n, [RL(n)])]) for n in first]
    phases = [*experts, Phase("p", steps, [Update("student", signals)])]
    return Schedule("alone", [*first, "student"], phases, "student")


KINDS = {
    "semi-OPD": semi_opd(PAIR, 1, 6),
    "completions of a frozen expert, weighted": alone(OPD("sums", "sums", 0.5, rollouts="teacher"), steps=7,
                                                      first=["sums"]),
    "CoDistill-GRPO": codistill_grpo(PAIR, 6, lead=1, residual="centred"),
    "completions of a live branch": Schedule("live", ["a", "b"], [Phase("p", 6, [
        Update("a", [RL("sums")]), Update("b", [OPD("image", "base", 0.5, "topk", rollouts="a")])])], "b"),
    "CaMOPD": camopd("image", "sums", 2, 8),
    "a gate": reward_and_teacher(PAIR, 1, 6, beta=0.5, residual="bounded", gate="verified"),
}


def made(schedule, folder, config=QUIET, start=None, **more):
    return train(schedule, suite(), start or base(), config, folder, progress=False, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Runs that nothing interrupts, each made once."
    found = {}

    def get(name):
        if name not in found: found[name] = made(KINDS[name], tmp_path_factory.mktemp("whole") / "run")
        return found[name]
    return get


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_numbers(name, steps, whole, tmp_path, dies_after):
    "Checkpoints every two steps, so that steps are repeated with completions that are on disk already."
    config = replace(QUIET, checkpoint_every=2)
    with dies_after(steps): made(KINDS[name], tmp_path / "cut", config)
    same(whole(name), made(KINDS[name], tmp_path / "cut", config))


def test_a_run_killed_between_sampling_and_learning_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch):
    "The completions of the step that was cut off are on disk; in the log they count as sampled in that step."
    real, left = whose_module.Kept.get, iter(range(5))

    def dying(*args):
        if next(left, None) is None: raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(whose_module.Kept, "get", dying)
        made(KINDS["semi-OPD"], tmp_path / "cut")
    assert list((tmp_path / "cut" / "rollouts").glob("*/0*"))
    run = made(KINDS["semi-OPD"], tmp_path / "cut")
    same(whole("semi-OPD"), run)
    assert not (run.path / "rollouts").exists()  # a finished run needs them no longer


@pytest.mark.parametrize("name", ["semi-OPD", "a gate"])
def test_lora_branches_too(name, tmp_path, dies_after):
    whole = made(KINDS[name], tmp_path / "whole", start=adapters())
    with dies_after(4): made(KINDS[name], tmp_path / "cut", replace(QUIET, checkpoint_every=2), adapters())
    same(whole, made(KINDS[name], tmp_path / "cut", replace(QUIET, checkpoint_every=2), adapters()))


def columns(run, *drop):
    "Training rows without what differs by design."
    rows = run.events[run.events.kind == "train"]
    return rows.drop(columns=[c for c in ("seconds", *drop) if c in rows]).dropna(axis=1, how="all")


def test_a_closed_gate_is_plain_rl(tmp_path):
    "No teacher reaches a success rate above 0.999…: only the columns of the teacher and of its cost are there."
    signals = [RL(n, "base", 0.5, gate="verified", threshold=1 - 1e-12) for n in PAIR]
    gated = made(alone(*signals), tmp_path / "gated")
    plain = made(replace(mixed_rlvr(PAIR, 4), branches=["student"], result="student", phases=[
        Phase("p", 4, [Update("student", [RL(n) for n in PAIR])])]), tmp_path / "plain")
    rows, wanted = columns(gated), columns(plain)
    assert (rows.gate_open == 0).all() and (rows.teacher_term == 0).all()
    for name in ("loss", "reward", "gradient_norm", "entropy", "total_gradient_norm", "length"):
        assert rows[name].tolist() == wanted[name].tolist()
    a, b = gated.result.dense_state(), plain.result.dense_state()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_sum_of_both_terms_is_the_sum_of_two_gradients(tmp_path):
    "One token denominator, one batch: gradient of reward and teacher = gradient of reward + gradient of teacher alone."
    from copd_nb.engine.accelerator import accelerator_for
    from copd_nb.engine.passes import collect
    from copd_nb.engine.state import Training
    from copd_nb.engine.update import gradients_of
    found = {}
    for name, (signal, scale) in dict(both=(RL("sums", "image", 0.5), 1.0), reward=(RL("sums"), 1.0),
                                      teacher=(RL("sums", "image", 0.5), 0.0)).items():
        schedule = alone(signal, first=["image"])
        capabilities = {c.name: c for c in suite()}
        config = replace(QUIET, skip_flat=False)
        training = Training(schedule, capabilities, base(), config, accelerator_for(config), None)
        for p in training.branch("image").policy.parameters(): p.data.mul_(1.2)  # a teacher that differs
        batches = collect(training, schedule.phases[-1].updates[0], 0)
        batches[0].advantages = batches[0].advantages * scale
        gradients, _ = gradients_of(training, "student", batches)
        found[name] = torch.cat([g.flatten() for g in gradients["rl"] if g is not None])
    assert found["teacher"].norm() > 0 and found["reward"].norm() > 0
    assert torch.allclose(found["both"], found["reward"] + found["teacher"], atol=1e-5)


def test_the_base_as_roller_of_its_copy_has_weights_of_one(tmp_path):
    "In the first step the learner is the base; later it is not."
    rows = columns(made(alone(OPD("sums", "sums", 0.5, rollouts="base"), first=["sums"]), tmp_path / "run"))
    mine = rows[rows.branch == "student"]
    assert mine.weight_mean.iloc[0] == pytest.approx(1, abs=1e-4) and (mine.weight_mean.iloc[1:] - 1).abs().max() > 1e-3
    assert (mine.weight_clipped <= 1).all() and (mine.rollouts == "base").all()


def test_a_small_clip_clips(tmp_path):
    signal = OPD("sums", "sums", 0.5, rollouts="base", weight_clip=0.5)
    rows = columns(made(alone(signal, first=["sums"], steps=2), tmp_path / "run"))
    assert rows[rows.branch == "student"].weight_clipped.iloc[0] == 1 and rows.weight_mean.dropna().max() <= 0.5


def test_lent_completions_are_those_of_the_lender(tmp_path):
    "The large branch learns from the small one's very completions and rewards, though it has drawn prompts before."
    rows = columns(made(codistill_grpo(PAIR, 3, lead=2), tmp_path / "run")).query("phase_index == 1")
    small, large = (rows[rows.branch == b].sort_values(["step", "capability"]) for b in ("small", "large"))
    for name in ("reward", "length", "prompts", "prompt_tokens"):
        wanted = small[name] / (1 if name != "prompt_tokens" else 2)  # the small one's teacher reads them, too
        assert large[name].tolist() == wanted.tolist(), name
    assert (large.generated == 0).all() and large.trained.tolist() == small.generated.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_the_price_counts_what_the_log_counts(name, whole):
    "Prompts, and the ratio of sampled to trained tokens where lengths are equal: exact with lengths of the run itself."
    rows, schedule = columns(whole(name)), KINDS[name]
    capabilities = suite()
    work = workload(base(), capabilities, QUIET)
    lengths = {c.name: rows[rows.capability == c.name].trained.sum() / QUIET.group_size
               / max(1, rows[rows.capability == c.name].prompts.sum()) for c in capabilities}
    work = replace(work, completion_tokens=lengths)
    price = schedule.price(work)
    assert price.prompts.sum() == rows.prompts.sum()
    for unit in ("trained", "generated", "scored"):
        assert price[unit].sum() == pytest.approx(rows[unit].sum(), rel=0.1), unit


def test_a_frozen_roller_samples_each_prompt_once(tmp_path):
    "Sixteen prompts, two a step: after eight steps nothing is sampled any more."
    rows = columns(made(alone(OPD("sums", "base", 0.5, "reverse", rollouts="base"), steps=10), tmp_path / "run"))
    assert (rows.generated.iloc[:8] > 0).all() and (rows.generated.iloc[8:] == 0).all()


class Silent:
    "A sampler that knows no log-probabilities."
    def __call__(self, *args): return [replace(out, logp=None, start=None) for out in sample_many(*args)]


class Unweighted(AdvantageEstimator):
    def loss(self, inputs, config): return super().loss(inputs, config)


unweighted = Unweighted()


class Strange(Learner):
    def gradients(self, training, name, batches): return super().gradients(training, name, batches)


def other_ends():
    found = Policy(base().model, base().processor, "other")
    found.model.generation_config.eos_token_id = [found.tokenizer.eos_token_id]
    return Policy(found.model, found.processor, "other")


ROLLED = alone(OPD("sums", "sums", 0.5, rollouts="teacher"), first=["sums"])


@pytest.mark.parametrize(("schedule", "changes", "more", "message"), [
    (alone(OPD("sums", "base", rollouts="nobody")), {}, {}, "unknown rollouts 'nobody'"),
    (alone(OPD("sums", "base", rollouts="student")), {}, {}, "write rollouts='learner'"),
    (alone(RL("sums", "nobody")), {}, {}, "unknown teacher 'nobody'"),
    (alone(RL("sums", "base", rollouts="base")), {}, {}, "scores the learner's own completions"),
    (alone(RL("sums", gate="verified")), {}, {}, "need a teacher"),
    (alone(RL("sums", "base", residual="centered")), {}, {}, "unknown residual 'centered'"),
    (alone(RL("sums", "base", threshold=1.0)), {}, {}, "threshold must be in"),
    (alone(OPD("sums", "base", rollouts="teacher", weight_clip=0)), {}, {}, "weight_clip must be > 0"),
    (alone(OPD("sums", "base", 1.0, "test_whose:unweighted", "base")), {}, {}, "has no importance weight"),
    (codistill_grpo(PAIR, 1), dict(updates="sequential"), {}, "updates='sequential' rules out"),
    (ROLLED, {}, dict(learner=Strange()), "computes its own gradients"),
    (ROLLED, {}, dict(sampler=Silent()), "gives no log-probabilities"),
    (alone(RL("sums", "base")), {}, dict(sampler=Silent()), "gives no log-probabilities"),
    (ROLLED, {}, dict(starts=dict(sums=other_ends())), "need the same end tokens"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_work_is_refused(schedule, changes, more, message, tmp_path):
    with pytest.raises(ValueError, match=message): made(schedule, tmp_path / "run", replace(QUIET, **changes), **more)


def test_estimators_that_weigh():
    from copd_nb.engine.beside import _weighs
    assert _weighs(Sampled()) and not _weighs(Unweighted())
