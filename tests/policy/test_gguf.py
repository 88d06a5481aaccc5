"GGUF files: the weights come back in an ordinary model, and unreadable files are refused before anything is built."
import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from copd_nb.data.capability import Example
from copd_nb.policy.core import Policy

HEADS, KV, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "12"]


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=128, tie_word_embeddings=True,
        rope_theta=10_000.0))


def rotated(w, heads):
    "Rows of a query or key projection in the order of llama.cpp."
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}


def tensors(llama):
    for name, x in llama.model.state_dict().items():
        w = x.numpy()
        if name == "embed_tokens.weight": yield "token_embd.weight", w
        elif name == "norm.weight": yield "output_norm.weight", w
        else:
            _, layer, rest = name.split(".", 2)
            part = rest.removesuffix(".weight")
            w = rotated(w, HEADS if "q_proj" in part else KV) if part in ("self_attn.q_proj", "self_attn.k_proj") else w
            yield f"blk.{layer}.{NAMES[part]}.weight", w


def write(path, architecture="llama", kind=gguf.GGMLQuantizationType.F32, template=TEMPLATE):
    llama, out = model(), gguf.GGUFWriter(path, architecture)
    out.add_context_length(128), out.add_embedding_length(WIDTH), out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER), out.add_head_count(HEADS), out.add_head_count_kv(KV)
    out.add_layer_norm_rms_eps(llama.config.rms_norm_eps), out.add_rope_freq_base(10_000.0)
    out.add_vocab_size(len(TOKENS)), out.add_tokenizer_model("gpt2"), out.add_tokenizer_pre("default")
    out.add_token_list(TOKENS), out.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3)), out.add_token_merges(["1 2"])
    out.add_bos_token_id(1), out.add_eos_token_id(2), out.add_pad_token_id(0)
    if template: out.add_chat_template(template)
    for name, w in tensors(llama):
        if w.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            out.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)
        else: out.add_tensor(name, np.ascontiguousarray(w))
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
    return path


@pytest.mark.parametrize("kind,bound", [("F32", 1e-7), ("Q8_0", 2e-3)])
def test_a_gguf_file_becomes_an_ordinary_policy(kind, bound, tmp_path):
    path = write(tmp_path / "tiny.gguf", kind=getattr(gguf.GGMLQuantizationType, kind))
    policy, wanted = Policy.load(path), model().state_dict()
    for name, x in policy.model.state_dict().items(): assert (x - wanted[name]).abs().max() < bound, name
    assert policy.name == "tiny.gguf" and policy.eos == [2] and policy.packs
    assert not getattr(policy.model.config, "quantization_config", None)
    prompt = policy.encode([Example("1+1=", "2", "sums")])
    assert policy.tokenizer.decode(prompt.ids[0]) == "<|im_start|>1+1=<|im_end|>"
    logits = policy.completion_logits(prompt, torch.tensor([[20, 21, 22]]))
    logits.sum().backward()  # it trains
    again = Policy.load(policy.save(tmp_path / "saved"))
    assert torch.equal(again.completion_logits(prompt, torch.tensor([[20, 21, 22]])), logits)


def test_the_only_gguf_file_of_a_folder_is_meant(tmp_path):
    write(tmp_path / "one.gguf")
    assert Policy.load(tmp_path).origin == str(tmp_path)
    write(tmp_path / "two.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files: name one of \['one.gguf', 'two.gguf'\]"):
        Policy.load(tmp_path)


def test_a_gguf_file_without_a_chat_template(tmp_path):
    path = write(tmp_path / "tiny.gguf", template=None)
    with pytest.raises(ValueError, match="has no chat template"): Policy.load(path)
    assert Policy.load(path, chat_template="plain").tokenizer.chat_template


def test_an_unknown_architecture(tmp_path):
    with pytest.raises(ValueError, match="tiny.gguf has architecture 'rwkv7': .*llama"):
        Policy.load(write(tmp_path / "tiny.gguf", "rwkv7"))


def test_a_type_of_tensor_that_cant_be_turned_into_numbers(tmp_path):
    path, kind = tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.I8
    out = gguf.GGUFWriter(path, "llama")
    out.add_tensor("token_embd.weight", np.zeros((4, 32), np.int8), raw_dtype=kind)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
    with pytest.raises(ValueError, match="tiny.gguf has tensors of type I8: they can't be dequantised"):
        Policy.load(path)


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"no gguf at all" * 20, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_damaged_file(damage, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(damage)
    with pytest.raises(ValueError, match="tiny.gguf is no GGUF file that can be read"):
        Policy.load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_a_truncated_file(share, tmp_path):
    path = write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="tiny.gguf is no GGUF file that can be read"): Policy.load(path)


def patched(path, name, value):
    "The same file with another number under a name (4 bytes)."
    data, key = bytearray(path.read_bytes()), name.encode()
    at = data.index(len(key).to_bytes(8, "little") + key) + 8 + len(key) + 4
    data[at:at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name, value",
                         [("block_count", 2 ** 31), ("embedding_length", 2 ** 30), ("feed_forward_length", 2 ** 31),
                          ("attention.head_count", 2 ** 20), ("attention.head_count_kv", 2 ** 31),
                          ("vocab_size", 2 ** 31)])
def test_sizes_that_the_tensors_dont_bear_out_are_refused_before_anything_is_built(name, value, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    wrong = f"ValueError: llama.{name} is {value}: .* a number from 0 to"
    with pytest.raises(ValueError, match=f"tiny.gguf is no GGUF file that can be read: {wrong}"):
        Policy.load(patched(write(tmp_path / "tiny.gguf"), f"llama.{name}", value))


@pytest.mark.parametrize("name, value",
                         [("block_count", 3), ("embedding_length", 32), ("feed_forward_length", 64),
                          ("attention.head_count", 0)])
def test_sizes_that_make_another_model_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match="tiny.gguf (holds no model that can be built|lacks 9 tensors)"):
        Policy.load(patched(write(tmp_path / "tiny.gguf"), f"llama.{name}", value))


def test_a_file_without_one_tensor_is_no_model_with_random_weights(tmp_path, monkeypatch):
    every = tensors
    monkeypatch.setattr("test_gguf.tensors", lambda llama: [t for t in every(llama) if t[0] != "blk.1.ffn_up.weight"])
    with pytest.raises(ValueError,
                       match="tiny.gguf lacks 1 tensors of its model, the first is model.layers.1.mlp.up_proj.weight"):
        Policy.load(write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("length", [2 ** 40, 2 ** 63])
@pytest.mark.parametrize("kind", [0, 4, 8, 9])
def test_a_list_that_claims_more_entries_than_the_file_has_is_refused_at_once(length, kind, tmp_path):
    "Bytes, numbers, texts, lists."
    path = tmp_path / "tiny.gguf"
    def numbers(*pairs): return b"".join(n.to_bytes(size, "little") for n, size in pairs)
    head = b"GGUF" + numbers((3, 4), (0, 8), (1, 8), (1, 8)) + b"a"
    path.write_bytes(head + numbers((9, 4), (kind, 4), (length, 8)) + b"\0" * 40)
    with pytest.raises(ValueError, match="tiny.gguf is no GGUF file that can be read"): Policy.load(path)


def test_a_head_with_more_values_than_any_model_has_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "tiny.gguf")
    monkeypatch.setattr("copd_nb.policy.gguf.GGUF_READS", 100)
    with pytest.raises(ValueError, match="more than 100 values"): Policy.load(path)
