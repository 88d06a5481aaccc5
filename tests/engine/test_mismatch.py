"A sampler that isn't the trainer: weights in the engine's gradients, runs that are what they were, what is refused."
import copy
import math
from dataclasses import replace

import pytest
import torch
from same_runs import same
from test_freeze import CONFIG, PAIR, adapters, base, suite

from copd_nb.data.capability import Capability, Example
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import CORRECTION, Config
from copd_nb.engine.mismatch import mismatch_row
from copd_nb.engine.passes import collect
from copd_nb.engine.state import Training
from copd_nb.engine.training import train
from copd_nb.engine.update import Learner, gradients_of
from copd_nb.policy.toys import tiny_policy
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.neighbours import reward_and_teacher, semi_opd
from copd_nb.schedule.paradigms import expert, mixed_rlvr
from copd_nb.schedule.parts import OPD, RL, SFT, Phase, Update
from copd_nb.signals.estimators import Estimator
from copd_nb.signals.sampling import sample_many

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = replace(CONFIG, probe_every=0, eval_every=0)
SUMS = ("sums",)
COLUMNS = {"sampler_difference", "sampler_difference_max", "sampler_kl", "weight_mean", "weight_clipped"}


class At:
    "A sampler at a temperature of its own, with its true log-probabilities."
    def __init__(self, temperature: float = 0.6, **changes): self.temperature, self.changes = temperature, changes

    def __call__(self, policy, requests, length, temperature, *options):
        outs = sample_many(policy, requests, length, self.temperature, *options)
        return [replace(out, start=None, **{n: f(out) for n, f in self.changes.items()}) for out in outs]


def made(schedule, folder, config=QUIET, start=None, **more):
    return train(schedule, suite(), start or base(), config, folder, progress=False, **more)


def rows_of(run): return run.events[run.events.kind == "train"].dropna(axis=1, how="all")


# What a run is named by, and what it computes.

@pytest.mark.parametrize("schedule", [mixed_rlvr(PAIR, 2), copd(PAIR, cycles=1, s_rl=1, s_opd=1, beta=0.5)],
                         ids=["RL", "CoPD"])
def test_the_engines_own_sampler_is_as_it_was(schedule, tmp_path):
    "The same run whatever the correction says: the same content, bit for bit the same numbers, no new columns."
    plain = made(schedule, tmp_path / "plain")
    for i, changes in enumerate((dict(sampler_correction="none"), dict(sampler_correction="mask", sampler_cap=1.0,
                                                                       sampler_level="sequence", sampler_floor=1.0))):
        other = made(schedule, tmp_path / str(i), replace(QUIET, **changes))
        assert other.manifest["content_hash"] == plain.manifest["content_hash"]
        same(plain, other)
    named = made(schedule, tmp_path / "named", sampler=sample_many)
    for run in (plain, named): assert not COLUMNS & set(rows_of(run))
    assert "correction" not in named.manifest


def test_a_sampler_that_is_the_trainer_has_weights_of_one(tmp_path):
    "The engine's sampler behind another name: every column is there, and says that nothing happens."
    own, other = (made(mixed_rlvr(PAIR, 2), tmp_path / n, sampler=s) for n, s in (("own", None), ("other", At(1.0))))
    rows, wanted = rows_of(other), rows_of(own)
    assert COLUMNS <= set(rows) and rows.sampler_difference_max.max() < 1e-4 and (rows.weight_clipped == 0).all()
    assert rows.weight_mean.tolist() == pytest.approx([1.0] * len(rows), abs=1e-5)
    for name in ("reward", "loss", "gradient_norm"):
        assert rows[name].tolist() == pytest.approx(wanted[name].tolist(), rel=1e-3, abs=1e-5)


def test_the_content_of_a_run_with_another_sampler_names_its_correction(tmp_path):
    hashes = {n: made(expert("sums", 1), tmp_path / n, replace(QUIET, **c), sampler=At()).manifest["content_hash"]
              for n, c in dict(default={}, none=dict(sampler_correction="none"), mask=dict(sampler_correction="mask"),
                               uncorrected=dict(sampler_correction="none", sampler_cap=3.0)).items()}
    assert hashes["none"] == hashes["uncorrected"] and len(set(hashes.values())) == 3


def test_experts_are_shared_by_what_corrects_them(tmp_path):
    for i, config in enumerate((QUIET, replace(QUIET, sampler_cap=3.0), QUIET)):
        made(expert("sums", 1), tmp_path / str(i), config, experts=tmp_path / "experts", sampler=At())
    assert len([p for p in (tmp_path / "experts").iterdir() if p.is_dir()]) == 2


# Gradients by hand.

def begin(schedule, config, sampler, start=None) -> Training:
    "A training before its first step; teachers are apart from their learners."
    training = Training(schedule, {c.name: c for c in suite()}, start or base(), config, accelerator_for(config), None,
                        sampler=sampler)
    for name in schedule.starts:
        source = torch.Generator().manual_seed(len(name))
        for p in training.branch(name).policy.parameters():
            p.data.add_(0.05 * torch.randn(p.shape, generator=source) * (name == "image"))
    return training


def flat(gradient): return torch.cat([g.flatten() for g in gradient if g is not None])


def batches_of(signals, config, sampler):
    schedule = Schedule("one", ["sums", "image"], [Phase("p", 1, [Update("sums", signals)])], "sums")
    training = begin(schedule, config, sampler)
    return training, collect(training, schedule.phases[0].updates[0], 0)


def log_probs(training, batch):
    "Of the sampled tokens and of all ids under the learner, by one plain pass, with gradient."
    policy, out = training.branch("sums").policy, batch.rollouts
    every = policy.completion_logits(out.prompts, out.ids, training.config.temperature).log_softmax(-1)
    return every.gather(-1, out.ids[..., None])[..., 0], every


def plain_weights(logp, batch, config):
    "As in the definitions, row by row."
    found = torch.zeros_like(batch.mask)
    for i, n in enumerate(batch.rollouts.lengths.long().tolist()):
        ratio = (logp.detach()[i, :n] - batch.sampler_logp[i, :n]).exp()
        if config.sampler_level == "sequence": ratio = ratio.prod().expand(n)
        cap, floor = config.sampler_cap, config.sampler_floor
        if config.sampler_correction == "mask": found[i, :n] = ratio * ((ratio <= cap) & (ratio >= floor))
        else: found[i, :n] = ratio.clamp(floor, cap)
    return found


WAYS = [dict(sampler_correction=mode, sampler_level=level, sampler_cap=cap, sampler_floor=floor)
        for mode, level, cap, floor in (("truncate", "token", 1.05, 0.0), ("mask", "token", 1.1, 0.9),
                                        ("truncate", "sequence", 1.1, 0.95), ("mask", "sequence", 1.1, 0.0))]
ids = [f"{w['sampler_correction']} {w['sampler_level']}" for w in WAYS]


@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_gradient_of_grpo_by_hand(way, reduction):
    config = replace(QUIET, reduction=reduction, **way)
    training, (batch,) = batches_of([RL("sums")], config, At())
    gradients, losses = gradients_of(training, "sums", [batch])
    logp, _ = log_probs(training, batch)
    weights = plain_weights(logp, batch, config)
    assert way["sampler_correction"] == "truncate" or 0 < (weights[batch.mask > 0] == 0).float().mean() < 1
    tokens = weights * batch.advantages[:, None] * (logp - logp.detach()).exp() * batch.mask
    by_row = tokens.sum(1) / batch.rollouts.lengths if reduction == "sequence" else tokens.sum(1)
    loss = -by_row.sum() / (len(by_row) if reduction == "sequence" else batch.mask.sum())
    loss.backward()
    wanted = flat([p.grad for p in training.branch("sums").policy.parameters()])
    assert losses["rl"] == pytest.approx(loss.item(), abs=1e-5)
    assert (flat(gradients["rl"]) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("way", [*WAYS, dict(sampler_correction="none")], ids=[*ids, "none"])
@pytest.mark.parametrize("estimator", ["sampled", "reverse"])
def test_gradient_of_distillation_by_hand(way, estimator):
    "The advantage is teacher − trainer; a divergence is weighted by whole completions only."
    config = replace(QUIET, **way)
    training, (batch,) = batches_of([OPD("sums", "image", 0.5, estimator)], config, At())
    gradients, _ = gradients_of(training, "sums", [batch])
    (logp, every), out = log_probs(training, batch), batch.rollouts
    with torch.no_grad():
        theirs = training.policy("image").completion_logits(out.prompts, out.ids, 1.0).log_softmax(-1)
    weights = batch.mask if way["sampler_correction"] == "none" else plain_weights(logp, batch, config)
    if estimator == "sampled":
        delta = theirs.gather(-1, out.ids[..., None])[..., 0] - logp.detach()
        tokens = -0.5 * weights * delta * (logp - logp.detach()).exp() * batch.mask
    else:
        whole = weights if config.sampler_level == "sequence" else batch.mask
        tokens = 0.5 * whole * (every.exp() * (every - theirs)).sum(-1) * batch.mask
    (tokens.sum() / batch.mask.sum()).backward()
    wanted = flat([p.grad for p in training.branch("sums").policy.parameters()])
    assert (flat(gradients[batch.stream]) - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_change_nothing(level):
    "Gradients, old log-probabilities and the numbers of the log, however a batch is cut."
    found = []
    for limits in ({}, dict(micro_tokens=7, micro_prompts=1), dict(micro_tokens=1), dict(pack=False)):
        config = replace(QUIET, sampler_level=level, sampler_cap=1.05, **limits)
        training, batches = batches_of([RL("sums"), OPD("sums", "image", 0.5)], config, At())
        gradients, _ = gradients_of(training, "sums", batches)
        found.append({s: flat(g) for s, g in gradients.items()})
    for other in found[1:]:
        for stream, gradient in found[0].items(): assert torch.allclose(other[stream], gradient, atol=2e-6)


def test_a_second_update_keeps_the_weights_of_the_first(tmp_path):
    "The weight is old trainer to sampler, and PPO's ratio new trainer to old: only the ratio moves on."
    training, (batch,) = batches_of([RL("sums")], replace(QUIET, epochs=2), At())
    gradients_of(training, "sums", [batch])
    before = batch.old_logp.clone()
    for p in training.branch("sums").policy.parameters(): p.data.mul_(1.05)
    gradients_of(training, "sums", [batch])
    assert torch.equal(batch.old_logp, before) and (batch.logp - before)[batch.mask > 0].abs().max() > 1e-3
    rows = rows_of(made(expert("sums", 2), tmp_path / "run", replace(QUIET, epochs=2), sampler=At()))
    assert (rows.updates == 2).all() and (rows.sampler_kl > 0).all()


def test_a_teacher_beside_a_reward_hears_the_trainers_log_probs(tmp_path):
    "Its term is that of the learner's own scores, which cost a pass; without a correction it is as it was."
    signals = [RL("sums", "image", 0.5, residual="centred")]
    training, (batch,) = batches_of(signals, QUIET, At())
    gradients_of(training, "sums", [batch])
    run = torch.zeros(len(batch.mask), dtype=torch.bool)
    run[batch.learning_rows(QUIET)] = True
    apart = (batch.own_logp - batch.old_logp)[run] * batch.mask[run]
    assert apart.abs().max() < 1e-4 < (batch.own_logp - batch.sampler_logp)[run].abs().max()
    delta = (batch.heard - batch.own_logp) * batch.mask
    groups, tokens = (x.reshape(-1, 4 * x.shape[1]).sum(1) for x in (delta, batch.mask))
    centred = 0.5 * (delta - (groups / tokens).repeat_interleave(4)[:, None]) * batch.mask
    assert torch.allclose(batch.term, centred, atol=1e-5)
    _, (plain,) = batches_of(signals, replace(QUIET, sampler_correction="none"), At())
    assert plain.own_logp is None
    schedule = reward_and_teacher(PAIR, 1, 1, beta=0.5)
    rows = [rows_of(made(schedule, tmp_path / mode, replace(QUIET, sampler_correction=mode), sampler=At()))
            for mode in ("truncate", "none")]
    taught = [r[r.teacher_term.notna()] for r in rows]
    assert (taught[0].scored == 2 * taught[1].scored).all() and len(taught[0])


def test_groups_without_advantage_do_not_count_as_agreement(tmp_path):
    "Rows that have no pass keep what the sampler noted; the log is about the others."
    found = {}
    for skip in (True, False):
        training, (batch,) = batches_of([RL("sums")], replace(QUIET, prompts=8, skip_flat=skip), At())
        batch.advantages = torch.tensor([0.0] * 16 + [1.0, -1.0] * 8)
        gradients_of(training, "sums", [batch])
        run = torch.arange(len(batch.mask)) >= 16
        found[skip] = mismatch_row(training.config, batch, run), mismatch_row(training.config, batch, ~run)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-4) and found[True][1] == {}
    assert found[False][1]["sampler_difference"] > 0


# Runs.

KINDS = {"RL": (mixed_rlvr(PAIR, 5), {}), "semi-OPD": (semi_opd(PAIR, 1, 4), {}),
         "CoPD": (copd(PAIR, cycles=2, s_rl=2, s_opd=1, beta=0.5), dict(sampler_level="sequence")),
         "a teacher beside a reward": (reward_and_teacher(PAIR, 1, 4, beta=0.5), dict(sampler_correction="mask"))}


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_goes_on_to_the_same_numbers(name, tmp_path, dies_after):
    schedule, changes = KINDS[name]
    config = replace(QUIET, checkpoint_every=2, **changes)
    whole = made(schedule, tmp_path / "whole", config, sampler=At())
    with dies_after(3): made(schedule, tmp_path / "cut", config, sampler=At())
    same(whole, made(schedule, tmp_path / "cut", config, sampler=At()))


def test_lora_branches_too(tmp_path):
    run = made(mixed_rlvr(PAIR, 2), tmp_path / "run", start=adapters(), sampler=At())
    assert (rows_of(run).sampler_kl > 0).all()


# What is refused.

class Strange(Learner):
    def gradients(self, training, name, batches): return super().gradients(training, name, batches)


class Corrects(Strange): corrects_sampler = True


class Own(Estimator):
    def loss(self, inputs, config): return -(inputs.logp * inputs.mask).sum() / inputs.denominator


own = Own()
TAUGHT = Schedule("taught", ["sums", "image"], [Phase("p", 1, [Update("sums", [OPD("sums", "image", 1.0,
                                                                                   "test_mismatch:own")])])], "sums")


def spoilt(value):
    def change(out):
        logp = out.logp.clone()
        logp[0, 0] = value
        return logp
    return At(logp=change)


@pytest.mark.parametrize(("schedule", "more", "message"), [
    (expert("sums", 1), dict(sampler=At(logp=lambda out: None)), "sampler At gives no log-probabilities"),
    (expert("sums", 1), dict(sampler=spoilt(math.nan)), "gives 1 values for .* no log-probabilities"),
    (expert("sums", 1), dict(sampler=spoilt(-math.inf)), "gives 1 values for .* no log-probabilities"),
    (expert("sums", 1), dict(sampler=spoilt(0.4)), "they must be finite and at most 0"),
    (expert("sums", 1), dict(sampler=At(logp=lambda out: out.logp[:, :1])), "log-probabilities of shape"),
    (expert("sums", 1), dict(sampler=At(), learner=Strange()), "learner Strange computes its own gradients"),
    (TAUGHT, dict(sampler=At()), "estimator 'own' has no importance weight"),
])
def test_what_cannot_work_is_refused_before_anything_is_learnt(schedule, more, message, tmp_path):
    with pytest.raises(ValueError, match=message): made(schedule, tmp_path / "run", **more)
    assert not (tmp_path / "run" / "events.jsonl").exists() or not (tmp_path / "run" / "events.jsonl").read_text()
    plain = replace(QUIET, sampler_correction="none")
    if "learner" in more or schedule is TAUGHT: assert made(schedule, tmp_path / "plain", plain, **more).finished


def test_what_says_that_it_corrects_may(tmp_path):
    run = made(expert("sums", 1), tmp_path / "run", sampler=At(), learner=Corrects())
    silent = made(expert("sums", 1), tmp_path / "silent", replace(QUIET, sampler_correction="none"),
                  sampler=At(logp=lambda out: None))
    assert run.finished and not COLUMNS & set(rows_of(silent))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(sampler_cap=0.9), "sampler_cap=0.9: must be 1 or more, and finite"),
    (dict(sampler_cap=math.inf), "sampler_cap"), (dict(sampler_floor=1.5), "sampler_floor=1.5: must be from 0 to 1"),
    (dict(sampler_correction="clip"), "sampler_correction='clip': one of truncate, mask, none"),
    (dict(sampler_level="row"), "sampler_level='row': one of token, sequence"),
])
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message): Config(**changes)


def test_the_fields_are_those_of_the_configuration():
    assert set(CORRECTION) == {n for n in vars(Config()) if n.startswith("sampler_")}
    assert Config().correction(None) == {} and Config().correction(sample_many) == {}
    assert Config(sampler_correction="none").correction(At()) == {}
    assert set(Config().correction(At())) == set(CORRECTION)


# A sampler that is wrong on purpose.

class Slips:
    "With a probability of `share` a token is any id at all; the log-probabilities are those of this mixture."
    def __init__(self, share: float = 0.3): self.share = share

    def __call__(self, policy, requests, *options):
        def logits_of(own):
            def logits(hidden):
                p, share = own(hidden).softmax(-1), self.share
                free = torch.ones_like(p).index_fill(-1, own.banned, 0)
                return ((1 - share) * p + share * free / free.sum(-1, keepdim=True)).log().clamp(min=-1e9)
            return logits
        wrong = copy.copy(policy)
        wrong.head = lambda temperature=1.0: logits_of(policy.head(temperature))
        return [replace(out, start=None) for out in sample_many(wrong, requests, *options)]


PAID = {"7": 1.0, "4": 0.6}


def paid(completions, examples): return [PAID.get(c, 0.0) for c in completions]


ANY = [Example(f"{a}+{b}=", "7" if (3 * a + b) % 10 in (0, 3, 6) else "4", "any") for a in range(6) for b in range(5)]
ANSWERS = Capability("any", ANY, [Example(f"9+{b}=", "7", "any") for b in range(8)], paid)
LEARNS = Config(prompts=8, group_size=8, max_new_tokens=3, probe_every=0, eval_every=0, warmup=1, learning_rate=2e-3,
                checkpoint_every=100, device="cpu")


def one(signal, steps): return Schedule("one", ["a"], [Phase("p", steps, [Update("a", [signal])])], "a")


def says(policy, digit) -> float:
    "Exact probability of an answer, mean over the training prompts."
    ids = torch.tensor([[*policy.tokenizer(digit, add_special_tokens=False).input_ids, policy.end]] * len(ANY))
    with torch.no_grad(): every = policy.completion_logits(policy.encode(ANY), ids).log_softmax(-1)
    return every.gather(-1, ids[..., None])[..., 0].sum(1).exp().mean().item()


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    "A policy that answers 4 half of the time and 7 a third of it."
    config = replace(LEARNS, prompts=30, learning_rate=3e-3)
    start = tiny_policy(hidden=32, layers=2, vision_hidden=16, vision_depth=1)
    run = train(one(SFT("any"), 50), [ANSWERS], start, config, tmp_path_factory.mktemp("start") / "run", progress=False)
    assert 0.2 < says(run.result, "7") < says(run.result, "4") < 0.7
    return run.result


@pytest.mark.parametrize("seed", range(3))
def test_a_sampler_that_slips_is_no_harm_with_the_correction_and_stops_learning_without(seed, undecided, tmp_path):
    """Answers of 7 pay more than answers of 4. Three tokens in ten are any id, so the mean reward of a group is so low
    that 4 looks good, too; weighted, the slips count nothing. Seen with five seeds: 7 with a probability of 0.975 to
    0.978 against 0.40 to 0.66. A monitor warns as soon as its window is full, long before the run is over."""
    found = {}
    for mode in ("truncate", "none"):
        run = train(one(RL("any"), 60), [ANSWERS], undecided, replace(LEARNS, seed=seed, sampler_correction=mode),
                    tmp_path / mode, progress=False, sampler=Slips())
        found[mode] = says(run.result, "7")
        warned = run.events[run.events.kind == "warning"]
        assert warned[warned.monitor == "sampler"].global_step.iloc[0] == 8
    print(found)
    assert found["truncate"] > 0.93 and found["none"] < 0.8
