"Each file in `examples/` is valid, says what it means, and is rehearsed; rehearsals find faults."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig

from copd_nb.data.capability import Example
from copd_nb.engine.config import Config
from copd_nb.policy.lora_branches import LoraPolicy
from copd_nb.schedule.copd_schedules import copd
from copd_nb.study.experiment import Experiment, read_experiment, rows_of, settings_of
from copd_nb.study.loading import capability_of
from copd_nb.study.memory import lengths_of, plan_for
from copd_nb.study.rehearsal import (
    _small, rehearsal_base, rehearsal_config, rehearsal_prompts, rehearse, rehearsed, share_of_digits, shrunk,
    small_model, small_text_model)

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
SMALL = dict(task="algebra", arguments=dict(size=40, held_out=8))


def example(name): return read_experiment(EXAMPLES / f"{name}.yaml")


def test_there_are_examples(): assert {"qwen3-vl-4b", "qwen3-0.6b"} <= {f.stem for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_of_an_example_is_described(file):
    readme, experiment = (EXAMPLES / "README.md").read_text(encoding="utf-8"), read_experiment(file)
    assert f"`{file.name}`" in readme
    for entry in experiment.capabilities.values():
        for key in ("file", "test"):
            if key in entry: assert f"`{entry[key]}`" in readme, entry[key]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_schedules_of_examples_are_valid(file):
    experiment = read_experiment(file)
    for setting, rows in rows_of(experiment).items():
        for p in rows: p.schedule.validate(list(settings_of(experiment)[setting].capabilities))
    for preset in experiment.presets: assert rows_of(read_experiment(file, preset))


def test_the_4b_example_is_the_setting_of_the_paper():
    e = example("qwen3-vl-4b")
    c = e.config
    assert (c.prompts, c.group_size, c.max_new_tokens, c.learning_rate, c.temperature) == (256, 8, 16_384, 1e-6, 1.0)
    assert (c.clip_low, c.clip_high, c.warmup, c.precision, c.recompute) == (0.2, 0.28, 0, "bf16", True)
    assert e.model == dict(path="Qwen/Qwen3-VL-4B-Instruct", dtype="bfloat16", lora=64)
    assert list(e.capabilities) == ["text", "image", "video"]
    schedule = next(p.schedule for p in rows_of(e)["three_branch"] if p.label == "CoPD")
    assert schedule == replace(copd(["text", "image", "video"], cycles=5, s_rl=12, s_opd=8, beta=1.0, topology="hub"),
                               name=schedule.name)
    assert schedule.links() == {(a, b) for a in ("image", "video") for b in ("text",)} | {("text", "image"),
                                                                                         ("text", "video")}


@pytest.mark.parametrize("name,prompt,low,high", [("qwen3-vl-4b", 4000, 60, 80), ("qwen3-0.6b", 500, 10, 24)])
def test_examples_fit_the_card_that_they_name(name, prompt, low, high):
    experiment = example(name)
    plan = plan_for(experiment, prompt=prompt)
    assert low < plan.largest["GiB"].iloc[-1] < high
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"{plan.largest['GiB'].iloc[-1]:.0f} GiB" in readme
    assert all("assumed" in origin or "measured" in origin for origin in lengths_of(experiment).origin.values())


SLOW = "coevolution", "neighbours", "parts", "qwen3-vl-4b"


@pytest.mark.integration
@pytest.mark.parametrize("file", [
    pytest.param(f, marks=[pytest.mark.slow] * (f.stem in SLOW), id=f.stem)
    for f in FILES if f.stem != "balance"])  # its rows are those of others
def test_examples_are_rehearsed(file):
    experiment = read_experiment(file)
    table = rehearse(experiment)
    assert table.ok.all(), table[["paradigm", "fault"]].to_string()
    assert set(table.paradigm) == {p.label for rows in rows_of(experiment).values() for p in rows}


def rows(path, many): path.write_text("\n".join(map(json.dumps, many)), encoding="utf-8")


def test_the_sets_of_an_example_are_read_by_their_recipes(tmp_path):
    e = example("qwen3-vl-4b")
    rows(tmp_path / "train.jsonl", [dict(question=f"What is {i}+{i}?", final_answer=str(2 * i)) for i in range(5)])
    rows(tmp_path / "test.jsonl", [dict(problem=f"What is {i}-1?", answer=str(i - 1), unique_id=f"u{i}")
                                   for i in range(3)])
    entry = e.capabilities["text"] | dict(file="train.jsonl", recipe="deepmath-103k", test="test.jsonl")
    own = replace(e, capabilities=dict(text=entry, image=e.capabilities["image"]), together={}, folder=tmp_path)
    found, origin = rehearsal_prompts(own)
    assert origin == dict(text="its own", image="embedded")
    assert (len(found["text"].train), len(found["text"].test)) == (5, 3)
    assert found["image"].train[0].images and found["image"].train[0].capability == "image"


def test_the_tests_of_programs_are_read(tmp_path):
    e = example("qwen3-0.6b")
    (tmp_path / "data").mkdir()
    rows(tmp_path / "data" / "mbpp.jsonl", [dict(prompt=f"Write add{i}(a, b).", answer=json.dumps(
        dict(tests=f"assert add{i}(1, 2) == 3"))) for i in range(30)])
    own = replace(e, folder=tmp_path)
    code = capability_of("code", own.capabilities["code"], own.folder)
    assert "one block of Python" in code.train[0].prompt
    number = code.train[0].prompt.split("add")[1].split("(")[0]
    assert list(code.reward([f"```python\ndef add{number}(a, b): return a + b\n```"], code.train[:1])) == [1]


def test_a_rehearsal_keeps_switches_and_makes_numbers_small():
    config = example("qwen3-vl-4b").config
    small = rehearsal_config(config)
    kept = ("micro_prompts", "micro_tokens", "rollout_rows", "recompute", "clip_high", "learning_rate", "precision")
    assert small.recompute and all((getattr(small, k) is None) == (getattr(config, k) is None) for k in kept)
    assert (small.clip_high, small.learning_rate, small.precision) == (0.28, 1e-6, "bf16") and small.prompts == 4
    off = rehearsal_config(Config(probe_every=0, eval_every=0))
    assert (off.probe_every, off.eval_every, off.micro_tokens, off.recompute) == (0, 0, None, False)


def test_a_rehearsal_takes_the_first_cycle():
    short = rehearsed(copd(["a", "b"], cycles=3, s_rl=6, s_opd=4, beta=0.2))
    assert [(p.cycle, p.steps) for p in short.phases] == [(1, 1), (1, 1)] and short.phases[1].updates[0].opd


@pytest.mark.parametrize("config,kind", [(LlamaConfig(), "llama"), (GPT2Config(), "gpt2")])
def test_a_small_model_of_the_same_type(config, kind):
    assert small_text_model(config).model.config.model_type == kind


def test_a_family_that_can_not_be_shrunk_is_rehearsed_as_qwen3():
    with pytest.raises(ValueError): small_text_model(MambaConfig())
    assert small_model(Experiment("nobody/nothing", dict(a=SMALL, b=SMALL))).model.config.model_type == "qwen3"
    assert small_model(Experiment(shrunk(), dict(a=SMALL, b=SMALL))).model.config.model_type == "qwen3_vl"


def test_adapters_and_dtype_of_a_rehearsal():
    base = rehearsal_base(Experiment(dict(path="Qwen/Qwen3-0.6B", lora=32, alpha=32, dtype="bfloat16"),
                                     dict(a=SMALL, b=SMALL)))
    assert isinstance(base, LoraPolicy) and base.adapter.shape == dict(r=4, lora_alpha=4)
    assert str(base.model.dtype) == "torch.bfloat16"


def test_large_pictures_become_small():
    film, photo = np.zeros((30, 240, 320, 3), np.uint8), np.full((100, 400, 3), 9, np.uint8)
    small = _small(Example("?", "1", "x", images=(photo,), videos=(film,)), "mine")
    assert small.videos[0].shape == (4, 32, 32, 3) and small.images[0].shape == (32, 32, 3)
    assert small.capability == "mine" and (small.images[0] == 9).all()


def test_the_reward_of_a_rehearsal(): assert share_of_digits(["12ab", "", "7"], [None] * 3) == [0.5, 0, 1]




def test_a_fault_is_found_and_the_other_rows_are_tried(tmp_path):
    "A top-k beyond the vocabulary: the engine refuses it, row by row."
    two = dict(a=SMALL, b=dict(file="none.jsonl", reward="exact"))
    wrong = Experiment("Qwen/Qwen3-0.6B", two, paradigms=["mixed", "merged"], config=Config(probe_k=5000))
    table = rehearse(wrong, tmp_path / "kept")
    assert not table.ok.any() and table.fault.str.contains("probe_k=5000").all() and len(table) == 2
    right = replace(wrong, paradigms=["mixed"], config=Config(device="cpu"))
    table = rehearse(right, tmp_path / "kept")
    assert table.ok.all() and table.gradient_norm.gt(0).all() and list(table.judged) == [4]
    assert table.attrs == dict(model="qwen3", prompts=dict(a="its own", b="embedded"))
    assert len(list((tmp_path / "kept").glob("rehearsal-*"))) == 2  # each in a folder of its own


def test_code_of_ones_own_that_is_not_there_is_an_error():
    two = dict(a=SMALL, b=dict(task="no_such_module:task"))
    with pytest.raises((ValueError, ImportError), match="no_such_module"):
        rehearsal_prompts(Experiment("Qwen/Qwen3-0.6B", two))
