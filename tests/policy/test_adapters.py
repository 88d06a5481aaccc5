"Adapters of other programs: equal to peft's logits, live, multiplied out, merged, saved again; or refused by name."
import dataclasses
import gc
import json
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from copd_nb.policy import adapters as adapters_module
from copd_nb.policy import core as core_module
from copd_nb.policy import lora_branches as lora_module
from copd_nb.policy.toys import image, text, tiny_policy, video
from copd_nb.schedule.merging import merge
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import LoraPolicy, adapted_layers, lora
from copd_nb.policy.processors import character_tokenizer
from copd_nb.study.memory import lora_size

IDS = torch.tensor([[20, 41, 33, 25], [30, 31, 32, 33]])
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=.1)
TIED, MOE = dict(tie_word_embeddings=True), dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = dict(
    llama=("Llama", {}), tied=("Llama", TIED), biased=("Qwen2", TIED), wide=("Llama", dict(hidden_size=48)),
    moe=("Qwen3Moe", MOE | dict(head_dim=8)), mixed=("Qwen3Moe", MOE | dict(head_dim=8, mlp_only_layers=[0])),
    shared=("Qwen2Moe", MOE), mixtral=("Mixtral", dict(num_local_experts=4)),
    falcon=("Falcon", dict(ffn_hidden_size=48)),
    gpt2=("GPT2", dict(n_embd=32, n_head=4, n_layer=2, n_positions=64)))
ATTENTION, LINEAR = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made(family):
    kind, sizes = FAMILIES[family]
    torch.manual_seed(7)
    if kind in ("GPT2", "Falcon"): sizes = {k: v for k, v in SIZES.items() if k.endswith(("_id", "_range"))} | sizes
    if kind == "Falcon": sizes |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, kind + "Config")(**SIZES | sizes if kind not in ("GPT2", "Falcon") else sizes)
    config.vocab_size = len(character_tokenizer())
    return getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))(config).eval()


def base_in(place, family):
    "Folder of a family's base, made when it is first asked for."
    if (place / family).exists(): return place / family
    if family == "vision": base = tiny_policy(hidden=32, layers=2, vision_hidden=16, vision_depth=2)
    else: base = Policy(made(family), character_tokenizer())
    return base.save(place / family)


@pytest.fixture(scope="module")
def bases(tmp_path_factory): return partial(base_in, tmp_path_factory.mktemp("bases"))


def plain(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def saved(config, base, folder, **options):
    "An adapter with random matrices, as peft writes it."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(plain(base), config).eval()
        stir(model)
        model.save_pretrained(folder, **options)
    return folder


def stir(model, by=.2):
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n: p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * by)


def peft_logits(folder, base, prompts, ids=IDS):
    "(2, 4, V) of the tokens of IDS after one prompt, by peft and the model's own forward pass."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(plain(base), folder).eval()
    rows, inputs = torch.cat([prompts.ids.repeat(len(ids), 1), ids], 1), {}
    if prompts.vision:
        inputs = {k: v.repeat(len(ids), *[1] * (v.dim() - 1)) for k, v in prompts.vision.items()}
        inputs["mm_token_type_ids"] = kinds_of(model, rows)
    with torch.no_grad(): found = model(input_ids=rows, attention_mask=torch.ones_like(rows), **inputs).logits
    return found[:, prompts.ids.shape[1] - 1:-1]


def kinds_of(model, ids):
    config = model.get_base_model().config
    return (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()


def prompt(policy, example=None): return policy.encode([example or text(8).test[0]])
def free(policy): return torch.ones(policy.width, dtype=torch.bool).index_fill(0, policy.banned, False)


@torch.no_grad()
def logits(policy, prompts=None): return policy.completion_logits(prompts or prompt(policy), IDS)


def away(policy, found, wanted): return (found - wanted)[..., free(policy)].abs().max().item()
def off(policy, wanted, prompts=None): return away(policy, logits(policy, prompts), wanted)


def errors(folder, base, place, example=None):
    "Largest differences from peft: live, multiplied out, merged in three ways, saved again and read by us and by peft."
    policy = Policy.load(folder)
    prompts, pair = prompt(policy, example), [policy, policy.clone("twin")]
    wanted = peft_logits(folder, base, prompts)
    joined, again = policy.joined([(.25, pair[0]), (.75, pair[1])]), Policy.load(policy.save(place / "again"))
    kinds = dict(live=policy, dense=policy.dense(), linear=merge(pair), joined=joined, again=again,
                 ties=merge(pair, "ties", base=policy.shared.base))
    assert off(policy.shared.base, wanted, prompts) > 1e-2, "the adapter does nothing"
    assert core_module.weights_hash(again) == core_module.weights_hash(policy)
    by_peft = dict(peft=place / "again", peft_joined=joined.save(place / "joined"))
    return {k: off(p, wanted, prompts) for k, p in kinds.items()} | {
        k: away(policy, peft_logits(f, base, prompts), wanted) for k, f in by_peft.items()}


def refused(message, folder):
    with pytest.raises(ValueError, match=message): Policy.load(folder)


def c(**settings): return LoraConfig(**dict(r=4, target_modules=ATTENTION) | settings)


TOWER = r".*(visual.*(qkv|proj|linear_fc1)|language_model.*q_proj)"
EQUAL = {
    "plain": ("llama", c(r=8, target_modules=LINEAR)),
    "partly matched": ("llama", c(target_modules=["q_proj", "c_attn", "wqkv"])),
    "one layer": ("llama", c(r=3, lora_alpha=7, target_modules=["model.layers.1.mlp.up_proj"])),
    "tied base": ("tied", c()),
    "base with biases": ("biased", c(target_modules=LINEAR)),
    "dropout": ("llama", c(lora_dropout=.5)),
    "causal": ("llama", c(task_type="CAUSAL_LM")),
    "negative alpha": ("llama", c(lora_alpha=-3)),
    "broken alpha": ("llama", c(lora_alpha=2.5)),
    "use_rslora": ("llama", c(r=9, lora_alpha=4, use_rslora=True, target_modules=LINEAR)),
    "rank_pattern": ("llama", c(rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, target_modules=LINEAR)),
    "alpha_pattern": ("llama", c(alpha_pattern={"^model.layers.0.self_attn.q_proj": 1, "v_proj": 30})),
    "patterns and rslora": ("llama", c(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 3})),
    "regex": ("llama", c(target_modules=r".*layers\.0.*(q|up)_proj")),
    "all-linear": ("llama", c(target_modules="all-linear")),
    "none named": ("llama", c(target_modules=None)),
    "layers_to_transform": ("llama", c(layers_to_transform=[1])),
    "one to transform": ("llama", c(layers_to_transform=0, layers_pattern="layers")),
    "layers_pattern": ("llama", c(layers_to_transform=[0], layers_pattern=["layers"])),
    "exclude_modules": ("llama", c(target_modules=LINEAR, exclude_modules=["k_proj", "layers.0.mlp.up_proj"])),
    "exclude by regex": ("llama", c(target_modules=LINEAR, exclude_modules=r".*layers\.1\..*")),
    "false init": ("llama", c(init_lora_weights=False)),
    "gaussian": ("llama", c(init_lora_weights="gaussian")),
    "orthogonal": ("llama", c(init_lora_weights="orthogonal")),
    "mica": ("llama", c(init_lora_weights="mica")),
    "eva": ("llama", c(init_lora_weights="eva", rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 12})),
    "fan_in_fan_out on linear layers": ("llama", c(fan_in_fan_out=True)),
    "transposed": ("gpt2", c(fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"])),
    "transposed, unsaid": ("gpt2", c(target_modules=["attn.c_proj"])),
    "transposed, none named": ("gpt2", c(target_modules=None)),
    "own class of linear layers": ("falcon", c(target_modules=["query_key_value", "dense_h_to_4h"])),
    "attention of experts": ("moe", c(target_modules=["q_proj", "k_proj", "o_proj"])),
    "a shared expert": ("shared", c(target_modules=["q_proj", "shared_expert.up_proj"])),
    "attention of Mixtral": ("mixtral", c()),
    "vision model": ("vision", c(target_modules=LINEAR)),
    "vision tower": ("vision", c(target_modules=TOWER, exclude_modules=".*patch_embed.*")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EQUAL)
def test_what_is_read_is_equal_to_peft(kind, bases, tmp_path):
    family, config = EQUAL[kind]
    base = bases(family)
    folder = saved(config, base, tmp_path / "adapter")
    found = errors(folder, base, tmp_path)
    assert max(found.values()) < 1e-5, found
    if family == "vision":
        for capability in (image, video):
            found = errors(folder, base, tmp_path, capability(8, 8).test[0])
            assert max(found.values()) < 1e-5, found


BLOCKS = dict(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
ALONE = dict(save_embedding_layers=False)
REFUSED = {
    "dora": ("llama", c(use_dora=True), {}, "use_dora=True"),
    "lora_bias": ("biased", c(lora_bias=True), {}, "lora_bias=True"),
    "bias all": ("biased", c(bias="all"), {}, "bias='all'"),
    "bias lora_only": ("biased", c(bias="lora_only"), {}, "bias='lora_only'"),
    "pissa": ("llama", c(init_lora_weights="pissa"), {}, "init_lora_weights='pissa'"),
    "pissa_niter": ("llama", c(init_lora_weights="pissa_niter_4"), {}, "init_lora_weights='pissa_niter_4'"),
    "olora": ("llama", c(init_lora_weights="olora"), {}, "init_lora_weights='olora'"),
    "lora_ga": ("llama", c(init_lora_weights="lora_ga"), {}, "init_lora_weights='lora_ga'"),
    "modules_to_save": ("llama", c(modules_to_save=["lm_head"]), {}, r"modules_to_save=\['lm_head'\]"),
    "tokens": ("llama", c(trainable_token_indices=[3, 4]), {}, "trainable_token_indices"),
    "activated": ("llama", c(task_type="CAUSAL_LM", alora_invocation_tokens=[5]), {}, "alora_invocation_tokens"),
    "replication": ("llama", c(layer_replication=[(0, 2), (1, 2)]), {}, "layer_replication"),
    "parameters": ("moe", c(target_modules=[], target_parameters=["experts.down_proj"]), {}, "target_parameters"),
    "experts": ("mixtral", c(r=2, target_modules=["q_proj", "w1", "w2", "w3"]), {}, "target_parameters"),
    "blocks": ("llama", c(target_modules=["q_proj", "o_proj"], use_bdlora=BLOCKS), {}, "use_bdlora"),
    "velora": ("llama", c(velora_config=dict(num_groups=4)), {}, "velora_config"),
    "kasa": ("llama", c(kasa_config={}), {}, "kasa_config"),
    "monteclora": ("llama", c(monteclora_config=dict(num_samples=2)), {}, "monteclora_config"),
    "tying": ("tied", c(ensure_weight_tying=True), {}, "ensure_weight_tying"),
    "head": ("llama", c(target_modules=["q_proj", "lm_head"]), ALONE, "output head 'lm_head'"),
    "tied head": ("tied", c(target_modules=["q_proj", "lm_head"]), ALONE, "output head 'lm_head'"),
    "head with copies": ("llama", c(target_modules=["q_proj", "lm_head"]), {}, r"tensor .*lm_head\.base_layer\.weight"),
    "head of GPT-2": ("gpt2", c(target_modules=["c_attn", "lm_head"]), ALONE, "output head 'lm_head'"),
    "embeddings": ("llama", c(target_modules=["q_proj", "embed_tokens"]), ALONE, "embed_tokens.lora_embedding_A"),
    "saved embeddings": ("llama", c(), dict(save_embedding_layers=True), r"tensor .*(embed_tokens|lm_head)\.weight"),
    "convolution": ("vision", c(target_modules=["q_proj", "patch_embed.proj"]), {}, "tensor .*patch_embed.proj.lora_A"),
    "classifier": ("llama", c(task_type=TaskType.FEATURE_EXTRACTION), {}, "task_type='FEATURE_EXTRACTION'"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(kind, bases, tmp_path):
    family, config, options, message = REFUSED[kind]
    refused(message, saved(config, bases(family), tmp_path / "adapter", **options))


@pytest.fixture
def plain_adapter(bases, tmp_path): return saved(c(), bases("llama"), tmp_path / "adapter")


def reworded(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


READ = {*adapters_module._HARMLESS, *adapters_module._SHAPE, *adapters_module._PLACES}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LoraConfig) if f.name not in READ])
def test_every_other_field_is_refused_unless_it_has_its_default(field, plain_adapter):
    refused(f"{field}='something new'", reworded(plain_adapter, **{field: "something new"}))


@pytest.mark.parametrize("value", [True, 1, 0.5, "on", [0], {"a": 0}])
def test_fields_of_a_later_peft_are_refused_unless_they_are_off(value, plain_adapter):
    refused("use_next_lora=.*read: None", reworded(plain_adapter, use_next_lora=value))
    assert Policy.load(reworded(plain_adapter, use_next_lora=None, other=False, third=[], fourth={})).adapter.rank == 4


INITS = ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "loftq", "lora_ga", "kasa", 7, ["gaussian"]]


@pytest.mark.parametrize("init", INITS)
def test_only_beginnings_that_leave_the_base_alone_are_read(init, plain_adapter):
    refused("init_lora_weights=.*read: True, False, 'gaussian'", reworded(plain_adapter, init_lora_weights=init))


def test_notes_of_trainers_change_nothing(plain_adapter, bases):
    wanted = logits(Policy.load(plain_adapter))
    mapping = dict(base_model_class="LlamaForCausalLM", parent_library="x", unsloth_fixed=True)
    noted = dict(auto_mapping=mapping, runtime_config=dict(ephemeral_gpu_offload=True), eva_config=dict(rho=1.0),
                 corda_config={}, lora_dropout=.3, peft_version="99.0", revision="main")
    assert torch.equal(logits(Policy.load(reworded(plain_adapter, **noted))), wanted)


@pytest.mark.parametrize("kind", [t.value for t in PeftType if t != PeftType.LORA])
def test_no_other_type_of_adapter_is_taken_for_lora(kind, plain_adapter):
    refused(f"peft_type='{kind}' .read: 'LORA'", reworded(plain_adapter, peft_type=kind))


def test_real_adapters_of_other_types_are_refused(bases, tmp_path):
    seen, settings = 0, dict(target_modules=ATTENTION, num_virtual_tokens=4, task_type="CAUSAL_LM", total_step=9)
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind == PeftType.LORA: continue
        names = {f.name for f in dataclasses.fields(config)}
        options = {k: v for k, v in settings.items() if k in names}
        try: folder = saved(config(**options), bases("llama"), tmp_path / kind.value)
        except Exception: continue  # some need data, other layers or a card to be made
        seen += 1
        refused(f"peft_type='{kind.value}'", folder)
    assert seen > 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_converted_adapter_is_plain_lora_of_twice_the_rank(kind, bases, tmp_path):
    base = bases("llama")
    model = get_peft_model(plain(base), c(r=3, init_lora_weights=kind)).eval()
    model.save_pretrained(tmp_path / "start")
    reworded(tmp_path / "start", init_lora_weights=True)
    stir(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model.save_pretrained(tmp_path / "trained")
    policy = Policy.load(tmp_path / "plain")
    prompts = prompt(policy)
    rows = torch.cat([prompts.ids.repeat(2, 1), IDS], 1)
    with torch.no_grad(): wanted = model(input_ids=rows).logits[:, prompts.ids.shape[1] - 1:-1]
    assert policy.adapter.rank == 6 and off(policy, wanted) < 1e-5 and off(policy.dense(), wanted) < 1e-5
    refused(f"init_lora_weights='{kind}'", tmp_path / "trained")


def retensored(folder, change):
    "The same adapter with other tensors."
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, dict(format="pt"))
    return folder


MODEL = "base_model.model.model."
FIRST = MODEL + "layers.0.self_attn.q_proj."


def more(name, *shape, dtype=torch.float32): return lambda tensors: tensors.update({name: torch.zeros(shape).to(dtype)})
def less(name): return lambda tensors: tensors.pop(name)


def renamed(old, new):
    def change(tensors):
        for k in list(tensors): tensors[k.replace(old, new)] = tensors.pop(k)
    return change


@pytest.mark.parametrize("change, message", [
    (more(MODEL + "embed_tokens.weight", 4, 4), "holds the tensor base_model.model.model.embed_tokens.weight"),
    (more(MODEL + "embed_tokens.lora_embedding_A", 4, 4), "embed_tokens.lora_embedding_A"),
    (more(FIRST + "lora_magnitude_vector", 32), "lora_magnitude_vector"),
    (more(FIRST + "lora_B.bias", 32), "lora_B.bias"),
    (more(FIRST + "base_layer.weight", 32, 32), "q_proj.base_layer.weight"),
    (more("base_model.model.score.weight", 4, 4), "score"),
    (more(FIRST + "lora_A.default.weight", 4, 32), "lora_A.default.weight"),
    (more(FIRST + "lora_A.weight", 4), "shape .4,"),
    (more(FIRST + "lora_A.weight", 4, 32, dtype=torch.int8), "int8"),
    (more(FIRST + "lora_A.weight", 0, 32), "shape .0, 32"),
    (dict.clear, "without tensors"), (less(FIRST + "lora_B.weight"), "lacks model.layers.0.self_attn.q_proj.lora_B"),
    (more(FIRST.replace("q_", "k_") + "lora_A.weight", 4, 32), "holds .*k_proj.*names no such layer"),
    (more(FIRST.replace(".0.", ".9.") + "lora_A.weight", 4, 32), "layers.9.*names no such layer"),
    (more(FIRST + "lora_B.weight", 16, 4), "another size"), (more(FIRST + "lora_A.weight", 1, 32), "another size"),
    (renamed("model.model.model", "model.model"), "names no such layer"),  # saved from the model without its head
])
def test_tensors_that_do_not_belong_to_the_layers_are_refused_by_name(change, message, plain_adapter, bases):
    good = Policy.load(shutil.copytree(plain_adapter, plain_adapter.parent / "good"))
    before, wanted = core_module.weights_hash(good.shared.base), logits(good)
    refused(message, retensored(plain_adapter, change))
    gc.collect()
    assert torch.equal(logits(good), wanted)  # both share one base
    assert core_module.weights_hash(good.shared.base) == before == core_module.weights_hash(Policy.load(bases("llama")))


@pytest.mark.parametrize("fields, message", [
    (dict(target_modules=["none_proj"]), "doesn't fit into .*none_proj"),
    (dict(target_modules=["self_attn"]), "doesn't fit into"),
    (dict(target_modules="(q_proj"), "doesn't fit into"),
    (dict(target_modules={"q": 1}), "target_modules=.*names or numbers"),
    (dict(target_modules=[["q_proj"]]), "target_modules=.*names or numbers"),
    (dict(layers_to_transform=[7]), "doesn't fit into"),
    (dict(target_modules=["q_proj", "v_proj", "o_proj"]), "lacks .*o_proj.lora_A"), (dict(r="4"), "rank '4'"),
    (dict(r=0), "rank 0"),
    (dict(target_modules=["q_proj"]), "v_proj.*names no such layer"),
    (dict(r=10 ** 9), "rank 1000000000: .* from 1 to 32"),
    (dict(r=True), "rank True"), (dict(r=2), "another size"),
    (dict(rank_pattern={"q_proj": 10 ** 8}), "rank 100000000"),
    (dict(rank_pattern=[4]), r"rank_pattern=\[4\]"), (dict(rank_pattern={"(q": 4}), "rank_pattern={'.q': 4}"),
    (dict(alpha_pattern={"q_proj": "2"}), "lora_alpha '2'"),
    (dict(alpha_pattern={"q_proj": 10 ** 400}), "lora_alpha 1000"),
    (dict(lora_alpha=float("nan")), "lora_alpha nan"), (dict(lora_alpha=float("inf")), "lora_alpha inf"),
    (dict(use_rslora="false"), "use_rslora='false'"), (dict(revision="v2"), "revision='v2'"),
    (dict(bias=None), "bias=None"),
    (dict(base_model_name_or_path="."), "names the adapter '.' as its base"),
    (dict(base_model_name_or_path=7), "names no base")])
def test_configs_that_make_no_sense_are_refused_by_name(fields, message, plain_adapter):
    refused(message, reworded(plain_adapter, **fields))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"[" * 5000, b"\xff", b'{"peft_type": "LORA"'])
def test_a_config_that_is_none_is_refused(data, plain_adapter):
    (plain_adapter / "adapter_config.json").write_bytes(data)
    refused("adapter_config.json is no", plain_adapter)


def test_a_base_of_another_size_or_family_is_named(bases, plain_adapter):
    wide = reworded(plain_adapter, base_model_name_or_path=str(bases("wide")))
    refused("another size: .*q_proj.lora_A.weight has the shape .4, 32., and .*wide needs .4, 48.", wide)
    refused("doesn't fit into .*gpt2", reworded(plain_adapter, base_model_name_or_path=str(bases("gpt2"))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_matrices_of_another_dtype_are_held_in_fp32_as_peft_holds_them(dtype, plain_adapter, bases, tmp_path):
    folder = retensored(plain_adapter, lambda tensors: tensors.update({k: x.to(dtype) for k, x in tensors.items()}))
    assert max(errors(folder, bases("llama"), tmp_path).values()) < 1e-5
    assert {p.dtype for p in Policy.load(folder).parameters()} == {torch.float32}


def test_names_without_the_prefix_of_peft_are_read(plain_adapter, bases):
    wanted = logits(Policy.load(plain_adapter))
    assert torch.equal(logits(Policy.load(retensored(plain_adapter, renamed("base_model.model.", "")))), wanted)


def llava():
    "A model whose layers had other names in transformers 4."
    torch.manual_seed(7)
    seen = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=8,
                                         num_attention_heads=2, patch_size=4)
    read = transformers.LlamaConfig(vocab_size=len(character_tokenizer()), **SIZES)
    config = transformers.LlavaConfig(vision_config=seen, text_config=read, image_token_id=5)
    return transformers.LlavaForConditionalGeneration(config).eval()


def filled(folder, config):
    "What `load` does with an adapter once the base is in memory."
    base = Policy(llava(), character_tokenizer(), "llava")
    shared = lora_module._Shared(base,
                                 dict(target_modules=config.target_modules, exclude_modules=config.exclude_modules))
    room = adapters_module._added(shared, dict(r=config.r, lora_alpha=config.lora_alpha), str(folder))
    policy = LoraPolicy.of(base, shared, room, "branch")
    adapters_module._fill(policy, load_file(folder / "adapter_model.safetensors"), str(folder))
    policy.activate()
    return policy.model


@pytest.mark.filterwarnings("ignore")
def test_former_names_of_layers_are_read_as_peft_reads_them(tmp_path):
    config = c(init_lora_weights=False, exclude_modules=".*vision_tower.*")
    rows = torch.randint(20, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    model = get_peft_model(llava(), config).eval()
    model.save_pretrained(tmp_path)
    retensored(tmp_path, renamed("model.model.language_model", "model.language_model.model"))
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(k.startswith("base_model.model.language_model.model.layers") for k in names)
    models = filled(tmp_path, config), model, llava()
    with torch.no_grad(): found, wanted, base = (m(input_ids=rows).logits for m in models)
    assert (found - wanted).abs().max() < 1e-5 < (wanted - base).abs().max()


@pytest.mark.filterwarnings("ignore")
def test_former_names_that_peft_drops_are_an_error(tmp_path):
    "peft only warns, and the tower would see without its adapter."
    config = c(init_lora_weights=False)
    get_peft_model(llava(), config).save_pretrained(tmp_path)
    retensored(tmp_path, renamed("model.model.vision_tower", "model.vision_tower"))
    with pytest.raises(ValueError, match="vision_tower.*names no such layer"): filled(tmp_path, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["moe", "mixed", "shared", "mixtral", "gpt2", "falcon", "vision"])
def test_branches_of_every_family_are_read_by_peft(family, bases, tmp_path):
    policy = Policy.load(bases(family))
    branch = lora(policy, rank=3).clone("branch")
    noise = torch.Generator().manual_seed(0)
    branch.load_state({n: torch.randn(x.shape, generator=noise) * .2 for n, x in branch.state_dict().items()})
    folder = branch.save(tmp_path / "runs" / "branch")
    wanted = peft_logits(folder, bases(family), prompt(branch))
    assert off(policy, wanted) > 1e-2
    assert max(off(p, wanted) for p in (branch, branch.dense(), Policy.load(folder))) < 1e-5


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare"])
def test_adapters_of_unlike_layers_merge_as_their_full_copies(method, bases, tmp_path):
    config = c(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    left = Policy.load(saved(config, bases("llama"), tmp_path / "left"))
    right = left.clone("right")
    right.load_state({n: x.flip(0) for n, x in left.state_dict().items()})
    base, options = left.shared.base, dict(weights=[.3, .9], density=.7, seed=3)
    merged = merge([left, right], method, base=base, **options)
    wanted = merge([left.dense_state(), right.dense_state()], method, base=base.state_dict(), **options)
    assert isinstance(merged, LoraPolicy) == (method in ("linear", "task_arithmetic"))
    assert max((merged.dense_state()[n] - x).abs().max() for n, x in wanted.items()) < 1e-6


@pytest.mark.parametrize("config", [
    dict(quant_method="bitsandbytes", load_in_4bit=True), dict(quant_method="gptq", bits=4), dict(quant_method="awq"),
    dict(quant_method="fp8"), dict(quant_method="compressed-tensors")])
def test_a_quantised_base_is_refused_by_name(config, plain_adapter, bases, tmp_path):
    base = shutil.copytree(bases("llama"), tmp_path / "quantised")
    stored = json.loads((base / "config.json").read_text()) | dict(quantization_config=config)
    (base / "config.json").write_text(json.dumps(stored))
    refused(f"quantised.*{config['quant_method']}", reworded(plain_adapter, base_model_name_or_path=str(base)))


@pytest.mark.parametrize("family", ["llama", "moe", "mixed", "shared", "mixtral", "gpt2", "falcon", "vision"])
@pytest.mark.parametrize("vision", [False, True])
def test_the_layers_that_lora_adapts_are_known_before(family, vision, bases):
    "Also in a mixture of experts with dense layers, whose names are left out as those of experts."
    policy = Policy.load(bases(family))
    adapted = lora(policy, 2, vision=vision)
    assert adapted_layers(policy.model, vision).keys() == adapted.shared.layers.keys()
    assert lora_size(policy.model, 2, vision) == sum(p.numel() for p in adapted.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, places", [
    ("mixtral", [*ATTENTION, "w1", "w2", "w3"]), ("moe", [*ATTENTION, "gate_proj", "up_proj"]), ("moe", "all-linear"),
    ("moe", ".*(q_proj|v_proj|experts.*)")])
def test_places_that_have_become_experts_are_refused(family, places, bases, tmp_path):
    "In transformers 4 each expert had linear layers; they are one parameter now, and peft moves such an adapter there."
    folder = saved(c(), bases(family), tmp_path / "adapter")
    refused("target_parameters|router|gate|doesn't fit", reworded(folder, target_modules=places))


PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def outcome(kind, place):
    "A row of the page: what is read with its largest error, what is refused with its reason."
    family, config, options, _ = (*EQUAL[kind], {}, "") if kind in EQUAL else REFUSED[kind]
    base, folder = base_in(place, family), place / kind / "adapter"
    saved(config, base, folder, **options)
    try: found = max(errors(folder, base, folder.parent).values())
    except ValueError as error: return "refused", str(error).partition(f"{folder} ")[2].partition(": only ")[0]
    return "equal", f"{found:.0e}"


def table():
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [(kind, *outcome(kind, Path(place))) for kind in (*EQUAL, *REFUSED)]
    return "".join(f"| {kind} | {word} | {why} |\n" for kind, word, why in rows)


def test_the_page_on_adapters_names_every_kind():
    page = PAGE.read_text()
    for kind in (*EQUAL, *REFUSED): assert f"| {kind} | {'equal' if kind in EQUAL else 'refused'} |" in page, kind
    for kind in PeftType: assert kind.value in page, kind
    for field in dataclasses.fields(LoraConfig): assert f"`{field.name}`" in page, field.name


if __name__ == "__main__": print(table())
