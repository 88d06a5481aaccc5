"""Costs of stages and messages, and the simulator's error: `python bench/scaling.py [--ray]` writes scaling.json."""
import os

# before torch: every process has one thread
os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000",
                   TOKENIZERS_PARALLELISM="false")
import argparse
import datetime
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from copd_nb.engine.config import Config
from copd_nb.engine.executors import stopwatch
from copd_nb.engine.measure import probe_list
from copd_nb.engine.training import train
from copd_nb.policy.toys import minis, minis_base
from copd_nb.scale.calls import calls_of
from copd_nb.scale.measuring import fitted, measure
from copd_nb.scale.places import Link, Network, alone, load_of, placed
from copd_nb.scale.simulate import simulate
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.merging import merge

HERE = Path(__file__).parent
PAIRS = ("text", "image"), ("text", "video")  # costs are measured on these
CONFIG = Config(prompts=16, opd_prompts=8, device="cpu", probe_prompts=16, eval_prompts=16)
STEPS = 3  # of each phase; the first is left out
LONG, WARM = 12, 5  # steps of a phase with two actors, which are fresh processes, and how many of them are left out
SIZES = [10 ** n for n in range(3, 9)]  # bytes of a message
ROUNDS = 20  # messages of a size


def schedules(names: tuple[str, ...], topology: str = "pairwise") -> dict[tuple, Schedule]:
    "One cycle for each estimator."
    return {(names, topology, e): copd(names, cycles=1, s_rl=STEPS, s_opd=STEPS, topology=topology, estimator=e)
            for e in ("sampled", "topk")}


MEASURED = schedules(PAIRS[0]) | schedules(PAIRS[1])
THREE = ("text", "image", "video")
PREDICTED = schedules(("image", "video")) | schedules(THREE) | schedules(THREE, "hub")
CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)


def timed(schedule: Schedule, clock: str = "wall") -> pd.DataFrame:
    return measure(schedule, minis(), minis_base(), CONFIG, clock=CLOCKS[clock])


def rounds(cases: dict[tuple, Schedule], times: int, clock: str = "wall") -> dict[tuple, list[pd.DataFrame]]:
    "Every case in turn, round after round, so that a slow minute hits all of them."
    found = {key: [] for key in cases}
    for i in range(times):
        for key, schedule in cases.items():
            print(f"round {i + 1}: {' '.join(key[0])}, {key[1]}, {key[2]}", flush=True)
            found[key].append(timed(schedule, clock))
    return found


def joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    "The rounds of a case as one table."
    table = pd.concat(tables)
    table.attrs = tables[0].attrs
    return table


def title(key: tuple, phase) -> str:
    "A case in words; Phase I is the same for all topologies and estimators."
    what = "RL" if phase.name.startswith("I ") else f"{key[1]}, {key[2]}"
    return f"{len(key[0])} branches ({', '.join(key[0])}), {what}"


def checked(found: dict[tuple, list[pd.DataFrame]], costs) -> list[dict]:
    "Simulated against measured steps of the cases that no cost was taken from."
    steps, simulated = {}, {}
    for key, schedule in PREDICTED.items():
        table = joined(found[key])
        for phase in schedule.phases:
            name = title(key, phase)
            mine = table[(table["phase"] == phase.title) & (table["stage"] == "step")]
            steps.setdefault(name, []).extend(mine["seconds"])
            made = simulate(calls_of(phase, CONFIG, costs, STEPS), alone(schedule))
            simulated[name] = made.step_seconds + costs.seconds["rest"]
    return [compared(name, "local, one process", simulated[name], s) for name, s in steps.items()]


def compared(case: str, where: str, predicted: float, steps: list[float]) -> dict:
    "A row of the check."
    measured = float(np.median(steps))
    low, high = np.quantile(steps, (0.25, 0.75))
    return dict(case=case, where=where, measured=measured, quartiles=[float(low), float(high)], steps=len(steps),
                simulated=predicted, error=predicted / measured - 1)


def between_steps(clock: str) -> dict[str, float]:
    "Seconds of a prompt's probe and evaluation, of a branch's checkpoint, of a merge: medians over a run."
    schedule, config = MEASURED[PAIRS[0], "pairwise", "sampled"], replace(CONFIG, probe_every=1, eval_every=1)
    with tempfile.TemporaryDirectory() as folder, stopwatch(CLOCKS[clock]) as notes:
        run = train(schedule, minis(PAIRS[0]), minis_base(), replace(config, checkpoint_every=1), Path(folder) / "run",
                    progress=False)
        branches = [run.branch(name) for name in schedule.members]
    found = {stage: float(np.median([s for name, _, s in notes if name == stage]))
             for stage in ("probe", "evaluate", "checkpoint")}
    began = CLOCKS[clock]()
    merge(branches)
    shared = dict(merge=CLOCKS[clock]() - began, checkpoint=found["checkpoint"] / 2)
    pairs = len(probe_list(schedule, schedule.phases[1]))
    for c in minis():
        shared[f"probe/{c}"] = found["probe"] / pairs / CONFIG.probe_prompts
        shared[f"evaluate/{c}"] = found["evaluate"] / 2 / CONFIG.eval_prompts
    return shared


def line(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    "Seconds of nothing and seconds a byte, by relative least squares."
    weights = 1 / np.array(seconds)
    constant, slope = nnls(np.stack([weights, np.array(sizes) * weights], 1), np.ones(len(sizes)))[0]
    return float(constant), float(slope)


def messages() -> dict:
    "Ray's start, and messages from actor to actor; latency is a third of the chain driver, actor, actor, driver."
    import ray
    began = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        class Holder:
            def ready(self):
                import copd_nb.engine.training  # noqa: F401, loaded by every worker
                return True
            def make(self, size): return np.zeros(size, np.uint8)
            def read(self, values): return int(values[0]) + len(values)
        a, b = (ray.remote(Holder).options(num_cpus=1).remote() for _ in range(2))
        ray.get([a.ready.remote(), b.ready.remote()])
        start, rows = time.perf_counter() - began, []
        for size in SIZES * ROUNDS:
            began = time.perf_counter()
            ray.get(b.read.remote(a.make.remote(size)))
            rows.append((size, time.perf_counter() - began))
    finally: ray.shutdown()
    medians = pd.DataFrame(rows, columns=["bytes", "seconds"]).groupby("bytes")["seconds"].median()
    constant, slope = line(list(medians.index), list(medians))
    return dict(start=start, latency=constant / 3, bandwidth=1 / slope, bytes=list(medians.index),
                seconds=list(medians), ray=ray.__version__)


@contextmanager
def twin():
    "A second process that trains the same beside this one: memory and caches are shared as by two actors."
    process = subprocess.Popen([sys.executable, __file__, "--twin"], start_new_session=True)
    try:
        time.sleep(10)  # until it has loaded and trains
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train_on():
    "Train until killed, as the twin."
    while True: timed(MEASURED[PAIRS[0], "pairwise", "sampled"])


def with_actors(times: int, link: dict) -> list[dict]:
    "Steps of two actors against the simulator, with costs of two local processes side by side and the link."
    cases, network, steps, simulated = schedules(PAIRS[0]), Network(Link(link["latency"], link["bandwidth"])), {}, {}
    with twin(): costs = fitted([joined(t) for t in rounds(cases, times).values()], minis_base())
    for key in cases:
        schedule = copd(key[0], cycles=1, s_rl=LONG, s_opd=LONG, topology=key[1], estimator=key[2])
        config = replace(CONFIG, probe_every=0, eval_every=0, checkpoint_every=10 ** 9)
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder, stopwatch() as notes:
                train(schedule, minis(key[0]), minis_base(), config, Path(folder) / "run", progress=False,
                      cluster="ray")
            ends = [end for stage, end, _ in notes if stage == "record"]
            for i, p in enumerate(schedule.phases):
                steps.setdefault(title(key, p), []).extend(np.diff(ends[i * LONG + WARM - 1:(i + 1) * LONG]).tolist())
        for p in schedule.phases:
            calls = calls_of(p, CONFIG, costs, STEPS)
            simulated[title(key, p)] = simulate(calls, placed(load_of(calls)), network).step_seconds
    return [compared(name, "two actors", simulated[name], s) for name, s in steps.items()]


def about() -> dict:
    "Where and how it was measured."
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True,
                            text=True).stdout.strip()
    return dict(command="python " + " ".join(["bench/scaling.py", *sys.argv[1:]]), commit=commit or "unknown",
                cpu=cpu[1] if cpu else "unknown", cores=os.cpu_count(),
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"), load=os.getloadavg())


def parsed() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often every case is run")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="of local runs: cpu where others use the machine, too; two actors are always timed by the "
                             "wall")
    parser.add_argument("--ray", action="store_true", help="also train with two actors")
    parser.add_argument("--only-ray", action="store_true",
                        help="train with two actors alone, and put what is found into the scaling.json that is there")
    parser.add_argument("--twin", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def write(result: dict):
    "Keep and show."
    (HERE / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    print(pd.DataFrame(result["checks"]).to_string())


def main():
    "Measure, fit, predict, write."
    arguments = parsed()
    if arguments.twin: return train_on()
    if arguments.only_ray:
        result = json.loads((HERE / "scaling.json").read_text())
        local = [c for c in result["checks"] if c["where"] != "two actors"]
        return write(dict(result, checks=local + with_actors(arguments.rounds, result["link"]), about_actors=about()))
    link = messages()
    found = rounds(MEASURED | PREDICTED, arguments.rounds, arguments.clock)
    taken = [joined(found[key]) for key in MEASURED]
    where = about()
    seconds = dict(wall="seconds of the wall", cpu="seconds of the processor")[arguments.clock]
    origin = f"measured with {where['command']} on {where['cores']} × {where['cpu']}, one thread a process, {seconds}"
    costs = fitted(taken, minis_base(), origin, **between_steps(arguments.clock))
    costs = replace(costs, start=link["start"])
    checks = checked(found, costs) + (with_actors(arguments.rounds, link) if arguments.ray else [])
    kept = ("prompts", "opd_prompts", "group_size", "max_new_tokens", "opd_top_k")
    config = {key: asdict(CONFIG)[key] for key in kept}
    write(dict(about=where, config=config, costs=asdict(costs), link=link, checks=checks))


if __name__ == "__main__": main()
