"""One small run of every paradigm is what it was: event rows without their seconds, and the final weights.

The numbers are in freeze.json. They were made by one processor and hold on others to a few digits: sums in another
order change the last digits, and Adam turns the sign of a gradient that is zero but for rounding into a whole step.
What is bit for bit the same on one machine, test_engine and test_executors show. `python tests/test_freeze.py` writes
the file anew, which is a change of what the engine computes and belongs into the message of its commit.
"""
import json
import math
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from same_runs import by_letters, small_base

from copd_nb.schedule.neighbours import camopd, codistill_grpo, reward_and_teacher, semi_opd
from copd_nb.schedule.paradigms import expert, merged_experts, mixed_rlvr, mopd, static_opd
from copd_nb.data.capability import Capability, Example
from copd_nb.schedule.control import divergence_band
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.policy.toys import minis
from copd_nb.policy.lora_branches import lora
from copd_nb.engine.log import EventLog

RECORD = Path(__file__).with_name("freeze.json")
PAIR = ("sums", "image")
CONFIG = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=6, probe_every=2, probe_prompts=2,
                probe_k=(3, 10),
                eval_every=3, eval_prompts=4, eval_samples=1, learning_rate=1e-2, warmup=2, checkpoint_every=20,
                device="cpu")


@cache
def suite():
    "A capability of text and one of pictures; what is paid has nothing to do with what is asked."
    sums = [Example(f"{a}+{b}=", str(a + b), "sums") for a in range(6) for b in range(4)]
    image = minis(("image",))["image"]
    return [Capability("sums", sums[:16], sums[16:], by_letters),
            Capability("image", image.train[:16], image.test[:8], by_letters)]


def base(): return small_base(hidden=32, vision_hidden=16)


def adapters(): return lora(base(), rank=2)


COPD = copd(PAIR, cycles=2, s_rl=1, s_opd=1, beta=0.5)
RUNS = {
    "expert": (expert("sums", 3), {}), "mixed": (mixed_rlvr(PAIR, 3), {}),
    "opd sums to image": (static_opd("sums", "image", 2, 2), {}),
    "opd image to sums": (static_opd("image", "sums", 2, 2), {}), "mopd": (mopd(PAIR, 2, 2), {}),
    "mopd from an expert": (mopd(PAIR, 2, 2, start="sums"), {}),
    "merged": (merged_experts(PAIR, 2), {}), "merged by ties": (merged_experts(PAIR, 2, "ties", density=0.5), {}),
    "copd": (COPD, {}), "copd hub": (copd(PAIR, cycles=2, s_rl=1, s_opd=1, topology="hub"), {}),
    "copd student": (copd(PAIR, cycles=2, s_rl=1, s_opd=1, topology="student"), {}),
    **{f"copd {e}": (copd(PAIR, cycles=1, s_rl=1, s_opd=2, beta=0.5, estimator=e), {})
       for e in ("reverse", "forward", "jsd", "topk", "unlikely")},
    "controlled": (copd(PAIR, cycles=3, s_rl=1, s_opd=1, beta=0.5, control=divergence_band(0.0, 1e-4)),
                   dict(probe_every=1)),
    "moments reset": (COPD, dict(optimizer_state="reset")),
    "moments separate": (COPD, dict(optimizer_state="separate")),
    "sequential": (COPD, dict(updates="sequential")),
    "two epochs in parts": (COPD, dict(epochs=2, micro_prompts=1, clip_high=0.02, clip_low=0.02)),
    "padded": (COPD, dict(pack=False, shared_prompt=False, keep_prefill=False, drop_finished=False, skip_flat=False)),
    "lora": (COPD, {}),
    "semi-OPD": (semi_opd(PAIR, 1, 3), {}), "semi-OPD sampled": (semi_opd(PAIR, 1, 3, estimator="sampled"), {}),
    "codistill": (codistill_grpo(PAIR, 2, lead=1), {}), "camopd": (camopd(*PAIR, 1, 4), {}),
    "reward and teacher": (reward_and_teacher(PAIR, 1, 2, beta=0.5), {}),
    "reward and teacher, gated": (reward_and_teacher(PAIR, 1, 2, 0.5, "bounded", "verified"), {}),
}


def rounded(value):
    "Numbers to five digits, whatever holds them."
    if isinstance(value, float): return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items() if k != "seconds"}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def projections(policy, n=8) -> list[float]:
    "Products of all weights with fixed random directions of length one, and the weights' norm."
    flat = torch.cat([x.double().flatten() for _, x in sorted(policy.dense_state().items())])
    source = torch.Generator().manual_seed(0)
    directions = [torch.randn(len(flat), generator=source, dtype=torch.float64) for _ in range(n)]
    return [flat.norm().item(), *((flat @ d / d.norm()).item() for d in directions)]


def made(name: str, folder) -> dict:
    "Rows and weights of a run."
    schedule, changed = RUNS[name]
    run = train(schedule, suite(), adapters() if name == "lora" else base(), replace(CONFIG, **changed),
                Path(folder) / "run", progress=False)
    return dict(rows=rounded(EventLog(run.path / "events.jsonl").rows()), weights=rounded(projections(run.result)))


def close(found, wanted, where=""):
    "The same; numbers to three digits."
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted: close(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, float): assert found == pytest.approx(wanted, rel=2e-3, abs=1e-5), where
    else: assert found == wanted, where


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_was(name, tmp_path):
    wanted, found = json.loads(RECORD.read_text(encoding="utf-8"))[name], made(name, tmp_path)
    assert len(found["rows"]) == len(wanted["rows"])
    for i, (a, b) in enumerate(zip(found["rows"], wanted["rows"])): close(a, b, f"{name}/{i}")
    assert found["weights"] == pytest.approx(wanted["weights"], rel=1e-4, abs=1e-4)


def test_runs_say_something():
    "Rewards differ, gradients are not zero, and no two runs are the same."
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for name, run in record.items():
        train_rows = [r for r in run["rows"] if r["kind"] == "train"]
        assert train_rows and any(r["gradient_norm"] > 0 for r in train_rows) and any(0 < r.get("reward", 0) < 1
            for r in train_rows), name
    ends = {tuple(run["weights"]) for run in record.values()}
    assert record.keys() == RUNS.keys() and len(ends) == len(RUNS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        record = {name: made(name, Path(place) / str(i)) for i, name in enumerate(RUNS)}
    RECORD.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n",
                      encoding="utf-8")
    sys.exit(print(f"{len(record)} runs written to {RECORD.name}"))
