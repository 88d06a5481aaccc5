"Decoding in fixed shapes: the numbers of the usual decoder, a step that waits for nothing, and what a graph would do."

import copy
import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from copd_nb.policy import static_keys
from copd_nb.policy.attention import PromptKeys
from copd_nb.policy.head import Head
from copd_nb.policy.launches import NoWaiting, kernels
from copd_nb.policy.lora_branches import lora
from copd_nb.policy.prepared import Prepared
from copd_nb.policy.static_keys import Table, first_table, tables
from copd_nb.policy.toys import image, minis_base, text, tiny_policy, video
from copd_nb.signals import replay
from copd_nb.signals.rollouts import Request, generator
from copd_nb.signals.sampling import sample, sample_many

TASKS = dict(text=text(16), image=image(16), video=video(16, 8))


@pytest.fixture(scope="module")
def shipped():
    return minis_base()


@pytest.fixture(autouse=True)
def nothing_kept():
    replay.release()
    yield
    replay.release()


def stirred(policy, size=0.05, seed=0):
    "A policy, changed in place."
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters(): p.add_(torch.randn(p.shape, generator=source) * size)
    return policy


def ways(policy, prompts, *requests, tokens=12, **options):
    "Rollouts of the usual decoder and of the one in fixed shapes, of requests that are dicts."
    found = []
    for policy.graphs in (False, True):
        asked = [Request(p, source=generator("cpu", "replay", i), **r)
                 for i, (p, r) in enumerate(zip(prompts, requests))]
        with torch.no_grad(): found.append(sample_many(policy, asked, tokens, **options))
    policy.graphs = False
    return found


def same(usual, static, tolerance=2e-5):
    for a, b in zip(usual, static, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.ids * a.mask, b.ids * b.mask) and a.texts == b.texts
        assert torch.allclose(a.logp, b.logp, atol=tolerance) and torch.allclose(a.entropy, b.entropy, atol=tolerance)
        assert (a.top_ids is None) == (b.top_ids is None)
        if a.top_ids is not None: assert torch.equal(a.top_ids[a.mask.bool()], b.top_ids[b.mask.bool()])


# The same as the usual decoder

@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("adapters", [False, True])
def test_tokens_and_numbers(name, adapters, shipped):
    policy = stirred(lora(shipped, 4)) if adapters else shipped.clone()
    prompts = policy.encode(TASKS[name].test[:5])
    usual, static = ways(policy, [prompts], dict(group_size=6, greedy=1, top_k=4))
    same(usual, static)
    assert torch.equal(usual[0].ids, static[0].ids)  # also behind the end of a row


@pytest.mark.parametrize("groups", [(1,), (1, 1), (8, 3), (2, 5, 1)])
@pytest.mark.parametrize("drop", [True, False])
def test_groups_and_prompts_of_all_sizes(groups, drop, shipped):
    "Several requests, whose prompts differ in length and whose groups differ in size; rows end when they like."
    tasks = [TASKS["text"].test[:3], TASKS["video"].test[:1], TASKS["image"].test[:2]]
    prompts = [shipped.encode(e) for e, _ in zip(tasks, groups)]
    usual, static = ways(shipped, prompts, *(dict(group_size=g) for g in groups), tokens=20, temperature=1.7,
                         drop_finished=drop)
    same(usual, static)
    assert sum(r.decoded for r in static) >= sum(r.decoded for r in usual)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_one_row_and_few_tokens(tokens, shipped):
    same(*ways(shipped, [shipped.encode(TASKS["image"].test[:1])], dict(group_size=1), tokens=tokens))


def test_long_completions_that_end_one_by_one(shipped, monkeypatch):
    "The own keys that take part grow, the table shrinks, and forced ends come in every column."
    monkeypatch.setattr(static_keys, "COLUMNS", 8)
    policy, lengths = shipped.clone(), torch.arange(48) % 41 + 1
    prompts, seen, real = policy.encode(TASKS["text"].test[:6]), [], replay.Rollout.step

    def noted(self):
        seen.append((self.table, self.fixed.keys.limit(self.done)))
        real(self)
    monkeypatch.setattr(replay.Rollout, "step", noted)
    usual, static = ways(policy, [prompts], dict(group_size=8, lengths=lengths), tokens=48)
    same(usual, static)
    assert static[0].lengths.tolist() == lengths.tolist()
    assert len({t for t, _ in seen}) >= 3 and [c for _, c in seen] == sorted(c for _, c in seen)
    assert {c for _, c in seen} == {8, 16, 32, 47} and len(seen) == 40


def test_bf16_stays_within_its_rounding(shipped):
    "Log-probabilities of what was sampled, against a scoring pass in fp32: no further off than the usual decoder's."
    policy = stirred(lora(shipped, 4))
    prompts, off = policy.encode(TASKS["text"].test[:6]), []
    with torch.autocast("cpu", torch.bfloat16): outs = [o for o, in ways(policy, [prompts], dict(group_size=8))]
    for out in outs:
        with torch.no_grad(): logits = policy.completion_logits(prompts, out.ids)
        logp = logits.float().log_softmax(-1).gather(-1, out.ids[..., None])[..., 0]
        off.append((((out.logp - logp) * out.mask).abs().sum() / out.mask.sum()).item())
    assert 0 < off[0] < 0.05 and off[1] < 1.5 * off[0]


def test_weights_in_bf16_with_adapters_in_fp32(shipped):
    half = shipped.clone()
    half.model.bfloat16()
    policy = stirred(lora(half, 4))
    (usual,), (static,) = ways(policy, [policy.encode(TASKS["text"].test[:4])], dict(group_size=4, greedy=4))
    agree = (usual.ids[:, :4] == static.ids[:, :4]).float().mean()
    assert agree > 0.9 and (usual.logp[:, 0] - static.logp[:, 0]).abs().max() == 0


def test_a_llama_without_shared_prompts():
    policy = tiny_policy(hidden=48, layers=2, vision_hidden=32, vision_depth=2)
    prompts = policy.encode([e for e in TASKS["text"].test[:4] for _ in range(3)])
    same(*ways(policy, [prompts], dict(group_size=1, top_k=2)))


# What stands between rollouts

def test_the_next_rollout_has_the_new_weights_in_the_old_memory(shipped):
    policy = shipped.clone()
    prompts = policy.encode(TASKS["text"].test[:4])
    used = []
    for seed in range(2):
        same(*ways(policy, [prompts], dict(group_size=4)))
        used += [fixed for _, fixed in replay._kept[policy.model]]
        stirred(policy, 0.02, seed)
    assert len(used) == 2 and used[0] is used[1]


def test_branches_share_tensors(shipped):
    a = stirred(lora(shipped, 4))
    b = stirred(a.clone("b"), seed=1)
    wide = a.joined([(0.5, a), (0.5, b)])  # of another rank
    for policy in (a, b, wide, a):
        with torch.autocast("cpu", torch.bfloat16): outs = ways(policy, [a.encode(TASKS["text"].test[:4])],
                                                                dict(group_size=4, greedy=4))
        assert (outs[0][0].logp[:, 0] == outs[1][0].logp[:, 0]).all()
    (_, wider), (_, fixed) = replay._kept[a.model]
    assert wider is not fixed and fixed.policy is None and not any("forward" in vars(m) for m in a.model.modules())


def test_longer_prompts_and_other_forms_get_tensors_of_their_own(shipped, monkeypatch):
    monkeypatch.setattr(replay, "ROOM", 4)
    policy, short, long = shipped.clone(), *(shipped.encode(TASKS[n].test[:2]) for n in ("text", "video"))
    found = [ways(policy, [prompts], dict(group_size=2)) for prompts in (short, long, short)]
    for pair in found: same(*pair)
    assert torch.equal(found[0][1][0].logp, found[2][1][0].logp)  # as if nothing had come before
    rooms = [f.keys.room for _, f in replay._kept[policy.model]]
    lengths = [p.ids.shape[1] for p in (long, short)]
    assert rooms[0] > rooms[1] and all(room // 2 < n <= room for room, n in zip(rooms, lengths))
    for n in (3, 4, 5): same(*ways(policy, [short], dict(group_size=n)))
    assert len(replay._kept[policy.model]) == replay.KEPT
    replay.release()
    assert not replay._kept


def test_what_is_kept_does_not_keep_a_model(shipped):
    policy = shipped.clone()
    ways(policy, [policy.encode(TASKS["text"].test[:1])], dict(group_size=2))
    model, tensor = weakref.ref(policy.model), weakref.ref(replay._kept[policy.model][0][1].token)
    assert model() is not None and tensor() is not None
    del policy
    gc.collect()
    assert model() is None and tensor() is None


def test_old_numbers_that_are_not_finite_reach_nobody(shipped):
    "The next rollout finds keys and values of one that went wrong."
    policy, prompts = shipped.clone(), shipped.encode(TASKS["video"].test[:2])
    ways(policy, [prompts], dict(group_size=4))
    (_, fixed), = replay._kept[policy.model]
    for k, v in fixed.keys.own + fixed.keys.prompt: k.fill_(float("nan")), v.fill_(float("nan"))
    short = policy.encode(TASKS["text"].test[:2])
    assert short.ids.shape[1] < prompts.ids.shape[1]
    same(*ways(policy, [short], dict(group_size=4)))
    assert replay._kept[policy.model][0][1] is fixed


def test_layers_are_not_recomputed_while_decoding(shipped, monkeypatch):
    "Checkpointing notes the state of random numbers, which a recording doesn't allow."
    policy = shipped.clone()
    policy.recompute()
    prompts = policy.encode(TASKS["text"].test[:2])
    with torch.no_grad(): start = policy.prefill(prompts)
    def never(*args, **kwargs): raise AssertionError("recomputed")
    monkeypatch.setattr(torch, "get_rng_state", never)
    policy.graphs = True
    with torch.no_grad(): out = sample(policy, prompts, 2, 6, source=generator("cpu", 0), start=start)
    monkeypatch.undo()
    policy.graphs = False
    with torch.no_grad(): usual = sample(policy, prompts, 2, 6, source=generator("cpu", 0), start=start)
    same([usual], [out])


def test_refusals(shipped):
    policy = shipped.clone()
    prompts = policy.encode(TASKS["text"].test[:1])
    policy.packs, policy.graphs = False, True
    with pytest.raises(ValueError, match="can't decode in fixed shapes: it runs padded"): sample(policy, prompts, 2, 3)
    policy.packs, module = True, next(m for m in policy.model.modules() if hasattr(m, "rope_type"))
    module.rope_type = "dynamic"
    with pytest.raises(ValueError, match="rotary frequencies follow the length"): sample(policy, prompts, 2, 3)
    module.rope_type, layer = "default", policy.model.model.language_model.layers[0].mlp
    real = layer.forward
    layer.forward = lambda x: real(x) if x.sum() > -1e9 else x  # looks at a value
    with pytest.raises(ValueError, match="_local_scalar_dense.default waits for values"): sample(policy, prompts, 2, 3)


# Tables

@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 9))
def test_everybody_has_one_seat_beside_the_keys_of_its_prompt(owner, blocks, width):
    first = first_table(owner)
    assert first.seat(owner) is not None
    for table in (first, *tables(first), Table(blocks, width)):
        found, needed = table.seat(owner), sum(-(-owner.count(p) // table.width) for p in set(owner))
        assert (found is None) == (needed > table.blocks)
        if found is None: continue
        seats, prompts = found
        assert len(seats) == table.seats and len(prompts) == table.blocks
        assert sorted(s for s in seats if s >= 0) == [*range(len(owner))]
        assert all(owner[row] == prompts[at // table.width] for at, row in enumerate(seats) if row >= 0)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_smaller_tables(blocks, width):
    found = tables(Table(blocks, width))
    assert all(b.seats < a.seats and b.blocks <= blocks for a, b in zip(found, found[1:]))
    assert found[-1].seats <= static_keys.LEAST and len(found) <= 12


# What a graph needs, and what it would do

class Tape(TorchDispatchMode):
    "A graph on a processor: notes each operation with its tensors, and repeats them without the code that called them."

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    @torch.autocast("cpu", enabled=False)  # its casts are on the tape
    def replay(self):
        now = {}  # what an operation made when it was noted → now
        def current(x): return now.get(id(x), x)
        for func, args, kwargs, noted in self.ops:
            out = func(*tree_map_only(torch.Tensor, current, args), **tree_map_only(torch.Tensor, current, kwargs))
            made = zip(tree_flatten(noted)[0], tree_flatten(out)[0])
            now.update({id(a): b for a, b in made if isinstance(a, torch.Tensor)})


class Taped:
    "Runs a step once, and then plays the tape."
    made = []

    def __init__(self, step, shared): self.step, self.tape, self.plays = step, None, 0

    def __call__(self):
        if self.tape is not None:
            self.plays += 1
            return self.tape.replay()
        with Tape() as self.tape: self.step()
        self.made.append(self)


@pytest.mark.parametrize("kind", ["full", "adapters, bf16"])
def test_a_recorded_step_repeats_without_its_code(kind, shipped, monkeypatch):
    "Rollouts whose positions are recorded operations on fixed tensors, also after the weights have changed."
    monkeypatch.setattr(static_keys, "COLUMNS", 8)
    monkeypatch.setattr(Taped, "made", [])
    policy = shipped.clone() if kind == "full" else stirred(lora(shipped, 4))
    prompts = policy.encode([*TASKS["text"].test[:2], *TASKS["image"].test[:1]])
    half = torch.autocast("cpu", torch.bfloat16, enabled="bf16" in kind)

    def rolled(repeat):
        policy.graphs = True
        monkeypatch.setitem(replay.REPEATS, "cpu", repeat)
        with torch.no_grad(), half: return sample(policy, prompts, 8, 18, 1.5, source=generator("cpu", "tape"))
    for seed in range(2):
        eager, taped = rolled(replay.Eager), rolled(Taped)
        assert torch.equal(eager.ids, taped.ids) and torch.equal(eager.logp, taped.logp)
        assert torch.equal(eager.entropy, taped.entropy)
        if not seed: recorded = len(Taped.made)
        stirred(policy, 0.01, seed)
    assert recorded >= 2 and sum(t.plays for t in Taped.made) > 15
    tables_of = [t.seats for f in replay._kept[policy.model] for t, _ in f[1].runs]
    assert len(set(tables_of)) >= 2


@contextmanager
def cards(monkeypatch, fixed):
    "What `Captured` needs of torch.cuda: a recording computes nothing, a replay plays a tape."
    log = []

    class Stream:
        def wait_stream(self, other): log.append("wait")

    class Graph:
        def replay(self):
            log.append("replay")
            self.tape.replay()

    @contextmanager
    def graph(of, pool, stream):
        log.append("record")
        assert pool == "pool" and isinstance(stream, Stream)
        kept = fixed()
        before = [(x, x.clone()) for x in kept]
        with Tape() as of.tape: yield
        for x, old in before: x.copy_(old)
    for name, value in dict(Stream=Stream, current_stream=Stream, CUDAGraph=Graph, graph=graph,
                            graph_pool_handle=lambda: "pool", stream=lambda s: nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(replay.REPEATS, "cpu", replay.Captured)
    yield log
    monkeypatch.undo()


def test_captured_warms_up_records_and_replays(shipped, monkeypatch):
    policy = shipped.clone()
    prompts = policy.encode(TASKS["text"].test[:2])
    def tensors():
        (_, f), = replay._kept[policy.model]
        grids = f.out.ids, f.out.logp, f.out.entropy, f.out.top_ids, f.token, f.position, f.row, f.alive, f.column
        return [*grids, *(x for pair in f.keys.own for x in pair)]
    usual = sample(policy, prompts, 4, 9, 2.5, source=generator("cpu", 0), drop_finished=False)
    policy.graphs = True
    with cards(monkeypatch, tensors) as log:
        outs = [sample(policy, prompts, 4, 9, 2.5, source=generator("cpu", 0), drop_finished=False) for _ in range(2)]
        (_, fixed), = replay._kept[policy.model]
    for out in outs: same([usual], [out])
    first, steps = ["wait", "wait"] * replay.WARM + ["record"], {run.calls for run in fixed.runs.values()}
    assert log[:len(first)] == first and log[len(first):] == ["replay"] * (steps.pop() - replay.WARM)


def faked(policy, mode):
    "A policy without numbers, on a device that isn't the processor."
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    def elsewhere(x): return torch.empty(x.shape, dtype=x.dtype, device="meta")
    with mode:
        for module in other.model.modules():
            for name, p in [*module._parameters.items()]:
                if p is not None: module._parameters[name] = torch.nn.Parameter(elsewhere(p), requires_grad=False)
            for name, b in [*module._buffers.items()]:
                if b is not None: module._buffers[name] = elsewhere(b)
        other.banned = elsewhere(policy.banned)
    return other


@pytest.mark.parametrize("top, forced", [(0, False), (5, True)])
def test_a_step_asks_no_card_for_values(top, forced, shipped, monkeypatch):
    "On tensors without values, on a device of their own: nothing depends on values, nothing comes from the processor."
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)  # it knows no device without values
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    mode = FakeTensorMode()
    policy, size = faked(shipped, mode), shipped.model.config.text_config
    with mode:
        heads, width = size.num_key_value_heads, size.head_dim
        table = Table(3, 4)
        like = PromptKeys([(torch.empty(3, heads, 9, width, device="meta"),) * 2] * size.num_hidden_layers,
                          torch.ones(3, 9, dtype=torch.bool, device="meta"))
        fixed = replay.Fixed(like, table, 12, 64, 20, top, forced, replay.Eager)
        fixed.prepared.norms = dict.fromkeys((n for n, _ in policy.model.named_modules()), True)
        head = Head(policy.model.get_output_embeddings().weight, None, policy.banned, temperature=1.3)
        fixed.ready(head, torch.zeros(2, dtype=torch.long, device="meta"))
        fixed.policy = policy
        with torch.no_grad(), fixed.prepared.on(policy), NoWaiting():
            count = kernels(lambda: fixed.advance(table, 19))
        where = {x.device.type for x in (fixed.out.logp, fixed.token, fixed.keys.both, fixed.keys.own[0][0])}
        assert where == {"meta"} and count.total() > 100
        with pytest.raises(Exception, match="device|fake"), torch.no_grad():  # such a mistake is noticed
            fixed.keys.columns = torch.arange(20)
            fixed.keys.columns = fixed.keys.columns.to("cpu")
            fixed.advance(table, 19)


def counted(shipped, adapters):
    "Operations of one position of 48 rows with both decoders, as calls without arguments."
    policy = stirred(lora(shipped, 4)) if adapters else shipped
    prompts, owner = policy.encode(TASKS["text"].test[:6]), torch.arange(6).repeat_interleave(8)
    start, ends, draws = policy.prefill(prompts), torch.tensor(policy.eos), torch.rand(48, 12)
    given = start.keys, owner.tolist(), 12, 0, policy.head(), ends, False
    return policy, prompts, owner, start, ends, draws, given


def test_operations_are_those_of_the_profiler(shipped):
    policy, prompts, owner, start, ends, draws, given = counted(shipped, True)
    with torch.no_grad():
        fixed = replay.fixed_for(policy, *given)
        with fixed.of(policy):
            fixed.ready(policy.head(), ends)
            rollout = replay.Rollout(fixed, owner.tolist())
            rollout.begin(start.keys, prompts.next_position[owner], start.hidden[owner], draws, None)
            rollout.step()
            ours = kernels(rollout.step)
            with profile(activities=[ProfilerActivity.CPU]) as seen: rollout.step()
    theirs = {e.key: e.count for e in seen.key_averages()}
    for name in ("mm", "addmm", "bmm", "index_copy_", "cat", "silu", "rsqrt", "searchsorted", "argmax"):
        assert theirs[f"aten::{name}"] == ours[name] > 0, name
    assert ours["_softmax"] == policy.model.config.text_config.num_hidden_layers + 1 == theirs["aten::_softmax"]


def test_prepared_layers_are_those_of_the_model(shipped):
    "Each layer alone, with adapters: the same to rounding, in fp32 and by autocast."
    policy, source = stirred(lora(shipped, 4)), torch.Generator().manual_seed(0)
    layers = {n: m for n, m in policy.shared.layers.items()}
    for half, rtol in ((False, 1e-5), (True, 1e-2)):
        prepared = Prepared()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for layer in layers.values():
                x = torch.randn(1, 5, layer.in_features, generator=source)
                usual = layer(x)
                with prepared.on(policy): found = layer(x)
                assert found.dtype == usual.dtype and (found - usual).norm() <= rtol * usual.norm()
