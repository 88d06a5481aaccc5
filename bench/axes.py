"""Price and measured cost of every axis and named paradigm: `python bench/axes.py [--steps N]`.

The embedded suite, text and image. Prices come from the schedule and the base's completion lengths, before anything is
trained; tokens and FLOPs from the log of the run; processor seconds of all its updates, one thread. Seconds are
compared by what a priced FLOP took, with mixed RLVR as 1: there, small operations count more than FLOPs do."""
import argparse
import tempfile
import time
from pathlib import Path

import copd_nb  # noqa: F401 – sets the threads' waiting before torch loads
import torch

from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.engine.workload import workload
from copd_nb.policy.toys import minis, minis_base
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.live import Average, Snapshot
from copd_nb.schedule.local import local_rlvr, synced
from copd_nb.schedule.neighbours import camopd, codistill_grpo, reward_and_teacher, semi_opd
from copd_nb.schedule.paradigms import merged_experts, mixed_rlvr, mopd, static_opd
from copd_nb.schedule.parts import OPD, RL, Phase, Update
from copd_nb.schedule.price import total_cost

NAMES = ["text", "image"]
CONFIG = Config(probe_every=0, eval_every=0, checkpoint_every=1000, device="cpu")


def copied(teacher, steps: int) -> Schedule:
    "A text branch that learns from a copy of itself, as old as `teacher` says."
    update = Update("text", [RL("text"), OPD("text", teacher)])
    return Schedule("copied", ["text"], [Phase("RLVR beside a copy", steps, [update])], "text").validate(NAMES)


def arms(n: int) -> dict[str, Schedule]:
    cycles, four = dict(cycles=max(1, n // 4), s_rl=2, s_opd=2, beta=0.1), max(4, n // 4 * 4)
    return {"mixed RLVR": mixed_rlvr(NAMES, n), "merged experts": merged_experts(NAMES, n),
            "static OPD": static_opd("text", "image", n, n), "MOPD": mopd(NAMES, n, n), "CoPD": copd(NAMES, **cycles),
            "averaged every step": local_rlvr(NAMES, n, period=1), "averaged every 5": local_rlvr(NAMES, n, period=5),
            "CoPD, averaged": synced(copd(NAMES, **cycles)), "semi-OPD": semi_opd(NAMES, n, n),
            "CoDistill-GRPO": codistill_grpo(NAMES, n), "CaMOPD": camopd("text", "image", n, four),
            "reward and teacher": reward_and_teacher(NAMES, n, n),
            "reward and teacher, gated": reward_and_teacher(NAMES, n, n, gate="verified"),
            "copy every 5 steps": copied(Snapshot("text", every=5), n),
            "moving average": copied(Average("text", decay=0.9), n)}


def measure(schedule: Schedule, capabilities: dict, base, folder: Path):
    "The sums of the log, and processor seconds of the training."
    began = time.process_time()
    run = train(schedule, capabilities, base, CONFIG, folder, progress=False)
    rows = run.events.query("kind == 'train'")
    return rows[["generated", "scored", "trained", "flops"]].sum(), time.process_time() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20, help="of each branch and phase")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    capabilities, base, unit = minis(tuple(NAMES)), minis_base(), None
    load = workload(base, capabilities, CONFIG, prompts=64)
    print("| | tokens, priced | measured | ratio | TFLOP, priced | measured | ratio | s a priced TFLOP |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for n, (name, schedule) in enumerate(arms(steps).items()):
            priced = total_cost(schedule, load)
            found, seconds = measure(schedule, capabilities, base, Path(folder) / str(n))
            tokens, pace = found.generated + found.scored + found.trained, seconds / priced.flops
            unit = unit or pace
            print(f"| {name} | {priced.tokens:,.0f} | {tokens:,.0f} | {tokens / priced.tokens:.2f} "
                  f"| {priced.flops / 1e12:.2f} | {found.flops / 1e12:.2f} "
                  f"| {found.flops / priced.flops:.2f} | {pace / unit:.2f} |", flush=True)
