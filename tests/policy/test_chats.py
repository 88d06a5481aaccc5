"Whole conversations as prompts: text is kept, pictures keep their places, and templates that drop anything are named."
import json
import warnings
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from copd_nb.schedule.paradigms import expert
from copd_nb.data.capability import Capability, Example
from copd_nb.data.conversation import conversation
from copd_nb.data.columns import Columns
from copd_nb.data.files import capability_from, prompt_key, read_examples
from copd_nb.policy.file_problems import problems
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.analysis.token_gap import behavior_gap
from copd_nb.policy.toys import minis_base, tiny_policy
from copd_nb.policy.core import Policy
from copd_nb.policy.encoding import prompt_text
from copd_nb.policy.processors import character_tokenizer, small_processor
from copd_nb.policy.templates import conversation_text, left_out
from copd_nb.data.rewards import Exact
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample
from copd_nb.view.token_views import token_view

RAMP = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
CLIP = np.stack([RAMP, 255 - RAMP])
MODEL = files("copd_nb") / "assets" / "minis-base"


def system(text="Be brief."): return dict(role="system", content=text)
def user(text="2+2="): return dict(role="user", content=text)
def bot(text="4"): return dict(role="assistant", content=text)
def text(said): return dict(type="text", text=said)


IMAGE, VIDEO = dict(type="image"), dict(type="video")
LONG = [system(), user(), bot(), user("3+4=")]
BEGUN = [*LONG, bot("It is")]


def chat(*messages, answer="7", **pictures): return Example("", answer, "chats", messages=messages, **pictures)


# Texts are what they were

def test_texts_and_pictures_have_the_names_that_older_runs_know():
    "Computed before conversations were prompts; a change makes every stored run and record another one."
    every = [Example("12+30=", "42", "sums"), Example("Qué?\n\"x\" 'y'", "", "c", trace="t"),
             Example("sum?", "7", "image", images=(RAMP, RAMP[::-1].copy())),
             Example("diff?", "2", "video", videos=(CLIP,)),
             Example("both?", "a", "mixed", images=(RAMP,), videos=(CLIP, CLIP[:1]))]
    ids = ["ce79df132a7b019a", "7fbc7b466d7f8334", "bbadabf2aad89e4f", "b15cdc3191e35846", "a45486be38e10200"]
    keys = ["191e46473a2d2b1a", "6fca412918bbc37c", "3524294437fa3d68", "eb5dda3278a02928", "9740ed5c02a1b759"]
    assert [e.id for e in every] == ids and [prompt_key(e) for e in every] == keys
    assert Capability("pinned", every[:3], every[3:], Exact()).fingerprint == "232682d239689fad"


@pytest.mark.parametrize("messages, plain", [
    ([user("3+4?")], Example("3+4?", "7", "chats")), ([user([text("3+4?")])], Example("3+4?", "7", "chats")),
    ([user([text("3+"), text("4?")])], Example("3+4?", "7", "chats")),
    ([user([IMAGE, text("sum?")])], Example("sum?", "7", "chats", images=(RAMP,))),
    ([user("sum?")], Example("sum?", "7", "chats", images=(RAMP, RAMP))),
    ([user([IMAGE, VIDEO, text("sum?")])], Example("sum?", "7", "chats", images=(RAMP,), videos=(CLIP,)))])
def test_one_message_of_the_user_is_the_same_prompt(messages, plain):
    made = chat(*messages, images=plain.images, videos=plain.videos)
    found = made.id, made.prompt, made.messages, made.chat, made.transcript
    assert found == (plain.id, plain.prompt, (), plain.chat, plain.prompt)


# Conversations

def test_every_turn_is_part_of_a_prompts_name():
    variants = [LONG, LONG[1:], [system("Be rude."), *LONG[1:]], [*LONG[:2], bot("5"), LONG[3]],
                LONG[2:] and [user(), bot(), user("3+4=")][1:],
                BEGUN, [*BEGUN[:-1], bot("It is ")], [LONG[0], LONG[3]]]
    every = [chat(*v) for v in variants]
    assert len({e.id for e in every} | {Example("3+4=", "7", "chats").id}) == len(every) + 1
    assert len({prompt_key(e) for e in every}) == len(every) - 1  # a space at an end is no other prompt
    assert {e.prompt for e in every} == {"3+4="}


def test_keys_and_none_do_not_change_a_conversation():
    odd = [dict(content=m["content"], role=m["role"], tool_calls=None, name="", extra=[]) for m in LONG]
    assert chat(*odd).id == chat(*LONG).id and chat(*LONG).messages == tuple(LONG)
    assert replace(chat(*LONG), capability="other", trace="t").id == chat(*LONG).id


def test_the_text_beside_a_conversation_is_the_users_last_one():
    assert Example("3+4=", "7", "c", messages=tuple(BEGUN)).prompt == "3+4="
    with pytest.raises(ValueError, match=r"prompt '2\+2=' differs from the last text, '3\+4='"):
        Example("2+2=", "7", "c", messages=tuple(LONG))
    with pytest.raises(ValueError, match="differs from the last text"): replace(chat(*LONG), prompt="other")


@pytest.mark.parametrize("messages, error", [
    ([], "there is no message of the user: there are none"), ([system()], "there is no message of the user: system"),
    ([user(), system()], "the last message is of the system"),
    ([user(), dict(role="tool", content="4")], "message 2 has the role tool: system, user, assistant are allowed"),
    ([dict(role=["user"], content="a")], "message 1 has the role"),
    ([dict(content="a")], "message 1 has the role None"), (["2+2"], "message 1 is 2.2: role and content"),
    ([user(), dict(bot(), tool_calls=[dict(id=1)])], "message 2 has tool_calls: only role and content would be kept"),
    ([user(), dict(role="assistant", content=None, function_call=dict(name="f"))], "message 2 has function_call"),
    ([dict(user(), name="Ann")], "message 1 has name"),
    ([user(" ")], "message 1 is blank: a message of the user needs a text"),
    ([user(), bot("\n")], "message 2 is blank: a message of the assistant needs a text"),
    ([user([])], "message 1 is blank"),
    ([user(None)], "message 1 has the content None: a text or a list of parts"),
    ([user(7)], "message 1 has the content 7"), ([user(dict(text="a"))], "has the content"),
    ([user([text("a"), dict(type="input_audio", input_audio={})])],
     "part 2 of message 1 is .*input_audio.*: its type must be one of text, image, video"),
    ([user([dict(type="image_url", image_url=dict(url="https://a.b/c.png"))])], "part 1 of message 1 is .*image_url"),
    ([user(["a"])], "part 1 of message 1 is a"),
    ([user([dict(type="text")])], "part 1 of message 1 has the text None"),
    ([user([dict(type="image", url="a"), text("b")])], "part 1 of message 1, of type image, has url: only type"),
    ([user([dict(text("a"), cache_control=dict(type="x"))])], "part 1 of message 1, of type text, has cache_control"),
    ([user(), bot([IMAGE, text("so")])], "the last message, of the assistant, has pictures")])
def test_what_can_not_be_kept_is_named(messages, error):
    with pytest.raises(ValueError, match=error): conversation(messages)


def test_an_empty_system_message_is_not_none():
    "Templates with a default system message leave it away for an empty one."
    assert chat(system(""), user()).messages == (system(""), user())


@pytest.mark.parametrize("content, images, videos, placed", [
    ("now?", 2, 1, [IMAGE, IMAGE, VIDEO, text("now?")]),
    ([text("this "), IMAGE, text(" or "), IMAGE], 2, 0, [text("this "), IMAGE, text(" or "), IMAGE]),
    ([text("a"), text("b"), VIDEO], 0, 1, [text("ab"), VIDEO]), ([text("a"), IMAGE], 1, 1, [VIDEO, text("a"), IMAGE])])
def test_pictures_stand_where_their_parts_are_or_before_the_last_text_of_the_user(content, images, videos, placed):
    made = chat(system(), user(content), bot("I see"), images=(RAMP,) * images, videos=(CLIP,) * videos)
    assert made.messages[1]["content"] == placed


def test_marks_of_earlier_turns_count():
    turns = user([text("Look: "), IMAGE]), bot("Yes."), user("Which side is bright?")
    assert chat(*turns, images=(RAMP,)).messages == turns
    for n in (2, 0):
        with pytest.raises(ValueError, match=f"has 1 parts of type image for {n} images"):
            chat(*turns, images=(RAMP,) * n)
    with pytest.raises(ValueError, match="has 2 parts of type video for 1 videos"):
        chat(user([VIDEO, VIDEO, text("a")]), videos=(CLIP,))


def test_pages_show_the_whole_conversation():
    made = chat(system("<b>Be brief</b>"), user([text("Look "), IMAGE]), bot("So?"), user("Left or right?"),
                images=(RAMP,))
    lines = ["system: <b>Be brief</b>", "user: Look <image>", "assistant: So?", "user: Left or right?"]
    assert made.transcript == "\n".join(lines) and repr("\n".join(lines)) in repr(made)
    html = made._repr_html_()
    assert "<b>" not in html
    assert "system: &lt;b&gt;Be brief&lt;/b&gt;<br>user: Look &lt;image&gt;<br>assistant: So?" in html
    assert html.count("<img") == 1
    policy = words()
    out = sample(policy, policy.encode([chat(*BEGUN)]), 1, 4, 1., source=generator("cpu", 0))
    view = token_view(policy, policy, [chat(*BEGUN)], ["7"])
    for page in (out._repr_html_(), view._repr_html_()):
        assert all(m["content"] in page for m in BEGUN) and "assistant: It is" in page


# Templates

HEADERS = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
           "{% if add_generation_prompt %}<|assistant|>{% endif %}")
FOLDED = (
    "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ m['role'] }}\n{{ first if loop.first else '' }}"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<end_of_turn>\n{% endfor %}")
THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '' }}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DEAF = "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
FORGETFUL = "[user] {{ messages[-1]['content'] }}\n[assistant] "
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + DEAF
GLUED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PRINTED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ADDED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
PARTS = ("{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
         "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>{% endif %}{% endfor %}\n{% endfor %}")
FIRST = ("{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] if c['type'] != 'text' %}<image>{% endfor %}"
         "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}\n{% endfor %}")


def told(template, kind=character_tokenizer):
    made = kind()
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [HEADERS, FOLDED, THOUGHT, DEAF, ADDED, character_tokenizer().chat_template])
@pytest.mark.parametrize("messages",
                         [LONG, BEGUN, LONG[1:], [*LONG[1:], bot("It is ")], [user()], [user(), bot(" so\n\n")]],
                         ids=lambda m: f"{len(m)}-{m[-1]['role']}")
def test_the_text_is_the_templates_own(template, messages):
    tokenizer = told(template)
    ending = {"continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt": True}
    assert conversation_text(tokenizer, messages) == tokenizer.apply_chat_template(messages, tokenize=False, **ending)


def test_a_prefill_is_left_open_behind_what_the_template_writes():
    assert conversation_text(told(HEADERS), BEGUN).endswith("<|user|>3+4=<|end|><|assistant|>It is")
    assert conversation_text(told(THOUGHT), BEGUN).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nIt is")
    assert conversation_text(told(THOUGHT), LONG).endswith("<|im_start|>assistant\n")


@pytest.mark.skipif(find_spec("trl") is None, reason="the published templates come with trl")
@pytest.mark.parametrize("name",
                         ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl",
                          "qwen2_5_vl", "gemma3", "phi3", "phi3_5", "smolvlm", "llava_next", "cohere2", "lfm2"])
def test_published_templates_keep_conversations(name):
    import trl
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    sees = name in ("smolvlm", "llava_next")
    for kind in (character_tokenizer, small_processor):
        processor = told(template, kind)
        getattr(processor, "tokenizer", processor).bos_token = "<|endoftext|>"
        for messages in (LONG, BEGUN, LONG[1:]):
            assert left_out(processor, messages) == [], messages
            given = [m | dict(content=[text(m["content"])]) for m in messages] if sees else messages
            end = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
            wanted = processor.apply_chat_template(given, tokenize=False, **{end: True})
            assert conversation_text(processor, messages) == wanted


@pytest.mark.parametrize("template, messages, found", [
    (HEADERS, BEGUN, []), (FOLDED, BEGUN, []), (ADDED, BEGUN, []), (PRINTED, BEGUN, []), (PARTS, BEGUN, []),
    (DEAF, LONG, ["drops message 1 (system)"]),
    (FORGETFUL, LONG, ["drops message 1 (system)", "drops message 2 (user)", "drops message 3 (assistant)"]),
    (HEADERS, [*LONG, bot("It is ")], ["trims the prefill, message 5 (assistant)"]),
    (THOUGHT, [user(), bot("<think>2 and 2</think>4"), user()], ["changes message 2 (assistant)"]),
    (GLUED, LONG[:3] + [user("3")],
     [f"puts nothing between message {i} and message {i + 1} ({r})"
      for i, r in ((1, "user"), (2, "assistant"), (3, "user"))])])
@pytest.mark.parametrize("kind", [character_tokenizer, small_processor])
def test_what_a_template_leaves_out(kind, template, messages, found):
    assert left_out(told(template, kind), messages) == [f"the chat template {f}" for f in found]


def test_templates_that_refuse_a_conversation_say_so():
    for template, messages, words in ((STRICT, LONG, "System role not supported"),
                                      (FOLDED, [user(), user()], "roles must alternate")):
        for kind in (character_tokenizer, small_processor):
            with pytest.raises(ValueError, match=words): left_out(told(template, kind), messages)


def test_pictures_that_a_template_moves():
    one = [user([text("this "), IMAGE, text(" or "), IMAGE]), bot("Left."), user("Sure?")]
    two = [user([IMAGE, text("what?")])]
    assert left_out(told(PARTS, small_processor), one) == left_out(told(PARTS, small_processor), two) == []
    moved = ["the chat template drops or moves a picture of message 1 (user)"]
    assert left_out(told(FIRST, small_processor), one) == moved
    with pytest.raises(ValueError, match="prints the parts of message 1 as a list"):
        left_out(told(PRINTED, small_processor), two)


# Policies

def words(template=None):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer = character_tokenizer() if template is None else told(template)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = Qwen3Config(max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **sizes)
    return Policy(Qwen3ForCausalLM(config), tokenizer, "words")


def test_a_model_reads_the_whole_conversation():
    policy = words()
    ids = [policy.encode([chat(*m)]).ids[0].tolist() for m in (LONG, BEGUN)]
    assert ids[0] == policy.tokenizer.apply_chat_template(LONG, add_generation_prompt=True, return_dict=False)
    assert ids[1] == policy.tokenizer.apply_chat_template(BEGUN, continue_final_message=True, return_dict=False)
    both = policy.encode([chat(*LONG), Example("3+4=", "7", "chats")])
    assert both.mask.sum(1).tolist()[0] == len(ids[0]) > both.mask.sum(1).tolist()[1]
    with pytest.raises(ValueError, match="more than the context"): policy.encode([chat(system("a" * 300), user())])


def test_a_template_that_loses_messages_is_warned_of_once_a_prompt_is_read():
    with pytest.warns(UserWarning, match=r"'words' leaves out messages of conversations \(system\)"):
        words(DEAF).encode([chat(*LONG)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words(DEAF).encode([chat(*LONG[1:]), Example("3+4=", "7", "chats")])


def test_without_a_template_there_are_no_conversations():
    policy = words()
    policy.tokenizer.chat_template = None
    assert policy.encode([Example("3+4=", "7", "chats")]).ids.shape[1] == 4
    with pytest.raises(ValueError, match="prompt .*: a conversation needs a chat template, and 'words' has none"):
        policy.encode([chat(*LONG)])


def test_pictures_of_a_conversation_are_read_in_their_places():
    policy, other = tiny_policy(hidden=48, layers=2, vision_hidden=32, vision_depth=2), 255 - RAMP
    turns = [system(), user([text("this "), IMAGE, text("?")]), bot("No."),
             user([text("then "), IMAGE, VIDEO, text("?")]), bot("May")]
    made = chat(*turns, images=(RAMP, other), videos=(CLIP,))
    assert prompt_text(policy, made).count("<|image_pad|>") == 2
    assert prompt_text(policy, made).endswith("?<|im_end|>\n<|im_start|>assistant\nMay")
    found = policy.encode([Example("sum?", "1", "c", images=(other,)), made])
    batch = policy.processor(text=[prompt_text(policy, made)], images=[RAMP, other], videos=[CLIP], return_tensors="pt")
    assert found.ids[1].tolist() == batch["input_ids"][0].tolist() and found.mask[1].all()
    alone = policy.encode([made]).vision
    assert all(torch.equal(alone[k], batch[k])
               for k in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"))
    swapped = policy.encode([chat(*turns, images=(other, RAMP), videos=(CLIP,))])
    assert torch.equal(swapped.ids[0], found.ids[1])
    assert not torch.equal(swapped.vision["pixel_values"], alone["pixel_values"])
    ids = torch.randint(8, 100, (2, 3))
    logits = policy.completion_logits(policy.encode([made]), ids)
    seen = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in batch.items()
            if k in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")}
    kinds = torch.cat([batch["mm_token_type_ids"].repeat(2, 1), torch.zeros_like(ids)], 1)
    both = torch.cat([batch["input_ids"].repeat(2, 1), ids], 1)
    stock = policy.model(**seen, input_ids=both, mm_token_type_ids=kinds).logits[:, -4:-1]
    free = torch.ones(policy.width, dtype=torch.bool)
    free[policy.banned] = False
    assert torch.allclose(logits[..., free], stock[..., free].float(), atol=1e-4)


def test_a_reward_sees_what_the_model_has_written():
    policy, seen = words(), []
    def reward(completions, examples):
        seen.extend(zip(completions, examples))
        return [0.] * len(completions)
    example = chat(*BEGUN)
    out = sample(policy, policy.encode([example]), 2, 3, 1., source=generator("cpu", 0))
    reward(out.texts, out.examples)
    assert all("It is" not in c and e is example and e.messages[-1]["content"] == "It is" for c, e in seen)


# Data files

@pytest.fixture
def folder(tmp_path):
    for i, picture in enumerate((RAMP, 255 - RAMP)): Image.fromarray(picture).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder, *rows):
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "chats.jsonl"


def one(folder, messages, columns=Columns(), **more):
    return read_examples(write(folder, dict(prompt=messages, answer="7") | more), columns=columns)[0]


def test_conversations_of_every_kind_of_file_are_one(folder):
    rows = [dict(prompt=BEGUN, answer="7"), dict(prompt=[user()], answer="4")]
    ids = [e.id for e in read_examples(write(folder, *rows))]
    assert ids == [chat(*BEGUN).id, Example("2+2=", "4", "c").id]
    (folder / "a.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_parquet(folder / "a.parquet")
    pd.DataFrame([dict(prompt=np.array(r["prompt"], dtype=object), answer=r["answer"]) for r in rows]).to_parquet(
        folder / "b.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "set")
    names = [
        dict(prompt={"from": ["system", "human", "gpt", "human", "gpt"], "value": [m["content"] for m in BEGUN]},
             answer="7"),
             dict(prompt=[{"from": "human", "value": "2+2="}], answer="4")]
    (folder / "c.json").write_text(json.dumps(names))
    for file in ("a.json", "a.parquet", "b.parquet", "set", "c.json"):
        assert [e.id for e in read_examples(folder / file)] == ids, file


def test_tables_that_fill_missing_fields_with_nothing(folder):
    turns = [dict(user([text("a"), IMAGE]), name=None), bot(None) | dict(content=[text("b")]), user([text("c")])]
    rows = [dict(prompt=turns, images=["0.png"], answer="7")]
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    assert read_examples(folder / "a.parquet")[0].messages == (user([text("a"), IMAGE]), bot("b"), user("c"))


def test_template_and_options_go_to_the_users_last_text(folder):
    columns = Columns(options="o", template="Q: {prompt}\nLetter only.")
    made = one(folder, BEGUN, columns, o=["six", "seven"])
    assert made.messages == (*LONG[:3], user("Q: 3+4=\nA. six\nB. seven\nLetter only."), bot("It is"))
    made = one(folder, [system(), user([IMAGE, text("this or "), IMAGE, text("?")])], columns, o=["six", "seven"],
               images=["0.png", "1.png"])
    assert made.messages[1]["content"] == [IMAGE, text("Q: this or "), IMAGE, text("?\nA. six\nB. seven\nLetter only.")]
    made = one(folder, [system(), user([IMAGE])], columns, images=["0.png"])
    assert made.messages[1]["content"] == [IMAGE, text("Q: \nLetter only.")] and made.prompt == "Q: \nLetter only."
    with pytest.raises(ValueError, match="has {prompt} twice"):
        one(folder, [user([text("a"), IMAGE])], Columns(template="{prompt} {prompt}"), images=["0.png"])
    assert one(folder, [system(), user("a")], Columns(template="{prompt} {prompt}")).prompt == "a a"


def test_parts_may_name_their_pictures(folder):
    raw = (folder / "1.png").read_bytes()
    made = one(folder, [user([dict(IMAGE, image="0.png"), text(" or "), dict(IMAGE, path="1.png")])])
    assert np.array_equal(made.images[0], RAMP) and np.array_equal(made.images[1], 255 - RAMP)
    assert made.messages == (user([IMAGE, text(" or "), IMAGE]),)
    parts = [dict(type="image", image=dict(bytes=raw, path=None), text=None),
             dict(type="text", image=None, text="what?")]
    rows = [dict(prompt=[user(parts)], answer="7")]
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    assert read_examples(folder / "a.parquet")[0].id == Example("what?", "7", "c", images=(255 - RAMP,)).id
    np.save(folder / "film.npy", CLIP)
    assert np.array_equal(one(folder, [user([dict(VIDEO, video="film.npy"), text("what?")])]).videos[0], CLIP)


@pytest.mark.parametrize("messages, more, error", [
    ([user([IMAGE, text("a")])], {}, "row 1 of chats.jsonl: the conversation has 1 parts of type image for 0 images"),
    ([user([IMAGE, IMAGE, text("a")])], dict(images=["0.png"]), "has 2 parts of type image for 1 images"),
    ([user([dict(IMAGE, image="0.png"), IMAGE, text("a")])], {}, "has 2 parts of type image for 1 images"),
    ([user([dict(IMAGE, image="0.png"), text("a")])], dict(images=["1.png"]),
     "images are in 'images' and in the conversation: one place"),
    ([user([dict(IMAGE, image="../0.png"), text("a")])], {}, "outside of the data file's folder"),
    ([user([dict(IMAGE, image="9.png"), text("a")])], {}, "no file '9.png'"),
    ([user([dict(IMAGE, image="https://a.b/c.png"), text("a")])], {},
     "'https://a.b/c.png' is not a file name: images are read from the data file's folder only"),
    ([user([dict(IMAGE, image="data:image/png;base64," + "A" * 9000), text("a")])], {}, "^.{,200}$"),
    ([user([dict(type="image_url", image_url=dict(url="data:image/png;base64,AAAA"))])], {},
     "part 1 of message 1 is .*: its type must be one of text, image, video"),
    ([user([dict(IMAGE, url="https://a.b/c.png"), text("a")])], {}, "part 1 of message 1, of type image, has url"),
    ([{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}], {},
     "message 2 has the role observation: system, user, assistant"),
    ([{"from": "human", "value": None}], {}, "message 1 has the content None"),
    ([{"from": ["human"], "value": "a"}], {}, "message 1 has the role"),
    ([user(), dict(bot(), tool_calls=[1])], {}, "row 1 of chats.jsonl: message 2 has tool_calls"),
    ([], {}, "row 1 of chats.jsonl: there is no message of the user: there are none"),
    ([user("x" * 600_000), bot("y" * 600_000), user()], {}, "the prompt has 1,200,004 characters: at most 1,000,000"),
    ({"role": ["user"], "content": []}, {}, "text is needed")])
def test_rows_that_can_not_be_kept_name_what_is_allowed(folder, messages, more, error):
    with pytest.raises(ValueError, match=error): one(folder, messages, **more)
    found = problems(folder / "chats.jsonl")
    assert found.row.tolist() == [1] and len(found.problem[0]) < 250


def test_another_column_with_conversations_is_named(folder):
    path = write(folder, dict(prompt="2+2=", answer="4"),
                 dict(conversations=[{"from": "human", "value": "3+4="}], answer="7"))
    cure = "column 'conversations' holds conversations, use .*--column prompt=conversations"
    with pytest.raises(ValueError, match=f"row 2 .*'prompt' is None: {cure}"):
        read_examples(path)
    found = problems(write(folder, dict(messages=LONG, answer="7")))
    assert found[["row", "column"]].values.tolist() == [[0, "prompt"]]
    assert "use Columns(prompt='messages')" in found.problem[0]
    assert problems(folder / "chats.jsonl", Columns(prompt="messages"), "numeric").empty
    found = problems(
        write(folder, dict(prompt=json.dumps(LONG), answer="7"), dict(prompt=str(LONG), answer="7"),
              dict(prompt="[{ is a bracket", answer="7")))
    assert found.row.tolist() == [1, 2] and "is the text of a list of messages" in found.problem[0]


def test_chats_that_differ_in_one_turn_do_not_repeat_each_other(folder):
    rows = [dict(prompt=m, answer="7") for m in (LONG, [system("Be rude."), *LONG[1:]], LONG[1:], [LONG[3]], BEGUN)]
    assert len(read_examples(write(folder, *rows))) == 5 and problems(folder / "chats.jsonl").empty
    loud = [m | dict(content=m["content"].upper() + " ") for m in LONG]
    found = problems(write(folder, *rows, dict(prompt=loud, answer="8")))
    assert found.row.tolist() == [6] and found.problem[0] == "repeats row 1 with another answer"
    (folder / "test.jsonl").write_text(json.dumps(dict(prompt=loud, answer="7")))
    assert problems(write(folder, *rows),
                    test=folder / "test.jsonl").problem.tolist() == ["is held out in row 1 of test.jsonl"]


@pytest.mark.parametrize("last, answer, reward, away", [
    ("It is 7.", "7", None, True), ("4, so", "4", None, True), ("It is 17", "7", None, False),
    ("7.5 or so", "7", None, False), ("x7", "7", None, False), ("It is", "7", "numeric", False),
    ("1,200", "1200", None, False), ("1,200", "1200", "numeric", True), ("so", "", None, False),
    ("PARIS it is", "Paris", None, True)])
def test_a_prefill_that_gives_the_answer_away(folder, last, answer, reward, away):
    found = problems(
        write(folder, dict(prompt=[user(), bot(last)], answer=answer),
              dict(prompt=[user(), bot(f"{answer} is old."), user("Why?")], answer=answer)), reward=reward)
    assert found.row.tolist().count(1) == away and 2 not in found.row.tolist()
    if away: assert "the last message, of the assistant, gives" in found.problem[0]


def test_what_a_model_makes_of_conversations_is_listed(folder):
    model = minis_base()
    model.tokenizer.chat_template = model.processor.chat_template = STRICT.replace(
        "messages[0]['role'] == 'system'", "messages[0]['content'] == 'No'")
    model.save(folder / "model")
    long = [system("a" * 400), user("b" * 100), bot("c" * 20)]
    rows = [LONG, [system("No"), user("1")], [user(), bot("It is")], long, [user([text("this"), IMAGE]), user("what?")]]
    path = write(folder, *[dict(prompt=m, answer="7", images=["0.png"] if m is rows[-1] else []) for m in rows])
    found = problems(path, model=folder / "model", room=8)
    said = {r: "; ".join(found.problem[found.row == r]) for r in found.row}
    assert set(said) >= {1, 2, 4} and 3 not in said and set(found.column) == {"prompt"}
    assert said[1] == "the chat template drops message 1 (system)" and "System role not supported" in said[2]
    assert "drops message 1 (system)" in said[4]
    found = problems(path, model=MODEL, room=8)
    assert found.row.tolist() == [4] and "and 8 for the completion: the context is 512" in found.problem[0]


def test_a_model_without_a_template_takes_texts_only(folder):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "model")
    from transformers import LlamaConfig
    LlamaConfig(max_position_embeddings=64).save_pretrained(folder / "model")
    found = problems(write(folder, dict(prompt=LONG), dict(prompt="2+2=")), model=folder / "model")
    assert found.row.tolist() == [0, 1] and "is a conversation, but the model has no chat template" in found.problem[1]


# From the file to the gap

def test_a_training_on_conversations(folder):
    def row(i, language):
        return dict(
            messages=[system(f"Answer in {language}."), user(f"I have {i} pens."), bot("Ok."),
                      user("And if I lose one?")], answer=str(i - 1))
    path = write(folder, *[row(i, language) for i in range(2, 12) for language in ("French", "German")])
    columns = Columns(prompt="messages")
    assert problems(path, columns, "numeric", model=MODEL, room=4).empty
    pens = capability_from(path, "pens", "numeric", columns)
    assert len(pens.train) + len(pens.test) == 20 and len({e.prompt for e in (*pens.train, *pens.test)}) == 1
    config = Config(prompts=2, group_size=2, max_new_tokens=4, eval_every=0, probe_every=0, checkpoint_every=1,
                    warmup=1, device="cpu")
    run = train(expert("pens", 2), [pens], minis_base(), config, folder / "run", progress=False)
    again = train(expert("pens", 2), [capability_from(path, "pens", "numeric", columns)], minis_base(), config,
                  folder / "run", progress=False)
    assert run.finished and again.finished
    gap = behavior_gap(minis_base(), run.result, pens.test[:2], samples=1, max_new_tokens=3)
    assert set(gap.example) == {e.id for e in pens.test[:2]}


def test_a_file_with_too_few_rows_says_how_rows_are_chosen(folder):
    cure = "a hash of the prompt chooses its side: add rows, or name a file"
    with pytest.raises(ValueError, match=f"no (training|held-out) prompts.*{cure}"):
        capability_from(write(folder, dict(prompt=LONG, answer="7")), "c", "numeric")
