"""What rows of kind `signal` cost, as a share of a step: `python bench/signals.py [--rounds N]`.

Each round times one step of the same training with and without them, in turn, by the processor's clock; the share is
the median of the ratios. At an interval of n steps a run pays that share divided by n."""
import argparse
import time
from statistics import median

import copd_nb  # noqa: F401 – sets the threads' waiting before torch loads
import torch

from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import Config
from copd_nb.engine.state import Training
from copd_nb.engine.step import train_step
from copd_nb.policy.toys import minis, minis_base
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.paradigms import mixed_rlvr

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    config = Config(device="cpu")
    print("| phase | a step, s | watching, share of a step | every 10 steps | every 20 |")
    print("|---|---|---|---|---|")
    for name, (schedule, index) in PHASES.items():
        step, extra = share(schedule, index, config, rounds)
        print(f"| {name} | {step:.2f} | {extra:.0%} | {extra / 10:.1%} | {extra / 20:.1%} |", flush=True)
