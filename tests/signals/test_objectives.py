"Objectives against slow loops, and gradients against exact enumeration of a small autoregressive policy."
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings, strategies as st

from copd_nb.signals.divergences import divergence
from copd_nb.signals.objectives import (
    clip_share, clipped_surrogate, delta_stats, distillation_loss, grpo_advantages, kl_estimator_loss,
    loss_denominator, opd_advantages, reduce_loss)

REDUCTIONS = ("token", "sequence", "constant")
NAN = float("nan")


# --- GRPO advantages ---------------------------------------------------------------------------------------------

def slow_advantages(rewards, size, eps=1e-6, scale="std"):
    out = []
    for i in range(0, len(rewards), size):
        group = rewards[i:i + size]
        mean = math.fsum(group) / size
        if size == 1 or len(set(group)) == 1: out += [0.0] * size
        else: out += [(r - mean) / (statistics.stdev(group) + eps if scale == "std" else 1) for r in group]
    return torch.tensor(out)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5).flatmap(lambda g: st.tuples(st.just(g), st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=g, max_size=g), min_size=1, max_size=4))),
    st.sampled_from(["std", "none"]))
def test_advantages_against_a_loop(case, scale):
    size, groups = case
    rewards = [r for g in groups for r in g]
    assert torch.allclose(grpo_advantages(torch.tensor(rewards), size, scale=scale), slow_advantages(rewards, size,
                                                                                                     scale=scale),
                                                                                                     atol=1e-4)


def test_advantages_by_hand():
    a = grpo_advantages(torch.tensor([1.0, 0, 0, 0, 3.0, 1.0, 3.0, 1.0]), 4)
    assert torch.allclose(a, torch.tensor([1.5, -0.5, -0.5, -0.5] + [math.sqrt(3) / 2, -math.sqrt(3) / 2] * 2),
                          atol=1e-5)
    assert grpo_advantages(torch.tensor([0.0, 1e-6]), 2,
                           eps=1e-6)[1].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1), rel=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-8, 7e5])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_no_variance_means_exactly_zero(value, scale):
    for size in (1, 3, 7): assert (grpo_advantages(torch.full((21,), value), size, scale=scale) == 0).all()


def test_advantages_ignore_other_groups_shift_and_dtype():
    r = torch.tensor([1.0, 0, 1, 0, 0, 1])
    assert torch.equal(grpo_advantages(r, 3)[:3], grpo_advantages(r[:3], 3))
    assert torch.allclose(grpo_advantages(r + 5, 3), grpo_advantages(r, 3), atol=1e-5)
    low = grpo_advantages(r.bfloat16(), 3)
    assert torch.equal(low, grpo_advantages(r, 3)) and low.dtype == torch.float32
    assert grpo_advantages(r.long(), 3).dtype == torch.float32


def test_advantage_errors():
    with pytest.raises(ValueError, match="groups of 4"): grpo_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="groups of 0"): grpo_advantages(torch.zeros(6), 0)
    with pytest.raises(ValueError, match="row 2"): grpo_advantages(torch.tensor([0.0, 1, NAN, 0]), 2)
    with pytest.raises(ValueError, match="row 1"): grpo_advantages(torch.tensor([0.0, math.inf]), 2)
    with pytest.raises(ValueError, match="std or none"): grpo_advantages(torch.zeros(2), 2, scale="mean")


# --- surrogate, reductions, denominators --------------------------------------------------------------------------

def batch(seed=0, rows=6, length=5, dtype=torch.float64):
    "Log-probabilities, old ones, token advantages and a mask whose row 2 is empty."
    torch.manual_seed(seed)
    logp, old = (-torch.rand(rows, length, dtype=dtype) * 2 for _ in range(2))
    mask = torch.arange(length) < torch.tensor([5, 1, 0, 3, 2, 4])[:rows, None]
    return logp.requires_grad_(), old, torch.randn(rows, length, dtype=dtype), mask


def slow_surrogate(logp, old, advantages, mask, low, high, reduction, max_tokens):
    rows = []
    for lp, lo, a, m in zip(logp.tolist(), old.tolist(), advantages.tolist(), mask.tolist()):
        terms = []
        for x, y, w, keep in zip(lp, lo, a, m):
            if not keep: continue
            ratio = math.exp(min(20, max(-20, x - y)))
            terms.append(-min(ratio * w, min(1 + high, max(1 - low, ratio)) * w))
        rows.append(terms)
    if reduction == "token": return math.fsum(x for r in rows for x in r) / sum(map(len, rows))
    if reduction == "sequence": return math.fsum(math.fsum(r) / len(r) for r in rows if r) / len(rows)
    return math.fsum(x for r in rows for x in r) / (len(rows) * max_tokens)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.1, 1.0), (0.9, 0.05)])
def test_surrogate_against_a_loop(reduction, low, high):
    for seed in range(5):
        logp, old, advantages, mask = batch(seed)
        fast = clipped_surrogate(logp, old, advantages, mask, low, high, reduction, max_tokens=7)
        assert fast.item() == pytest.approx(slow_surrogate(logp, old, advantages, mask, low, high, reduction, 7),
                                            abs=1e-12)
        rows = advantages[:, :1].expand(-1, 5)
        fast = clipped_surrogate(logp, old, rows[:, 0], mask, low, high, reduction, max_tokens=7)
        assert fast.item() == pytest.approx(slow_surrogate(logp, old, rows, mask, low, high, reduction, 7), abs=1e-12)


def test_clip_is_asymmetric_in_value_gradient_and_share():
    ratios, signs = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0], [1.0, -1.0]
    for sign in signs:
        for ratio in ratios:
            logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
            args = logp, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([sign]), torch.ones(1, 1)
            clipped_surrogate(*args).backward()
            stopped = ratio > 1.28 if sign > 0 else ratio < 0.8
            assert logp.grad.item() == pytest.approx(0 if stopped else -sign * ratio)
            assert clip_share(*args).item() == stopped


def test_clip_share_is_the_share_of_zero_gradients():
    logp, old, advantages, mask = batch(3)
    clipped_surrogate(logp, old, advantages, mask).backward()
    stopped = ((logp.grad == 0) & mask).sum() / mask.sum()
    assert 0 < stopped < 1 and clip_share(logp, old, advantages, mask).item() == pytest.approx(stopped.item())


def test_on_policy_gradient_is_plain_policy_gradient():
    logp, _, advantages, mask = batch()
    clipped_surrogate(logp, logp, advantages, mask).backward()  # the same tensor as old: detached inside
    assert torch.allclose(logp.grad, -advantages * mask / mask.sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 6), (0, 2, 3, 6),
                                  (0, 1, 2, 3, 4, 5, 6)])  # (2, 3) is an empty micro-batch
def test_splitting_into_micro_batches_changes_nothing(reduction, cuts):
    logp, old, advantages, mask = batch()
    whole = clipped_surrogate(logp, old, advantages, mask, reduction=reduction, max_tokens=5)
    gradient, = torch.autograd.grad(whole, logp)
    total = loss_denominator(mask, reduction, 5)
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    assert total == sum(loss_denominator(mask[p], reduction, 5) for p in parts)
    step = {"reduction": reduction, "denominator": total, "max_tokens": 5}
    losses = [clipped_surrogate(logp[p], old[p], advantages[p], mask[p], **step) for p in parts]
    for loss in losses: loss.backward()
    assert torch.allclose(sum(losses), whole, atol=1e-14) and torch.allclose(logp.grad, gradient, atol=1e-14)


@pytest.mark.parametrize("kind, k", [("reverse", None), ("forward", None), ("jsd", None), ("topk", 2)])
def test_splitting_distillation_changes_nothing(kind, k):
    mask = batch()[3]
    s, t = (torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    whole = distillation_loss(s, t, mask, kind, k=k)
    gradient, = torch.autograd.grad(whole, s)
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    losses = [distillation_loss(s[p], t[p], mask[p], kind, k=k, denominator=loss_denominator(mask)) for p in parts]
    for loss in losses: loss.backward()
    assert torch.allclose(sum(losses), whole, atol=1e-14) and torch.allclose(s.grad, gradient, atol=1e-14)
    assert t.grad is None


def test_padding_does_not_matter():
    logp, old, advantages, mask = batch()
    wider = [torch.nn.functional.pad(x.detach(), (0, 3), value=v) for x, v in ((logp, NAN), (old, math.inf),
                                                                               (advantages, NAN))]
    for reduction in REDUCTIONS:
        plain = clipped_surrogate(logp, old, advantages, mask, reduction=reduction, max_tokens=5)
        leaf = wider[0].clone().requires_grad_()
        padded = clipped_surrogate(leaf, wider[1], wider[2], torch.nn.functional.pad(mask, (0, 3)),
                                   reduction=reduction, max_tokens=5)
        padded.backward()
        assert torch.equal(plain, padded)
        assert leaf.grad.isfinite().all() and (leaf.grad[:, 5:] == 0).all()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_masked_garbage_leaks_nowhere(bad):
    logp, old, advantages, mask = batch()
    reference = clipped_surrogate(logp, old, advantages, mask), clip_share(logp, old, advantages, mask)
    dirty = [x.detach().masked_fill(~mask, bad).requires_grad_() for x in (logp, old, advantages)]
    loss = clipped_surrogate(*dirty, mask)
    loss.backward()
    assert torch.equal(loss, reference[0]) and dirty[0].grad.isfinite().all() and (dirty[0].grad[~mask] == 0).all()
    assert dirty[1].grad is None and dirty[2].grad is None  # only logp learns
    assert torch.equal(clip_share(*dirty, mask), reference[1])
    assert delta_stats(dirty[1], dirty[0], mask, 0.5) == delta_stats(old, logp, mask, 0.5)
    s = torch.randn(6, 5, 4, dtype=torch.float64)
    s[~mask] = bad
    s.requires_grad_()
    distillation_loss(s, torch.where(mask[..., None], 0.5, bad) * torch.ones_like(s).detach(), mask).backward()
    assert s.grad.isfinite().all() and (s.grad[~mask] == 0).all()


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([[0.0, -1e4, -1e9, 0.0]], requires_grad=True)
    loss = clipped_surrogate(logp, torch.tensor([[-1e4, 0.0, 0.0, -1e9]]), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]),
                             torch.ones(1, 4))
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()
    for estimator in ("k2", "k3"):
        student = torch.tensor([[0.0, -1e4, -5.0]], requires_grad=True)
        value = kl_estimator_loss(student, torch.tensor([[-1e4, 0.0, -5.0]]), estimator)
        value.sum().backward()
        assert value.isfinite().all() and student.grad.isfinite().all() and value[0, 2] == 0


def test_distillation_in_float32_and_float64_agree_at_extreme_logits():
    torch.manual_seed(4)
    s, t = ((torch.rand(2, 3, 6, dtype=torch.float64) * 2 - 1) * 1e4 for _ in range(2))
    s[..., 0] = t[..., 0] = -1e9
    for kind, k in (("reverse", None), ("forward", None), ("jsd", None), ("topk", 2)):
        wide, narrow = s.clone().requires_grad_(), s.float().requires_grad_()
        losses = distillation_loss(wide, t, torch.ones(2, 3), kind, k=k), distillation_loss(narrow, t.float(),
                                                                                            torch.ones(2, 3), kind, k=k)
        for loss in losses: loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4, abs=1e-3)
        assert narrow.grad.isfinite().all()
        assert narrow.grad.abs().max() <= 2e4


def test_reduce_loss_by_hand():
    x, mask = torch.tensor([[2.0, 4.0, NAN], [6.0, NAN, NAN], [NAN, NAN, NAN]]), torch.tensor([[1, 1, 0], [1, 0, 0],
                                                                                               [0, 0, 0]])
    assert reduce_loss(x, mask).item() == 4
    assert reduce_loss(x, mask, "sequence").item() == 3  # (3 + 6 + 0) / 3: the empty row stays in the denominator
    assert reduce_loss(x, mask, "constant", max_tokens=2).item() == 2
    assert reduce_loss(x, mask, "token", denominator=6).item() == 2


def test_reduction_errors():
    logp, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="token, sequence or constant"): clipped_surrogate(logp, old, advantages, mask,
                                                                                           reduction="mean")
    with pytest.raises(ValueError, match="max_tokens"): clipped_surrogate(logp, old, advantages, mask,
                                                                          reduction="constant")
    with pytest.raises(ValueError, match="denominator"): clipped_surrogate(logp, old, advantages, mask * 0)
    with pytest.raises(ValueError, match="denominator"): clipped_surrogate(logp, old, advantages, mask, denominator=-1)
    with pytest.raises(ValueError, match="old_logp"): clipped_surrogate(logp, old[:, :1], advantages, mask)
    with pytest.raises(ValueError, match="advantages"): clipped_surrogate(logp, old, advantages[:3, 0].repeat(1),
                                                                          mask[:3].repeat(2, 1))
    with pytest.raises(ValueError, match="mask"): clipped_surrogate(logp, old, advantages, mask[:, :1])
    with pytest.raises(ValueError, match="mask"): reduce_loss(old, mask[:, :1])
    with pytest.raises(ValueError, match="no token"): clip_share(logp, old, advantages, mask * 0)


# --- OPD and its statistics -----------------------------------------------------------------------------------------

def test_opd_advantages_clip_before_beta_and_carry_no_gradient():
    student, teacher = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True), torch.tensor([[-0.5, -9.0, -1.0]],
                                                                                            requires_grad=True)
    assert torch.allclose(opd_advantages(teacher, student), torch.tensor([[0.5, -8.0, 0.0]]))
    clipped = opd_advantages(teacher, student, beta=0.1, clip=2.0)
    assert torch.allclose(clipped, torch.tensor([[0.05, -0.2, 0.0]])) and not clipped.requires_grad
    assert opd_advantages(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="teacher_logp"): opd_advantages(teacher[:, :1], student)
    for clip in (0, -1, NAN):
        with pytest.raises(ValueError, match="clip"): opd_advantages(teacher, student, clip=clip)


def test_delta_stats_by_hand():
    delta = torch.arange(1, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    stats = delta_stats(delta[order].view(4, 25), torch.zeros(4, 25), torch.ones(4, 25), clip=80)
    assert stats == pytest.approx({"mean": -0.5, "abs_p50": 50, "abs_p90": 90, "abs_p99": 99, "clipped_share": 0.2})
    one = delta_stats(torch.tensor([[3.0]]), torch.zeros(1, 1), torch.ones(1, 1))
    assert one == {"mean": 3, "abs_p50": 3, "abs_p90": 3, "abs_p99": 3, "clipped_share": 0}
    with pytest.raises(ValueError, match="no token"): delta_stats(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1,
                                                                                                                    2))


# --- exact gradients on an enumerable policy

V, T, EOS = 3, 3, 0
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # every outcome: expectations are exact sums
FIRST, SECOND = SEQUENCES[:, 0], SEQUENCES[:, 1]
STATES = torch.stack([torch.zeros(len(SEQUENCES), dtype=torch.long), 1 + FIRST, 1 + V + V * FIRST + SECOND], 1)
ENDED = (SEQUENCES == EOS).long()
MASK = (ENDED.cumsum(1) - ENDED) == 0  # up to and including the first EOS; what follows sums out of every expectation


@pytest.fixture
def tables():
    "Logits of student (with gradient) and teacher for each of the 13 prefixes of length 0, 1 and 2."
    torch.manual_seed(7)
    return torch.randn(13, V, dtype=torch.float64, requires_grad=True), torch.randn(13, V, dtype=torch.float64)


def scores(table): return table.log_softmax(-1)[STATES,
                                                SEQUENCES]  # (27, 3) log-probability of every token of every sequence


def expected(per_token, logp):
    "E over the student's sequences of Σ_t of (27, 3) values, the sampling distribution detached."
    weight = logp.sum(1).exp().detach()
    return (weight[:, None] * torch.where(MASK, per_token, 0)).sum()


def on_policy_kl(student, teacher, kind):
    "Σ_t E_{prefix ~ student, detached} of the divergence at that prefix."
    return expected(divergence(student, teacher, kind)[STATES], scores(student))


def grad(loss, table): return torch.autograd.grad(loss, table, retain_graph=True)[0]


def sampled_loss(logp, advantages):
    "clipped_surrogate over all sequences, each weighted by its probability: the estimator's exact expectation."
    weight = logp.sum(1).exp().detach()[:, None]
    return clipped_surrogate(logp, logp, advantages * weight, MASK, denominator=1)


def test_expected_opd_gradient_is_that_of_the_reverse_kl_at_visited_prefixes(tables):
    student, teacher = tables
    logp = scores(student)
    gradient = grad(sampled_loss(logp, opd_advantages(scores(teacher), logp)), student)
    assert torch.allclose(gradient, grad(on_policy_kl(student, teacher, "reverse"), student), atol=1e-12)
    assert not torch.allclose(gradient, grad(on_policy_kl(student, teacher, "forward"), student), atol=1e-2)
    half = grad(sampled_loss(logp, opd_advantages(scores(teacher), logp, beta=0.5)), student)
    assert torch.allclose(half, gradient / 2, atol=1e-12)


def test_sequence_kl_needs_the_later_deltas_too(tables):
    "The KL of whole sequences has another gradient, which the sum of this and all later δ as advantage gives."
    student, teacher = tables
    logp, teacher_logp = scores(student), scores(teacher)
    delta = torch.where(MASK, logp - teacher_logp, 0)
    # nothing detached; sequences that agree up to EOS add up to one outcome
    sequence_kl = (logp.sum(1).exp() * delta.sum(1)).sum()
    exact = grad(sequence_kl, student)
    token_level = opd_advantages(teacher_logp, logp)
    to_go = torch.where(MASK, token_level, 0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(grad(sampled_loss(logp, to_go), student), exact, atol=1e-12)
    assert (grad(sampled_loss(logp, token_level), student) - exact).abs().max() > 0.05
    last = student.new_tensor(range(13)) >= 4  # at the last position nothing comes later
    assert torch.allclose(grad(sampled_loss(logp, token_level), student)[last], exact[last], atol=1e-12)


@pytest.mark.parametrize("estimator, kind", [("k2", "reverse"), ("k3", "forward")])
def test_estimators_have_the_gradient_of_their_name(tables, estimator, kind):
    student, teacher = tables
    logp = scores(student)
    gradient = grad(expected(kl_estimator_loss(logp, scores(teacher), estimator), logp), student)
    other = "forward" if kind == "reverse" else "reverse"
    assert torch.allclose(gradient, grad(on_policy_kl(student, teacher, kind), student), atol=1e-12)
    assert not torch.allclose(gradient, grad(on_policy_kl(student, teacher, other), student), atol=1e-2)


def test_k3_is_not_the_forward_kl_of_sequences(tables):
    "Its prefixes are the student's; the forward KL between sequences has the teacher's."
    student, teacher = tables
    logp, teacher_logp = scores(student), scores(teacher)
    sequence_forward = (teacher_logp.sum(1).exp() * torch.where(MASK, teacher_logp - logp, 0).sum(1)).sum()
    k3 = grad(expected(kl_estimator_loss(logp, teacher_logp, "k3"), logp), student)
    assert (k3 - grad(sequence_forward, student)).abs().max() > 0.01


def test_k1_has_no_expected_gradient_and_is_refused(tables):
    student, teacher = tables
    logp = scores(student)
    assert torch.allclose(grad(expected(logp - scores(teacher), logp), student), torch.zeros(13, V,
                                                                                             dtype=torch.float64),
                                                                                             atol=1e-14)
    with pytest.raises(ValueError, match="zero"): kl_estimator_loss(logp, scores(teacher), "k1")
    with pytest.raises(ValueError, match="k4"): kl_estimator_loss(logp, scores(teacher), "k4")


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_full_vocabulary_distillation_on_all_rollouts(tables, kind):
    "distillation_loss over rollouts in proportion to their probability is the on-policy divergence per token."
    student, teacher = tables
    weight = scores(student).sum(1).exp().detach()
    rows = [(student[STATES[i:i + 1]], teacher[STATES[i:i + 1]], MASK[i:i + 1]) for i in range(len(STATES))]
    parts = [distillation_loss(*row, kind, denominator=1) * w for row, w in zip(rows, weight)]
    exact = on_policy_kl(student, teacher, kind)
    assert torch.allclose(sum(parts), exact) and torch.allclose(grad(sum(parts), student), grad(exact, student),
                                                                atol=1e-12)


def batch_gradients(student, per_token, batches, size):
    "Gradients of Σ_t per rollout averaged over `size` sampled rollouts, for many batches: (batches, 13, V)."
    picked = torch.multinomial(scores(student).sum(1).exp().detach(), batches * size, replacement=True).view(batches,
                                                                                                             size)
    rows = torch.where(MASK, per_token, 0).sum(1)
    single = torch.stack([grad(r, student) for r in rows])  # the gradient of each of the 27 outcomes
    return single[picked].mean(1)


@pytest.mark.parametrize("name, kind", [("opd", "reverse"), ("k2", "reverse"), ("k3", "forward")])
def test_sampled_gradients_agree_within_their_standard_error(tables, name, kind):
    student, teacher = tables
    logp, teacher_logp = scores(student), scores(teacher)
    ratio = (logp - logp.detach()).exp()
    per_token = -ratio * opd_advantages(teacher_logp, logp) if name == "opd" else kl_estimator_loss(logp, teacher_logp,
                                                                                                    name)
    torch.manual_seed(11)
    draws = batch_gradients(student, per_token, batches=200, size=200)
    error = (draws.mean(0) - grad(on_policy_kl(student, teacher, kind), student)).abs()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert (error <= 4.5 * standard_error + 1e-12).all()
    assert (standard_error < 0.02).all()  # tight enough for the comparison to mean something


@pytest.mark.parametrize("kind", ["opd", "k2", "k3", "reverse", "forward", "jsd", "topk"])
def test_a_student_that_equals_its_teacher_learns_nothing(tables, kind):
    student, _ = tables
    logp, twin = scores(student), student.detach().clone()
    if kind == "opd": loss = clipped_surrogate(logp, logp, opd_advantages(scores(twin), logp), MASK)
    elif kind in ("k2", "k3"): loss = reduce_loss(kl_estimator_loss(logp, scores(twin), kind), MASK)
    else: loss = distillation_loss(student[STATES], twin[STATES], MASK, kind, k=2 if kind == "topk" else None)
    assert abs(loss.item()) < 1e-14 and grad(loss, student).abs().max() < 1e-14


def test_distillation_errors():
    s = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="needs k"): distillation_loss(s, s, torch.ones(1, 2), "topk")
    with pytest.raises(ValueError, match="take none"): distillation_loss(s, s, torch.ones(1, 2), "reverse", k=2)
    with pytest.raises(ValueError, match="4 and 5"): distillation_loss(s, torch.zeros(1, 2, 5), torch.ones(1, 2))
    with pytest.raises(ValueError, match="mask"): distillation_loss(s, s, torch.ones(1, 1))
    with pytest.raises(ValueError, match="denominator"): distillation_loss(s, s, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="forward, reverse or jsd"): distillation_loss(s, s, torch.ones(1, 2), "kl")
