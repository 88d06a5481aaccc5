"Products by oneDNN: values, gradients, what they are not used for, and models that go through them."
import copy
import os
import subprocess
import sys

import pytest
import torch

from copd_nb.data.capability import Example
from copd_nb.policy import products
from copd_nb.policy.core import Policy
from copd_nb.policy.products import Linear, product, use_products
from copd_nb.policy.skills import text_policy
from copd_nb.policy.toys import tiny_policy

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    "oneDNN, whoever made this processor, and also for the small matrices of a test."
    monkeypatch.setattr(products, "with_onednn", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)


def double(x, weight): return torch.nn.functional.linear(x.double(), weight.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 5, 64), (2, 1, 4, 64)])
def test_values_and_gradients_against_double_precision(shape, bias):
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(48, 64), torch.randn(48) if bias else None]
    ours, theirs = ([t if t is None else t.detach().to(kind, copy=True).requires_grad_() for t in tensors]
                    for kind in (torch.float32, torch.float64))
    grad = torch.randn(*shape[:-1], 48)
    found, wanted = product(*ours), torch.nn.functional.linear(*theirs)
    assert found.grad_fn is not None and found.shape == wanted.shape
    found.backward(grad), wanted.backward(grad.double())
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    for mine, its in zip(ours, theirs):
        if mine is not None: assert torch.allclose(mine.grad.double(), its.grad, atol=1e-4)


def test_operands_that_are_views():
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    wide, expanded = torch.randn(9, 128), [torch.randn(1, 64), torch.randn(9, 1), torch.ones(())]
    views = [torch.randn(64, 9).t(), wide[:, 32:96], torch.randn(18, 64)[::2], wide[:, ::2]]
    views += [x.expand(9, 64) for x in expanded]
    for x in views:
        for w in (weight, torch.randn(64, 48).t(), torch.randn(96, 128)[::2, ::2]):
            assert torch.allclose(product(x, w).double(), double(x, w), atol=1e-4)


def test_a_gradient_that_is_expanded():
    "The gradient of a sum has no memory of its own."
    x, weight = torch.randn(9, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    product(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(9, 64), atol=1e-4)
    assert torch.allclose(weight.grad, x.sum(0).expand(48, 64), atol=1e-4)


@pytest.mark.parametrize("x, weight", [(torch.randn(0, 64), torch.randn(48, 64)),
                                       (torch.randn(9, 64).double(), torch.randn(48, 64).double()),
                                       (torch.randn(9, 64).bfloat16(), torch.randn(48, 64).bfloat16())])
def test_empty_and_other_types_stay_with_pytorch(x, weight):
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))


def test_autocast_stays_with_pytorch():
    x, weight = torch.randn(9, 64), torch.randn(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16
        assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))


def test_layers_keep_everything_but_their_class():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2, bias=False))
    x, before, state = torch.randn(3, 8), None, model.state_dict()
    before = model(x)
    assert use_products(model) == 2 and use_products(model) == 0
    assert all(type(m) is Linear and isinstance(m, torch.nn.Linear) for m in model)
    assert torch.allclose(model(x), before, atol=1e-5) and model.state_dict().keys() == state.keys()
    assert type(copy.deepcopy(model)[0]) is Linear


@pytest.mark.parametrize("make", [text_policy, tiny_policy])
def test_a_policy_scores_and_learns_as_with_pytorchs_products(make, monkeypatch):
    def scored():
        policy = make()
        prompts = policy.encode([Example("12+34=", "46", "add"), Example("50+6=", "56", "add")])
        ids = torch.arange(12).view(2, 6) % 10 + 3
        logp = policy.completion_logits(prompts, ids).log_softmax(-1).gather(-1, ids[..., None])
        logp.sum().backward()
        return policy, logp, [p.grad for p in policy.parameters()]
    policy, mine, gradients = scored()
    assert any(type(m) is Linear for m in policy.model.modules())
    monkeypatch.setattr(products, "with_onednn", lambda: False)
    other, its, theirs = scored()
    assert not any(type(m) is Linear for m in other.model.modules())
    assert torch.allclose(mine, its, atol=1e-4)
    for a, b in zip(gradients, theirs):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-4))


@pytest.mark.parametrize("chosen, expected", [("0", "False"), ("1", "True")])
def test_the_environment_decides(chosen, expected):
    code = "from copd_nb.policy.products import with_onednn; print(with_onednn())"
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "COPD_ONEDNN": chosen},
                           capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


@pytest.mark.parametrize("vendor, wide, expected", [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False),
                                                    ("GenuineIntel", "AVX512", False), ("", "AVX512", False)])
def test_the_processor_decides(vendor, wide, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("COPD_ONEDNN", raising=False)
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wide)
    assert products.with_onednn.__wrapped__() == (expected and torch.backends.mkl.is_available())


def test_a_borrowed_model_gets_its_classes_back():
    from copd_nb.scale.borrowing import borrowed
    model = text_policy().model
    for m in model.modules():
        if type(m) is Linear: m.__class__ = torch.nn.Linear
    with borrowed(model):
        Policy(model, text_policy().processor)
        assert any(type(m) is Linear for m in model.modules())
    assert not any(type(m) is Linear for m in model.modules())
