"Ids of prompts are those of `apply_chat_template`; answers end as templates end them; runs keep their date."
import copy
import json
import pickle
import threading
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import fake_vllm
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from copd_nb.engine import phase as phase_module
from copd_nb.policy import templates as templates_module
from copd_nb.study import jobs as jobs_module
from copd_nb.schedule.paradigms import expert
from copd_nb.data.capability import Capability, Example
from copd_nb.policy.file_problems import problems
from copd_nb.engine.config import Config
from copd_nb.engine.manifest import FINGERPRINTED, prompt_fingerprints
from copd_nb.engine.training import train
from copd_nb.analysis.token_gap import behavior_gap
from copd_nb.analysis.same_tokens import same_format
from copd_nb.scale.vllm import VllmSampler
from copd_nb.policy.toys import minis_base, image, text, tiny_policy, video
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import lora
from copd_nb.policy.ids import added_tokens, completion_texts, prompt_ids, special_ids, turn_end
from copd_nb.policy.processors import CHAT_TEMPLATE, character_tokenizer, small_processor
from copd_nb.policy.templates import PLAIN, chat_text, template_now
from copd_nb.signals.rollouts import Request, closed, generator, given_rollouts
from copd_nb.signals.sampling import rollouts_of, sample
from copd_nb.engine.runs import Run, request_stop
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, SFT, Phase, Update
from copd_nb.view.token_views import token_view

OWN = Path(__file__).parents[1] / "templates"


def published(name: str) -> str:
    "A chat template that TRL ships, or one of ours."
    if (own := OWN / f"{name}.jinja").exists(): return own.read_text(encoding="utf-8")
    found = find_spec("trl")
    if found is None: pytest.skip(f"the template {name} is in the package trl")
    return (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
         ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>"])
CHATML = (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"])
GEMMA = ("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"])
PHI = ("<s>", "<|endoftext|>", "<|placeholder|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
# template → first, end and pad token, other special tokens, whether the tokenizer adds the first one, end of a turn
FAMILIES = {
    **{name: (*LLAMA, True, "<|eot_id|>") for name in ("llama3", "llama3_1", "llama3_2")},
    **{name: (*CHATML, False, "<|im_end|>") for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507")},
    "gemma": (*GEMMA, True, "<end_of_turn>"), "gemma3": (*GEMMA, True, "<end_of_turn>"),
    "mistral": ("<s>", "</s>", "<unk>", ["[INST]", "[/INST]"], True, "</s>"),
    "phi3": (*PHI, False, "<|end|>"), "phi3_5": (*PHI, True, "<|end|>"), "phi4_mini": (*PHI, False, "<|end|>"),
    "phi4": ("<|endoftext|>", "<|im_end|>", "<|dummy|>", ["<|im_start|>", "<|im_sep|>"], False, "<|im_end|>"),
    "smollm2": (*CHATML, False, "<|im_end|>"), "smollm3": (*CHATML, True, "<|im_end|>"),
}


def said(*turns: str, system: str | None = None) -> list[dict]:
    "Turns of user and assistant in turn."
    first = [] if system is None else [dict(role="system", content=system)]
    return first + [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(turns)]


CHATS = {
    "one turn": said("What is 2+2?\n"), "a system message": said("What is 2+2?", system="Be brief."),
    "three turns": said("2+2?", " 4 ", "and 3+3?"),
    "three turns and a system message": said("2+2?", "4", "é ≤ 3 <b>?", system="Be  brief. "),
    "reasoning in a turn": said("2+2?", "<think>\nsum\n</think>\n\n4", "why?"),
}
REFUSED = {("gemma", "a system message"), ("gemma", "three turns and a system message")}


def tokenizer_of(first, end, pad, more, adds, template, behind=None, **options):
    "A tokenizer of bytes with a family's special tokens, and with its post-processor."
    specials = list(dict.fromkeys(t for t in (pad, first, end, *more, behind) if t))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*specials, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    around = " ".join(([first] if adds and first else []) + ["$A"] + ([behind] if behind else []))
    core.post_processor = TemplateProcessing(single=around, special_tokens=[(t, core.token_to_id(t)) for t in specials])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=first, eos_token=end, pad_token=pad,
                                   padding_side="left", chat_template=template, **options)


def family(name: str, **options): return tokenizer_of(*FAMILIES[name][:5], published(name), **options)


def policy_of(tokenizer, ends=None, context=1024, name="small"):
    "A random Llama for a tokenizer; its generation config names some end tokens."
    torch.manual_seed(0)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=context)
    config = LlamaConfig(bos_token_id=None, eos_token_id=end, pad_token_id=pad, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=end if ends is None else ends, pad_token_id=pad)
    return Policy(model, tokenizer, name)


def ask(prompt, answer="1"): return Example(prompt, answer, "sums")


def official(processor, chat):
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)


def rows_of(prompts): return [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask.bool())]


# ---- ids of prompts

@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_apply_chat_template(name, chat):
    tokenizer, messages = family(name), CHATS[chat]
    if (name, chat) in REFUSED:
        with pytest.raises(ValueError, match="System role not supported"): prompt_ids(tokenizer, messages)
        return
    ids = prompt_ids(tokenizer, messages)
    assert ids == official(tokenizer, messages)
    assert ids.count(tokenizer.bos_token_id) <= 1
    assert messages[-1]["content"].strip() in tokenizer.decode(ids)


def told(chat): return Example("", "1", "sums", messages=tuple(chat))


@pytest.mark.filterwarnings("ignore:the chat template of .* leaves out")
@pytest.mark.parametrize("name", FAMILIES)
def test_policies_encode_the_same_ids(name):
    policy = policy_of(family(name))
    chats = [c for chat, c in CHATS.items() if (name, chat) not in REFUSED]
    prompts = policy.encode([ask("What is 12 + 34 ?"), *map(told, chats)])
    assert rows_of(prompts) == [official(policy.tokenizer, chat) for chat in [said("What is 12 + 34 ?"), *chats]]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_begun_has_the_ids_of_continue_final_message(name):
    tokenizer, chat = family(name), said("2+2?", "It is")
    want = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=True, return_dict=False)
    assert prompt_ids(tokenizer, chat) == want == policy_of(tokenizer).encode([told(chat)]).ids[0].tolist()


def test_a_conversation_needs_a_template():
    tokenizer = tokenizer_of(*GEMMA, True, None)
    with pytest.raises(ValueError, match="the model has no chat template"): prompt_ids(tokenizer, CHATS["three turns"])


@pytest.mark.parametrize("template", [PLAIN, PLAIN + "\n", None])
@pytest.mark.parametrize("adds", [True, False])
def test_plain_prompts_are_tokenised_as_the_tokenizer_does_it(adds, template):
    tokenizer = tokenizer_of(*GEMMA, adds, template)
    ids = policy_of(tokenizer).encode([ask("2+2=")]).ids[0].tolist()
    assert ids == tokenizer("2+2=").input_ids == prompt_ids(tokenizer, said("2+2="))
    assert ids.count(tokenizer.bos_token_id) == adds


@pytest.mark.parametrize("template", [PLAIN, None, "{{ bos_token }}" + CHAT_TEMPLATE, CHAT_TEMPLATE])
def test_no_prompt_ends_in_an_end_token_of_the_tokenizer(template):
    tokenizer = tokenizer_of(*GEMMA, True, template, behind="<eos>")
    assert added_tokens(tokenizer) == ([tokenizer.bos_token_id], [tokenizer.eos_token_id])
    policy = policy_of(tokenizer)
    prompts = policy.encode([ask("2+2="), ask("17 + 4 =")])
    bare = [tokenizer.bos_token_id] * (template != CHAT_TEMPLATE)
    for e, ids in zip(prompts.examples, rows_of(prompts)):
        text = e.prompt if template in (PLAIN, None) else chat_text(tokenizer, said(e.prompt)).removeprefix("<bos>")
        assert ids == [*bare, *tokenizer(text, add_special_tokens=False).input_ids]
    assert prompts.positions[0][prompts.mask[0].bool()].tolist() == list(range(int(prompts.mask[0].sum())))


def test_a_tokenizer_that_changes_its_mind_is_followed():
    "Prompts that were encoded before don't stand in the way."
    tokenizer = tokenizer_of(*GEMMA, True, PLAIN)
    policy, counts = policy_of(tokenizer), []
    for adds in (True, False, True):
        tokenizer.add_bos_token = adds
        tokenizer.update_post_processor()
        counts.append(policy.encode([ask("2+2=")]).ids[0].tolist().count(tokenizer.bos_token_id))
    tokenizer.chat_template = "{{ bos_token }}" + PLAIN
    assert counts == [1, 0, 1] and policy.encode([ask("2+2=")]).ids[0].tolist() == official(tokenizer, said("2+2="))


@pytest.mark.parametrize("template", [PLAIN, "{{ bos_token }}" + CHAT_TEMPLATE, CHAT_TEMPLATE])
def test_saved_and_loaded_policies_and_checks_of_data_count_the_same(template, tmp_path):
    policy = policy_of(tokenizer_of(*GEMMA, True, template), context=128)
    folder = policy.save(tmp_path / "model")
    loaded = Policy.load(folder)
    assert same_format(policy, loaded, [ask("2+2="), ask("3")])
    assert rows_of(loaded.encode([ask("7")])) == rows_of(policy.encode([ask("7")]))
    room = 128 - policy.encode([ask("x" * 40)]).ids.shape[1]
    lines = [json.dumps(dict(prompt="x" * n, answer="4")) for n in (40, 41)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    found = problems(tmp_path / "data.jsonl", model=folder, room=room)
    assert found.row.tolist() == [2] and "context is 128" in found.problem[0]
    plain = Policy.load(folder, chat_template="plain")
    assert plain.encode([ask("2+2=")]).ids[0].tolist() == plain.tokenizer("2+2=").input_ids
    assert same_format(plain, policy, [ask("2+2=")]) == (template == PLAIN)


def test_a_prompt_without_tokens_is_an_error():
    policy = policy_of(tokenizer_of(*CHATML, False, PLAIN))
    with pytest.raises(ValueError, match="prompt .* of capability 'sums' is empty"): policy.encode([ask("")])


# ---- ids of prompts with pictures

def begins(processor, adds):
    "The same processor, whose tokenizer has a first token, and may add it to texts."
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    made = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
    if adds: tokenizer.backend_tokenizer.post_processor = made
    return processor


def shown(example):
    "A prompt as a message whose parts hold the pictures."
    pictures = [dict(type=k[:-1], **{k[:-1]: x}) for k in ("images", "videos") for x in getattr(example, k)]
    return [dict(role="user", content=[*pictures, dict(type="text", text=example.prompt)])]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("template", ["ours", "ours with a first token", "qwen3_vl"])
def test_processors_give_the_ids_of_their_apply_chat_template(template, adds):
    policy = tiny_policy(hidden=24, layers=1, vision_hidden=16, vision_depth=1)
    own = {"ours": CHAT_TEMPLATE, "ours with a first token": "{{ bos_token }}" + CHAT_TEMPLATE}
    made = own.get(template) or published(template)
    begins(policy.processor, adds).chat_template = policy.tokenizer.chat_template = made
    examples = [text(8).test[0], image(8, 8).test[0], video(8, 8).test[0]]
    prompts = policy.encode(examples)
    for e, ids in zip(examples, rows_of(prompts)):
        want = list(official(policy.processor, shown(e))[0])
        visual = {k: list(v) for k in ("images", "videos") if (v := getattr(e, k))}
        assert ids == want == prompt_ids(policy.processor, e.chat, **visual), e
        assert want.count(policy.tokenizer.bos_token_id) == (adds or "first" in template)


def test_some_prompts_with_a_first_token_and_some_without_are_encoded_one_by_one():
    policy = tiny_policy(hidden=24, layers=1, vision_hidden=16, vision_depth=1)
    some = "{% if '1' in messages[0]['content'][0]['text'] %}{{ bos_token }}{% endif %}"
    begins(policy.processor, True).chat_template = some + CHAT_TEMPLATE
    prompts = policy.encode([ask("1+1="), ask("2+2=")])
    for e, ids in zip(prompts.examples, rows_of(prompts)): assert ids == list(official(policy.processor, shown(e))[0])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE])
def test_vllm_makes_the_same_prompt_of_text_and_pictures(template, monkeypatch):
    def made():
        policy = tiny_policy(hidden=24, layers=1, vision_hidden=16, vision_depth=1)
        begins(policy.processor, True).chat_template = policy.tokenizer.chat_template = template
        return Policy(policy.model, policy.processor, "begins")
    fake_vllm.install(monkeypatch, made)
    policy = made()
    request = Request(policy.encode([text(8).test[0], image(8, 8).test[0]]), 2, generator("cpu", 0))
    out, = VllmSampler("models/tiny")(policy, [request], 3, 1.0)
    assert len(out.texts) == 4


# ---- the end of a turn

@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_decides_what_ends_a_turn(name):
    "Also where the checkpoint names only the token that ends a document, or the smallest of several is another one."
    tokenizer, want = family(name), FAMILIES[name][5]
    end = tokenizer.convert_tokens_to_ids(want)
    for ends in (tokenizer.eos_token_id, [tokenizer.pad_token_id, end], [0, tokenizer.eos_token_id]):
        policy = policy_of(tokenizer, ends)
        named = {*(ends if isinstance(ends, list) else [ends])}
        assert policy.end == end and policy.eos == sorted({*named, tokenizer.eos_token_id, end})
        assert not set(policy.eos) & set(policy.banned.tolist())


def test_a_base_model_that_ends_documents_stops_at_the_end_of_a_turn():
    marks = ["<|im_start|>", "<|im_end|>"]
    policy = policy_of(tokenizer_of(None, "<|endoftext|>", "<|endoftext|>", marks, False, published("qwen2_5")))
    end, ids = policy.tokenizer.convert_tokens_to_ids("<|im_end|>"), policy.tokenizer("24").input_ids
    assert policy.end == end and policy.eos == sorted([end, policy.tokenizer.eos_token_id])
    prompts = policy.encode([ask("1+1=")])
    out = rollouts_of(policy, Request(prompts, 1), torch.tensor([[ids[0], end, *ids]]))
    assert out.texts == ["2"] and out.finished.all() and out.mask.sum() == 2
    assert sample(policy, prompts, 1, 5, lengths=torch.tensor([3])).ids[0, 2] == end  # a forced length


ENDINGS = {
    "nothing": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "refuses answers": "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
    "hides answers": "{% for m in messages if m.role == 'user' %}{{ m.content }}<end_of_turn>{% endfor %}",
    "is broken": "{% for %}", "is plain": PLAIN, "is missing": None,
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_templates_that_write_no_end_leave_it_to_the_tokenizer(kind):
    policy = policy_of(tokenizer_of(*GEMMA, True, ENDINGS[kind]))
    assert policy.end == policy.tokenizer.eos_token_id and policy.eos == [policy.end]


def test_an_end_that_only_the_generation_config_knows():
    tokenizer = tokenizer_of("<bos>", None, "<pad>", ["<end_of_turn>"], True, PLAIN)
    known = policy_of(tokenizer, [tokenizer.convert_tokens_to_ids("<end_of_turn>")])
    assert known.eos == [known.end] == [tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    none = copy.copy(known)
    none.end, none.eos = None, []
    with pytest.raises(ValueError, match="'small' has no end token"): closed(none, ["1"])


def test_the_shipped_models_end_as_before():
    for policy in (minis_base(), tiny_policy(), lora(minis_base(), 2)): assert policy.end == 2 and policy.eos == [2]
    assert turn_end(small_processor()) == turn_end(character_tokenizer(), [0]) == 2


def pair_of(name):
    "Two policies that also stop at the padding, which has the smallest id."
    tokenizer = family(name)
    return [policy_of(tokenizer, [tokenizer.pad_token_id, tokenizer.eos_token_id], name=n) for n in "ab"]


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3_2", "phi3"])
def test_given_answers_are_closed_by_the_end_of_a_turn_everywhere(name, tmp_path, monkeypatch):
    a, b = pair_of(name)
    assert a.end == a.tokenizer.convert_tokens_to_ids(FAMILIES[name][5]) != min(a.eos)
    want = [*a.tokenizer("4", add_special_tokens=False).input_ids, a.end]
    gap = behavior_gap(a, b, [ask("2+2=")], completions=["4"])
    view = token_view(a, b, [ask("2+2=")], ["4"]).completions[0]
    assert gap.token.tolist() == view.ids == want and gap.text.tolist() == view.texts == ["4", FAMILIES[name][5]]
    seen = []
    monkeypatch.setattr("copd_nb.engine.streams.given_rollouts",
                        lambda *args: seen.append(given_rollouts(*args)) or seen[-1])
    plan = Schedule("copy", ["sums"], [Phase("copy", 1, [Update("sums", [SFT("sums")])])], "sums")
    train(plan, [sums()], a, TINY, tmp_path / "run", progress=False)
    out, = seen
    assert [row[int(n) - 1] for row, n in zip(out.ids.tolist(), out.lengths)] == [a.end] * len(out.ids)
    assert out.texts == [e.answer for e in out.examples]


def test_what_follows_an_end_is_no_part_of_a_given_completion():
    a, b = pair_of("qwen3")
    view = token_view(a, b, [ask("2+2=")], ["4<|im_end|>and"]).completions[0]
    assert view.texts == ["4", "<|im_end|>"] and view.finished
    out = given_rollouts(a, a.encode([ask("1"), ask("2")]), [[*a.tokenizer("12").input_ids], [a.end]])
    assert out.finished.tolist() == [False, True] and out.texts == ["12", ""] and out.mask.tolist() == [[1, 1], [1, 0]]


# ---- texts of completions

def heard(policy, ids):
    "What a reward sees of a completion."
    return rollouts_of(policy, Request(policy.encode([ask("1+1=")]), 1), torch.tensor([[*ids, policy.end]])).texts[0]


SPACED = ["print( 'a !' )", "x = 'n\\'t . 5'", "f(1 , 2) ?", "it 's", " do not ", "\n  if a :\n"]


def words(**options):
    "A tokenizer of single characters without a decoder of its own, as WordLevel models have them."
    known = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<pad>", "<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left", chat_template=PLAIN, **options)


CLEANING = dict(clean_up_tokenization_spaces=True)
FORCED = CLEANING | dict(clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True)
BYTES = {"bytes": lambda: tokenizer_of(*GEMMA, True, PLAIN, **CLEANING), "words": lambda: words(**CLEANING),
         "bytes, cleaned by force": lambda: tokenizer_of(*GEMMA, True, PLAIN, **FORCED)}


@pytest.mark.parametrize("kind", BYTES)
def test_spaces_stay_whatever_the_tokenizer_would_tidy_up(kind):
    policy = policy_of(BYTES[kind]())
    other = policy_of(policy.tokenizer, name="b")
    for wrote in SPACED:
        assert heard(policy, policy.tokenizer(wrote, add_special_tokens=False).input_ids) == wrote
        gap = behavior_gap(policy, other, [ask("1")], completions=[wrote])
        view = token_view(policy, other, [ask("1")], [wrote]).completions[0]
        assert "".join(gap.text[:-1]) == wrote == "".join(view.texts[:-1])


def pieces():
    "A SentencePiece-like tokenizer: a word carries the space before it, and a decoder drops the first one of all."
    raw = [f"<0x{i:02X}>" for i in range(256)]
    parts = ["<pad>", "<s>", "</s>", "[/INST]", *raw, "▁", *map(chr, range(33, 127)), "▁4", "▁a"]
    merges = [("▁", "4"), ("▁", "a")]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(parts)}, merges, byte_fallback=True, unk_token=None))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in parts[:4]])
    template = "{% for m in messages %}{{ m['content'] }}[/INST]{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   padding_side="left", chat_template=template)


def test_the_text_of_a_completion_is_what_follows_the_prompt():
    "The decoder alone would drop the space; behind a prompt it doesn't."
    policy = policy_of(pieces())
    tokenizer, prompt = policy.tokenizer, policy.encode([ask("1+1=")]).ids[0].tolist()
    ids_of, four = tokenizer.convert_tokens_to_ids, [tokenizer.convert_tokens_to_ids("▁4")]
    for ids in (tokenizer("4 a4").input_ids, ids_of(["4", "▁a"]), ids_of(["▁", "▁", "x"])):
        whole = tokenizer.decode([*prompt, *ids], clean_up_tokenization_spaces=False)
        assert heard(policy, ids) == whole.removeprefix(tokenizer.decode(prompt))
    assert heard(policy, four) == " 4" and tokenizer.decode(four) == "4"


@pytest.mark.parametrize("make", [pieces, lambda: tokenizer_of(*GEMMA, True, PLAIN)], ids=["byte fallback", "bytes"])
def test_half_a_character_is_marked(make):
    policy = policy_of(make())
    euro = policy.tokenizer("€", add_special_tokens=False).input_ids[-3:]
    x = policy.tokenizer.convert_tokens_to_ids("x")
    assert heard(policy, euro) == "€" and "\ufffd" in heard(policy, euro[:2])
    assert heard(policy, [euro[0], x])[-1] == "x" and "\ufffd" in heard(policy, [euro[0], x])
    assert all("\ufffd" in t for t in completion_texts(policy.tokenizer, [[i] for i in euro]))
    assert completion_texts(policy.tokenizer, [[], euro]) == ["", "€"]


def test_special_tokens_stay_but_for_the_end():
    tokenizer = tokenizer_of(*CHATML, False, published("qwen2_5"))
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<answer>", "</answer>"]))
    policy = policy_of(tokenizer)
    ids = tokenizer("<answer>4</answer>", add_special_tokens=False).input_ids
    assert len(ids) == 3 and set(ids[::2]) <= special_ids(tokenizer)
    padded = torch.tensor([[*ids, policy.end, tokenizer.pad_token_id, tokenizer.pad_token_id]])
    assert rollouts_of(policy, Request(policy.encode([ask("1")]), 1), padded).texts == ["<answer>4</answer>"]


def test_decoders_that_put_spaces_between_words():
    "WordPiece: behind a prompt there is a space, too."
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "four": 2, "##s": 3, "[E]": 4}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[E]")
    assert completion_texts(tokenizer, [[2, 3], [3], []]) == [" fours", "s", ""]


# ---- templates with a date

DAY, NEXT = datetime(2026, 5, 1, 12, 30), datetime(2026, 5, 2, 12, 30)
DATED = {
    "strftime_now": "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m['content'] }}{% endfor %}",
    "date_string": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
                   "{{ date_string }} {% for m in messages %}{{ m['content'] }}{% endfor %}",
}
TINY = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=3, probe_every=1, probe_prompts=1, eval_every=2,
              eval_prompts=1, eval_samples=1, checkpoint_every=1, warmup=1, learning_rate=1e-2, device="cpu")


@pytest.fixture
def clock(monkeypatch):
    "The day that chat templates are told."
    class Clock(datetime):
        today = DAY

        @classmethod
        def now(cls, tz=None): return cls.today
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def scored(completions, examples): return [(1 + sum(map(ord, c)) % 7) / 7 for c in completions]


def sums(n=12): return Capability("sums", [ask(f"{i}+{i}=", str(i + i)) for i in range(n)], [ask("1+2=", "3")], scored)


def dated(template=DATED["strftime_now"], name="small"):
    "A policy whose prompts show the date, and whose completions end soon."
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return policy_of(tokenizer, [2, *range(20, 60)], context=128, name=name)


def read(policy, prompt="1+1="): return policy.tokenizer.decode(policy.encode([ask(prompt)]).ids[0])


@pytest.mark.parametrize("template", [*DATED, "llama3_2", "smollm3"])
def test_a_template_is_told_the_date_of_its_policy(template, clock):
    tokenizer = family(template) if template in FAMILIES else character_tokenizer()
    if template in DATED: tokenizer.chat_template = DATED[template]
    policy = policy_of(tokenizer)
    assert "01 May" in read(policy)
    clock.today = NEXT
    assert "02 May" in read(policy) and template_now() == NEXT  # an encoded prompt does not outlive its day
    policy.date = DAY
    assert "01 May" in read(policy) and chat_template_utils.datetime is clock
    adapted = lora(policy_of(tokenizer), 2).clone()
    adapted.date = DAY  # its base has none
    sent, other = pickle.loads(pickle.dumps(policy)), policy.with_state(policy.state_dict())
    full = adapted.dense(), adapted.with_state(adapted.state_dict())
    for other in (policy.clone(), other, sent, lora(policy, 2), adapted.clone(), *full):
        assert other.date == DAY and "01 May" in read(other)


def test_threads_with_other_dates_do_not_meet():
    "One of them is told the true date."
    days, wrong = [datetime(2001, 5, 1), datetime(2001, 5, 2), None], []

    def work(day):
        policy = dated("{{ strftime_now('%Y') }} " + PLAIN if day is None else DATED["strftime_now"])
        policy.date, want = day, str(datetime.now().year) if day is None else f"{day:%d %b %Y}"
        wrong.extend(i for i in range(40) if want not in read(policy, f"{i}+1="))
    threads = [threading.Thread(target=work, args=(d,)) for d in days]
    for t in threads: t.start()
    for t in threads: t.join()
    assert wrong == [] and chat_template_utils.datetime is datetime


def test_the_clock_is_true_again_after_a_template_that_fails(clock):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }}{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="never"): chat_text(tokenizer, said("1"), NEXT)
    assert chat_template_utils.datetime is clock


def halfway(monkeypatch, plan, policy, path, step=2, **more):
    "A run that is asked to stop in one of its steps."
    real, count = phase_module.train_step, iter(range(step - 1))

    def asking(*args):
        if next(count, None) is None: request_stop(path)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(phase_module, "train_step", asking)
        run = train(plan, [sums()], policy, TINY, path, progress=False, **more)
    assert not run.finished
    return run


def events(run): return run.events.drop(columns="seconds").to_json(orient="records", lines=True)


@pytest.mark.parametrize("template", DATED)
def test_a_run_that_goes_on_after_a_night_has_the_prompts_of_its_first_day(template, clock, tmp_path, monkeypatch):
    "Training, probes and evaluations; the policy that was given keeps no date."
    plan, policy = expert("sums", 4), dated(DATED[template])
    whole = train(plan, [sums()], policy, TINY, tmp_path / "whole", progress=False)
    halfway(monkeypatch, plan, dated(DATED[template]), tmp_path / "late")
    clock.today = NEXT
    late = train(plan, [sums()], dated(DATED[template]), TINY, tmp_path / "late", progress=False)
    assert late.finished and events(late) == events(whole) and late.date == DAY == whole.date and policy.date is None
    other = train(plan, [sums()], dated(DATED[template]), TINY, tmp_path / "other", progress=False)
    assert other.date == NEXT and other.manifest["content_hash"] == late.manifest["content_hash"]
    assert other.manifest["prompts"] != late.manifest["prompts"] == whole.manifest["prompts"]


TAUGHT = Schedule("taught", {"student": "base", "teacher": "base"},
                  [Phase("OPD", 4, [Update("student", [RL("sums"), OPD("sums", "teacher", 0.5)])])], "student")


def test_a_given_teacher_has_the_date_of_the_run(clock, tmp_path, monkeypatch):
    whole = train(TAUGHT, [sums()], dated(), TINY, tmp_path / "whole", progress=False, starts=dict(teacher=dated()))
    halfway(monkeypatch, TAUGHT, dated(), tmp_path / "late", starts=dict(teacher=dated()))
    clock.today = NEXT
    late = train(TAUGHT, [sums()], dated(), TINY, tmp_path / "late", progress=False, starts=dict(teacher=dated()))
    assert events(late) == events(whole) and {"base", "teacher"} == set(late.manifest["prompts"])


def test_a_teacher_that_can_not_read_a_capability_has_no_prints_of_it(tmp_path):
    mixed = dict(sums=sums(), image=image(8, 4))
    found = prompt_fingerprints(dated(), mixed, 0)
    assert len(found["sums"]) == 8 and found["image"] == {}


@pytest.mark.parametrize("change", ["template", "tokenizer"])
def test_other_prompts_on_the_way_are_an_error(change, tmp_path, monkeypatch):
    plan = expert("sums", 4)
    halfway(monkeypatch, plan, dated(PLAIN), tmp_path / "run")
    changed = dated(PLAIN + "!" if change == "template" else PLAIN)
    if change == "tokenizer": changed.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("+", " + ")
    def files(): return [(tmp_path / "run" / name).read_bytes() for name in ("manifest.json", "events.jsonl")]
    before = files()
    first = "|".join(e.id for e in sums().draw(TINY.seed, 0, FINGERPRINTED))
    words = f"run run: prompt ({first}) of capability 'sums' has other ids for 'base' than when the run began.*template"
    with pytest.raises(ValueError, match=words):
        train(plan, [sums()], changed, TINY, tmp_path / "run", progress=False)
    assert files() == before
    assert train(plan, [sums()], dated(PLAIN), TINY, tmp_path / "run", progress=False).finished


def test_a_template_that_can_not_be_pinned_is_an_error(tmp_path, monkeypatch):
    plan, template = expert("sums", 4), "{{ range(10 ** 5) | random }} " + PLAIN
    halfway(monkeypatch, plan, dated(template), tmp_path / "run")
    with pytest.raises(ValueError, match="of capability 'sums' has other ids"):
        train(plan, [sums()], dated(template), TINY, tmp_path / "run", progress=False)


@pytest.mark.parametrize("template, warned", [(DATED["date_string"], True), (PLAIN, False)])
def test_runs_of_before_go_on_as_before_and_say_so(template, warned, clock, tmp_path, monkeypatch, recwarn):
    plan, path = expert("sums", 4), tmp_path / "run"
    halfway(monkeypatch, plan, dated(template), path)
    old = {k: v for k, v in Run(path).manifest.items() if k not in ("date", "prompts")}
    (path / "manifest.json").write_text(json.dumps(old))
    assert Run(path).date is None
    clock.today = NEXT
    recwarn.clear()
    run = train(plan, [sums()], dated(template), TINY, path, progress=False)
    assert run.finished and run.date == NEXT and len(run.manifest["prompts"]["base"]["sums"]) == 8
    assert any("run run holds no date" in str(w.message) for w in recwarn) == warned


def test_experts_are_shared_by_runs_whose_prompts_show_one_day(clock, tmp_path):
    steps = []
    for i, day in enumerate((DAY, DAY.replace(hour=20), NEXT)):
        clock.today = day
        train(expert("sums", 2), [sums()], dated(), TINY, tmp_path / str(i), tmp_path / "experts", progress=False)
        steps.append(len([p for p in (tmp_path / "experts").iterdir() if p.is_dir()]))
    assert steps == [1, 1, 2]


def test_a_run_is_judged_with_its_own_date(clock, tmp_path):
    run = train(expert("sums", 1), [sums()], dated(), TINY, tmp_path / "run", progress=False)
    clock.today = NEXT
    judged = jobs_module._judged(run)
    assert {n: p.date for n, p in judged.items()} == {"result": DAY} and "01 May" in read(judged["result"])
    assert "02 May" in read(run.result)  # whoever only looks at it does so today


@pytest.mark.parametrize("value", ["yesterday", "2026-13-45", ""])
def test_a_damaged_date_is_named(value, tmp_path):
    run = train(expert("sums", 1), [sums()], dated(PLAIN), TINY, tmp_path / "run", progress=False)
    (run.path / "manifest.json").write_text(json.dumps(run.manifest | dict(date=value)))
    with pytest.raises(ValueError, match="manifest.json.*date"): Run(run.path).date


def test_the_trial_of_a_template_also_closes_an_answer(monkeypatch):
    "Rendering a conversation to find its end is as dangerous as rendering a prompt."
    monkeypatch.setattr(templates_module, "_PATIENCE", 1)
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if not add_generation_prompt %}" + forever + "{% endif %}{{ messages[0].content }}"
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="takes more than 1 seconds"): chat_text(tokenizer, said("1"))
