"The chunked output head against the plain functions on whole logits: values, gradients, memory, precision, errors."
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from copd_nb.signals.divergences import (
    divergence, entropy, kl, overlap_mass, symmetric_kl, token_logprobs, topk_mask, topk_overlap, topk_reverse_kl)
from copd_nb.signals.compare import compare_tokens
from copd_nb.signals.heads import CHUNK, token_scores
from copd_nb.signals.teachers import token_divergence
from copd_nb.policy.head import Head

KINDS = ("reverse", "forward", "jsd", "topk")
NONE = torch.tensor([], dtype=torch.long)
FINISHES = dict(plain={}, scale=dict(scale=0.3), softcap=dict(softcap=2.0), temperature=dict(temperature=0.6),
                banned=dict(banned=torch.tensor([0, 3])),
                everything=dict(scale=0.5, softcap=3.0, temperature=1.7, banned=torch.tensor([2])))


def make(seed, vocabulary, size, *shape, bias=True, dtype=torch.float64, **finish):
    "A head and hidden states of `shape`, all with gradient."
    generator = torch.Generator().manual_seed(seed)
    def draw(*sizes): return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return Head(draw(vocabulary, size), draw(vocabulary) if bias else None,
                **(dict(banned=NONE) | finish)), draw(*shape, size)


def plain_divergence(student, teacher, kind, k):
    return topk_reverse_kl(student, teacher, k) if kind == "topk" else divergence(student, teacher, kind, 0.3)


def gradients(value, head, hidden, seed=0):
    "Of a weighted sum of values, with respect to hidden states, weight and bias."
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((value * weights).sum(), [x for x in (hidden, head.weight, head.bias) if x is not None])


def close(found, expected, rtol=1e-9, atol=1e-11):
    return all(torch.allclose(a, b, rtol, atol) for a, b in zip(found, expected, strict=True))


shapes = st.tuples(st.integers(0, 10**6), st.integers(4, 30), st.integers(1, 8), st.lists(st.integers(1, 5),
                                                                                          min_size=1, max_size=3))
chunks = st.one_of(st.integers(0, 400), st.just(CHUNK))
finishes = st.sampled_from(sorted(FINISHES))


@settings(max_examples=60, deadline=None)
@given(shapes, chunks, finishes, st.booleans(), st.integers(1, 4), st.booleans())
def test_scores_are_those_of_whole_logits(drawn, chunk, finish, bias, k, graph):
    seed, vocabulary, size, shape = drawn
    head, hidden = make(seed, vocabulary, size, *shape, bias=bias, dtype=torch.float32, **FINISHES[finish])
    ids, logits = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)), head(hidden).detach()
    with torch.set_grad_enabled(graph): scores = token_scores(head, hidden, ids, entropy=True, k=k, chunk=chunk)
    assert scores.logp.dtype == scores.entropy.dtype == torch.float32 and scores.logp.requires_grad == graph
    assert torch.allclose(scores.logp, token_logprobs(logits, ids), rtol=1e-6, atol=1e-5)
    assert torch.allclose(scores.entropy, entropy(logits), atol=1e-5) and not scores.entropy.requires_grad
    assert torch.equal(scores.top_ids.sort(-1).values, topk_mask(logits, k).nonzero()[:, -1].view(*shape, k))


@settings(max_examples=60, deadline=None)
@given(shapes, chunks, finishes, st.booleans())
def test_gradients_of_log_probabilities(drawn, chunk, finish, bias):
    seed, vocabulary, size, shape = drawn
    head, hidden = make(seed, vocabulary, size, *shape, bias=bias, **FINISHES[finish])
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    ids = torch.where(torch.isin(ids, head.banned), 1, ids)  # 1 is never banned here
    found = token_scores(head, hidden, ids, entropy=True, k=2, chunk=chunk).logp
    expected = token_logprobs(head(hidden), ids)
    assert close([found], [expected]) and close(gradients(found, head, hidden), gradients(expected, head, hidden))


@settings(max_examples=100, deadline=None)
@given(shapes, chunks, finishes, st.booleans(), st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 8))
def test_divergences_and_their_gradients(drawn, chunk, finish, bias, kind, k, teacher_size):
    seed, vocabulary, size, shape = drawn
    head, hidden = make(seed, vocabulary, size, *shape, bias=bias, **FINISHES[finish])
    teacher_head, teacher_hidden = make(seed + 1, vocabulary, teacher_size, *shape, bias=not bias, **FINISHES[finish])
    found = token_divergence(head, hidden, teacher_head, teacher_hidden, kind, 0.3, k, chunk)
    expected = plain_divergence(head(hidden), teacher_head(teacher_hidden).detach(), kind, k)
    assert found.shape == tuple(shape) and close([found], [expected], atol=1e-9)
    assert close(gradients(found, head, hidden), gradients(expected, head, hidden), atol=1e-8)
    with torch.no_grad(): again = token_divergence(head, hidden, teacher_head, teacher_hidden, kind, 0.3, k, chunk)
    assert close([again], [expected], atol=1e-9) and not again.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_in_fp32(kind):
    head, hidden = make(0, 40, 8, 30, dtype=torch.float32, **FINISHES["everything"])
    teacher_head, teacher_hidden = make(1, 40, 8, 30, dtype=torch.float32)
    found = token_divergence(head, hidden, teacher_head, teacher_hidden, kind, 0.3, 5, chunk=120)
    expected = plain_divergence(head(hidden), teacher_head(teacher_hidden).detach(), kind, 5)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(found, head, hidden), gradients(expected, head,
                                                              hidden)): assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("chunk", [1, 12, CHUNK])
def test_gradcheck_in_fp64(chunk):
    head, hidden = make(0, 5, 3, 4, **FINISHES["everything"])
    teacher_head, teacher_hidden = make(1, 5, 2, 4, banned=torch.tensor([2]))
    ids = torch.tensor([0, 1, 3, 4])
    for kind in (None, *KINDS):
        def values(hidden, weight, bias):
            student = replace(head, weight=weight, bias=bias)
            if kind is None: return token_scores(student, hidden, ids, chunk=chunk).logp
            return token_divergence(student, hidden, teacher_head, teacher_hidden, kind, 0.3, 2, chunk)
        assert torch.autograd.gradcheck(values, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("finish", FINISHES)
def test_logits_are_finished_as_written_by_hand(finish):
    head, hidden = make(2, 9, 4, 6, **FINISHES[finish])
    logits = (hidden @ head.weight.T + head.bias) * head.scale
    if head.softcap: logits = head.softcap * torch.tanh(logits / head.softcap)
    p = (logits / head.temperature).exp()
    p = p.index_fill(-1, head.banned, 0)
    ids = torch.tensor([1, 4, 5, 6, 7, 8])
    expected = (p / p.sum(-1, keepdim=True)).gather(-1, ids[:, None]).squeeze(-1).log()
    slopes = gradients(expected, head, hidden)
    for chunk in (1, CHUNK):
        found = token_scores(head, hidden, ids, k=9 - len(head.banned), chunk=chunk)
        assert close([found.logp], [expected]) and not torch.isin(found.top_ids, head.banned).any()
        assert close(gradients(found.logp, head, hidden), slopes)


def test_a_banned_id_is_as_unlikely_as_in_whole_logits():
    head, hidden = make(3, 9, 4, 3, dtype=torch.float32, banned=torch.tensor([5]))
    scores = token_scores(head, hidden, torch.full((3,), 5), chunk=9)
    assert torch.allclose(scores.logp, torch.tensor(-1e9)) and all(g.isfinite().all() for g in gradients(scores.logp,
                                                                                                         head, hidden))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_gradients_with_and_without_chunks_are_the_same(kind):
    head, hidden = make(4, 50, 16, 64, dtype=torch.float32, **FINISHES["everything"])
    teacher_head, teacher_hidden = make(5, 50, 16, 64, dtype=torch.float32, **FINISHES["everything"])
    def run(chunk):
        if kind is None: return token_scores(head, hidden, torch.arange(64) % 50, chunk=chunk).logp
        return token_divergence(head, hidden, teacher_head, teacher_hidden, kind, 0.3, 5, chunk)
    whole = run(CHUNK)
    slopes = gradients(whole, head, hidden)
    for chunk in (0, 50, 350, 64 * 50 - 1):
        part = run(chunk)
        assert torch.allclose(part, whole, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients(part, head, hidden), slopes): assert (a - b).norm() < 1e-6 * b.norm()


def test_a_tied_weight_gets_the_gradient_of_both_its_uses():
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    head, ids = Head(weight, None, NONE), torch.randint(30, (2, 9))
    def loss(chunk): return token_scores(head, weight[ids[:, :-1]].tanh(), ids[:, 1:], chunk=chunk).logp.sum()
    expected, = torch.autograd.grad(token_logprobs(head(weight[ids[:, :-1]].tanh()), ids[:, 1:]).sum(), weight)
    for chunk in (30, 90, CHUNK): assert close(torch.autograd.grad(loss(chunk), weight), [expected])


class Watch(TorchDispatchMode):
    "Shapes of results, numbers of matrix products and of conversions by shape, and the most bytes of new storages."

    def __init__(self):
        super().__init__()
        self.shapes, self.products, self.conversions = set(), 0, Counter()
        self.held, self.most, self.storages = 0, 0, weakref.WeakKeyDictionary()

    def free(self, size): self.held -= size

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        self.products += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(x, torch.Tensor): continue
            self.shapes.add(tuple(x.shape))
            self.conversions[tuple(x.shape)] += operation.overloadpacket is torch.ops.aten._to_copy
            storage = x.untyped_storage()
            if storage in self.storages or id(storage) in known: continue
            self.storages[storage] = True
            self.held += storage.nbytes()
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self.free, storage.nbytes())
        return result


def calls(head, hidden, teacher_head, teacher_hidden, chunk):
    "Everything that goes through a head, by name."
    ids = torch.ones(len(hidden), dtype=torch.long)
    return {"scores": lambda: token_scores(head, hidden, ids, True, 3, chunk).logp,
            "compare": lambda: compare_tokens(head, hidden, teacher_head, teacher_hidden, (2, 5), chunk)["jsd"],
            **{kind: lambda kind=kind: token_divergence(head, hidden, teacher_head, teacher_hidden, kind, 0.3, 3,
                                                        chunk) for kind in KINDS}}


# Chunks of logits that live at a time, without and with a backward pass;
# the latter holds the gradients of weight and bias, 0.6 chunks
HELD = dict(scores=(4.5, 6.5), compare=(5.7, 5.7), reverse=(4.5, 7), forward=(4.5, 7), jsd=(5.5, 8), topk=(4.5, 7))


@pytest.mark.parametrize("name", ["scores", "compare", *KINDS])
@pytest.mark.parametrize("graph", [False, True])
def test_the_logits_of_all_tokens_never_exist(name, graph):
    tokens, vocabulary, step = 300, 1_000, 8
    head, hidden = make(0, vocabulary, 4, tokens, dtype=torch.float32, **FINISHES["everything"])
    teacher_head, teacher_hidden = make(1, vocabulary, 4, tokens, dtype=torch.float32)
    call = calls(head, hidden, teacher_head, teacher_hidden, step * vocabulary + 999)[name]
    with Watch() as watch, torch.set_grad_enabled(graph):
        value = call()
        if value.requires_grad: value.sum().backward()
    rows = [shape[0] for shape in watch.shapes if len(shape) == 2 and shape[1] == vocabulary]
    assert max(rows) == step  # as large as the chunk allows
    assert max(torch.Size(shape).numel() for shape in watch.shapes) == step * vocabulary
    assert watch.most < HELD[name][graph] * 4 * step * vocabulary  # whole logits are 38 chunks
    assert (hidden.grad is not None) == (graph and name != "compare")


def test_memory_does_not_grow_with_tokens():
    def most(tokens):
        head, hidden = make(0, 1_000, 4, tokens, dtype=torch.float32)
        with Watch() as watch: token_scores(head, hidden, torch.ones(tokens, dtype=torch.long),
                                            chunk=8_000).logp.sum().backward()
        return watch.most
    assert most(800) - most(80) < 4 * 720 * 12  # values, ids and gradients of 720 more tokens, no logits


def test_a_chunk_is_computed_once_forward_and_once_backward():
    head, hidden = make(0, 50, 4, 30, bias=False)
    for chunk, products in ((500, 3 * 2 + 3 * 2), (CHUNK,
                                                   3)):  # forward, again, and the gradients of hidden states and weight
        with Watch() as watch: token_scores(head, hidden, torch.ones(30, dtype=torch.long), True, 3,
                                            chunk).logp.sum().backward()
        assert watch.products == products
    with Watch() as watch: compare_tokens(head, hidden, head, hidden, (1, 5, 10), chunk=500)
    assert watch.products == 3 * 2


@pytest.mark.parametrize("chunk", [100, CHUNK])
def test_what_is_frozen_gets_no_gradient_and_costs_none(chunk):
    head, hidden = make(0, 50, 7, 30)
    ids = torch.ones(30, dtype=torch.long)
    frozen = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
    with Watch() as watch: token_scores(frozen, hidden, ids, chunk=chunk).logp.sum().backward()
    chunks = 15 if chunk == 100 else 1
    assert hidden.grad.shape == hidden.shape and frozen.weight.grad is None
    assert watch.products == (3 * chunks if chunks > 1
                              else 2)  # forward, forward again in chunks, gradient of hidden states
    with Watch() as watch: token_scores(head, hidden.detach(), ids, chunk=chunk).logp.sum().backward()
    assert head.weight.grad.shape == (50, 7) and head.bias.grad.shape == (50,)
    assert watch.products == (3 * chunks if chunks > 1 else 2)
    only_bias = replace(frozen, bias=head.bias)
    expected, = torch.autograd.grad(token_logprobs(only_bias(hidden), ids).sum(), head.bias)
    assert close(torch.autograd.grad(token_scores(only_bias, hidden.detach(), ids, chunk=chunk).logp.sum(), head.bias),
                 [expected])
    assert not token_scores(frozen, hidden.detach(), ids, chunk=chunk).logp.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [100, CHUNK])
def test_no_gradient_reaches_the_teacher(kind, chunk):
    head, hidden = make(0, 50, 4, 12)
    teacher_head, teacher_hidden = make(1, 50, 6, 12)
    token_divergence(head, hidden, teacher_head, teacher_hidden, kind, 0.3, 3, chunk).sum().backward()
    assert hidden.grad.abs().sum() > 0 and head.weight.grad.abs().sum() > 0
    assert [x.grad for x in (teacher_head.weight, teacher_head.bias, teacher_hidden)] == [None] * 3
    frozen = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
    assert not token_divergence(frozen, hidden.detach(), teacher_head, teacher_hidden, kind, 0.3, 3,
                                chunk).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_equal_policies_have_no_divergence_and_no_gradient(kind):
    head, hidden = make(0, 50, 4, 12, dtype=torch.float32, **FINISHES["everything"])
    value = token_divergence(head, hidden, head, hidden, kind, 0.3, 3, chunk=100)
    assert value.abs().max() < 1e-6 and all(g.abs().max() < 1e-5 for g in gradients(value, head, hidden))


@pytest.mark.parametrize("chunk", [100, CHUNK])
def test_autocast_changes_nothing(chunk):
    head, hidden = make(0, 50, 16, 12, dtype=torch.float32)
    teacher_head, teacher_hidden = make(1, 50, 16, 12, dtype=torch.float32)
    ran = calls(head, hidden, teacher_head, teacher_hidden, chunk)
    for name, call in ran.items():
        exact = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(hidden @ head.weight.T, head.raw(hidden))  # autocast is at work
            found = call()
        assert found.dtype == torch.float32 and torch.equal(found, exact), name
        if name != "compare": assert close(gradients(found, head, hidden), gradients(exact, head, hidden), 0, 0), name


def test_a_chunked_backward_inside_autocast_stays_exact():
    head, hidden = make(0, 50, 16, 12, dtype=torch.float32)
    value = token_scores(head, hidden, torch.ones(12, dtype=torch.long), chunk=100).logp
    exact = torch.autograd.grad(value.sum(), (hidden, head.weight, head.bias), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16): found = torch.autograd.grad(value.sum(), (hidden, head.weight,
                                                                                                head.bias))
    assert close(found, exact, 0, 0)


@pytest.mark.parametrize("chunk", [50, CHUNK])
def test_bf16_hidden_states_and_weights_are_computed_in_fp32(chunk):
    head, hidden = make(0, 50, 16, 400, dtype=torch.bfloat16)
    wide = replace(head, weight=head.weight.detach().float().requires_grad_(),
                   bias=head.bias.detach().float().requires_grad_())
    wide_hidden, ids = hidden.detach().float().requires_grad_(), torch.ones(400, dtype=torch.long)
    found, exact = token_scores(head, hidden, ids, True, 3, chunk), token_scores(wide, wide_hidden, ids, True, 3, chunk)
    assert torch.equal(found.logp, exact.logp) and torch.equal(found.entropy,
                                                               exact.entropy) and torch.equal(found.top_ids,
                                                                                              exact.top_ids)
    narrow, expected = gradients(found.logp, head, hidden), gradients(exact.logp, wide, wide_hidden)
    assert all(x.dtype == torch.bfloat16 for x in narrow)
    assert close(narrow, [x.bfloat16() for x in expected], 0, 0)  # rounded once, after the sum over all tokens
    mixed = torch.autograd.grad(token_scores(wide, hidden, ids, chunk=chunk).logp.sum(), (hidden, wide.weight))
    assert [x.dtype for x in mixed] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_no_tokens_give_empty_tensors(shape):
    head, hidden = make(0, 9, 4, *shape)
    teacher_head, teacher_hidden = make(1, 9, 3, *shape)
    for graph in (False, True):
        with torch.set_grad_enabled(graph): scores = token_scores(head, hidden, torch.zeros(shape, dtype=torch.long),
                                                                  True, 3)
        assert scores.logp.shape == scores.entropy.shape == shape
        assert scores.top_ids.shape == (*shape, 3) and scores.top_ids.dtype == torch.long
    for kind in KINDS:
        value = token_divergence(head, hidden, teacher_head, teacher_hidden, kind, k=2)
        assert value.shape == shape and all((g == 0).all() for g in gradients(value, head, hidden))
    assert all(x.shape == shape for x in compare_tokens(head, hidden, teacher_head, teacher_hidden, 3).values())


def test_one_token_and_no_leading_dimension():
    head, hidden = make(0, 9, 4)
    assert hidden.shape == (4,)
    scores = token_scores(head, hidden, torch.tensor(3), True, 2)
    assert close([scores.logp, scores.entropy], [head(hidden).log_softmax(-1)[3], entropy(head(hidden))])
    assert scores.logp.shape == () and scores.top_ids.shape == (2,)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 200))
def test_ties_go_to_the_lower_id(seed, k, chunk):
    logits = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed)).round()  # ids × tokens, many ties
    head, hidden = Head(logits, None, torch.tensor([1, 2, 4])), torch.eye(20)
    found = token_scores(head, hidden, torch.zeros(20, dtype=torch.long), k=k, chunk=chunk).top_ids
    assert torch.equal(found, head(hidden).sort(dim=-1, descending=True, stable=True).indices[:, :k])


@settings(max_examples=60, deadline=None)
@given(shapes, chunks, finishes, st.booleans(), st.booleans())
def test_compared_policies_are_those_of_whole_logits(drawn, chunk, finish, coarse, several):
    seed, vocabulary, size, shape = drawn
    a_head, a_hidden = make(seed, vocabulary, size, *shape, dtype=torch.float32, **FINISHES[finish])
    b_head, b_hidden = make(seed + 1, vocabulary, size + 1, *shape, bias=False, dtype=torch.float32, **FINISHES[finish])
    if coarse:  # whole numbers: ties
        a_head, b_head = (Head(h.weight.detach().round(), None, h.banned) for h in (a_head, b_head))
        a_hidden, b_hidden = a_hidden.detach().round(), b_hidden.detach().round()
    found = compare_tokens(a_head, a_hidden, b_head, b_hidden, (3, 1, 4) if several else 3, chunk)
    a, b = a_head(a_hidden).detach(), b_head(b_hidden).detach()
    expected = dict(symmetric_kl=symmetric_kl(a, b), kl_ab=kl(a, b), kl_ba=kl(b, a), jsd=divergence(a, b, "jsd"),
                    entropy_a=entropy(a), entropy_b=entropy(b))
    for k, suffix in ((3, "@3"), (1, "@1"), (4, "@4")) if several else ((3, ""),):
        masses = overlap_mass(a, b, k)
        expected |= {f"overlap{suffix}": topk_overlap(a, b, k), f"overlap_mass_a{suffix}": masses[0],
                     f"overlap_mass_b{suffix}": masses[1]}
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.shape == tuple(shape) and x.dtype == torch.float32 and not x.requires_grad
        assert torch.allclose(x, expected[name], rtol=1e-5, atol=1e-5), name
    assert (found["symmetric_kl"] >= 0).all()


def test_weights_are_converted_once_a_pass():
    head, hidden = make(0, 50, 8, 30, bias=False, dtype=torch.bfloat16)
    with Watch() as watch: value = token_scores(head, hidden, torch.ones(30, dtype=torch.long), chunk=100).logp.sum()
    assert watch.conversions[50, 8] == 1
    with Watch() as watch: value.backward()
    assert watch.conversions[50, 8] == 2  # the weight, and its gradient back to bf16
    with Watch() as watch: compare_tokens(head, hidden, head, hidden, chunk=100)
    assert watch.conversions[50, 8] == 2


def test_swapped_policies_swap_the_sides():
    a, b = make(0, 30, 4, 6), make(1, 30, 5, 6)
    one, other = compare_tokens(*a, *b, k=4, chunk=60), compare_tokens(*b, *a, k=4, chunk=60)
    for left, right in (("overlap_mass_a", "overlap_mass_b"), ("kl_ab", "kl_ba"), ("entropy_a", "entropy_b")):
        assert close([one[left]], [other[right]]) and close([one[right]], [other[left]])
    for name in ("overlap", "symmetric_kl", "jsd"): assert close([one[name]], [other[name]])
    assert not torch.allclose(one["kl_ab"], one["kl_ba"])


@pytest.mark.parametrize("name", ["scores", "compare", *KINDS])
def test_extreme_logits_stay_finite_and_agree_with_fp64(name):
    torch.manual_seed(0)
    a, b = ((torch.rand(6, 9, dtype=torch.float64) * 2 - 1) * 1e4 for _ in range(2))  # ids × tokens
    a[:, 0], b[:, 0] = torch.tensor([1e4, -1e4, 0, 0, 0, 0]), torch.tensor([-1e4, 1e4, 0, 0, 0, 0])
    found = []
    for dtype in (torch.float64, torch.float32):
        # id 3 is banned in one, 4 in the other
        heads = [Head(x.to(dtype), None, torch.tensor([2, i])) for i, x in ((3, a), (4, b))]
        hidden = torch.eye(9, dtype=dtype, requires_grad=True)
        value = calls(heads[0], hidden, heads[1], hidden.detach(), 12)[name]()
        gradient = torch.autograd.grad(value.sum(), hidden)[0] if value.requires_grad else torch.zeros(1)
        assert value.isfinite().all() and gradient.isfinite().all()
        found.append(value.double())
    assert torch.allclose(found[1], found[0], rtol=1e-4, atol=1e-3)


def test_an_id_that_one_policy_bans_counts_as_much_as_the_mixture_says():
    head, hidden = Head(torch.tensor([[0.0], [0.0], [0.0]]), None, torch.tensor([2])), torch.ones(1, 1)
    teacher = Head(torch.tensor([[0.0], [0.0], [0.0]]), None, torch.tensor([1]))
    for alpha in (0.2, 0.5, 0.8):  # (½, ½, 0) and (½, 0, ½): half of each is alone there
        expected = alpha * 0.5 * -torch.tensor(alpha).log() + (1 - alpha) * 0.5 * -torch.tensor(1 - alpha).log()
        assert token_divergence(head, hidden, teacher, hidden, "jsd", alpha).item() == pytest.approx(expected.item(),
                                                                                                     abs=1e-6)


@pytest.mark.parametrize("name", ["scores", "compare", *KINDS])
@pytest.mark.parametrize("chunk", [100, CHUNK])
def test_arguments_are_left_as_they_were(name, chunk):
    arguments = *make(0, 50, 4, 12), *make(1, 50, 4, 12)
    tensors = [x for a in arguments for x in ((a.weight, a.bias) if isinstance(a, Head) else (a,))]
    before = [x.detach().clone() for x in tensors]
    value = calls(*arguments, chunk)[name]()
    if value.requires_grad: value.sum().backward()
    assert close(tensors, before, 0, 0)


def test_a_changed_weight_is_noticed_and_second_derivatives_are_refused():
    head, hidden = make(0, 50, 4, 12)
    def logp(): return token_scores(head, hidden, torch.ones(12, dtype=torch.long), chunk=100).logp.sum()
    first, = torch.autograd.grad(logp() ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): first.sum().backward()
    value = logp()
    with torch.no_grad(): head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): value.backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_teacher_that_changes_before_the_backward_is_noticed(which):
    head, hidden = make(0, 50, 4, 12)
    teacher_head, teacher_hidden = make(1, 50, 4, 12)
    value = token_divergence(head, hidden, teacher_head, teacher_hidden, chunk=100).sum()
    with torch.no_grad(): (teacher_head.weight, teacher_head.bias, teacher_hidden)[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): value.backward()


def test_hidden_states_need_not_be_contiguous():
    head, hidden = make(0, 50, 4, 3, 5)
    turned, ids = hidden.transpose(0, 1), torch.arange(15).view(5, 3)
    assert close([token_scores(head, turned, ids, chunk=100).logp], [token_logprobs(head(turned), ids)])
    assert close([token_scores(head, turned, ids.T.contiguous().T, chunk=100).logp],
                 [token_logprobs(head(turned), ids)])


def test_what_is_not_asked_for_is_none():
    head, hidden = make(0, 9, 4, 3)
    ids = torch.zeros(3, dtype=torch.long)
    assert (s := token_scores(head, hidden, ids)).entropy is None and s.top_ids is None
    assert (s := token_scores(head, hidden, ids, entropy=True)).entropy.shape == (3,) and s.top_ids is None
    assert (s := token_scores(head, hidden, ids, k=2)).entropy is None and s.top_ids.shape == (3, 2)


def test_errors_name_what_is_wrong():
    a, b, other = make(0, 5, 4, 3), make(1, 5, 2, 3), make(2, 6, 4, 3)
    ids = torch.zeros(3, dtype=torch.long)
    for function in (token_divergence, compare_tokens):
        with pytest.raises(ValueError,
                           match="vocabularies of 6 and 5 ids, and id 5 is more than padding"): function(*a, *other)
        with pytest.raises(ValueError, match="same tokens"): function(*a, *make(1, 5, 2, 4))
    with pytest.raises(ValueError, match="all but the last dimension"): token_scores(*a, ids[:2])
    with pytest.raises(ValueError, match="all but the last dimension"): token_scores(*a, ids[None])
    for k in (-1, 6):
        with pytest.raises(ValueError, match=f"k is {k}"): token_scores(*a, ids, k=k)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}"): token_divergence(*a, *b, "topk", k=k)
        with pytest.raises(ValueError, match=f"k is {k}"): compare_tokens(*a, *b, k)
        with pytest.raises(ValueError, match=f"k is {k}"): compare_tokens(*a, *b, (1, k))
    with pytest.raises(ValueError, match="at least one"): compare_tokens(*a, *b, ())
    with pytest.raises(ValueError, match="choose reverse, forward, jsd or topk"): token_divergence(*a, *b, "kl")
    with pytest.raises(ValueError, match="needs k"): token_divergence(*a, *b, "topk")
    for alpha in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"): token_divergence(*a, *b, "jsd", alpha)


@pytest.mark.parametrize("chunk", [1, 7, CHUNK])
def test_sampled_ids_and_the_advantage_of_shared_ids(chunk):
    (a_head, a), (b_head, b) = make(3, 12, 4, 2, 5), make(4, 12, 3, 2, 5)
    ids = torch.randint(12, (2, 5), generator=torch.Generator().manual_seed(0))
    found = compare_tokens(a_head, a, b_head, b, (1, 4, 12), chunk, ids)
    p, q = (head(x).log_softmax(-1).detach() for head, x in ((a_head, a), (b_head, b)))
    for k in (1, 4, 12):
        shared = (topk_mask(p, k) & topk_mask(q, k)).double()
        expected = (p.exp() * (q - p) * shared).sum(-1) / (p.exp() * shared).sum(-1)
        assert torch.allclose(found[f"overlap_advantage@{k}"], expected, atol=1e-12, equal_nan=True)
        assert torch.equal(found[f"overlap_advantage@{k}"].isnan(), found[f"overlap@{k}"] == 0)
    for name, x in (("logp_a", p), ("logp_b", q)):
        assert torch.allclose(found[name], x.gather(-1, ids[..., None])[..., 0], atol=1e-12)
    assert found["overlap_advantage@1"].isnan().any() and torch.allclose(found["overlap_advantage@12"],
                                                                         -found["kl_ab"], atol=1e-12)
    assert not {"logp_a", "overlap_advantage"} & set(compare_tokens(a_head, a, b_head, b))
    with pytest.raises(ValueError, match=r"ids of shape \(2, 4\)"): compare_tokens(a_head, a, b_head, b, ids=ids[:, :4])
