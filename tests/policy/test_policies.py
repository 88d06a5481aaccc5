"Scoring against the stock forward pass, banned ids, errors, clones, checkpoints."
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from copd_nb.policy import passes as passes_module
from copd_nb.policy import verify as verify_module
from copd_nb.data.capability import Example
from copd_nb.policy.toys import minis_base, image, text, tiny_policy, video
from copd_nb.policy.verify import verify_forward
from copd_nb.policy.core import Policy, check_same_vocabulary, context_length
from copd_nb.policy.head import BANNED_LOGIT
from copd_nb.policy.processors import character_tokenizer
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample

SMALL = dict(hidden=48, layers=2, vision_hidden=32, vision_depth=2)
TEXT, IMAGE, VIDEO = text(8).test[:2], image(8, 4).test[:2], video(8, 4).test[:2]
SOUP = Example("all?", "1", "soup", images=(IMAGE[0].images[0], IMAGE[1].images[0][:, :16]), videos=VIDEO[0].videos)
BATCHES = dict(text=TEXT, image=IMAGE, video=VIDEO, mixed=[VIDEO[0], TEXT[0], SOUP, IMAGE[1]])
GROUP, LENGTH = 3, 5


@pytest.fixture(scope="module")
def tiny(): return tiny_policy(**SMALL)


@pytest.fixture(scope="module")
def shipped(): return minis_base()


def text_policy(kind="qwen3", name="words", **extra):
    tokenizer = character_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                 pad_token_id=tokenizer.pad_token_id) | extra
    torch.manual_seed(0)
    qwen = kind == "qwen3"
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes)) if qwen else LlamaForCausalLM(LlamaConfig(**sizes))
    return Policy(model, tokenizer, name)


def tokens(policy, rows, length=LENGTH, seed=0):
    allowed = torch.tensor(sorted(set(range(policy.width)) - set(policy.banned.tolist())))
    return allowed[torch.randint(len(allowed), (rows, length), generator=generator("cpu", seed))]


def logp(logits, ids): return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def scored(policy, examples, ids, temperature=1.0):
    return logp(policy.completion_logits(policy.encode(examples), ids, temperature), ids)


def chat(policy, example):
    content = [{"type": "image"}] * len(example.images) + [{"type": "video"}] * len(example.videos)
    content.append({"type": "text", "text": example.prompt})
    if policy.processor is policy.tokenizer: content = example.prompt
    return policy.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                                tokenize=False)


def stock_logits(policy, examples, ids, temperature=1.0):
    "Every row with its own prompt and pixels through the stock forward pass, which works out its positions itself."
    visual = {k: [v for e in examples for v in getattr(e, k)] for k in ("images", "videos")}
    visual = {k: v for k, v in visual.items() if v}
    batch = dict(
        policy.processor(text=[chat(policy, e) for e in examples], padding=True, return_tensors="pt", **visual))
    kinds = batch.pop("mm_token_type_ids", torch.zeros_like(batch["input_ids"]))
    mask = torch.cat([batch.pop("attention_mask"), torch.ones_like(ids)], 1)
    where = dict(mm_token_type_ids=torch.cat([kinds, torch.zeros_like(ids)], 1))
    if not visual: where = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    out = policy.model(input_ids=torch.cat([batch.pop("input_ids"), ids], 1), attention_mask=mask,
                       logits_to_keep=ids.shape[1] + 1, use_cache=False,
                       **where, **batch)
    logits = out.logits[:, :-1].float() / temperature
    logits[..., policy.banned] = BANNED_LOGIT
    return logits


def stock(policy, examples, ids, temperature=1.0): return logp(stock_logits(policy, examples, ids, temperature), ids)


def gradients(policy, value):
    out = torch.autograd.grad(value, list(policy.model.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(out, policy.model.parameters())])


@pytest.mark.parametrize("which", ["tiny", "shipped"])
@pytest.mark.parametrize("kind", BATCHES)
def test_shared_prompts_equal_full_rows_of_the_stock_model(which, kind, request):
    policy, examples = request.getfixturevalue(which), BATCHES[kind]
    rows = [e for e in examples for _ in range(GROUP)]
    ids = tokens(policy, len(rows))
    weights = torch.randn(ids.shape, generator=generator("cpu", "weights"))
    shared, plain = scored(policy, examples, ids), stock(policy, rows, ids)
    assert (shared - plain).abs().max() < 1e-5 * max(1, plain.abs().max())
    a, b = gradients(policy, (shared * weights).sum()), gradients(policy, (plain * weights).sum())
    assert b.norm() > 0 and (a - b).norm() < 1e-4 * b.norm()
    has_pixels = any(e.images or e.videos for e in examples)
    size = sum(p.numel() for p in policy.model.model.visual.parameters())
    vision = gradients(policy, (scored(policy, examples, ids) * weights).sum())[:size]
    assert (vision.norm() > 0) == has_pixels  # the vision tower is reached through the shared prompt


@pytest.mark.parametrize("kind", BATCHES)
def test_a_row_alone_equals_the_row_in_a_batch(kind, shipped):
    examples = BATCHES["mixed"] + TEXT + BATCHES[kind]
    ids = tokens(shipped, len(examples))
    together = scored(shipped, examples, ids)
    alone = torch.cat([scored(shipped, [e], ids[i:i + 1]) for i, e in enumerate(examples)])
    assert (together - alone).abs().max() < 2e-5


def test_positions_and_masks_of_a_mixed_batch(shipped):
    prompts = shipped.encode(BATCHES["mixed"])
    for i, e in enumerate(BATCHES["mixed"]):
        one, n = shipped.encode([e]), int(prompts.mask[i].sum())
        assert torch.equal(prompts.ids[i, -n:], one.ids[0])
        assert torch.equal(prompts.positions[:, i, -n:], one.positions[:, 0])
        assert not prompts.mask[i, :-n].any() and prompts.next_position[i] == one.next_position[0]
        assert prompts.patches[i] == sum(len(v) for k, v in one.vision.items() if k.startswith("pixel"))
    assert prompts.tokens == int(prompts.mask.sum()) and prompts.patches[1] == 0


def test_stale_offsets_of_an_earlier_batch_do_not_matter(tiny):
    ids = tokens(tiny, 2)
    before = scored(tiny, TEXT, ids)
    stock(tiny, VIDEO, ids)  # the model now remembers the offsets of videos
    assert torch.equal(scored(tiny, TEXT, ids), before)


@pytest.mark.parametrize("temperature", [.5, 2.0])
def test_temperature_divides_the_logits_everywhere(temperature, tiny):
    ids = tokens(tiny, 4)
    rows = [e for e in BATCHES["image"] for _ in range(2)]
    assert torch.allclose(scored(tiny, IMAGE, ids, temperature), stock(tiny, rows, ids, temperature), atol=1e-5)
    assert not torch.allclose(scored(tiny, IMAGE, ids, temperature), scored(tiny, IMAGE, ids), atol=1e-3)


def test_a_given_prefill_is_used(tiny):
    prompts, ids = tiny.encode(IMAGE), tokens(tiny, 4)
    start = tiny.prefill(prompts)
    assert torch.equal(tiny.completion_logits(prompts, ids, start=start), tiny.completion_logits(prompts, ids))
    # and not used up
    assert torch.equal(tiny.completion_logits(prompts, ids, start=start), tiny.completion_logits(prompts, ids))
    other = tiny_policy(seed=1, **SMALL).prefill(prompts)
    assert not torch.allclose(tiny.completion_logits(prompts, ids, start=other), tiny.completion_logits(prompts, ids),
                              atol=1e-3)
    assert all(x.grad_fn is None for x in start.detach().tensors) and all(x.grad_fn is not None for x in start.tensors)


def test_one_token_and_many_agree_on_the_first(tiny):
    prompts, ids = tiny.encode(TEXT), tokens(tiny, 4)
    assert torch.equal(tiny.completion_logits(prompts, ids[:, :1]), tiny.completion_logits(prompts, ids)[:, :1])


@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_decoding_equals_scoring_while_rows_leave(packs, tiny):
    policy = tiny.clone()
    policy.packs = packs
    prompts, rows = policy.encode(BATCHES["mixed"]), torch.arange(12)
    ids, owner, whole = tokens(tiny, 12), rows // 3, tiny.completion_logits(prompts, tokens(tiny, 12))
    decoder = policy.decoder(policy.prefill(prompts).keys, owner, prompts.next_position[owner], LENGTH - 1)
    for t in range(LENGTH - 1):
        if t:
            alive = torch.rand(len(rows), generator=generator("cpu", "alive", t)) < .6
            decoder.keep(alive)
            rows = rows[alive]
        assert torch.allclose(policy.head()(decoder.next(ids[rows, t])), whole[rows, t + 1], atol=1e-5)
    assert 0 < len(rows) < 12


RAGGED = torch.tensor([1, 5, 3, 2, 5, 4, 1])  # lengths of rows that belong to prompts in no order
OWNER = torch.tensor([2, 0, 2, 3, 0, 2, 1])


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("long", [1, 2, 48])
def test_ragged_rows_of_prompts_in_any_order(packs, long, tiny, monkeypatch):
    policy, prompts, ids = tiny.clone(), tiny.encode(BATCHES["mixed"]), tokens(tiny, 7)
    policy.packs = packs
    monkeypatch.setattr("copd_nb.policy.attention.LONG", long)
    mask = torch.arange(LENGTH) < RAGGED[:, None]
    hidden = policy.completion_hidden(prompts, ids, mask, owner=OWNER)
    rows = tiny.encode([BATCHES["mixed"][i] for i in OWNER])
    expected = stock_logits(tiny, [BATCHES["mixed"][i] for i in OWNER], ids)[mask]
    logits = policy.head()(hidden)
    assert (logits - expected)[:, :8].abs().max() < 1e-4 and len(rows) == 7
    weights = torch.randn(expected.shape, generator=generator("cpu", "ragged")) * (expected > BANNED_LOGIT)
    a, b = gradients(policy, (logits * weights).sum()), gradients(tiny, (expected * weights).sum())
    assert (a - b).norm() < 1e-4 * b.norm()


def test_a_leaf_collects_what_goes_through_the_prompt(tiny):
    prompts, ids = tiny.encode(BATCHES["mixed"]), tokens(tiny, 8)
    whole = gradients(tiny, tiny.completion_hidden(prompts, ids).square().sum())
    start = tiny.prefill(prompts)
    leaf = start.leaf()
    for rows in (torch.tensor([5, 0, 3]), torch.tensor([1, 2, 4, 6, 7])):
        tiny.completion_hidden(prompts, ids[rows], start=leaf, owner=rows // 2).square().sum().backward()
    start.backward(leaf)
    parts = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in tiny.model.parameters()])
    tiny.model.zero_grad()
    assert (whole - parts).norm() < 1e-5 * whole.norm()


SIZES = dict(vocab_size=107, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8,
             max_position_embeddings=64, eos_token_id=2, bos_token_id=None, pad_token_id=0)
FAMILIES = dict(llama={}, qwen2=dict(use_sliding_window=False, sliding_window=None), qwen3={},
                mistral=dict(sliding_window=None), gemma={}, olmo2={}, phi3=dict(sliding_window=None),
                granite=dict(logits_scaling=3.0, embedding_multiplier=2.0), cohere=dict(logit_scale=.25), glm4={},
                smollm3={}, starcoder2=dict(sliding_window=None),
                gpt_neox=dict(num_key_value_heads=4), mistral_window=dict(sliding_window=4),
                gemma2=dict(final_logit_softcapping=5.0, attn_logit_softcapping=8.0),
                gemma3_text=dict(sliding_window=4), gpt2=dict(n_embd=32, n_layer=2, n_head=4, n_positions=64))
PADDED = {"mistral_window", "gemma2", "gemma3_text"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models(family):
    "Packed or padded, log-probs and gradients equal those of the stock forward pass in every family."
    config = AutoConfig.for_model(family.removesuffix("_window"), **SIZES | FAMILIES[family])
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    policy = Policy(AutoModelForCausalLM.from_config(config), tokenizer, family)
    assert policy.packs == (family not in PADDED)
    ids = tokens(policy, 4)
    rows = [TEXT[0], TEXT[0], Example("1+1=", "2", "sums"), Example("1+1=", "2", "sums")]
    shared, plain = scored(policy, rows[::2], ids), stock(policy, rows, ids)
    assert (shared - plain).abs().max() < 2e-5
    a, b = gradients(policy, shared.sum()), gradients(policy, plain.sum())
    assert (a - b).norm() < 1e-4 * b.norm()
    with torch.no_grad():
        out = sample(policy, policy.encode(rows[::2]), 2, 6, source=generator("cpu", 0))
        assert torch.allclose(out.logp, logp(stock_logits(policy, rows, out.ids), out.ids) * out.mask, atol=1e-4)


def family(kind, **extra):
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | extra)), character_tokenizer(),
                  kind)


@pytest.mark.parametrize("kind", ["nemotron", "diffllama"])
def test_a_model_that_does_not_hand_on_how_rows_are_packed_is_padded(kind, tmp_path):
    made = family(kind)
    assert made.packs
    policy = Policy.load(made.save(tmp_path / kind))
    assert not policy.packs
    ids = tokens(policy, 4)
    rows = [TEXT[0], TEXT[0], TEXT[1], TEXT[1]]
    assert (scored(policy, TEXT, ids) - stock(policy, rows, ids)).abs().max() < 2e-5


LATENT = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, kv_lora_rank=16, q_lora_rank=16,
              num_key_value_heads=4)
ROUTED = LATENT | dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
                       first_k_dense_replace=1)


@pytest.mark.parametrize("kind, extra",
                         [("deepseek_v3", ROUTED), ("deepseek_v2", ROUTED | dict(topk_method="greedy")),
                          ("minicpm3", LATENT | dict(head_dim=16))])
def test_a_model_with_latent_attention_is_padded(kind, extra):
    policy = family(kind, **extra)
    verify_forward(policy)
    assert not policy.packs


@pytest.mark.parametrize("kind, extra, said", [
    ("bert", {}, r"\(BertLMHeadModel\): our scoring pass differs from model.forward by"),
    ("rwkv", {}, "our scoring pass differs"),
    ("mpt", dict(logit_scale=0.5, d_model=32, n_heads=4, n_layers=2), "our scoring pass differs"),
    ("lfm2", dict(layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM, layers of type conv.*fail on text"),
    ("qwen3_5_text", {}, "layers of type linear_attention.*our passes fail on text with"),
])
def test_a_model_that_would_be_trained_as_another_is_refused_when_it_is_read(kind, extra, said, tmp_path):
    folder = family(kind, **extra).save(tmp_path / kind)
    with pytest.raises(ValueError, match=f"'{kind}' .*{said}.*this architecture is not supported"): Policy.load(folder)


@pytest.fixture
def unverified(monkeypatch): monkeypatch.setattr("copd_nb.policy.verify._VERIFIED", {})


def test_a_config_is_tried_once(unverified, monkeypatch):
    tried, real = [], verify_module._mismatch
    monkeypatch.setattr(verify_module, "_mismatch", lambda policy: tried.append(policy.packs) or real(policy))
    for _ in range(2):
        policy = family("nemotron")
        verify_forward(policy)
        assert not policy.packs and tried == [True, False]
    verify_forward(family("nemotron", hidden_size=64))
    assert tried == [True, False] * 2


def test_a_head_that_does_more_is_refused_and_a_broken_model_is_not(unverified):
    policy, own = text_policy(), type(text_policy().model).forward
    verify_forward(policy)
    class Doubling(type(policy.model)):
        def forward(self, *args, **kwargs):
            out = own(self, *args, **kwargs)
            return type(out)(logits=2 * out.logits, past_key_values=out.past_key_values)
    policy.model.__class__ = Doubling
    wrong = r"'words' \(Doubling\): our scoring pass differs from model.forward by 50.0 %"
    with pytest.raises(ValueError, match=wrong): verify_forward(policy)
    for value in (0.0, float("nan")):
        policy = text_policy()
        with torch.no_grad(): policy.model.model.norm.weight.fill_(value)
        verify_forward(policy)
        verify_module._VERIFIED.clear()


def test_a_decoder_that_forgets_is_refused(unverified, monkeypatch):
    kept = passes_module.PaddedDecoder.next
    monkeypatch.setattr(passes_module.PaddedDecoder, "next", lambda self, tokens: kept(self, torch.zeros_like(tokens)))
    with pytest.raises(ValueError, match="'gemma2' .* our decoding pass differs from model.forward"):
        verify_forward(family("gemma2"))


def tried(kind) -> str:
    "What becomes of a family at the size of a test."
    try: policy = family(kind)
    except Exception: return "not built"
    try: verify_forward(policy)
    except ValueError as error: return "can't run" if "passes fail on text" in str(error) else "other logits"
    return "packed" if policy.packs else "padded"


@pytest.mark.slow
def test_every_family_of_transformers_is_its_own_or_refused(monkeypatch):
    "No other error, and the ones that people train are among those that run."
    transformers.logging.set_verbosity_error()  # warnings about sizes that no one would choose
    small = AutoModelForCausalLM.from_config
    def bounded(config):
        with torch.device("meta"): size = sum(p.numel() for p in small(config).parameters())
        if size > 3e7: raise MemoryError(size)
        return small(config)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", bounded)
    found = {kind: tried(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for outcome in sorted(set(found.values())):
        print(f"{outcome}: {', '.join(k for k, v in found.items() if v == outcome)}")
    assert {"llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2",
            "granite", "glm4", "smollm3", "cohere2",
            "gpt_oss"} <= {k for k, v in found.items() if v in ("packed", "padded")}


def test_another_attention_that_was_chosen_is_left_alone():
    policy = text_policy()
    eager = text_policy().model
    eager.set_attn_implementation("eager")
    eager = Policy(eager, policy.tokenizer)
    assert policy.packs and not eager.packs and eager.model.config._attn_implementation == "eager"
    ids = tokens(policy, 4)
    assert torch.allclose(scored(eager, TEXT, ids), scored(policy, TEXT, ids), atol=1e-5)


def test_which_ids_are_banned(tiny):
    marks = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    assert tiny.banned.tolist() == sorted(tiny.tokenizer.convert_tokens_to_ids(marks)) and tiny.eos == [2]
    wide = text_policy(vocab_size=115)
    assert wide.banned.tolist() == [0, *range(107, 115)] and wide.width == 115
    ends = text_policy(pad_token_id=2)
    ends.tokenizer.pad_token = "<|im_end|>"
    assert Policy(ends.model, ends.tokenizer).banned.tolist() == []  # the end token pads too: it must stay allowed


def test_banned_ids_have_probability_zero_and_are_never_sampled():
    policy = text_policy(vocab_size=115, tie_word_embeddings=False)
    with torch.no_grad():  # a model that wants nothing else
        policy.model.lm_head.weight.zero_()
        state = policy.model.model(torch.tensor([[8]])).last_hidden_state[0, 0]
        policy.model.lm_head.weight[policy.banned] = 1e3 * state.sign()
    prompts = policy.encode(TEXT)
    logits = policy.completion_logits(prompts, tokens(policy, 4))
    assert (logits.softmax(-1)[..., policy.banned] == 0).all() and torch.isfinite(logits).all()
    out = sample(policy, prompts, 64, 4, source=generator("cpu", 0))
    assert not torch.isin(out.ids, policy.banned).any()
    assert not torch.isin(sample(policy, prompts, 1, 4, greedy=True).ids, policy.banned).any()


def test_a_prompt_longer_than_the_context_is_an_error_that_names_it():
    policy = text_policy()
    long = Example("1" * 60, "1", "sums")
    with pytest.raises(ValueError, match=rf"prompt {long.id} of capability 'sums' has \d+ tokens.*'words', 64 tokens"):
        policy.encode([*TEXT, long])
    fits = policy.context - policy.encode(TEXT[:1]).ids.shape[1]
    policy.encode(TEXT[:1], room=fits)
    with pytest.raises(ValueError, match=f"with {fits + 1} for the completion"): policy.encode(TEXT[:1], room=fits + 1)


@pytest.mark.parametrize("examples, what", [(IMAGE, "images"), (VIDEO, "videos")])
def test_pictures_are_an_error_for_a_text_only_model(examples, what):
    wrong = rf"{examples[0].id} of capability '{examples[0].capability}' has \['{what}'\].*'words' is a text-only"
    with pytest.raises(ValueError, match=wrong):
        text_policy().encode(examples)


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("pictures", [{}, dict(images=IMAGE[0].images), dict(videos=VIDEO[0].videos)],
                         ids=lambda p: "-".join(p) or "none")
def test_a_prompt_that_spells_a_vision_placeholder_is_an_error_that_names_it(mark, pictures, tiny):
    typed = Example(f"what is {mark}?", "1", "user", **pictures)
    with pytest.raises(ValueError, match=rf"prompt {typed.id} of capability 'user': .*{mark[:7]}".replace("|", r"\|")):
        tiny.encode([typed])


def test_without_a_chat_template_the_prompt_stands_as_it_is():
    policy = text_policy()
    policy.tokenizer.chat_template = None
    assert policy.tokenizer.decode(policy.encode([Example("1+1=", "2", "c")]).ids[0]) == "1+1="


def test_the_chat_template_is_applied(tiny):
    shown = tiny.tokenizer.decode(tiny.encode([TEXT[0]]).ids[0])
    assert shown == f"<|im_start|>user\n{TEXT[0].prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_clones_are_independent(tiny):
    ids = tokens(tiny, 2)
    before, copy = scored(tiny, IMAGE, ids), tiny.clone("copy")
    assert torch.equal(scored(copy, IMAGE, ids), before) and (copy.name, tiny.name) == ("copy", "tiny")
    assert not {p.data_ptr() for p in copy.model.parameters()} & {p.data_ptr() for p in tiny.model.parameters()}
    with torch.no_grad():
        for p in copy.model.parameters(): p.mul_(1.1)
    assert torch.equal(scored(tiny, IMAGE, ids), before)
    assert not torch.allclose(scored(copy, IMAGE, ids), before, atol=1e-3)


def test_with_state(tiny):
    other, ids = tiny_policy(seed=1, **SMALL), tokens(tiny, 2)
    moved = tiny.with_state(other.state_dict(), "moved")
    assert torch.equal(scored(moved, TEXT, ids), scored(other, TEXT, ids)) and moved.name == "moved"
    state = dict(other.state_dict())
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"): tiny.with_state(state)


def test_the_model_stays_in_evaluation_mode():
    policy = text_policy(attention_dropout=.5)
    policy.model.train()
    policy = Policy(policy.model, policy.tokenizer)
    ids = tokens(policy, 2)
    assert torch.equal(scored(policy, TEXT, ids), scored(policy.clone(), TEXT, ids))


def test_save_and_load_are_equal_with_pictures(tiny, tmp_path):
    again = Policy.load(tiny.save(tmp_path / "saved"))
    assert again.name == "saved" and type(again.model) is type(tiny.model) and again.eos == tiny.eos
    assert torch.equal(again.banned, tiny.banned)
    for examples in BATCHES.values():
        ids = tokens(tiny, len(examples))
        one, two = tiny.encode(examples), again.encode(examples)
        assert torch.equal(one.ids, two.ids) and all(torch.equal(one.vision[k], two.vision[k]) for k in one.vision)
        assert torch.equal(tiny.completion_logits(one, ids), again.completion_logits(two, ids))
    assert not [p for p in (tmp_path / "saved").iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    check_same_vocabulary(tiny, again)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_text_only_models(kind, tmp_path):
    policy = text_policy(kind)
    rows = [e for e in text(8).test[:3] for _ in range(2)]
    rows = rows[:2] + [Example("1+1=", "2", "sums")] * 2 + rows[4:]
    ids = tokens(policy, 6)
    shared, plain = scored(policy, rows[::2], ids), stock(policy, rows, ids)
    assert (shared - plain).abs().max() < 1e-5
    a, b = gradients(policy, shared.sum()), gradients(policy, plain.sum())
    assert (a - b).norm() < 1e-4 * b.norm()
    again = Policy.load(policy.save(tmp_path))
    assert type(again.model) is type(policy.model) and torch.equal(scored(again, rows[::2], ids), shared)
    assert again.eos == [2]
    assert sample(policy, policy.encode(rows[::2]), 2, 4, source=generator("cpu", 0)).ids.shape[0] == 6


def test_several_end_ids():
    policy = text_policy(eos_token_id=[2, 8])
    assert policy.eos == [2, 8]


def test_same_vocabulary():
    a, b = text_policy(name="a"), text_policy(name="b")
    check_same_vocabulary(a, b)
    b.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError,
                       match=r"'a' and 'b' have different vocabularies, 1 tokens differ: 'new' \(missing / 107\)"):
        check_same_vocabulary(a, b)
    with pytest.raises(ValueError, match=r"'new' \(107 / missing\)"): check_same_vocabulary(b, a)
    check_same_vocabulary(a, text_policy(vocab_size=115))  # padding makes no difference
    with pytest.raises(ValueError, match="'short' has an output head of 106 rows and tokens up to id 106"):
        check_same_vocabulary(a, text_policy(vocab_size=106, name="short"))


def test_swapped_ids_are_a_different_vocabulary():
    class Swapped:
        def __init__(self, ids): self.vocabulary = ids | {"1": ids["2"], "2": ids["1"]}
        def get_vocab(self): return self.vocabulary
    a, b = text_policy(name="a"), text_policy(name="b")
    b.tokenizer = Swapped(a.tokenizer.get_vocab())
    with pytest.raises(ValueError, match="2 tokens differ: '1'.*'2'"): check_same_vocabulary(a, b)


def test_encoded_prompts_are_kept_and_shared_with_clones(tiny, monkeypatch):
    e = Example("5+5=", "10", "sums")
    tiny.encode([e])
    clone = tiny.clone()
    monkeypatch.setattr("copd_nb.policy.encoding._encode_many", lambda policy, examples: pytest.fail("encoded again"))
    assert clone.encode([e, e]).ids.shape[0] == 2


def test_encoded_prompts_take_bounded_memory(shipped, monkeypatch):
    policy, examples = shipped.clone(), [*TEXT, *IMAGE, *VIDEO]
    policy._encoded = type(shipped._encoded)()
    policy.encode(examples)
    sizes = [policy._encoded.weight(row) for row in policy._encoded.values()]
    assert policy._encoded.size == sum(sizes) > 0 and list(policy._encoded) == [e.id for e in examples]
    monkeypatch.setattr("copd_nb.policy.encoding.KEPT_BYTES", sum(sizes[-2:]))
    # what is asked for at once may be more
    assert torch.equal(policy.encode(examples).ids, shipped.encode(examples).ids)
    assert list(policy._encoded) == [e.id for e in examples[-2:]] and policy._encoded.size == sum(sizes[-2:])
    policy.encode(examples[-2:-1])
    policy.encode(examples[:1])
    assert policy._encoded.size <= sum(sizes[-2:]) and list(policy._encoded)[-1] == examples[0].id


def test_prompts_encoded_together_equal_those_encoded_alone(shipped):
    together, examples = shipped.clone(), [*BATCHES["mixed"], *TEXT, *VIDEO, *IMAGE, *TEXT]
    alone = shipped.clone()
    together._encoded, alone._encoded = type(shipped._encoded)(), type(shipped._encoded)()
    together.encode(examples)
    for e in examples: alone.encode([e])
    for e in examples:
        a, b = together._encoded[e.id], alone._encoded[e.id]
        assert torch.equal(a["ids"], b["ids"]) and torch.equal(a["positions"], b["positions"])
        assert a["vision"].keys() == b["vision"].keys()
        assert all(torch.equal(a["vision"][k], b["vision"][k]) for k in a["vision"])


def test_one_bad_prompt_among_good_ones_is_named(tiny):
    typed = Example("what is <|image_pad|>?", "1", "user")
    with pytest.raises(ValueError, match=f"prompt {typed.id} of capability 'user'"):
        tiny.clone().encode([TEXT[0], IMAGE[0], typed, VIDEO[0]])


def test_the_array_behind_an_example_is_not_changed(tiny):
    before = np.copy(IMAGE[0].images[0])
    tiny.clone().encode([IMAGE[0]])
    assert np.array_equal(before, IMAGE[0].images[0])


def padded_copy(policy, rows, seed=0):
    "The same model with a longer head and embedding, as larger members of a family have it."
    config = copy.deepcopy(policy.model.config)
    config.vocab_size = rows
    model = type(policy.model)(config)
    state = dict(policy.model.state_dict())
    extra = torch.randn(rows, config.hidden_size, generator=generator("cpu", seed))
    for key in [k for k, x in state.items() if len(x) == policy.width]:
        state[key] = torch.cat([state[key], extra[policy.width:]])
    model.load_state_dict(state)
    return Policy(model, policy.tokenizer, "padded")


def test_padding_rows_of_a_head_take_no_part():
    policy = text_policy()
    longer = padded_copy(policy, 128)
    ids = tokens(policy, 2)
    assert set(range(107, 128)) <= set(longer.banned.tolist())
    ours, theirs = (p.completion_logits(p.encode(TEXT), ids).log_softmax(-1) for p in (policy, longer))
    assert torch.equal(ours, theirs[..., :107]) and theirs[..., 107:].max() < -1e8
    drawn = sample(longer, longer.encode(TEXT), 64, 6, 50.0, source=generator("cpu", 1))
    assert drawn.ids.max() < 107


def test_policies_with_heads_of_different_sizes_are_compared_on_their_common_ids():
    from copd_nb.analysis.token_gap import behavior_gap
    from copd_nb.signals.compare import compare_tokens
    from copd_nb.signals.teachers import token_divergence
    policy, other = text_policy(), text_policy("llama")
    with torch.no_grad(): other.model.lm_head.weight.mul_(1.5)
    longer = padded_copy(other, 128)
    one, two = (behavior_gap(policy, p, TEXT, k=5, max_new_tokens=4).drop(columns="b") for p in (longer, other))
    assert one.equals(two)
    h = torch.randn(6, 32, generator=generator("cpu", 2))
    for kind in ("reverse", "forward", "jsd", "topk"):
        wide, narrow = (token_divergence(policy.head(), h, p.head(), h, kind, k=4) for p in (longer, other))
        assert torch.equal(wide, narrow)
    # the student has the longer head
    back = token_divergence(longer.head(), h.requires_grad_(), policy.head(), h.detach())
    back.sum().backward()
    assert h.grad.norm() > 0
    assert all(torch.equal(x, y)
               for x, y in zip(compare_tokens(longer.head(), h, policy.head(), h).values(),
                               compare_tokens(other.head(), h, policy.head(), h).values()))


def test_ids_without_a_token_are_banned_wherever_they_are():
    class Gappy:
        "A tokenizer whose ids have a hole."
        def __init__(self, of): self.of = of
        def __getattr__(self, name): return getattr(self.of, name)
        def __call__(self, *given, **options): return self.of(*given, **options)
        def get_vocab(self): return {t: i for t, i in self.of.get_vocab().items() if i != 50}
    policy = text_policy()
    assert 50 not in policy.banned and 50 in Policy(policy.model, Gappy(policy.tokenizer)).banned


def saved(tmp_path, **changes):
    "A checkpoint folder with changes to its config.json."
    folder = text_policy().save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_missing_chat_template_is_asked_for(tmp_path):
    policy = text_policy()
    policy.tokenizer.chat_template = None
    folder = policy.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no chat template: give load\(chat_template=…\)"): Policy.load(folder)
    plain = Policy.load(folder, chat_template="plain")
    assert plain.tokenizer.decode(plain.encode([TEXT[0]]).ids[0]) == TEXT[0].prompt
    again = Policy.load(plain.save(tmp_path / "again"))  # the choice is kept
    assert again.tokenizer.decode(again.encode([TEXT[0]]).ids[0]) == TEXT[0].prompt
    given = Policy.load(folder, chat_template="{{ messages[0]['content'] }}!")
    assert given.tokenizer.decode(given.encode([TEXT[0]]).ids[0]) == TEXT[0].prompt + "!"


def test_a_missing_pad_token_is_asked_for(tmp_path):
    policy = text_policy()
    policy.tokenizer.pad_token = None
    folder = policy.save(tmp_path / "model")
    with pytest.raises(ValueError,
                       match=r"has no pad token: give load\(pad_token=…\), for instance its end token '<\|im_end\|>'"):
        Policy.load(folder)
    with pytest.raises(ValueError, match="pad_token='nonsense' is no token"): Policy.load(folder, pad_token="nonsense")
    assert Policy.load(folder, pad_token="<|endoftext|>").tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("changes,message", [
    (dict(architectures=["pipeline"]), r"names the class \['pipeline'\].*no remote code is run"),
    (dict(architectures=["Qwen3Model"]), "with an output head"),
    (dict(architectures=["PreTrainedModel"]), "with an output head"),
    (dict(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "is no model that transformers .* knows")])
def test_only_classes_of_transformers_are_built(changes, message, tmp_path):
    folder = saved(tmp_path, **changes)
    (folder / "mine.py").write_text("raise SystemExit('remote code has run')")
    with pytest.raises(ValueError, match=message): Policy.load(folder)


def test_only_safetensors_are_read(tmp_path):
    folder = saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors"): Policy.load(folder)


def test_weights_in_bf16_and_a_device_map(tmp_path):
    folder, ids = saved(tmp_path), tokens(text_policy(), 2)
    half = Policy.load(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert half.model.dtype == torch.bfloat16 and half.origin == str(folder)
    logits = half.completion_logits(half.encode(TEXT), ids)
    assert logits.dtype == torch.float32
    assert (logits - Policy.load(folder).completion_logits(half.encode(TEXT), ids)).abs().max() < 0.1
    assert half.to("cpu") is half


def test_models_without_a_limit_of_their_own_take_prompts_of_any_length(tmp_path):
    "Bloom's ALiBi has none, although checkpoints may name the length that they were trained on."
    config = transformers.BloomConfig(
        vocab_size=107, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    policy = Policy(AutoModelForCausalLM.from_config(config), character_tokenizer(), "bloom")
    assert policy.context is None and policy.encode([Example("1" * 3000, "1", "long")], 10).ids.shape[1] > 3000
    policy.model.config.seq_length = 64
    again = Policy.load(policy.save(tmp_path / "bloom"))
    assert again.context == 64
    with pytest.raises(ValueError, match="more than the context of 'bloom', 64 tokens"):
        again.encode([Example("1" * 60, "1", "long")])
    assert context_length(transformers.MptConfig(max_seq_len=128)) == 128


def test_a_policy_is_complete_wherever_it_is_imported_from():
    "Its passes and files are defined in later modules; documentation and signature are those of the functions."
    code = ("from copd_nb.policy.core import Policy; import inspect\n"
            "assert Policy.load.__doc__.startswith('Read a policy')\n"
            "assert 'room' in inspect.signature(Policy.encode).parameters\n"
            "for name in ('encode', 'prefill', 'decoder', 'completion_hidden', 'completion_logits', 'save', 'load'):\n"
            "    assert getattr(Policy, name).__doc__, name")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
