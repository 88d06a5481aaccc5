"""What rows of kind `signal` cost, as a share of a step, and what they show: `python bench/signals.py [--rounds N]`.

Each round times one step of the same training with and without them, in turn, by the processor's clock; the share is
the median of the ratios. At an interval of n steps a run pays that share divided by n.

`--curves FILE` draws the cosine between two rewards over mixed RLVR instead, for a pair that contradicts itself (`add`
and `backwards`: one question, opposite answers) and for one that doesn't (`add` and `again`: one answer)."""
import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import copd_nb  # noqa: F401 – sets the threads' waiting before torch loads
import matplotlib.pyplot as plt
import torch

from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import Config
from copd_nb.engine.state import Training
from copd_nb.engine.step import train_step
from copd_nb.engine.training import train
from copd_nb.policy.skills import skill
from copd_nb.policy.toys import minis, minis_base
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.paradigms import mixed_rlvr
from copd_nb.study.bases import base_for

NAMES = ("text", "image")
COPD = copd(list(NAMES), cycles=1, s_rl=1, s_opd=1)
PHASES = {"CoPD, own rewards": (COPD, 0), "CoPD, each other's": (COPD, 1),
          "mixed RLVR": (mixed_rlvr(list(NAMES), steps=1), 0)}


def seconds(training, phase, number: int, signals: bool) -> float:
    began = time.process_time()
    train_step(training, phase, number, signals)
    return time.process_time() - began


def share(schedule, index: int, config: Config, rounds: int) -> tuple[float, float]:
    "Seconds of a step, and what watching adds, as a share of it."
    training = Training(schedule, minis(NAMES), minis_base(), config, accelerator_for(config), None)
    phase, plain, ratios = schedule.phases[index], [], []
    for n in range(rounds + 1):
        one, other = (seconds(training, phase, 2 * n + k, bool(k)) for k in range(2))
        if n: plain, ratios = [*plain, one], [*ratios, other / one - 1]
    return median(plain), median(ratios)

PAIRS = {"contradiction: add and backwards": (("add", "backwards"), 700),
         "agreement: add and again": (("add", "again"), 300)}  # and the steps of the base's warm start


def curve(names: tuple, warm: int, folder: Path):
    "Rows of conflict, and of training, of a run of mixed RLVR that watches every second step."
    config = Config(prompts=128, learning_rate=1e-4, signals_every=2, probe_every=0, eval_every=0,
                    checkpoint_every=1000, device="cpu")
    base = base_for(names, warm, folder)
    suite, out = [skill(n) for n in names], folder / "-".join(names)
    run = train(mixed_rlvr(names, 40), suite, base, config, out, progress=False)
    events = run.events
    return events[(events.kind == "signal") & (events.what == "conflict")], events[events.kind == "train"]


def draw(file: str):
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    with tempfile.TemporaryDirectory() as folder:
        for ax, (title, (names, warm)) in zip(axes, PAIRS.items()):
            rows, trained = curve(names, warm, Path(folder))
            ax.plot(rows.step, rows.cosine, "o-", ms=4, label="cosine of half-batches")
            ax.plot(rows.step, rows.floor, "o-", ms=3, color="0.6", label="noise floor: halves of one capability")
            ax.axhline(0, color="0.8", lw=1)
            ax.set(xlabel="step", title=title)
            rewards = trained.groupby("capability").reward.agg(["first", "last"]).round(2).to_dict("index")
            print(f"{title}: cosine {rows.cosine.mean():.2f} on average, from {rows.cosine.iloc[0]:.2f} to "
                  f"{rows.cosine.dropna().iloc[-1]:.2f}; floor {rows.floor.mean():.2f}; rewards {rewards}", flush=True)
    axes[0].set_ylabel("cosine")
    axes[0].legend(frameon=False, fontsize=7)
    fig.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", metavar="FILE", help="a picture")
    rounds, file = vars(parser.parse_args()).values()
    torch.set_num_threads(1)
    if file: raise SystemExit(draw(file))
    config = Config(device="cpu")
    print("| phase | a step, s | watching, share of a step | every 10 steps | every 20 |")
    print("|---|---|---|---|---|")
    for name, (schedule, index) in PHASES.items():
        step, extra = share(schedule, index, config, rounds)
        print(f"| {name} | {step:.2f} | {extra:.0%} | {extra / 10:.1%} | {extra / 20:.1%} |", flush=True)
