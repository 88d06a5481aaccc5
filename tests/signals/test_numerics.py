"""Numbers at the edge: float32 against float64, bf16 against float32, long sequences, ids that may never be sampled.

Inputs are numbers that float32 holds exactly, so only the arithmetic differs. Errors are in units of float32's ε
times the *scale* of a value: the sum of its terms' magnitudes, each with the digits that its logarithms lose.
`pytest -s tests/signals/test_numerics.py` prints the worst of every function; the largest seen is 1.3, for KL and
log-probabilities at ±1e4.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.engine import state as state_module
from copd_nb.engine import training as train_module
from copd_nb.data.capability import Example
from copd_nb.signals.divergences import (
    divergence,
    entropy,
    kl,
    overlap_mass,
    sequence_mean,
    symmetric_kl,
    token_logprobs,
    token_mean,
    topk_mask,
    topk_overlap,
    topk_reverse_kl,
)
from copd_nb.engine.config import Config
from copd_nb.engine.passes import collect, hear, teacher_scores
from copd_nb.engine.batches import Batch
from copd_nb.engine.state import Training
from copd_nb.engine.update import gradients_of
from copd_nb.signals.compare import compare_tokens
from copd_nb.signals.heads import token_scores
from copd_nb.signals.teachers import token_divergence
from copd_nb.schedule.merging import METHODS, merge
from copd_nb.policy.toys import minis_base, minis
from copd_nb.signals.objectives import (
    LARGEST_REWARD,
    clip_share,
    clipped_surrogate,
    delta_stats,
    distillation_loss,
    grpo_advantages,
    kl_estimator_loss,
    loss_denominator,
    opd_advantages,
    reduce_loss,
    low_probability_advantages,
)
from copd_nb.policy.head import BANNED_LOGIT, Head, common_ids
from copd_nb.signals.rollouts import completion_mask, generator
from copd_nb.signals.sampling import _choose, _invert, sample
from copd_nb.engine.runs import Run
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, Phase, Update

EPS = torch.finfo(torch.float32).eps
UNITS = 4  # of ε times the scale: what is allowed
NONE = torch.tensor([], dtype=torch.long)
INF = math.inf


@pytest.fixture(scope="module")
def worst():
    "Worst error of every function in units of ε times the scale; printed at the end, shown with -s."
    found = {}
    yield found
    print(
        "\nworst error in units of float32's ε times the scale\n"
        + "\n".join(f"  {name:24} {value:.2g}" for name, value in sorted(found.items()))
    )


def held(x: torch.Tensor) -> torch.Tensor:
    "The nearest numbers that float32 holds, as float64."
    return x.float().double()


def draw(seed, *shape, spread=1.0):
    return held(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def ban(x, *ids, value=BANNED_LOGIT):
    return x.index_fill(-1, torch.tensor(ids), value)


HOT = rows([1e4, 0, 0, 0, 0, 0], [-1e4, 1e4, 0, -1e4, 0, 0], [-1e4, 1e4, 1e4, 0, 0, 0])
FINITE = {  # logits of two policies, (n, 6) each
    "ordinary": (draw(0, 4, 6, spread=4), draw(1, 4, 6, spread=4)),
    "nearly equal": (draw(0, 4, 6), held(draw(0, 4, 6) + draw(1, 4, 6, spread=1e-4))),
    "all equal": (torch.zeros(2, 6).double(), torch.full((2, 6), 1e4).double()),
    "±1e4": (
        held((torch.rand(8, 6, generator=torch.Generator().manual_seed(2)).double() * 2 - 1) * 1e4),
        draw(3, 8, 6, spread=1e4),
    ),
    "±1e30": (held(draw(4, 4, 6, spread=1e30)), held(draw(5, 4, 6, spread=1e30))),
    "one-hot": (HOT, HOT.flip(0)),
    "undecided and one-hot": (torch.zeros(3, 6).double(), HOT),
    "banned in both": (ban(draw(6, 4, 6, spread=5), 1, 4), ban(draw(7, 4, 6, spread=5), 1, 4)),
    "banned in one": (ban(draw(6, 4, 6, spread=5), 1, 4), ban(draw(7, 4, 6, spread=5), 1, 3)),
    "one id allowed": (ban(draw(8, 2, 6), 0, 1, 2, 4, 5), ban(draw(9, 2, 6), 0, 1, 2, 4, 5)),
    "temperature 1e-3": (held(draw(10, 4, 6, spread=20) / 1e-3), held(draw(11, 4, 6, spread=20) / 1e-3)),
    "temperature 1e3": (held(draw(10, 4, 6, spread=20) / 1e3), held(draw(11, 4, 6, spread=20) / 1e3)),
}
MASKED = {  # ids that both rule out, and more that only the second may sample
    "masks": (ban(draw(12, 4, 6, spread=5), 0, 4, value=-INF), ban(draw(13, 4, 6, spread=5), 0, 4, value=-INF)),
    "masks at ±1e4": (
        ban(draw(12, 4, 6, spread=1e4), 0, 4, value=-INF),
        ban(draw(13, 4, 6, spread=1e4), 0, 4, value=-INF),
    ),
    "one id left": (ban(draw(14, 2, 6), 0, 1, 2, 3, 4, value=-INF), ban(draw(15, 2, 6), 0, 1, 2, 3, 4, value=-INF)),
}


def scale(kind, a, b):
    "Sum of what is added up for a value, with the digits that logarithms lose, (n,)."
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)

    def under(x, y):
        return (x.exp() * (1 + x.abs()) * (1 + x.abs() + y.abs())).nan_to_num(0, INF).sum(-1)

    if kind == "jsd":
        return sum((x.exp() * (1 + x.abs())).nan_to_num(0).sum(-1) for x in (log_p, log_q)) + 1
    if kind == "entropy":
        return under(log_p, 0 * log_p.nan_to_num(neginf=0))
    if kind == "logp":
        return 1 + log_p[..., IDS[:1]].abs().squeeze(-1)
    return under(log_p, log_q) + under(log_q, log_p) if kind in ("forward", "jeffreys") else under(log_p, log_q)


IDS = torch.tensor([3])  # allowed in every case but one


def of_logits(x, head):
    return Head(x.T, None, NONE) if head else x


def by_head(kind, chunk):
    "The same number by the chunked head: weights are the logits, states the unit vectors, so the product is exact."

    def call(a, b):
        (head, teacher), states = (of_logits(x, True) for x in (a, b)), torch.eye(len(a), dtype=a.dtype)
        ids = IDS.expand(len(a))
        if kind == "logp":
            return token_scores(head, states, ids, chunk=chunk).logp
        if kind == "entropy":
            return token_scores(head, states, ids, True, chunk=chunk).entropy
        return token_divergence(head, states, teacher, states, kind, 0.3, 3 if kind == "topk" else None, chunk)

    return call


PLAIN = {
    "logp": lambda a, b: token_logprobs(a, IDS.expand(len(a))),
    "entropy": lambda a, b: entropy(a),
    "jeffreys": symmetric_kl,
    "reverse": divergence,
    "forward": lambda a, b: divergence(a, b, "forward"),
    "jsd": lambda a, b: divergence(a, b, "jsd", 0.3),
    "topk": lambda a, b: topk_reverse_kl(a, b, 3),
}
HEADS = {
    f"{kind} by head, chunk {chunk}": by_head(kind, chunk)
    for kind in ("logp", "entropy", "reverse", "forward", "jsd", "topk")
    for chunk in (6, 1000)
}


def value_and_gradient(function, a, b, dtype):
    a, b = a.to(dtype, copy=True).requires_grad_(), b.to(dtype)
    value = function(a, b)
    gradient = torch.autograd.grad(value.sum(), a)[0] if value.requires_grad else torch.zeros_like(a)
    assert value.dtype == gradient.dtype == dtype
    return value.detach().double(), gradient.double()


@pytest.mark.parametrize("name", [*PLAIN, *HEADS])
def test_values_and_gradients_in_float32_are_those_of_float64(name, worst):
    kind, function = name.split()[0], (PLAIN | HEADS)[name]
    for case, (a, b) in (FINITE | (MASKED if name in PLAIN else {})).items():
        if kind == "logp" and case == "one id left":
            continue  # the id that is scored is ruled out
        (exact, slope), (value, gradient) = (
            value_and_gradient(function, a, b, d) for d in (torch.float64, torch.float32)
        )
        assert (
            exact.isfinite().all() and value.isfinite().all() and slope.isfinite().all() and gradient.isfinite().all()
        ), case
        unit = EPS * scale(kind, a, b)
        off = torch.maximum((value - exact).abs() / unit, (gradient - slope).abs().amax(-1) / unit).max().item()
        worst[kind] = max(worst.get(kind, 0), off)
        assert off <= UNITS, (case, off)


def test_overlaps_and_masses_in_float32_are_those_of_float64():
    for case, (a, b) in (FINITE | MASKED).items():
        for k in (1, 3, 6):
            assert torch.equal(topk_mask(a.float(), k), topk_mask(a, k)) and torch.equal(
                topk_overlap(a.float(), b.float(), k), topk_overlap(a, b, k)
            ), case
            for x, y in zip(overlap_mass(a.float(), b.float(), k), overlap_mass(a, b, k)):
                assert (x - y).abs().max() <= UNITS * EPS * 10, case


def test_compared_tokens_in_float32_are_those_of_float64():
    kinds = dict(symmetric_kl="jeffreys", kl_ab="jeffreys", kl_ba="jeffreys", jsd="jsd", entropy_a="entropy")
    for case, (a, b) in FINITE.items():
        found = []
        for dtype in (torch.float64, torch.float32):
            states = torch.eye(len(a), dtype=dtype)
            found.append(
                compare_tokens(
                    of_logits(a.to(dtype), True),
                    states,
                    of_logits(b.to(dtype), True),
                    states,
                    3,
                    ids=IDS.expand(len(a)),
                )
            )
        for name, x in found[1].items():
            assert x.dtype == torch.float32 and (x.isfinite().all() or name == "overlap_advantage"), (case, name)
            if name in kinds:
                assert ((x - found[0][name]).abs() <= UNITS * EPS * scale(kinds[name], a, b)).all(), (case, name)
        assert torch.equal(found[1]["overlap"], found[0]["overlap"].float())


def test_what_is_infinite_and_what_is_not():
    free, hot, cold = torch.zeros(1, 4), rows([0, -INF, -INF, -INF]).float(), rows([-INF, 0, -INF, -INF]).float()
    assert kl(free, hot).item() == INF and kl(hot, free).item() == pytest.approx(math.log(4))
    assert (
        divergence(free, hot, "reverse").item()
        == symmetric_kl(free, hot).item()
        == symmetric_kl(hot, cold).item()
        == INF
    )
    assert divergence(free, hot, "forward").item() == pytest.approx(math.log(4))
    assert (
        entropy(hot).item() == 0
        and symmetric_kl(hot, hot).item() == 0
        and token_logprobs(hot, torch.tensor([1])).item() == -INF
    )
    for alpha in (0.3, 0.5):
        assert divergence(hot, cold, "jsd", alpha).item() == pytest.approx(
            -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha)
        )
    assert topk_reverse_kl(free, hot, 2).item() == INF  # id 1 is kept, and the teacher rules it out
    assert topk_reverse_kl(free, rows([0, 0, -INF, 0]).float(), 2).item() == pytest.approx(
        math.log(3 / 2) - 0.5 * math.log(2), abs=1e-6
    )  # in the tail it is not alone
    assert topk_reverse_kl(hot, hot, 2).item() == 0
    banned = divergence(free, hot.clamp(min=BANNED_LOGIT), "reverse").item()
    assert banned == pytest.approx(
        0.75e9, rel=1e-6
    )  # what the policies' own bans give instead: large and with a gradient


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd", "topk"])
def test_distillation_through_masks_learns_and_stays_finite(kind):
    a, b = (x.float() for x in MASKED["masks"])
    a.requires_grad_()
    distillation_loss(a[None], b[None], torch.ones(1, 4), kind, k=5 if kind == "topk" else None).backward()
    assert a.grad.isfinite().all() and (a.grad[:, [0, 4]] == 0).all() and (a.grad[:, 1] != 0).all()


# Objectives

TOKENS = {  # log-probabilities, old ones, advantages
    "ordinary": (-draw(0, 5, 6).abs(), -draw(1, 5, 6).abs(), draw(2, 5, 6)),
    "on policy": (-draw(0, 5, 6).abs(), -draw(0, 5, 6).abs(), draw(2, 5, 6)),
    "±1e4": (-draw(3, 5, 6, spread=1e4).abs(), -draw(4, 5, 6, spread=1e4).abs(), draw(5, 5, 6, spread=1e4)),
    "banned": (ban(-draw(6, 5, 6).abs(), 1, 2), ban(-draw(7, 5, 6).abs(), 2, 3), draw(8, 5, 6)),
    "certain": (torch.zeros(5, 6).double(), torch.zeros(5, 6).double(), draw(9, 5, 6, spread=1e-30)),
}
MASKS = {
    "all": torch.ones(5, 6),
    "one token": torch.zeros(5, 6).index_put((torch.tensor([2]), torch.tensor([0])), torch.tensor(1.0)),
    "an empty row": (torch.arange(6) < torch.tensor([6, 1, 0, 3, 2])[:, None]).float(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_surrogate_in_float32_is_that_of_float64(reduction, mask, worst):
    keep = MASKS[mask]
    for case, (logp, old, advantages) in TOKENS.items():
        found = []
        for dtype in (torch.float64, torch.float32):
            leaf = logp.to(dtype).requires_grad_()
            loss = clipped_surrogate(leaf, old.to(dtype), advantages.to(dtype), keep, reduction=reduction, max_tokens=6)
            found.append((loss.item(), torch.autograd.grad(loss, leaf)[0].double()))
        ratio = (logp - old).clamp(-20, 20)
        terms = reduce_loss(ratio.exp() * (1 + ratio.abs()) * advantages.abs(), keep, reduction, max_tokens=6).item()
        off = max(abs(found[1][0] - found[0][0]), (found[1][1] - found[0][1]).abs().max().item()) / (EPS * terms)
        worst["surrogate"] = max(worst.get("surrogate", 0), off)
        assert math.isfinite(found[1][0]) and found[1][1].isfinite().all() and off <= UNITS, case
        shares = [
            clip_share(logp.to(d), old.to(d), advantages.to(d), keep).item() for d in (torch.float64, torch.float32)
        ]
        assert shares[0] == shares[1]


def test_no_token_at_all_is_zero_or_refused_as_documented():
    logp, nothing = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="nothing to learn from"):
        clipped_surrogate(logp, logp, logp, nothing)
    for reduction in ("sequence", "constant"):
        assert clipped_surrogate(logp, logp, logp, nothing, reduction=reduction, max_tokens=3) == 0
    for function in (
        lambda: clip_share(logp, logp, logp, nothing),
        lambda: delta_stats(logp, logp, nothing),
        lambda: token_mean(logp, nothing),
        lambda: sequence_mean(logp, nothing),
    ):
        with pytest.raises(ValueError, match="no token"):
            function()
    assert loss_denominator(nothing) == 0 and completion_mask(torch.tensor([[5]]), [5])[0].tolist() == [[1]]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_estimators_in_float32_are_those_of_float64(estimator, worst):
    for case, (student, teacher, _) in TOKENS.items():
        found = [
            value_and_gradient(lambda a, b: kl_estimator_loss(a, b, estimator), student, teacher, d)
            for d in (torch.float64, torch.float32)
        ]
        delta = (teacher - student).abs()
        unit = EPS * (
            1
            + delta
            + (
                delta.square()
                if estimator == "k2"
                else (teacher - student).clamp(max=20).exp() * (1 + delta.clamp(max=20))
            )
        )
        off = max(((x - y).abs() / unit).max().item() for x, y in zip(*found))
        worst[estimator] = max(worst.get(estimator, 0), off)
        assert off <= UNITS and all(x.isfinite().all() for x in found[1]), case


@pytest.mark.parametrize("clip", [None, 0.5, 1e4])
def test_distillation_advantages_and_their_statistics_in_float32(clip):
    keep = MASKS["an empty row"]
    for case, (student, teacher, _) in TOKENS.items():
        exact, found = (opd_advantages(teacher.to(d), student.to(d), 0.3, clip) for d in (torch.float64, torch.float32))
        assert found.dtype == torch.float32 and ((found - exact).abs() <= UNITS * EPS * exact.abs() + 1e-38).all(), case
        wide, narrow = (delta_stats(teacher.to(d), student.to(d), keep, clip) for d in (torch.float64, torch.float32))
        size = ((teacher - student).abs() * keep).sum().item() / keep.sum().item()
        assert narrow.pop("mean") == pytest.approx(wide.pop("mean"), rel=0, abs=UNITS * EPS * size), case
        assert narrow == pytest.approx(wide, rel=UNITS * EPS), case
        low = low_probability_advantages(student.float(), 0.5)
        assert torch.equal(low, low_probability_advantages(student, 0.5).float()), case


@pytest.mark.parametrize(
    "name, rewards",
    [
        ("right and wrong", [1.0, 0, 0, 1, 0, 0, 0, 1]),
        ("offset", [1e6, 1e6 + 1, 1e6, 1e6 + 3]),
        ("small", [1e-30, 0, 0, 2e-30]),
        ("mixed", [1e15, -1e15, 0.5, 3.0]),
        ("one ulp", [1.0, 1.0 + EPS, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("scaled", ["std", "none"])
def test_advantages_in_float32_are_those_of_float64(name, rewards, scaled):
    "A group's mean is rounded at the size of its rewards, so a spread far below that size is known less well."
    r = held(torch.tensor(rewards, dtype=torch.float64))
    exact, found = (grpo_advantages(r.to(d), len(r), scale=scaled) for d in (torch.float64, torch.float32))
    spread = r.std().item() + 1e-6 if scaled == "std" else 1
    assert (
        found.isfinite().all()
        and ((found - exact).abs() <= UNITS * EPS * (r.abs().max().item() / spread + exact.abs())).all()
    )


def test_rewards_that_float32_can_not_square_are_refused():
    assert grpo_advantages(torch.tensor([LARGEST_REWARD, 0.0]), 2).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    for value in (1e16, -1e30, INF, math.nan):
        with pytest.raises(ValueError, match="the reward of row 1 is .*of a size up to 1e"):
            grpo_advantages(torch.tensor([0.0, value]), 2)


@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_are_rounded_once(method):
    "The arithmetic of a merge is float64 whatever the weights are, so float32 branches give float64's result, rounded."
    extremes = held(torch.tensor([1e4, -1e4, 1e30, -1e30, 1e-30, 0, 1, -1, 3e37, 1.17e-38]))

    def state(seed):
        return {
            "w": draw(seed, 3, 10),
            "edge": extremes.roll(seed),
            "zero": torch.zeros(4).double(),
            "one": draw(seed, 1),
        }

    models, base_state = [state(1), state(2)], state(3)
    wide = merge(models, method, [0.3, 0.9], base_state, 0.6, seed=1)
    narrow = merge(
        [{k: x.float() for k, x in m.items()} for m in models],
        method,
        [0.3, 0.9],
        {k: x.float() for k, x in base_state.items()},
        0.6,
        seed=1,
    )
    for key, x in narrow.items():
        assert x.dtype == torch.float32 and torch.equal(x, wide[key].float()) and x.isfinite().all(), key


# Many tokens


def test_a_million_tokens_add_up():
    g = torch.Generator().manual_seed(0)
    logp, old = (-torch.rand(1000, 1000, generator=g) for _ in range(2))
    advantages, mask = torch.randn(1000, generator=g) + 0.1, torch.rand(1000, 1000, generator=g) < 0.9
    for reduction in ("token", "sequence", "constant"):
        loss, exact = (
            clipped_surrogate(
                logp.to(d), old.to(d), advantages.to(d), mask, reduction=reduction, max_tokens=1000
            ).item()
            for d in (torch.float32, torch.float64)
        )
        assert loss == pytest.approx(exact, rel=1e-5)
    narrow, wide = (delta_stats(old.to(d), logp.to(d), mask, 0.5) for d in (torch.float32, torch.float64))
    assert narrow.pop("mean") == pytest.approx(wide.pop("mean"), abs=1e-8) and narrow == pytest.approx(wide, rel=1e-6)
    for mean in (token_mean, sequence_mean):
        assert mean(logp, mask).item() == pytest.approx(mean(logp.double(), mask).item(), rel=1e-6)
        assert mean(torch.full((1000, 1000), 0.1), mask).item() == pytest.approx(0.1, rel=1e-6)


def test_denominators_count_more_tokens_than_float32_can():
    mask = torch.ones(4096, 4097, dtype=torch.bool)
    assert loss_denominator(mask) == 4096 * 4097 > 2**24 and loss_denominator(mask, "constant", 4097) == 4096 * 4097
    mask[0, 0] = False
    assert loss_denominator(mask) == 4096 * 4097 - 1


def test_weight_gradients_of_many_chunks_add_up():
    "The gradient of a head is summed chunk by chunk; four thousand tokens in chunks of ten."
    g = torch.Generator().manual_seed(0)
    weight, hidden, ids = (
        torch.randn(11, 3, generator=g),
        torch.randn(4000, 3, generator=g),
        torch.randint(11, (4000,), generator=g),
    )
    found = []
    for dtype in (torch.float32, torch.float64):
        head = Head(weight.to(dtype).requires_grad_(), None, NONE)
        found.append(
            torch.autograd.grad(token_scores(head, hidden.to(dtype), ids, chunk=110).logp.mean(), head.weight)[
                0
            ].double()
        )
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


@pytest.fixture(scope="module")
def long_policy():
    "One layer that has positions for thousands of tokens."
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from copd_nb.policy.core import Policy
    from copd_nb.policy.processors import character_tokenizer

    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    policy = Policy(Qwen3ForCausalLM(config), tokenizer, "long")
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(20)  # opinions, as a trained model has them
    return policy


def test_a_completion_of_thousands_of_tokens_is_scored_as_in_float64(long_policy):
    "Log-probabilities within 1e-4, loss within 1e-6, gradient within 1e-4 of float64; 3e-6, 5e-9 and 4e-7 were seen."
    wide = long_policy.clone("wide")
    wide.model.double()
    ids = torch.randint(10, 100, (1, 3000), generator=torch.Generator().manual_seed(0))
    found = []
    for policy in (long_policy, wide):
        prompts, dtype = policy.encode([Example("12+3=", "15", "sums")]), policy.model.dtype
        hidden = policy.completion_hidden(prompts, ids)
        logp = token_scores(policy.head(), hidden, ids[0], chunk=2**16).logp[None]
        advantages = torch.linspace(-1, 1, 3000, dtype=dtype)[None]
        loss = clipped_surrogate(logp, (logp + 0.1 * advantages).detach(), advantages, torch.ones(1, 3000))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())]).double()
        found.append((logp.detach().double(), loss.item(), gradient))
    (logp, loss, gradient), (exact, exact_loss, slope) = found
    off = (logp - exact).abs().max().item(), abs(loss - exact_loss), ((gradient - slope).norm() / slope.norm()).item()
    print("\n3,000 tokens against float64: log-probabilities {:.1e}, loss {:.1e}, gradient {:.1e}".format(*off))
    assert exact.std() > 0.3 and off[0] < 1e-4 and off[1] < 1e-6 and off[2] < 1e-4


# Precision of computation

PRECISION = Config(prompts=6, opd_prompts=6, group_size=4, max_new_tokens=10, device="cpu")
SIGNALS = {
    "RL": RL("text"),
    "OPD sampled": OPD("text", "base", 1.0),
    "OPD reverse": OPD("text", "base", 1.0, "reverse"),
    "OPD topk": OPD("text", "base", 1.0, "topk"),
}


def begin(signal, precision, suite, student, folder):
    schedule = Schedule("s", ["a"], [Phase("p", 1, [Update("a", [signal])])], "a")
    (folder / "events.jsonl").touch()
    run = Run.__new__(Run)
    run.path = folder
    config = replace(PRECISION, precision=precision)
    return Training(
        schedule,
        suite,
        student[0],
        config,
        train_module.accelerator_for(config),
        run,
        {"a": state_module.Branch(student[1].clone("a"))},
    )


def again(training, batch):
    "The same rollouts, to be scored and learnt from in the precision of a training."
    new = Batch(batch.signals, replace(batch.rollouts, start=None), advantages=batch.advantages)
    if isinstance(new.signals[0], OPD):
        hear(new, teacher_scores(training, new.signals[0], new.rollouts))
    return new


@pytest.fixture(scope="module")
def student():
    "The shipped base as the teacher and a branch that has moved away from it."
    teacher = minis_base()
    branch = teacher.clone("moved")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in branch.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1 * p.std())
    return teacher, branch


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "OPD topk" else n for n in SIGNALS])
def test_bf16_drifts_within_bounds(name, student, tmp_path):
    """What bf16 changes for the same rollouts: log-probabilities, loss, direction of the gradient.

    bf16 keeps 8 bits, and two layers with a head in float32 leave errors of some 1e-2 nats; the gradient must point
    the same way."""
    suite, found = minis(("text",)), {}
    for precision in ("fp32", "bf16"):
        training = begin(SIGNALS[name], precision, suite, student, tmp_path)
        if precision == "fp32":
            (first,) = collect(training, training.schedule.phases[0].updates[0], 0)
            if name == "RL":
                first.advantages = torch.randn(24, generator=torch.Generator().manual_seed(1))
        batch = again(training, first)
        gradients, losses = gradients_of(training, "a", [batch])
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(training.policy("a").parameters(), next(iter(gradients.values())))
            ]
        )
        found[precision] = batch.logp[batch.rollouts.mask.bool()], next(iter(losses.values())), flat
    (logp, loss, gradient), (low, low_loss, low_gradient) = found["fp32"], found["bf16"]
    drift, cosine = (
        (logp - low).abs(),
        torch.nn.functional.cosine_similarity(gradient.double(), low_gradient.double(), 0).item(),
    )
    print(
        f"\nbf16 against fp32, {name}: log-probabilities {drift.mean():.1e} on average, {drift.max():.1e} at most; "
        f"loss {loss:.4f} and {low_loss:.4f}; "
        f"gradient: cosine {cosine:.5f}, length × {(low_gradient.norm() / gradient.norm()).item():.3f}"
    )
    assert 0 < drift.mean() < 0.02 and drift.max() < 0.3 and abs(loss - low_loss) < 0.02
    assert (
        cosine > 0.98
        and low_gradient.norm() / gradient.norm() == pytest.approx(1, abs=0.1)
        and low_gradient.dtype == torch.float32
    )


def test_the_trainer_agrees_with_the_sampler(student, tmp_path):
    "Log-probabilities of decoding, token by token over a cache, against the one pass of the update: the ratio's error."
    suite, gaps = minis(("text",)), {}
    for precision in ("fp32", "bf16"):
        training = begin(SIGNALS["RL"], precision, suite, student, tmp_path)
        (batch,) = collect(training, training.schedule.phases[0].updates[0], 0)
        new = again(training, batch)
        new.advantages = torch.ones(24)
        gradients_of(training, "a", [new])
        gaps[precision] = (new.logp - batch.rollouts.logp)[new.rollouts.mask.bool()].abs()
    print(
        "\nsampler against trainer: "
        + ", ".join(f"{p} {x.mean():.1e} nats on average, {x.max():.1e} at most" for p, x in gaps.items())
    )
    assert (
        gaps["fp32"].mean() < 2e-6
        and gaps["fp32"].max() < 5e-5
        and gaps["bf16"].mean() < 2e-3
        and gaps["bf16"].max() < 0.1
    )


# Ids that may never be sampled

PADDING = {"large": 1e4, "largest": 3e38, "infinite": INF, "not a number": math.nan, "small": -1e4}


@settings(max_examples=80)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(0, 6),
    st.integers(0, 4),
    st.sampled_from(sorted(PADDING)),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([None, 5.0]),
)
def test_padding_and_banned_ids_are_never_chosen(seed, allowed, padding, banned, kind, spread, temperature, softcap):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(allowed + banned, generator=g)
    forbidden = torch.cat([order[allowed:], torch.arange(allowed + banned, allowed + banned + padding)])
    weight = torch.randn(allowed + banned + padding, 5, generator=g) * spread
    weight[forbidden] = PADDING[kind]
    head, hidden = (
        Head(weight, None, forbidden, softcap=softcap, temperature=temperature),
        torch.randn(8, 5, generator=g),
    )
    logits = head(hidden)
    assert (logits.softmax(-1)[:, forbidden] == 0).all() and logits.isfinite().all()
    draws = torch.cat([torch.tensor([-1.0, 0.0, 1 - 2**-24]), torch.rand(5, generator=g)])
    eos = order[:1]
    for ends in (None, torch.arange(8) % 2 == 0):
        assert not torch.isin(_choose(logits, draws, ends if allowed > 1 else None, eos), forbidden).any()
    scores = token_scores(head, hidden, order[:1].expand(8), True, k=allowed)
    assert (
        not torch.isin(scores.top_ids, forbidden).any()
        and scores.logp.isfinite().all()
        and scores.entropy.isfinite().all()
    )


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 10), st.integers(0, 8), st.integers(0, 8))
def test_heads_of_different_length_compare_the_ids_that_both_have(seed, width, more, most):
    g = torch.Generator().manual_seed(seed)

    def make(extra):
        return Head(
            torch.randn(width + extra, 4, generator=g, dtype=torch.float64),
            None,
            torch.tensor([0, *range(width, width + extra)]),
        )

    a, b, hidden = make(more), make(most), torch.randn(3, 4, generator=g, dtype=torch.float64)
    left, right = common_ids(a, b)
    assert len(left.weight) == len(right.weight) == width + min(more, most)
    p, q = (h(hidden).log_softmax(-1) for h in (a, b))
    assert torch.allclose(left(hidden).log_softmax(-1)[:, :width], p[:, :width], atol=1e-12)
    wanted = (p.exp() * (p - torch.nn.functional.pad(q, (0, 9), value=0)[:, : p.shape[1]]))[:, 1:width].sum(-1)
    assert torch.allclose(token_divergence(a, hidden, b, hidden, "reverse"), wanted, atol=1e-12)
    free = replace(a, banned=a.banned[:1])
    if more > most:
        with pytest.raises(ValueError, match="more than padding"):
            common_ids(free, b)


def parallel_cumsum(self, dim):
    "The cumulative sum as a graphics card adds it up: in blocks, whose totals are added in another order."
    blocks = torch.nn.functional.pad(self, (0, -self.shape[-1] % 8)).unflatten(-1, (-1, 8))
    inner = torch.empty_like(blocks)
    for i in range(8):
        inner[..., i] = blocks[..., i] + (inner[..., i - 1] if i else 0)
    totals = ((blocks[..., 0] + blocks[..., 4]) + (blocks[..., 2] + blocks[..., 6])) + (
        (blocks[..., 1] + blocks[..., 5]) + (blocks[..., 3] + blocks[..., 7])
    )
    before = torch.zeros_like(totals)
    for i in range(1, totals.shape[-1]):
        before[..., i] = before[..., i - 1] + totals[..., i - 1]
    return (before[..., None] + inner).flatten(-2)[..., : self.shape[-1]]


def test_a_sum_that_is_rounded_differently_from_place_to_place_draws_no_banned_id(monkeypatch):
    "Each draw aims at a place where the rounded sum rises although the id has no probability."
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 64, generator=g) * 2
    logits[:, torch.arange(64) % 8 < 3] = BANNED_LOGIT  # the first ids of every block
    p = logits.softmax(-1)
    cumulative = parallel_cumsum(p, -1)
    rises = (p == 0) & (cumulative > torch.nn.functional.pad(cumulative[:, :-1], (1, 0)))
    rows_, columns = rises.nonzero(as_tuple=True)
    u = cumulative[rows_, columns - 1] / cumulative[rows_, -1]
    monkeypatch.setattr(torch.Tensor, "cumsum", parallel_cumsum)
    chosen = _invert(logits[rows_], u)
    assert len(chosen) > 50 and (p[rows_].gather(-1, chosen[:, None]) > 0).all()


def test_logits_that_are_no_numbers_choose_an_id_that_the_tokenizer_knows():
    head = Head(torch.full((9, 2), math.nan), None, torch.tensor([0, 3, 7, 8]))
    logits = head(torch.ones(3, 2))
    assert not torch.isin(_choose(logits, torch.tensor([-1.0, 0.0, 0.99]), None, torch.tensor([1])), head.banned).any()


def test_cold_rollouts_are_greedy_and_hot_ones_take_every_allowed_id(long_policy):
    prompts = long_policy.encode([Example("12+3=", "15", "sums")])
    with torch.no_grad():
        greedy = sample(long_policy, prompts, 4, 6, greedy=True)
        cold = sample(long_policy, prompts, 4, 6, 1e-3, source=generator("cpu", 0))
        hot = sample(long_policy, prompts, 2000, 1, 1e3, source=generator("cpu", 0))
    assert torch.equal(cold.ids, greedy.ids) and cold.logp.abs().max() < 1e-3
    allowed = set(range(long_policy.width)) - set(long_policy.banned.tolist())
    assert set(hot.ids.flatten().tolist()) == allowed and hot.entropy.isfinite().all()
    assert hot.logp.mean().item() == pytest.approx(-math.log(len(allowed)), abs=1e-2)
