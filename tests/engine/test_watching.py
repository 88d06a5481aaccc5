"Rows of kind `signal`: what they hold is what the gradients are, and the training doesn't notice."
import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from same_runs import PAIR, same, small_base, small_suite

from copd_nb.data.capability import Capability
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import Config
from copd_nb.engine.experts import expert_key
from copd_nb.engine.manifest import manifest_of
from copd_nb.engine.passes import collect
from copd_nb.engine.runs import Run
from copd_nb.engine.state import Training
from copd_nb.engine.training import train
from copd_nb.engine.update import Learner, gradients_of, part_gradient
from copd_nb.engine.watching import halves, signal_rows, stream_parts
from copd_nb.policy.lora_branches import lora
from copd_nb.policy.passes import completion_logits
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.paradigms import expert, mixed_rlvr, mopd
from copd_nb.schedule.parts import OPD, RL, Update
from copd_nb.signals.coherence import SKETCH, gradient_cosine, gradient_signal, random_projection, sketch
from copd_nb.signals.rollouts import generator

TINY = Config(prompts=4, opd_prompts=4, group_size=4, max_new_tokens=10, probe_every=0, eval_every=0,
              learning_rate=1e-4, warmup=2, checkpoint_every=1, device="cpu")
COPD = copd(PAIR, cycles=2, s_rl=2, s_opd=1, beta=0.5)


@pytest.fixture(scope="module")
def start(): return small_base()


@pytest.fixture(scope="module")
def suite(): return small_suite()


def begin(suite, start, config=TINY): return Training(COPD, suite, start.clone("base"), config,
                                                      accelerator_for(config), None)


def flat(policy, gradient):
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double()
                      for p, g in zip(policy.parameters(), gradient)])


def weights(run): return torch.cat([p.detach().flatten() for p in run.result.model.parameters()])


def signals_of(run): return run.events[run.events.kind == "signal"]


MIXED = Update("text", [RL("text"), RL("image")])
TAUGHT = Update("text", [OPD("image", "image", 0.5)])


@pytest.mark.parametrize("settings", [{}, dict(shared_prompt=False), dict(micro_prompts=3, micro_tokens=40),
                                      dict(skip_flat=False), dict(pack=False)], ids=str)
@pytest.mark.parametrize("update", [MIXED, TAUGHT], ids=["mixed", "taught"])
def test_rows_equal_exact_arithmetic(update, settings, suite, start):
    "Norms, signal, noise and cosines from whole gradients of half-batches."
    training = begin(suite, start, replace(TINY, prompts=8, group_size=8, **settings))
    with torch.no_grad():
        for p in training.branch("image").policy.parameters(): p.mul_(1.05)
    batch, = collect(training, update, 0)
    policy, gradient = training.branch("text").policy, gradients_of(training, "text", [batch])[0][batch.stream]
    kept = {k: v.clone() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    found = stream_parts(training, "text", batch, gradient)
    assert all(torch.equal(v, vars(batch)[k]) for k, v in kept.items())
    assert all(p.grad is None for p in policy.parameters())
    exact = []
    for signal in batch.signals:
        parts = halves(batch, signal.capability, 8)
        total = sum(map(len, parts))
        exact.append(torch.stack([flat(policy, part_gradient(training, policy, batch, rows)) * total / len(rows)
                                  for rows in parts]))
    whole = flat(policy, gradient)
    assert (sum(x.mean(0) for x in exact) - whole).norm() < 2e-5 * whole.norm()
    for part, x in zip(found, exact, strict=True):
        got, true = gradient_signal(part["parts"], part["counts"]), gradient_signal(x, part["counts"])
        scale = float(x[0].norm() * x[1].norm())
        assert abs(got["norm_squared"] - true["norm_squared"]) < 4 * scale / math.sqrt(SKETCH)
        assert got["noise_squared"] == pytest.approx(true["noise_squared"], rel=0.1)
    rows = pd.DataFrame(signal_rows(found))
    assert rows.token_share.sum() == pytest.approx(1)
    assert rows[rows.what == "gradient"].tokens.sum() == int(batch.mask.sum())
    for row, x in zip(rows[rows.what == "gradient"].itertuples(), exact):
        assert row.norm == pytest.approx(float(x.mean(0).norm()), rel=0.05)
        assert row.floor == pytest.approx(float(torch.cosine_similarity(*x, 0)), abs=4 / math.sqrt(SKETCH))
    if update is TAUGHT: return
    row, true = rows[rows.what == "conflict"].iloc[0], gradient_cosine(*exact)
    assert (row.capability, row.other) == ("text", "image")
    assert row.cosine == pytest.approx(true["cosine"], abs=4 / math.sqrt(SKETCH))


def test_a_part_is_what_a_plain_forward_pass_gives(suite, start):
    "An oracle without packing, prefill or streams: Σ A ∇log π of half the rows over the tokens of all."
    training = begin(suite, start)
    batch, = collect(training, Update("text", [RL("text")]), 0)
    gradients_of(training, "text", [batch])  # notes the log-probs of the rows
    policy = training.branch("text").policy
    rows = halves(batch, "text", 4)[0]
    found = flat(policy, part_gradient(training, policy, batch, rows))
    out = batch.rollouts
    policy.zero_grad()
    with policy.learning():
        logp = completion_logits(policy, out.prompts, out.ids).log_softmax(-1).gather(-1, out.ids[..., None])[..., 0]
        loss = -(logp * batch.advantages[:, None] * out.mask)[rows].sum() / out.mask.sum()
        loss.backward()
    plain = flat(policy, [p.grad for p in policy.parameters()])
    policy.zero_grad()
    assert plain.norm() > 0 and (found - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_watching_changes_no_number(kind, suite, start, tmp_path):
    base = start if kind == "full" else lora(start, rank=2)
    quiet = train(COPD, suite, base, TINY, tmp_path / "quiet", progress=False)
    seen = train(COPD, suite, base, replace(TINY, signals_every=2), tmp_path / "seen", progress=False)
    assert torch.equal(weights(quiet), weights(seen))
    rows = seen.events[seen.events.kind != "signal"].dropna(axis=1, how="all").drop(columns="seconds")
    pd.testing.assert_frame_equal(rows.reset_index(drop=True)[quiet.events.columns.drop("seconds")],
                                  quiet.events.drop(columns="seconds"), check_exact=True, check_dtype=False)
    found = signals_of(seen)
    gradients, conflicts = (found[found.what == w] for w in ("gradient", "conflict"))
    assert sorted(set(gradients.global_step)) == [1, 3, 4]  # the first and third step of rewards, the first of OPD
    shares = gradients.groupby("global_step").token_share.sum()
    assert shares.to_numpy() == pytest.approx(1) and (gradients.norm > 0).any()
    both = conflicts[(conflicts.stream == "rl") & (conflicts.other_stream == "rl")]
    assert set(zip(both.capability, both.other)) == {("text", "image")} and len(both) == 3


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow), 4])
def test_resumed_equals_uninterrupted(steps, suite, start, tmp_path, dies_after):
    config = replace(TINY, signals_every=2)
    whole = train(COPD, suite, start, config, tmp_path / "whole", progress=False)
    with dies_after(steps): train(COPD, suite, start, config, tmp_path / "cut", progress=False)
    assert not Run(tmp_path / "cut").finished
    same(whole, train(COPD, suite, start, config, tmp_path / "cut", progress=False))


def test_experts_bring_their_signal_rows(suite, start, tmp_path):
    config, plan = replace(TINY, signals_every=1), mopd(PAIR, 2, 1)
    alone = train(plan, suite, start, config, tmp_path / "alone", progress=False)
    train(expert("text", 2), suite, start, config, tmp_path / "text", experts=tmp_path / "e", progress=False)
    shared = train(plan, suite, start, config, tmp_path / "shared", experts=tmp_path / "e", progress=False)
    assert len(signals_of(alone)) == len(signals_of(shared)) > 0
    assert torch.equal(weights(alone), weights(shared))


def test_an_unused_setting_is_no_content(suite, start):
    def hashed(**settings): return manifest_of(COPD, suite, start, replace(TINY, **settings), {})["content_hash"]
    assert hashed() == hashed(signals_every=0) != hashed(signals_every=3)
    plan, run, keys = expert("text", 2), SimpleNamespace(manifest=dict(base="x")), []
    for every in (0, 3):
        config = replace(TINY, signals_every=every)
        keys.append(expert_key(Training(plan, suite, start, config, accelerator_for(config), run), plan.phases[0]))
    assert keys[0] != keys[1]


def test_what_can_not_be_watched(suite, start, tmp_path):
    class Own(Learner): pass
    with pytest.raises(ValueError, match="signals_every=-1"): Config(signals_every=-1)
    with pytest.raises(ValueError, match="signals_every=2.*learner.*Own"):
        train(COPD, suite, start, replace(TINY, signals_every=2), tmp_path / "run", learner=Own(), progress=False)
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_one_prompt_and_no_reward_have_no_signal(suite, start, tmp_path):
    "One prompt of a capability has no halves; equal rewards have a gradient of 0 and no cosine."
    run = train(mixed_rlvr(PAIR, steps=1), suite, start, replace(TINY, prompts=2, signals_every=1), tmp_path / "one",
                progress=False)
    rows = signals_of(run)
    assert list(rows.prompts) == [1, 1] and set(rows.what) == {"gradient"}
    flat_suite = [Capability(c.name, c.train, c.test, lambda completions, examples: [0.0] * len(completions))
                  for c in suite.values()]
    rows = signals_of(train(mixed_rlvr(PAIR, steps=1), flat_suite, start, replace(TINY, signals_every=1),
                            tmp_path / "flat", progress=False))
    assert (rows[rows.what == "gradient"].norm == 0).all() and rows.cosine.isna().all()


def test_phases_of_one_kind_are_counted_together(suite, start, tmp_path):
    "CoPD's phases are short: an interval counts the steps of all phases like this one."
    run = train(copd(PAIR, cycles=3, s_rl=1, s_opd=1), suite, start, replace(TINY, signals_every=2), tmp_path / "run",
                progress=False)
    assert sorted(set(signals_of(run).global_step)) == [1, 2, 5, 6]


def test_sketches_are_linear_unbiased_and_as_good_as_they_say():
    g = generator("cpu", "vectors")
    a, b = ([torch.randn(30, 40, generator=g), None, torch.randn(500, generator=g)] for _ in range(2))
    both = [None if x is None else x + 2 * y for x, y in zip(a, b)]
    assert torch.allclose(sketch(both, 64), sketch(a, 64) + 2 * sketch(b, 64), atol=1e-4)
    x, y = torch.randn(2, 3000, generator=g)
    y = y + 0.5 * x
    inner = torch.tensor([float(random_projection(x, 256, n) @ random_projection(y, 256, n)) for n in range(400)])
    true = float(x @ y)
    sd = math.sqrt(((x @ x) * (y @ y) + true ** 2 - 2 * (x * x * y * y).sum()).item() / 256)
    assert abs(inner.mean() - true) < 4 * sd / 20 and float(inner.std()) == pytest.approx(sd, rel=0.15)
    assert not sketch([]).any() and len(sketch([])) == SKETCH


def test_one_part_has_no_noise_to_tell():
    with pytest.raises(ValueError, match="at least two"): gradient_signal(torch.ones(1, 3), [4])


def test_parts_of_different_sizes_are_unbiased():
    g, true = generator("cpu", "sizes"), 4.0
    mu = torch.full((100,), true ** 0.5 / 10)
    found = pd.DataFrame([gradient_signal(torch.stack([x[:5].mean(0), x[5:6].mean(0), x[6:].mean(0)]), [5, 1, 3])
                          for x in (mu + torch.randn(9, 100, generator=g) for _ in range(800))])
    for name, value in (("norm_squared", true), ("noise_squared", 100 / 9)):
        assert abs(found[name].mean() - value) < 4 * found[name].std() / math.sqrt(800)
    assert (found.norm_squared < 0).any()

