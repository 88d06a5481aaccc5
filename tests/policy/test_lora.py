"LoRA branches: exact against full copies, apart from each other, one base in memory, merged and saved without loss."
import copy
import gc
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from copd_nb.schedule.paradigms import expert, merged_experts
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.analysis.weights import task_vectors
from copd_nb.schedule.merging import METHODS, merge
from copd_nb.policy.toys import minis_base as shipped
from copd_nb.policy.toys import image, text, tiny_policy, video
from copd_nb.policy.core import Policy, weights_hash
from copd_nb.policy.lora_branches import LoraPolicy, lora
from copd_nb.engine import phase as phase_module
from copd_nb.policy.processors import character_tokenizer
from copd_nb.engine.runs import request_stop
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, Phase, Update

EXAMPLES = [c(8, 8).test[0] if c is not text else text(8).test[0] for c in (text, image, video)]
SMALL = dict(hidden=32, layers=2, vision_hidden=16, vision_depth=2)
CONFIG = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=8, warmup=1, learning_rate=5e-3, probe_every=2,
                probe_prompts=2, eval_every=2, eval_prompts=4,
                eval_samples=1, checkpoint_every=1, device="cpu")


def language_model(kind="qwen3", rows=None, hidden=32, seed=0, **settings):
    tokenizer = character_tokenizer()
    kinds = dict(qwen3=(Qwen3Config, Qwen3ForCausalLM), llama=(LlamaConfig, LlamaForCausalLM))
    torch.manual_seed(seed)
    config, model = kinds[kind]
    settings = dict(tie_word_embeddings=True, num_hidden_layers=2) | settings
    made = model(
        config(vocab_size=rows or len(tokenizer), hidden_size=hidden, intermediate_size=64, num_attention_heads=2,
               num_key_value_heads=1, head_dim=16,
                        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, **settings))
    return Policy(made, tokenizer, kind)


def stirred(policy, seed, name=None):
    "A branch with random factors."
    branch = policy.clone(name or f"branch{seed}")
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in branch.parameters(): p.copy_(torch.randn(p.shape, generator=source) * 0.2)
    return branch


def ids_for(policy, n, seed=0): return torch.randint(20, 60, (n, 4), generator=torch.Generator().manual_seed(seed))
def logits(policy, examples=EXAMPLES[:1]):
    return policy.completion_logits(policy.encode(examples), ids_for(policy, len(examples)))


@pytest.fixture(scope="module")
def tiny(): return tiny_policy(**SMALL)


@pytest.mark.parametrize("vision", [False, True])
def test_a_branch_computes_what_its_full_copy_does(tiny, vision):
    base = lora(tiny, rank=3, vision=vision)
    branch = stirred(base, 1)
    dense = branch.dense()
    assert type(dense) is Policy and not any("lora" in n for n, _ in dense.model.named_parameters())
    for examples in ([e] for e in EXAMPLES):
        with torch.no_grad():
            assert torch.equal(logits(base, examples), logits(tiny, examples))
            assert (logits(branch, examples) - logits(dense, examples)).abs().max() < 1e-4
            assert (logits(branch, examples) - logits(tiny, examples)).abs().max() > 1e-2
    assert any("visual" in n for n, _ in branch.named_parameters()) == vision


def test_layers_are_recomputed_after_more_branches_are_made():
    "Each adapter that is added is switched to evaluation; the layers that hold it go on recomputing."
    base = lora(language_model(), rank=2)
    base.recompute()
    branch, calls = stirred(base, 1), []
    for layer in branch.model.model.layers: layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = logits(branch)
    passes = len(calls)
    found.sum().backward()
    assert passes and len(calls) == 2 * passes
    assert not any(m.training for layer in branch.shared.layers.values() for m in layer.modules())


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_gradients_follow_the_chain_rule(kind):
    branch = stirred(lora(language_model(kind), rank=2, alpha=6), 1)
    dense, weight = branch.dense(), torch.randn(1, 4, len(character_tokenizer()),
                                                generator=torch.Generator().manual_seed(3))
    for policy in (branch, dense): (logits(policy) * weight).sum().backward()
    of_weight = {n: p.grad for n, p in dense.model.named_parameters()}
    own = dict(branch.named_parameters())
    for n in branch.shared.layers:
        a, b, g = own[f"{n}.lora_A.weight"], own[f"{n}.lora_B.weight"], of_weight[f"{n}.weight"]
        assert torch.allclose(b.grad, 3 * g @ a.T, atol=1e-3, rtol=1e-3)
        assert torch.allclose(a.grad, 3 * b.T @ g, atol=1e-3, rtol=1e-3)
    assert not [n for n, p in branch.shared.model.named_parameters() if "lora" not in n
                and (p.requires_grad or p.grad is not None)]


def test_the_graph_of_one_branch_outlives_a_switch_to_another():
    base = lora(language_model(), rank=2)
    left, right = stirred(base, 1), stirred(base, 2)
    logits(left).square().sum().backward()
    alone = [p.grad.clone() for p in left.parameters()]
    left.zero_grad()
    loss = logits(left).square().sum()
    other = logits(right).square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(left.parameters(), alone))
    assert all(p.grad is None for p in right.parameters())
    other.backward()
    assert all(p.grad is not None for p in right.parameters())


def test_branches_share_one_base_in_memory_and_leave_it_alone():
    plain = language_model()
    before, hashed = {n: p.clone() for n, p in plain.state_dict().items()}, weights_hash(plain)
    base = lora(plain, rank=2)
    branches = [stirred(base, i) for i in range(3)]
    shared = {n.replace(".base_layer.", "."): p.data_ptr() for n, p in base.shared.model.named_parameters()
              if "lora" not in n}
    assert shared == {n: p.data_ptr() for n, p in plain.model.named_parameters()}
    assert all(b.model is base.model for b in branches) and len({weights_hash(b) for b in branches}) == 3
    assert all(p.requires_grad for p in plain.model.parameters()) and weights_hash(plain) == hashed
    assert all(torch.equal(x, before[n]) for n, x in plain.state_dict().items())


def test_an_adapter_leaves_with_its_policy_and_takes_nobody_along():
    base = lora(language_model(), rank=2)
    kept = stirred(base, 1)
    layer = next(iter(base.shared.layers.values()))
    before = logits(kept)
    for i in range(5): logits(stirred(base, i))
    gc.collect()
    assert torch.equal(logits(kept), before) and len(layer.lora_A) == 2
    view = copy.copy(stirred(base, 7))  # what the gap analysis does: the adapter stays as long as somebody holds it
    gc.collect()
    assert logits(view).isfinite().all() and len(layer.lora_A) == 3


def test_a_collector_may_run_while_the_layers_are_walked():
    base = lora(language_model(), rank=2)
    gone, layer = [stirred(base, 1)], next(iter(base.shared.layers.values()))
    gone.append(gone)  # only the collector finds it
    for _ in layer.lora_A:
        gone = None
        gc.collect()
    assert len(layer.lora_A) == 2 and logits(base).isfinite().all() and len(layer.lora_A) == 1


def test_making_branches_draws_nothing_from_the_global_stream():
    base = lora(language_model(), rank=2)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    base.clone()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_merging_equals_the_merge_of_full_copies(method):
    plain = language_model()
    base = lora(plain, rank=2)
    branches, weights = [stirred(base, i) for i in (1, 2)], [0.25, 0.75]
    options = dict(weights=weights, density=0.6, seed=4)
    merged = merge(branches, method, base=plain, **options)
    wanted = merge([b.dense_state() for b in branches], method, base=plain.state_dict(), **options)
    assert isinstance(merged, LoraPolicy) == (method in ("linear", "task_arithmetic"))
    found = merged.dense_state()
    assert max((found[n] - x).abs().max() for n, x in wanted.items()) < 1e-6
    with torch.no_grad(): assert (logits(merged) - logits(plain.with_state(wanted))).abs().max() < 1e-4


@settings(max_examples=4)
@given(st.integers(1, 4), st.floats(0.5, 20),
       st.lists(st.floats(0, 2), min_size=2, max_size=4).filter(lambda w: sum(w) > 0.1),
       st.sampled_from(["linear", "task_arithmetic"]))
def test_merged_adapters_add_up_to_the_merged_change_of_full_weights(rank, alpha, weights, method):
    plain = language_model()
    base = lora(plain, rank=rank, alpha=alpha)
    branches = [stirred(base, i) for i in range(len(weights))]
    shares = [w / (sum(weights) if method == "linear" else 1) for w in weights]
    merged, start = merge(branches, method, weights, base=plain), plain.state_dict()
    assert isinstance(merged, LoraPolicy)
    own = [dict(b.named_parameters()) for b in branches]
    for n in base.shared.layers:
        change = sum(s * alpha / rank * p[f"{n}.lora_B.weight"].double() @ p[f"{n}.lora_A.weight"].double()
                     for s, p in zip(shares, own))
        moved = merged.dense_state()[f"{n}.weight"].double() - start[f"{n}.weight"].double()
        assert (moved - change).abs().max() < 1e-5 * (1 + change.abs().max())


def test_merging_from_a_base_that_has_moved_itself():
    plain = language_model()
    start = stirred(lora(plain, rank=2), 9)
    branches = [stirred(start, i) for i in (1, 2)]
    merged = merge(branches, "task_arithmetic", weights=[0.5, 1.0], base=start)
    wanted = merge([b.dense_state() for b in branches], "task_arithmetic", weights=[0.5, 1.0], base=start.dense_state())
    assert isinstance(merged, LoraPolicy) and merged.adapter.rank == 6
    assert max((merged.dense_state()[n] - x).abs().max() for n, x in wanted.items()) < 1e-6
    with pytest.raises(ValueError, match="different bases"): start.joined([(1.0, lora(plain, rank=2))])
    assert type(merge([branches[0], stirred(lora(plain, rank=2), 3)])) is Policy  # two bases: multiplied out


def test_task_vectors_of_adapters_are_those_of_their_full_copies():
    plain = language_model()
    branches = {f"b{i}": stirred(lora(plain, rank=2), i) for i in (1, 2)}
    left = task_vectors(branches, plain).set_index(["a", "b", "layer"])
    right = task_vectors({n: b.dense() for n, b in branches.items()}, plain).set_index(["a", "b", "layer"])
    assert left.index.equals(right.index) and (left - right).abs().max().max() < 1e-5


@pytest.fixture(scope="module")
def suite(): return dict(text=text(8), image=image(16, 8))


def copd_plan(): return copd(["text", "image"], cycles=2, s_rl=1, s_opd=1, beta=0.5)


@pytest.fixture(scope="module")
def trained():
    "The shipped base, in memory only: its completions end and earn something."
    policy = shipped()
    policy.origin = None
    return policy


@pytest.fixture(scope="module")
def whole(trained, suite, tmp_path_factory):
    base = lora(trained, rank=2)
    return base, train(copd_plan(), suite, base, CONFIG, tmp_path_factory.mktemp("lora") / "run", progress=False)


def test_a_run_trains_adapters_and_merges_them_exactly(whole, trained):
    base, run = whole
    branches = [run.branch(n) for n in ("text", "image")]
    assert all(isinstance(b, LoraPolicy) for b in (*branches, run.result)) and run.result.adapter.rank == 4
    assert branches[0].shared is branches[1].shared is run.result.shared  # read one after the other, one base
    merged, *states = (p.dense_state() for p in (run.result, *branches))
    assert max((merged[n] - (states[0][n] + states[1][n]) / 2).abs().max() for n in trained.state_dict()) < 1e-6
    moved = [s["model.language_model.layers.0.self_attn.q_proj.weight"] for s in states]
    assert not torch.equal(*moved)
    assert all(not p.any() for n, p in base.named_parameters() if "lora_B" in n)  # what was given is unchanged
    events = run.events
    assert {"train", "probe", "eval"} <= set(events.kind) and events.query("kind == 'probe'").symmetric_kl.max() > 0


def test_a_stopped_run_of_adapters_goes_on_bit_for_bit(whole, trained, suite, tmp_path, monkeypatch):
    base, run = whole
    steps, step = iter(range(99)), phase_module.train_step
    def stopping(training, *rest):
        if next(steps) == 1: request_stop(training.run.path)
        return step(training, *rest)
    monkeypatch.setattr(phase_module, "train_step", stopping)
    begun = train(copd_plan(), suite, base, CONFIG, tmp_path / "run", progress=False)
    assert not begun.finished
    monkeypatch.setattr(phase_module, "train_step", step)
    again = train(copd_plan(), suite, lora(trained, rank=2), CONFIG, tmp_path / "run", progress=False)
    assert weights_hash(again.result) == weights_hash(run.result)
    drop = ["seconds"]
    assert again.events.drop(columns=drop).equals(run.events.drop(columns=drop))


def test_another_rank_is_another_run(whole, trained, suite):
    base, run = whole
    with pytest.raises(ValueError, match="holds another run"):
        train(copd_plan(), suite, lora(trained, rank=3), CONFIG, run.path, progress=False)


def test_peft_reads_what_is_saved(tmp_path):
    from peft import PeftModel
    plain = language_model("llama")
    branch = stirred(lora(plain, rank=2, alpha=7), 1)
    branch.save(tmp_path / "branch")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "branch" / "base"),
                                      tmp_path / "branch").eval()
    prompt = branch.encode(EXAMPLES[:1])
    with torch.no_grad(): theirs = model(input_ids=prompt.ids).logits[0, -1]
    ours = branch.completion_logits(prompt, ids_for(branch, 1))[0, 0]
    free = torch.ones(len(ours), dtype=torch.bool).index_fill(0, branch.banned, False)
    assert (theirs - ours)[free].abs().max() < 1e-4


def test_saved_adapters_find_their_base(tmp_path):
    plain = Policy.load(language_model().save(tmp_path / "model"), "plain")
    branch = stirred(lora(plain, rank=2), 1, "mine")
    folder = branch.save(tmp_path / "runs" / "branches" / "mine")
    assert not (folder / "base").exists() and not list(folder.glob("model*.safetensors"))
    again = Policy.load(folder)
    assert again.name == "mine" and torch.equal(logits(again), logits(branch))
    assert weights_hash(again) == weights_hash(branch)
    del again
    gc.collect()
    language_model(seed=3).save(tmp_path / "model")
    with pytest.raises(ValueError, match="its base has changed"): Policy.load(folder)


def test_a_base_without_a_folder_goes_along_and_the_folder_may_move(tmp_path):
    branch = stirred(lora(language_model(), rank=2), 1)
    branch.save(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert torch.equal(logits(Policy.load(tmp_path / "there")), logits(branch))


def test_bad_requests():
    base = lora(language_model(), rank=2)
    with pytest.raises(ValueError, match="LoRA policy already"): lora(base)
    with pytest.raises(ValueError, match="rank=0"): lora(language_model(), rank=0)
    with pytest.raises(ValueError, match="it must have exactly the matrices of its adapter"):
        base.load_state({"x.lora_A.weight": torch.zeros(1)})


def test_a_bf16_base_has_adapters_in_fp32_that_learn(suite, tmp_path):
    plain = language_model()
    half = Policy(plain.model.to(torch.bfloat16), plain.tokenizer, "half")
    base = lora(half, rank=2)
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    only_text = dict(text=suite["text"])
    run = train(expert("text", 2), only_text, base, CONFIG, tmp_path / "run", progress=False)
    own = run.branch("text").parameters()
    assert {p.dtype for p in own} == {torch.float32} and run.branch("text").model.dtype == torch.bfloat16
    assert run.finished
    with pytest.raises(ValueError, match="small updates would be rounded away"):
        train(expert("text", 2), only_text, half, CONFIG, tmp_path / "other", progress=False)


def padded(rows, hidden=32, seed=1): return language_model(rows=rows, hidden=hidden, seed=seed)


@pytest.mark.parametrize("estimator", ["sampled", "reverse", "topk"])
def test_a_larger_frozen_teacher_with_a_longer_head_teaches_adapters(estimator, suite, tmp_path):
    student, teacher = lora(padded(107), rank=2), padded(128, hidden=48)
    plan = Schedule("distil", {"pupil": "base", "big": "base"},
                    [Phase("OPD", 2, [Update("pupil", [OPD("text", "big", 1.0, estimator)])])], "pupil")
    run = train(plan, dict(text=suite["text"]), student, CONFIG, tmp_path / "run", progress=False,
                starts=dict(big=teacher))
    assert run.finished and run.events.query("kind == 'train'").gradient_norm.min() > 0
    assert run.events.query("kind == 'probe'").symmetric_kl.gt(0).any()


def test_a_policy_of_another_size_may_teach_but_not_learn_or_be_merged(suite, tmp_path):
    student, teacher = tiny_policy(**SMALL), tiny_policy(**SMALL | dict(hidden=48))
    with pytest.raises(ValueError, match="need one architecture"):
        train(merged_experts(["text", "image"], 1), suite, student, CONFIG, tmp_path / "run", progress=False,
              starts=dict(text=teacher))
    assert not (tmp_path / "run" / "manifest.json").exists()
