"Weights for a sampler that is not the trainer: by hand, number by number, and what they are right for."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.signals.mismatch import LEVELS, MODES, mismatch_stats, sampler_ratios, sampler_weights
from copd_nb.signals.objectives import clipped_surrogate


def by_hand(rows, mode, level, cap, floor):
    "Weights of rows of (log-prob of the trainer, of the sampler), with Python's floats; and whether each was cut."
    found = []
    for row in rows:
        whole = math.exp(sum(ours - theirs for ours, theirs in row))
        ratios = [whole if level == "sequence" else math.exp(ours - theirs) for ours, theirs in row]
        cut = [r < floor or r > cap for r in ratios]
        kept = [min(max(r, floor), cap) if mode == "truncate" else r * (not c) for r, c in zip(ratios, cut)]
        found.append((kept if mode != "none" else [1.0] * len(row), cut))
    return found


def grids(rows):
    "Rows of pairs as two (B, T) tensors with nonsense outside the mask, and the mask."
    width = max(map(len, rows)) + 1
    ours, theirs, mask = (torch.full((len(rows), width), x, dtype=torch.float64) for x in (-math.inf, 3.0, 0.0))
    for i, row in enumerate(rows):
        ours[i, :len(row)], theirs[i, :len(row)] = torch.tensor(row, dtype=torch.float64).T
        mask[i, :len(row)] = 1
    return ours, theirs, mask


nats = st.floats(-4, 0).map(lambda x: round(x, 3))
rows_of_pairs = st.lists(st.lists(st.tuples(nats, nats), min_size=1, max_size=5), min_size=1, max_size=4)


@given(rows_of_pairs, st.sampled_from(MODES), st.sampled_from(LEVELS), st.sampled_from([1.0, 1.7, 3.0]),
       st.sampled_from([0.0, 0.4, 1.0]))
def test_weights_and_numbers_of_the_log_by_hand(rows, mode, level, cap, floor):
    grid, (ours, theirs, mask) = by_hand(rows, mode, level, cap, floor), grids(rows)
    ours.requires_grad_()
    weights = sampler_weights(ours, theirs, mask, mode, level, cap, floor)
    assert not weights.requires_grad and weights.isfinite().all() and (weights[mask == 0] == 0).all()
    near = all(abs(math.exp(s) - b) > 1e-9 for row in rows for s in (
        [sum(o - t for o, t in row)] if level == "sequence" else [o - t for o, t in row]) for b in (cap, floor))
    if not near: return  # a ratio that is a bound but for rounding: either side is right
    for row, (kept, _) in zip(weights, grid): assert row[:len(kept)].tolist() == pytest.approx(kept)
    found, pairs = mismatch_stats(ours, theirs, mask, mode, level, cap, floor), [p for row in rows for p in row]
    gaps = [o - t for o, t in pairs]
    assert found["sampler_difference"] == pytest.approx(sum(map(abs, gaps)) / len(gaps))
    assert found["sampler_difference_max"] == pytest.approx(max(map(abs, gaps)))
    assert found["sampler_kl"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps) / len(gaps), abs=1e-12)
    one = slice(None) if level == "token" else slice(1)  # a completion counts once
    means, cuts = ([x for pair in grid for x in pair[k][one]] for k in (0, 1))
    if mode == "none": assert found.keys() == {"sampler_difference", "sampler_difference_max", "sampler_kl"}
    else:
        assert found["weight_mean"] == pytest.approx(sum(means) / len(means))
        assert found["weight_clipped"] == pytest.approx(sum(cuts) / len(cuts))


def test_one_policy_has_weights_of_exactly_one():
    logp = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    for mode in MODES:
        for level in LEVELS: assert torch.equal(sampler_weights(logp, logp, mask, mode, level, 1.0, 1.0), mask)
    assert mismatch_stats(logp, logp, mask) == dict(sampler_difference=0.0, sampler_difference_max=0.0, sampler_kl=0.0,
                                                    weight_mean=1.0, weight_clipped=0.0)


def every_pair(seed=0, n=5):
    "All completions of two tokens: their probabilities under a sampler, log-probs of both policies, advantages."
    source = torch.Generator().manual_seed(seed)
    first, then = (torch.randn(*s, generator=source, dtype=torch.float64).requires_grad_() for s in ((n,), (n, n)))
    def logp(noise):
        a, b = ((x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).log_softmax(-1)
                for x in (first, then))
        return torch.stack([a[:, None].expand(n, n), b], -1).view(n * n, 2)
    return (first, then), logp(0.0), logp(0.7).detach(), torch.randn(n * n, generator=source, dtype=torch.float64)


def test_sequence_weights_give_the_trainers_own_gradient_and_token_weights_do_not_quite():
    "Over all completions of two tokens: sum of μ · w · A · ∇log π = sum of π · A · ∇log π, for whole completions."
    leaves, ours, theirs, advantages = every_pair()
    mask = torch.ones_like(ours)

    def gradient(weights, share):
        loss = clipped_surrogate(ours, ours.detach(), weights * (share * advantages)[:, None], mask, denominator=1)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, retain_graph=True)])
    wanted = gradient(mask, ours.detach().sum(1).exp())
    mu = theirs.sum(1).exp()
    sequence, token = (gradient(sampler_weights(ours, theirs, mask, "truncate", level, 1e9), mu) for level in
                       ("sequence", "token"))
    plain = gradient(mask, mu)
    assert torch.allclose(sequence, wanted)
    assert 1e-3 < (token - wanted).norm() < (plain - wanted).norm()


def test_weights_far_apart_are_finite():
    ours, theirs, mask = torch.tensor([[0.0, -900.0]]), torch.tensor([[-900.0, 0.0]]), torch.ones(1, 2)
    for level in LEVELS: assert sampler_ratios(ours, theirs, mask, level).isfinite().all()
    assert all(math.isfinite(x) for x in mismatch_stats(ours, theirs, mask).values())


def test_what_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="unknown mode 'clip': choose one of truncate, mask, none"):
        sampler_weights(x, x, x, "clip")
    with pytest.raises(ValueError, match="unknown level 'row': choose one of token, sequence"):
        sampler_weights(x, x, x, level="row")
    with pytest.raises(ValueError, match="the mask selects no token"): mismatch_stats(x, x, x)
