"Importance weights, residuals and a teacher's term: identities that hold exactly, and edges."
import math

import pytest
import torch

from copd_nb.signals.off_policy import importance_weights, residual, teacher_term, weight_stats


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_turn_the_rollers_mean_into_the_learners():
    "Over a whole vocabulary: the sum of q · w · f is the sum of p · f, whatever f is."
    p, q = (draws(1, 9, seed=s).log_softmax(-1) for s in (0, 1))
    f, mask = draws(1, 9, seed=2), torch.ones(1, 9, dtype=torch.float64)
    weights = importance_weights(p, q, mask, math.inf)
    assert torch.allclose((q.exp() * weights * f).sum(), (p.exp() * f).sum())
    cut = importance_weights(p, q, mask, 1.5)
    assert torch.equal(cut, weights.clamp(max=1.5)) and (weights > 1.5).any()
    assert weight_stats(p, q, mask, 1.5)["weight_clipped"] == pytest.approx((weights > 1.5).double().mean().item())


def test_one_policy_has_weights_of_one_and_what_is_masked_counts_nothing():
    logp, mask = -draws(2, 4).abs(), torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0]])
    nothing = torch.where(mask.bool(), logp, torch.tensor(-math.inf, dtype=logp.dtype))
    assert torch.equal(importance_weights(nothing, logp, mask), mask.double())
    assert weight_stats(nothing, logp, mask) == dict(weight_mean=1.0, weight_clipped=0.0)


def test_weights_have_no_gradient_and_are_finite_far_apart():
    logp = torch.tensor([[0.0, -900.0]], requires_grad=True)
    weights = importance_weights(logp, torch.tensor([[-900.0, 0.0]]), torch.ones(1, 2), math.inf)
    assert weights.isfinite().all() and not weights.requires_grad and weights[0, 1] > 0


def test_a_centred_residual_has_no_mean_in_any_group():
    delta, mask = draws(6, 5), (draws(6, 5, seed=3) > -0.8).double()
    mask[:, 0] = 1
    found = residual(delta, mask, 3, "centred")
    for group, kept in zip(found.split(3), mask.split(3)):
        assert abs(group.sum().item()) < 1e-12 and (group[kept == 0] == 0).all()
    assert torch.allclose(residual(delta + 7, mask, 3, "centred"), found)  # a teacher that is surer of everything


def test_a_bounded_residual_stays_within_its_bound_and_is_centred_where_it_is_wide():
    delta, mask = 50 * draws(4, 6), torch.ones(4, 6, dtype=torch.float64)
    assert residual(delta, mask, 2, "bounded", 0.5).abs().max() <= 0.5
    assert torch.allclose(residual(delta, mask, 2, "bounded", 1e6), residual(delta, mask, 2, "centred"), rtol=1e-6)
    assert torch.equal(residual(delta, mask, 2), delta)
    with pytest.raises(ValueError, match="unknown residual 'mean': choose none, centred or bounded"):
        residual(delta, mask, 2, "mean")


def test_the_teachers_term_is_beta_times_the_log_ratio():
    teacher, logp, mask = -draws(4, 3).abs(), -draws(4, 3, seed=1).abs(), torch.ones(4, 3, dtype=torch.float64)
    assert torch.allclose(teacher_term(teacher, logp, mask, 2, 0.3), 0.3 * (teacher - logp))
    assert torch.allclose(teacher_term(teacher, logp, mask, 2, 1.0, clip=0.1), (teacher - logp).clamp(-0.1, 0.1))
    assert (teacher_term(logp, logp, mask, 2, 0.3, "bounded") == 0).all()
