"Divergences against slow Python loops, properties, and numbers at the edge of float32."

import math
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

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

KINDS = ("reverse", "forward", "jsd")


def softmax(row, temperature=1.0):
    "Probabilities of a list of logits, in Python floats."
    top = max(row)
    weights = [math.exp((x - top) / temperature) for x in row]
    return [w / math.fsum(weights) for w in weights]


def slow_kl(p, q):
    return math.fsum(x * math.log(x / y) for x, y in zip(p, q) if x > 0)


def slow_top(row, k):
    return set(sorted(range(len(row)), key=lambda v: (-row[v], v))[:k])


def slow(function, *logits):
    "A (B, T) tensor of `function` applied to the rows of (B, T, V) logits as lists."
    return torch.tensor(
        [[function(*rows) for rows in zip(*sequences)] for sequences in zip(*(x.tolist() for x in logits))]
    )


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(3, 4, 7) * 2, torch.randn(3, 4, 7) * 2


def test_token_logprobs_and_entropy_against_loops(pair):
    a, _ = pair
    ids = torch.randint(7, (3, 4))
    for temperature in (0.5, 1.0, 2.0):
        expected = [
            [math.log(softmax(row, temperature)[i]) for row, i in zip(rows, r)]
            for rows, r in zip(a.tolist(), ids.tolist())
        ]
        assert torch.allclose(token_logprobs(a, ids, temperature), torch.tensor(expected), atol=1e-5)
    assert torch.allclose(entropy(a), slow(lambda row: -math.fsum(p * math.log(p) for p in softmax(row)), a), atol=1e-5)


def test_divergences_against_loops(pair):
    a, b = pair

    def jsd(s, t, alpha):
        s, t = softmax(s), softmax(t)
        m = [alpha * y + (1 - alpha) * x for x, y in zip(s, t)]
        return alpha * slow_kl(t, m) + (1 - alpha) * slow_kl(s, m)

    reverse, forward = (
        slow(lambda s, t: slow_kl(softmax(s), softmax(t)), a, b),
        slow(lambda s, t: slow_kl(softmax(t), softmax(s)), a, b),
    )
    assert torch.allclose(kl(a, b), reverse, atol=1e-5) and torch.allclose(divergence(a, b), reverse, atol=1e-5)
    assert torch.allclose(divergence(a, b, "forward"), forward, atol=1e-5)
    assert torch.allclose(symmetric_kl(a, b), reverse + forward, atol=1e-5)
    for alpha in (0.1, 0.5, 0.8):
        assert torch.allclose(divergence(a, b, "jsd", alpha), slow(lambda s, t: jsd(s, t, alpha), a, b), atol=1e-5)


def test_hand_made_numbers():
    half, skewed = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3), 0.0]]])  # (1/2, 1/2) and (3/4, 1/4)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(half, skewed, "reverse").item() == pytest.approx(reverse, abs=1e-6)
    assert divergence(half, skewed, "forward").item() == pytest.approx(forward, abs=1e-6)
    assert entropy(half).item() == pytest.approx(math.log(2), abs=1e-6)


def test_alpha_weighs_the_teacher():
    s, t = torch.tensor([[[3.0, 0, 0]]], dtype=torch.float64), torch.tensor([[[0.0, 3.0, 0]]], dtype=torch.float64)
    small = 1e-4  # with alpha on the teacher: jsd/alpha → KL(T‖s) as alpha → 0, jsd/(1 − alpha) → KL(s‖T) as alpha → 1
    assert torch.allclose(divergence(s, t, "jsd", small) / small, divergence(s, t, "forward"), rtol=1e-2)
    s = s + torch.tensor([0.5, 0, 0])
    assert torch.allclose(divergence(s, t, "jsd", 1 - small) / small, divergence(s, t, "reverse"), rtol=1e-2)


@pytest.mark.parametrize("kind", [*KINDS, "topk"])
def test_equal_policies_have_no_divergence_and_no_gradient(kind):
    torch.manual_seed(1)
    base = torch.randn(2, 3, 9)
    base[..., 4] = -1e9
    s = base.clone().requires_grad_()
    value = topk_reverse_kl(s, base, 3) if kind == "topk" else divergence(s, base, kind, 0.3)
    value.sum().backward()
    assert value.abs().max() < 1e-6 and s.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind):
    torch.manual_seed(2)
    s, t = (torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: divergence(a, b, kind, 0.3), (s, t))
    assert torch.autograd.gradcheck(lambda a, b: topk_reverse_kl(a, b, 2), (s, t))
    assert torch.autograd.gradcheck(symmetric_kl, (s, t))


def extreme():
    "Logits up to ±1e4 with banned ids, on which naive formulas overflow."
    torch.manual_seed(3)
    a, b = ((torch.rand(2, 3, 6, dtype=torch.float64) * 2 - 1) * 1e4 for _ in range(2))
    a[0, 0], b[0, 0] = torch.tensor([1e4, -1e4, 0, 0, 0, 0.0]), torch.tensor([-1e4, 1e4, 0, 0, 0, 0.0])
    a[..., 5] = b[..., 5] = -1e9
    a[1, 0, 2] = -1e9  # banned in one of the two only
    return a, b


@pytest.mark.parametrize("name", [*KINDS, "topk", "jeffreys", "entropy"])
def test_extreme_logits_stay_finite_and_agree_with_float64(name):
    functions = {k: (lambda s, t, k=k: divergence(s, t, k)) for k in KINDS}
    functions |= {
        "topk": lambda s, t: topk_reverse_kl(s, t, 2),
        "jeffreys": symmetric_kl,
        "entropy": lambda s, t: entropy(s),
    }
    wide = [x.requires_grad_() for x in extreme()]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    exact, value = functions[name](*wide), functions[name](*narrow)
    exact.sum().backward(), value.sum().backward()
    assert value.dtype == torch.float32 and exact.dtype == torch.float64
    assert value.isfinite().all() and narrow[0].grad.isfinite().all()
    assert torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-3)


def test_low_precision_is_computed_in_float32(pair):
    a, b = (x.bfloat16() for x in pair)
    for function in (kl, symmetric_kl, lambda a, b: topk_reverse_kl(a, b, 3), lambda a, b: divergence(a, b, "jsd")):
        assert function(a, b).dtype == torch.float32
        assert torch.equal(function(a, b), function(a.float(), b.float()))
    ids = torch.zeros(3, 4, dtype=torch.long)
    assert torch.equal(token_logprobs(a, ids, 0.7), token_logprobs(a.float(), ids, 0.7))


def test_banned_ids_take_no_part():
    a, b = torch.tensor([[[1.0, 2.0, -1e9]]]), torch.tensor([[[2.0, 0.5, -1e9]]])
    for kind in KINDS:
        assert torch.allclose(divergence(a, b, kind), divergence(a[..., :2], b[..., :2], kind))
    assert torch.allclose(topk_reverse_kl(a, b, 1), topk_reverse_kl(a[..., :2], b[..., :2], 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_topk_with_ties_against_sorting(seed, k, coarse):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, 3, 12, generator=generator) for _ in range(2))
    if coarse:
        a, b = a.round(), b.round()  # many ties
    stable = torch.zeros_like(a, dtype=torch.bool).scatter(
        -1, a.sort(dim=-1, descending=True, stable=True).indices[..., :k], True
    )
    assert torch.equal(topk_mask(a, k), stable)
    assert torch.allclose(topk_overlap(a, b, k), slow(lambda x, y: len(slow_top(x, k) & slow_top(y, k)) / k, a, b))
    masses = overlap_mass(a, b, k)
    for side in (0, 1):
        mass = slow(
            lambda x, y: math.fsum([softmax(x), softmax(y)][side][v] for v in slow_top(x, k) & slow_top(y, k)), a, b
        )
        assert torch.allclose(masses[side], mass, atol=1e-5)


def test_overlap_is_symmetric_and_full_for_equal_policies(pair):
    a, b = pair
    assert torch.equal(topk_overlap(a, b, 3), topk_overlap(b, a, 3))
    assert (topk_overlap(a, a, 3) == 1).all() and (topk_overlap(a, b, 7) == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.1, 30))
def test_overlaps_are_bounded_symmetric_and_indifferent_to_the_names_of_ids(seed, k, spread):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, 9, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    overlap, (mass_a, mass_b), order = (
        topk_overlap(a, b, k),
        overlap_mass(a, b, k),
        torch.randperm(9, generator=generator),
    )
    assert (
        (max(0, 2 * k - 9) / k <= overlap).all()
        and (overlap <= 1).all()
        and (overlap * k - (overlap * k).round()).abs().max() < 1e-5
    )
    assert torch.equal(overlap, topk_overlap(b, a, k)) and torch.equal(
        overlap, topk_overlap(a[:, order], b[:, order], k)
    )
    for mass, back, moved in zip(
        (mass_a, mass_b), overlap_mass(b, a, k)[::-1], overlap_mass(a[:, order], b[:, order], k)
    ):
        assert (
            torch.equal(mass, back)
            and torch.allclose(mass, moved, atol=1e-12)
            and ((0 <= mass) & (mass <= 1 + 1e-12)).all()
        )
        assert torch.equal(mass > 0, overlap > 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 30), st.floats(0.05, 0.95), st.floats(-1e3, 1e3))
def test_divergences_are_bounded_symmetric_and_indifferent_to_names_and_shifts(seed, spread, alpha, shift):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, 9, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    order = torch.randperm(9, generator=generator)
    jsd = divergence(a, b, "jsd", alpha)
    assert (
        (-1e-12 <= jsd) & (jsd <= -alpha * math.log(alpha) - (1 - alpha) * math.log1p(-alpha) + 1e-12)
    ).all()  # at most the entropy of the weights
    assert torch.allclose(jsd, divergence(b, a, "jsd", 1 - alpha), atol=1e-12) and torch.equal(
        symmetric_kl(a, b), symmetric_kl(b, a)
    )
    for value in (
        kl,
        symmetric_kl,
        lambda x, y: divergence(x, y, "jsd", alpha),
        lambda x, y: topk_reverse_kl(x, y, 4),
        lambda x, y: entropy(x),
    ):
        assert (value(a, b) >= -1e-12).all() and torch.allclose(
            value(a, b), value(a[:, order] + shift, b[:, order] - shift), rtol=1e-9, atol=1e-9
        )
    assert (entropy(a) <= math.log(9) + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 20))
def test_topk_reverse_kl_is_a_growing_lower_bound(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(3, 8, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    full = divergence(s, t, "reverse")
    values = torch.stack([topk_reverse_kl(s, t, k) for k in range(1, 9)])
    assert (values <= full + 1e-9).all() and (values >= -1e-9).all()
    assert (values[1:] >= values[:-1] - 1e-9).all()  # a finer partition loses less
    assert torch.allclose(values[-1], full)
    assert torch.allclose(values[-2], full)  # one id in the tail is no loss either


def test_topk_reverse_kl_against_a_loop_and_with_an_empty_tail(pair):
    def bucketed(s, t, k=3):
        top, s, t = slow_top(s, k), softmax(s), softmax(t)
        tails = [1 - math.fsum(x[v] for v in top) for x in (s, t)]
        return math.fsum(s[v] * math.log(s[v] / t[v]) for v in top) + tails[0] * math.log(tails[0] / tails[1])

    assert torch.allclose(topk_reverse_kl(*pair, 3), slow(bucketed, *pair), atol=1e-5)
    s = torch.tensor([[[90.0, 0, 0, -1e9]]], requires_grad=True)  # tail mass e^-90: below float32's resolution of 1
    value = topk_reverse_kl(s, torch.tensor([[[0.0, 3.0, 0, -1e9]]]), 1)
    value.backward()
    assert value.item() == pytest.approx(math.log(2 + math.exp(3)), rel=1e-5) and s.grad.isfinite().all()


def test_topk_gradient_at_k_equal_v_is_that_of_the_full_kl(pair):
    s, t = pair[0].clone().requires_grad_(), pair[1]
    parts = [torch.autograd.grad(x.sum(), s)[0] for x in (topk_reverse_kl(s, t, 7), divergence(s, t, "reverse"))]
    assert torch.equal(*parts)


def test_means_against_loops():
    random.seed(0)
    x = torch.randn(5, 6)
    mask = torch.tensor([[random.random() < 0.5 for _ in range(6)] for _ in range(5)])
    mask[2] = False
    rows = [[v for v, m in zip(r, keep) if m] for r, keep in zip(x.tolist(), mask.tolist())]
    tokens, means = [v for r in rows for v in r], [sum(r) / len(r) for r in rows if r]
    x[~mask] = float("nan")
    for kind in (torch.bool, torch.float32, torch.int64):
        assert token_mean(x, mask.to(kind)).item() == pytest.approx(sum(tokens) / len(tokens), abs=1e-6)
        assert sequence_mean(x, mask.to(kind)).item() == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_errors_name_what_is_wrong():
    a, b = torch.zeros(1, 1, 5), torch.zeros(1, 1, 6)
    for function in (kl, divergence, symmetric_kl, topk_overlap, overlap_mass, lambda x, y: topk_reverse_kl(x, y, 2)):
        with pytest.raises(ValueError, match="5 and 6"):
            function(a, b)
    with pytest.raises(ValueError, match="same tokens"):
        kl(a, torch.zeros(1, 2, 5))
    for function in (topk_overlap, overlap_mass, topk_reverse_kl):
        with pytest.raises(ValueError, match="k is 6"):
            function(a, a, 6)
        with pytest.raises(ValueError, match="k is 0"):
            function(a, a, 0)
    with pytest.raises(ValueError, match="forward, reverse or jsd"):
        divergence(a, a, "kl")
    for alpha in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            divergence(a, a, "jsd", alpha)
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(a, torch.zeros(1, 1, dtype=torch.long), temperature)
    for mean in (token_mean, sequence_mean):
        with pytest.raises(ValueError, match="no token"):
            mean(torch.ones(2, 2), torch.zeros(2, 2))
        with pytest.raises(ValueError, match="shape"):
            mean(torch.ones(2, 2), torch.ones(2, 1))
