"Packed attention against one softmax over full rows, slots against loops."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.policy.attention import (
    Decoding, Packed, PromptKeys, Slots, _join, _part, frames_attention, use_packed_attention)
from copd_nb.policy.toys import tiny_policy
from copd_nb.signals.rollouts import generator

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def randn(key, *shape): return torch.randn(*shape, generator=generator("cpu", key))


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_slots_by_owner_keep_order_and_lose_nothing(owner):
    owner = torch.tensor(owner)
    slots, x = Slots.by(owner, 5), torch.arange(1., len(owner) + 1)
    grid = slots.pad(x)
    for row in range(5): assert [v for v in grid[row].tolist() if v] == x[owner == row].tolist()
    assert torch.equal(slots.take(grid), x) and slots.width == owner.bincount().max()


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_slots_of_a_mask(mask):
    mask = torch.tensor(mask)
    slots, x = Slots.of(mask), torch.arange(1., float(mask.sum()) + 1)
    assert torch.equal(slots.pad(x)[mask], x) and not slots.pad(x)[~mask].any()
    assert torch.equal(slots.take(slots.pad(x)), x)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.floats(-60, 60))
def test_two_parts_make_one_softmax(rows, queries, first, second, shift):
    q = randn("q", rows, queries, HEADS, WIDTH) * 3
    k, v = (randn(name, rows, KEY_HEADS, first + second, WIDTH) for name in "kv")
    k[:, :, :first, 0] += shift / 10  # parts of very different weight
    seen = torch.rand(rows, queries, first + second, generator=generator("cpu", "seen")) < .8
    seen[..., 0] = seen[..., -1] = True
    joined = _join(_part(q, k[:, :, :first], v[:, :, :first], seen[..., :first]),
                   _part(q, k[:, :, first:], v[:, :, first:], seen[..., first:]))
    scores = q.double().transpose(1, 2) @ k.double().repeat_interleave(2, 1).transpose(-1, -2)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    whole = (scores.softmax(-1) @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    assert (joined - whole).abs().max() < 1e-4 and torch.isfinite(joined).all()


def reference(q, k, v, owner, rows, prompt):
    "Each token alone: its prompt's real keys, then its row's keys up to itself, one softmax in fp64."
    out = []
    for i in range(len(q)):
        mine = [j for j in range(i + 1) if rows[j] == rows[i]]
        real = prompt.seen[owner[i]]
        both = (torch.cat([p[owner[i]][:, real], x[mine].transpose(0, 1)], 1)
                for p, x in zip(prompt.layers[0], (k, v)))
        keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, 0).double() for x in both)
        out.append(((q[i][:, None].double() @ keys.transpose(1, 2)).softmax(-1) @ values)[:, 0])
    return torch.stack(out)


def prompts(count=3, length=5):
    seen = torch.arange(length) < torch.tensor([5, 2, 4])[:count, None]
    return PromptKeys([(randn("pk", count, KEY_HEADS, length, WIDTH), randn("pv", count, KEY_HEADS, length, WIDTH))],
                      seen)


@pytest.mark.parametrize("long", [1, 48])
def test_packed_rows_equal_a_token_by_token_reference(long, monkeypatch):
    monkeypatch.setattr("copd_nb.policy.attention.LONG", long)
    fed = torch.arange(4) < torch.tensor([4, 1, 0, 3])[:, None]
    owner_of_row, prompt = torch.tensor([2, 0, 1, 2]), prompts()
    rows = fed.nonzero()[:, 0]
    q, k, v = randn("q", 8, HEADS, WIDTH), randn("k", 8, KEY_HEADS, WIDTH), randn("v", 8, KEY_HEADS, WIDTH)
    for x in (q, k, v): x.requires_grad_()
    packed = Packed(Slots.of(fed), prompt, owner_of_row)
    out, expected = packed.attend(0, q, k, v), reference(q, k, v, owner_of_row[rows], rows, prompt)
    assert (out - expected).abs().max() < 1e-5
    weights = randn("w", 8, HEADS, WIDTH)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected))
    for a, b in zip(mine, theirs): assert (a - b).norm() < 1e-4 * b.norm()


def test_decoding_with_compaction_equals_the_reference():
    prompt, owner, rows = prompts(), torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]), torch.arange(8)
    decoding, history = Decoding(prompt, owner, 6), []
    for step, dead in enumerate([[], [1], [2, 3], [0, 4], [], [5]]):
        if dead:
            decoding.keep(~torch.isin(rows, torch.tensor(dead)))
            rows = rows[~torch.isin(rows, torch.tensor(dead))]
        q, k, v = (randn((n, step), len(rows), h, WIDTH) for n, h in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)))
        decoding.step = step
        history.append((rows, k, v))
        out = decoding.attend(0, q, k, v)
        all_rows, all_k, all_v = (torch.cat(x) for x in zip(*history))
        expected = reference(torch.cat([torch.zeros(len(all_k) - len(q), HEADS, WIDTH), q]), all_k, all_v,
                             owner[all_rows], all_rows, prompt)[-len(q):]
        assert (out - expected).abs().max() < 1e-5
    assert decoding.stored.rows < 8 and len(decoding.prompt.seen) < 3  # rows and prompts were dropped


def test_joined_prompts_have_room_for_the_longest():
    long, short = prompts(3, 5), prompts(2, 5).of(torch.tensor([1]))
    short = PromptKeys([(k[:, :, :2], v[:, :, :2]) for k, v in short.layers], short.seen[:, :2])
    joined = PromptKeys.join([short, long])
    assert joined.seen.tolist() == [[True, True, False, False, False], *long.seen.tolist()]
    assert torch.equal(joined.layers[0][0][0, :, :2], short.layers[0][0][0])
    assert torch.equal(joined.layers[0][1][1:], long.layers[0][1])
    assert PromptKeys.join([long]) is long


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 16, 4, 8], [1]])
def test_frames_equal_one_after_the_other(lengths):
    total = sum(lengths)
    q, k, v = (randn(n, 1, HEADS, total, WIDTH).requires_grad_() for n in "qkv")
    out, _ = frames_attention(None, q, k, v, None, cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0), scaling=.3,
                              packed="not looked at")
    parts = [torch.nn.functional.scaled_dot_product_attention(*x, scale=.3).transpose(1, 2)
             for x in zip(*(y.split(lengths, 2) for y in (q, k, v)))]
    expected = torch.cat(parts, 1)
    assert torch.allclose(out, expected, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (out, expected))):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_model_runs_as_before_without_packed_tokens():
    policy, ids = tiny_policy(), torch.tensor([[8, 9, 10, 11]])
    model = policy.model
    ours = model(input_ids=ids).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(input_ids=ids).logits, ours) and use_packed_attention(model)
    assert torch.equal(model(input_ids=ids).logits, ours)


def test_the_vision_tower_is_called_once_a_layer(monkeypatch):
    from copd_nb.policy.toys import video
    policy, calls = tiny_policy(), []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention",
                        lambda *a, **k: (calls.append(a[0].shape), real(*a, **k))[1])
    with torch.no_grad(): policy.prefill(policy.encode(video(8, 8).test))
    depth = policy.model.config.vision_config.depth + policy.model.config.text_config.num_hidden_layers
    assert len(calls) == depth  # not once a frame
