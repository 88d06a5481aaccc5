"Memory and price of an experiment, counted without its weights and without a network."
import json
from dataclasses import replace

import peft
import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from copd_nb.engine.config import Config
from copd_nb.engine.state import model_shape
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import _targets, lora
from copd_nb.policy.toys import image, minis_base
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.costs import ModelShape, Workload
from copd_nb.schedule.live import follow
from copd_nb.schedule.local import local_rlvr
from copd_nb.study.accounts import memory_table
from copd_nb.study.experiment import Experiment, rows_of
from copd_nb.study.memory import _pictured, lengths_of, lora_size, memory_plan, plan_for, planned_model, priced
from copd_nb.study.rehearsal import shrunk
from copd_nb.study.sources import qwen3_vl_4b, without_weights

PAPER = Config(prompts=256, opd_prompts=256, max_new_tokens=16_384, precision="bf16", micro_prompts=8,
               micro_tokens=16_384, rollout_rows=12, recompute=True)
HUB = copd(["text", "image", "video"], cycles=5, s_rl=12, s_opd=8, topology="hub", hub="text")
TASKS = dict(a=dict(task="algebra", arguments=dict(size=40, held_out=8)), b=dict(file="none.jsonl", reward="exact"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return shrunk().save(tmp_path_factory.mktemp("models") / "shrunk")


@pytest.fixture(scope="module")
def large(): return without_weights(qwen3_vl_4b())


def test_adapters_have_the_size_that_is_planned(folder):
    policy = Policy.load(folder)
    for vision in (False, True):
        assert sum(p.numel() for p in lora(policy, 4, vision=vision).parameters()) == lora_size(policy.model, 4, vision)


def test_adapters_of_a_mixture_of_experts_with_a_dense_layer_have_the_size_that_is_planned():
    "Layers with the names of experts get no adapters, not even in the dense layer."
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2)
    config = Qwen3MoeConfig(**sizes, mlp_only_layers=[0])
    planned = without_weights(config)
    assert any("mlp.gate_proj" in n for n, _ in planned.named_modules())
    model = Qwen3MoeForCausalLM(config)
    found = _targets(model, vision=False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, **found), model)
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert lora_size(planned, 4) == adapters > 0


def plan_of(large, schedule=None, **options):
    text = qwen3_vl_4b().get_text_config()
    shape = ModelShape(sum(p.numel() for p in large.parameters()), 0, text.num_hidden_layers, text.hidden_size)
    config = replace(PAPER, **options.pop("config", {}))
    table = memory_plan(text, shape, schedule or HUB, config, **options).set_index("item")["GiB"]
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


def test_a_memory_plan_knows_syncs_followers_and_the_optimizer(large):
    "Merge, origin and outer momentum; copies of teachers; no moments for plain SGD."
    one = plan_of(large, HUB)["branches"] / 3
    local = plan_of(large, local_rlvr(["text", "image"], 20, 5))
    assert local["syncs"] == pytest.approx(2 * one) and "syncs" not in plan_of(large)
    assert plan_of(large, local_rlvr(["text", "image"], 20, 5, outer_momentum=0.9))["syncs"] == pytest.approx(3 * one)
    assert plan_of(large, follow(HUB, every=5))["followers"] == pytest.approx(3 * one)
    assert plan_of(large, config=dict(average=0.9))["followers"] == pytest.approx(3 * one)
    assert plan_of(large, config=dict(optimizer="sgd"))["AdamW"] == 0


def test_a_row_with_prompts_of_its_own_is_planned_with_them():
    "Four times the prompts: four times the keys and values; by the file and by the report."
    experiment = Experiment(paradigms=("mixed", dict(mixed=dict(prompts=128, steps=20))), steps=40, suite="minis",
                            together=dict(pair=["text", "image"]))
    rows, base = rows_of(experiment)["pair"], minis_base()
    load = Workload(32, 16, 8, dict(text=9, image=20), dict(text=8, image=8), model_shape(base))
    table = memory_table(base, rows, load, experiment.config)
    ratio = table.loc["keys and values", "mixed RLVR, 128 prompts"] / table.loc["keys and values", "mixed RLVR"]
    assert ratio == pytest.approx(4) and plan_for(experiment, base).rows.paradigm[0] == "mixed RLVR, 128 prompts"


@pytest.mark.parametrize("rank", [None, 4])
def test_a_model_is_planned_as_it_is_loaded(rank, folder):
    "The config alone gives what the loaded policy has."
    model = dict(path=str(folder)) | (dict(lora=rank, dtype="bfloat16") if rank else {})
    experiment = Experiment(model, TASKS)
    before = planned_model(experiment)
    base = lora(Policy.load(folder), rank) if rank else Policy.load(folder)
    assert before.shape == model_shape(base)
    assert before.adapter == (sum(p.numel() for p in base.parameters()) if rank else None)
    assert before.weight_bytes == (2 if rank else 4) and planned_model(experiment, base).shape == before.shape


def test_every_row_has_its_peak(folder):
    experiment = Experiment(str(folder), TASKS)
    plan = plan_for(experiment)
    rows = {(s, p.label) for s, rows in rows_of(experiment).items() for p in rows}
    assert set(zip(plan.rows.setting, plan.rows.paradigm)) == rows
    assert plan.rows.paradigm[0] == "CoPD"
    assert plan.rows["GiB"][0] == plan.largest["GiB"].iloc[-1] == plan.rows["GiB"].max()
    assert plan.text.hidden_size == 64


def test_an_experiment_whose_model_is_unknown_says_so_and_takes_the_loaded_one():
    experiment = Experiment("nobody/nothing", TASKS)
    with pytest.raises(ValueError, match="nobody/nothing is not on this disk"): plan_for(experiment)
    with pytest.raises(ValueError, match="makes its own model"): planned_model(Experiment(suite="some.module:suite"))
    base = shrunk()
    assert plan_for(experiment, base).shape == plan_for(Experiment(base, TASKS)).shape == model_shape(base)
    assert planned_model(Experiment(suite="minis")).adapter is None


def test_lengths_say_where_they_come_from(folder, tmp_path):
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(dict(prompt=f"{i}+1=" + "x" * 36, answer=str(i + 1)))
                                                   for i in range(10, 50)))
    entries = dict(mine=dict(file="sums.jsonl", reward="some_module:reward"),  # which is not imported
                   films=dict(file="none.json", recipe="video-r1"), own=dict(task="some_module:task"))
    unknown = Experiment("nobody/nothing", entries, folder=tmp_path, config=dict(max_new_tokens=7))
    found = lengths_of(unknown)
    assert found.prompts == dict(mine=10.25, films=4000, own=200) and set(found.completions.values()) == {7.0}
    assert found.origin == dict(mine="measured on 16 prompts, four characters a token",
                                films="assumed: 4,000 tokens", own="assumed: 200 tokens")
    counted = lengths_of(replace(unknown, model=str(folder)))  # a token a character
    assert counted.prompts["mine"] == 41 and "without their chat format" in counted.origin["mine"]
    base = Policy.load(folder)
    exact = lengths_of(replace(unknown, capabilities=dict(list(entries.items())[:2])), base)
    assert exact.origin["mine"] == "measured on 16 prompts" and exact.prompts["mine"] > counted.prompts["mine"]


def test_pictures_count_as_in_the_model():
    prompts = image(16, 8).train[:4]
    assert [_pictured(e) for e in prompts] == [16 * 32 / 32 ** 2] * 4
    measured = lengths_of(Experiment(suite="minis"), minis_base())
    assert measured.patches["text"] == 0 < measured.patches["image"] < measured.patches["video"]


def test_the_price_of_every_row(folder):
    experiment = Experiment(str(folder), TASKS, steps=40)
    lengths = lengths_of(experiment)
    price = priced(experiment, lengths).set_index("paradigm")
    assert price.steps["mixed RLVR"] == price.steps["CoPD"] == 80 and price.steps["a expert"] == 40
    assert price.critical_steps["CoPD"] == 40 and price.critical_steps["mixed RLVR"] == 80
    config = experiment.config
    assert price.tokens["a expert"] == 40 * config.prompts * config.group_size * 2 * config.max_new_tokens
    half = lengths._replace(completions={n: v / 2 for n, v in lengths.completions.items()})
    assert priced(experiment, half).tokens.sum() == pytest.approx(price.tokens.sum() / 2)
    adapted = Experiment(dict(path=str(folder), lora=4), TASKS, steps=40)
    assert priced(adapted, lengths).flops.sum() < price.flops.sum()  # frozen weights get no gradient
