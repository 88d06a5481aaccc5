"GapCallback: a training is the same with it and without, its numbers are right, and what can't be measured is refused."
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (BertConfig, BertForSequenceClassification, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          TrainerCallback, Trainer, TrainingArguments)

from copd_nb import GapCallback
from copd_nb.analysis.token_gap import behavior_gap
from copd_nb.data.capability import Example
from copd_nb.policy.core import Policy
from copd_nb.policy.processors import character_tokenizer
from copd_nb.scale.borrowing import borrowed, model_in
from copd_nb.scale.callbacks import completed

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(1, 9) for b in range(1, 9)]
PROMPTS = [Example(q, a, "sums" if i % 2 else "more") for i, (q, a) in enumerate(SUMS[:8])]
OPTIONS = dict(every=2, max_new_tokens=4, chat_template="plain", reward="exact", k=(1, 3))


def language_model(seed=0, vocabulary=0, **more):
    "A tiny model with dropout in its attention."
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer) + vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, attention_dropout=0.2, **more))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def adapters(model, **more):
    "The model with LoRA adapters that have dropout of their own."
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.3, init_lora_weights=False,
                             **more)
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


def digits(completions, **_): return [float(sum(c.isdigit() for c in text)) for text in completions]


def trainer_of(kind, folder, model, **more):
    "A trainer of one kind for six short steps."
    shared = dict(output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
                  use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1) | more
    tokenizer = character_tokenizer()
    if kind == "trainer":
        rows = [dict(input_ids=(ids := tokenizer(q + a)["input_ids"][:5]), labels=ids) for q, a in SUMS]
        rows = [r for r in rows if len(r["input_ids"]) == 5]
        return Trainer(model, TrainingArguments(**shared), train_dataset=rows, processing_class=tokenizer)
    if kind == "sft":
        rows = datasets.Dataset.from_list([dict(prompt=q, completion=a) for q, a in SUMS])
        args = trl.SFTConfig(**shared, max_length=32)
        return trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    rows = datasets.Dataset.from_list([dict(prompt=q) for q, _ in SUMS])
    beta = 0.05 if hasattr(model, "peft_config") else 0.0  # TRL reads the reference of a whole model from a folder
    args = trl.GRPOConfig(**shared, num_generations=4, max_completion_length=4, temperature=1.0, beta=beta)
    return trl.GRPOTrainer(model, digits, args, train_dataset=rows, processing_class=tokenizer)


class Fingerprints(TrainerCallback):
    "Everything about a model that a measurement could leave changed, at the end of each step."
    def __init__(self, last): self.last, self.seen = last, []

    def on_step_end(self, args, state, control, model=None, processing_class=None, **_):
        inside = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.seen.append(dict(
            modes=[m.training for m in model.modules()], attention=inside.config._attn_implementation,
            hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()],
            learns=[(p.requires_grad, p.grad is None) for p in model.parameters()], cache=inside.config.use_cache,
            template=processing_class.chat_template, pad=processing_class.pad_token, grad=torch.is_grad_enabled(),
            recompute=inside.is_activation_checkpointing, python=random.getstate(),
            torch=torch.get_rng_state().tolist(), numpy=np.random.get_state()[1].tolist(), asked=control.should_log))


def plain(rows):
    "Rows of a trainer's log without times."
    timed = ("runtime", "per_second", "step_time", "flos", "gap/")
    rows = [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows
            if "gap/seconds" not in row]
    return [{k: v for k, v in row.items() if v == v} for row in rows]


def trained(kind, folder, make, with_it, teacher, own=None, **more):
    "The log, the final weights and the fingerprints of a training."
    trainer = trainer_of(kind, folder, make(), **more)
    if with_it: trainer.add_callback(GapCallback(trainer, PROMPTS, teacher, **OPTIONS | (own or {})))
    trainer.add_callback(seen := Fingerprints(trainer))
    trainer.train()
    return trainer, {n: x.clone() for n, x in trainer.model.state_dict().items()}, seen.seen


def noisy(completions, examples):
    "A reward that draws from every global stream."
    return [float(random.random() + np.random.rand() + torch.rand(1).item() > 1.5) for _ in completions]


@pytest.mark.integration
@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("against", ["teacher", "folder", "start", "previous"])
@pytest.mark.parametrize("kind", ["trainer", "sft", "grpo"])
def test_a_training_is_the_same_with_it_and_without(kind, against, wrapped, tmp_path):
    def make(): return adapters(language_model()) if wrapped else language_model()
    more = dict(activation_checkpointing=True) if against == "start" else {}
    teacher = dict(teacher=(language_model(1).train(), character_tokenizer()), folder=tmp_path / "teacher").get(against)
    Policy(language_model(1), character_tokenizer()).save(tmp_path / "teacher")
    own = dict(reward=noisy) | (dict(against=against) if teacher is None else {})
    one, weights, before = trained(kind, tmp_path, make, False, None, **more)
    other, same, after = trained(kind, tmp_path, make, True, teacher, own, **more)
    losses = [row["loss"] for row in one.state.log_history if "loss" in row]
    assert len(losses) == 6 and len(set(losses)) > 1
    assert plain(one.state.log_history) == plain(other.state.log_history)
    assert weights.keys() == same.keys() and all(torch.equal(weights[n], same[n]) for n in weights)
    assert before == after
    gaps = [row for row in other.state.log_history if "gap/seconds" in row]
    assert [row["step"] for row in gaps] == [0, 2, 4, 6]
    if against == "teacher": assert teacher[0].training and teacher[0].config._attn_implementation == "sdpa"


def test_dropout_matters_in_these_trainings(tmp_path):
    "Otherwise the comparison above would prove little."
    def calm():
        model = language_model()
        for layer in model.model.layers: layer.self_attn.attention_dropout = 0.0
        return model
    logs = [trained("trainer", tmp_path, make, False, None)[0].state.log_history for make in (language_model, calm)]
    one, other = logs
    assert plain(one) != plain(other)


def history(trainer): return [row for row in trainer.state.log_history if "gap/seconds" in row]


def watched(folder, model=None, examples=PROMPTS, teacher=None, kind="trainer", more=None, **options):
    "A trainer with the callback."
    trainer = trainer_of(kind, folder, language_model() if model is None else model, **(more or {}))
    trainer.add_callback(GapCallback(trainer, examples, teacher, **OPTIONS | options))
    return trainer


def test_the_numbers_are_those_of_the_gap_of_the_final_model(tmp_path):
    tokenizer = completed(character_tokenizer(), "plain")
    teacher = Policy(language_model(1), tokenizer, "teacher")
    trainer = watched(tmp_path, teacher=teacher, every=4)
    trainer.train()
    rows = history(trainer)
    assert [r["step"] for r in rows] == [0, 4, 6] and "gap/share" not in rows[0]
    assert {"gap/overlap@1", "gap/overlap@3", "gap/symmetric_kl", "gap/accuracy", "gap/seconds",
            "gap/sums/symmetric_kl", "gap/more/overlap@3", "gap/sums/accuracy"} <= set(rows[-1])
    assert "gap/teacher_accuracy" in rows[0] and "gap/teacher_accuracy" not in rows[1]
    assert 0 < rows[-1]["gap/share"] < 1 and rows[-1]["gap/seconds"] > 0
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GapCallback))
    student = Policy(trainer.model, tokenizer, "student")
    written = callback._written(student)
    ids = [row[:int(n)].tolist() for row, n in zip(written.ids, written.lengths)]
    expected = behavior_gap(student, teacher, PROMPTS, [1, 3], completions=ids)
    for metric in ("overlap@1", "overlap@3", "symmetric_kl"):
        assert rows[-1][f"gap/{metric}"] == pytest.approx(expected[metric].mean(), abs=1e-6)
        part = expected[expected.capability == "sums"]
        assert rows[-1][f"gap/sums/{metric}"] == pytest.approx(part[metric].mean(), abs=1e-6)


def test_without_a_teacher_it_compares_with_the_start_or_with_the_last_time(tmp_path):
    found = {}
    for against in ("start", "previous"):
        trainer = watched(tmp_path, against=against)
        trainer.train()
        found[against] = [r["gap/symmetric_kl"] for r in history(trainer)]
    assert found["start"][0] == found["previous"][0] == pytest.approx(0, abs=1e-6)
    assert found["start"][1] == pytest.approx(found["previous"][1], abs=1e-7)
    assert found["start"][-1] > found["previous"][-1] > 0


def test_a_copy_of_adapters_shares_the_frozen_weights(tmp_path):
    whole, lora = (watched(tmp_path / str(i), m) for i, m in enumerate((language_model(), adapters(language_model()))))
    sizes = []
    for trainer in (whole, lora):
        trainer.train()
        sizes.append(history(trainer)[0]["gap/copy_mb"])
    trained_bytes = sum(p.nbytes for p in lora.model.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in lora.model.buffers())
    assert sizes[1] * 2 ** 20 == trained_bytes + buffers and sizes[1] < sizes[0] / 3


def test_adapters_train_the_head_whole(tmp_path):
    "Weights of `modules_to_save` are those that count."
    trainer = watched(tmp_path, adapters(language_model(tie_word_embeddings=False), modules_to_save=["lm_head"]))
    trainer.train()
    assert history(trainer)[-1]["gap/symmetric_kl"] > 0


def test_trackers_show_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watched(tmp_path, more=dict(report_to=["tensorboard"], logging_steps=3)).train()
    file = next(tmp_path.rglob("events.out.*"))
    seen = accumulator.EventAccumulator(str(file.parent))
    seen.Reload()
    tags = seen.Tags()["scalars"]
    assert {"train/gap/overlap@3", "train/gap/seconds", "train/gap/sums/symmetric_kl", "train/loss"} <= set(tags)
    assert [e.step for e in seen.Scalars("train/gap/overlap@3")] == [0, 2, 4, 6]
    assert [e.step for e in seen.Scalars("train/loss")] == [3, 6]


def test_a_model_without_template_and_padding_token(tmp_path):
    trainer = trainer_of("trainer", tmp_path, language_model())
    bare = character_tokenizer()
    bare.chat_template = bare.pad_token = None
    trainer.add_callback(GapCallback(trainer, ["1+1=", "2+2="], processor=bare, every=3, max_new_tokens=3))
    trainer.train()
    assert len(history(trainer)) == 3 and bare.pad_token is None and bare.chat_template is None
    with pytest.raises(ValueError, match="'<nothing>' is no token of the vocabulary"):
        other = trainer_of("trainer", tmp_path, language_model())
        other.add_callback(GapCallback(other, ["1+1="], processor=bare, pad_token="<nothing>"))  # noqa: S106
        other.train()


def test_a_teacher_in_a_folder(tmp_path):
    Policy(language_model(1), character_tokenizer()).save(tmp_path / "teacher")
    trainer = watched(tmp_path, teacher=str(tmp_path / "teacher"))
    trainer.train()
    assert history(trainer)[-1]["gap/overlap@1"] < 1


def fails_at_once(trainer, match):
    with pytest.raises(ValueError, match=match): trainer.train()
    assert trainer.state.global_step == 0


def test_what_can_not_be_compared_is_refused_before_the_first_step(tmp_path):
    other = character_tokenizer()
    other.add_tokens(["<more>"])
    teacher = language_model(1, vocabulary=1)
    fails_at_once(watched(tmp_path, teacher=(teacher, other)), "different vocabularies, 1 tokens differ: '<more>'")
    fails_at_once(watched(tmp_path, examples=[Example("1+1=" * 60, "2", "sums")]), "more than the context")
    bert = BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                                    intermediate_size=8, vocab_size=99))
    fails_at_once(watched(tmp_path, bert), "is a BertForSequenceClassification: a language")
    prompt = peft.get_peft_model(language_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    fails_at_once(watched(tmp_path, prompt), "PROMPT_TUNING puts learned vectors in front")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    fails_at_once(watched(tmp_path, peft.get_peft_model(language_model(), config)), "the output head has an adapter")


@pytest.mark.parametrize("state, match", [((2, True), "sharded by FSDP"),
                                          ((3, False), "sharded by DeepSpeed ZeRO-3")])
def test_sharded_weights_are_refused(state, match):
    plugin = SimpleNamespace(zero_stage=2)
    trainer = SimpleNamespace(model=language_model(), is_fsdp_enabled=False, accelerator=SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), unwrap_model=lambda m, **_: m))
    assert model_in(trainer) is trainer.model
    plugin.zero_stage, trainer.is_fsdp_enabled = state
    with pytest.raises(ValueError, match=f"{match}, and no process holds the model whole"): model_in(trainer)


@pytest.mark.parametrize("given, match", [
    (dict(every=0), "every=0"), (dict(against="end"), "against='end': start or previous"),
    (dict(examples=[]), "at least one prompt"), (dict(reward="nope"), "there is no reward 'nope'"),
    (dict(examples=["1+1="]), "no example has an answer"), (dict(reward=dict(sum="exact")), r"rewards for \['sum'\]"),
    (dict(trainer=language_model()), "was given a LlamaForCausalLM")])
def test_options_are_checked_when_it_is_made(given, match, tmp_path):
    options = dict(trainer=trainer_of("trainer", tmp_path, language_model()), examples=PROMPTS, reward="exact") | given
    with pytest.raises(ValueError, match=match): GapCallback(**options)


class Spoil(TrainerCallback):
    "Weights without a value from step 3 on."
    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 3: model.model.norm.weight.data.fill_(float("nan"))


def test_a_measurement_that_fails_later_does_not_end_the_training(tmp_path):
    trainer = watched(tmp_path)
    trainer.add_callback(Spoil())
    with pytest.warns(UserWarning, match="GapCallback measured nothing at step 4"): trainer.train()
    assert trainer.state.global_step == 6
    assert ["gap/symmetric_kl" in row for row in history(trainer)] == [True, True, False, False]


class Stop(TrainerCallback):
    "Ends a training after an evaluation, as early stopping does."
    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs and state.global_step == 3: control.should_training_stop = True


def test_a_training_that_is_stopped_is_measured_at_its_end(tmp_path):
    trainer = watched(tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    assert [row["step"] for row in history(trainer)] == [0, 2, 3]


def test_an_error_inside_gives_the_model_back(tmp_path):
    model = language_model().train()
    with pytest.raises(RuntimeError), borrowed(model):
        Policy(model, character_tokenizer())
        assert not model.training
        raise RuntimeError
    assert model.training and model.config._attn_implementation == "sdpa" and torch.is_grad_enabled()
