"""Two branches in two workers of a local Ray cluster against one process; writes cluster.json beside this file."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PHASES = dict(rl="Phase I: GRPO", sampled="Phase II: GRPO and OPD, sampled", topk="Phase II: GRPO and OPD, topk",
              reverse="Phase II: GRPO and OPD, reverse KL")
STEPS = 6  # of each phase; the first is left out


def side(where: str) -> dict:
    "Step times, start-up and bytes of one process or of two workers, in a process of its own."
    import numpy as np

    from copd_nb.engine import phase as phase_module
    from copd_nb.schedule.copd_schedules import copd
    from copd_nb.engine.config import Config
    from copd_nb.engine.training import train
    from copd_nb.policy.toys import minis_base, minis

    config = Config(probe_every=0, eval_every=0, checkpoint_every=10 ** 9, device="cpu")
    found, real = dict(seconds={}, bytes={}, start=[]), phase_module.log_rows
    for estimator in ("sampled", "topk", "reverse"):
        moments, sent = [], []

        def log(training, *rows):
            real(training, *rows)
            moments.append(time.perf_counter())
            sent.append(sum(getattr(training.executor, "sent", {}).values()))
        phase_module.log_rows, began = log, time.perf_counter()
        schedule = copd(["text", "image"], cycles=1, s_rl=STEPS, s_opd=STEPS, beta=0.1, estimator=estimator)
        with tempfile.TemporaryDirectory() as folder:
            train(schedule, minis(("text", "image")), minis_base(), config, Path(folder) / "run", progress=False,
                  cluster="ray" if where == "ray" else None)
        phase_module.log_rows = real
        seconds, volume = np.diff(moments), np.diff(sent)
        found["start"].append(moments[0] - began - float(np.median(seconds[:STEPS - 1])))
        for name, part in (("rl", slice(0, STEPS - 1)), (estimator, slice(STEPS, None))):
            found["seconds"].setdefault(name, []).extend(seconds[part].tolist())
            found["bytes"].setdefault(name, []).extend(volume[part].tolist())
    return found


SIDES = dict(ray=("ray", 1), one=("local", 1), two=("local", 2))  # where, and threads of a process


def rounds(times: int) -> dict[str, list[dict]]:
    "All sides in turn, round after round, so that a slow minute hits each."
    found = {name: [] for name in SIDES}
    for i in range(times):
        for name, (where, threads) in SIDES.items():
            env = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000",
                       TOKENIZERS_PARALLELISM="false")
            out = subprocess.run([sys.executable, __file__, "--side", where], env=env, capture_output=True, text=True,
                                 check=True).stdout
            found[name].append(json.loads(out.strip().splitlines()[-1]))
            print(f"round {i + 1}, {name}: " + ", ".join(f"{k} {sorted(v)[len(v) // 2]:.3f} s" for k,
                                                         v in found[name][-1]["seconds"].items()), flush=True)
    return found


def summary(found: dict[str, list[dict]]) -> list[dict]:
    "Medians, and ratios with their range over rounds."
    import numpy as np
    rows = []
    for phase, title in PHASES.items():
        medians = {name: [float(np.median(r["seconds"][phase])) for r in runs] for name, runs in found.items()}
        ratios = {name: [a / b for a, b in zip(medians[name], medians["ray"])] for name in ("one", "two")}
        rows.append(dict(phase=title, **{f"{name}_seconds": float(np.median(x)) for name, x in medians.items()},
                         **{f"{name}_{key}": float(f(x)) for name, x in ratios.items() for key,
                            f in (("ratio", np.median), ("low", min), ("high", max))},
                         bytes=float(np.median([b for r in found["ray"] for b in r["bytes"][phase]]))))
    return rows


def table(result: dict) -> str:
    "What was found, as Markdown."
    lines = ["| step | 2 workers | 1 process, 1 thread | ratio | 1 process, 2 threads | ratio | sent a step |",
             "|---|---|---|---|---|---|---|"]
    for r in result["rows"]:
        lines.append(f"| {r['phase']} | {r['ray_seconds']:.3f} s | {r['one_seconds']:.3f} s | {r['one_ratio']:.2f} "
                     f"[{r['one_low']:.2f}, {r['one_high']:.2f}] | {r['two_seconds']:.3f} s | "
                     f"{r['two_ratio']:.2f} [{r['two_low']:.2f}, {r['two_high']:.2f}] | {r['bytes'] / 1000:,.1f} kB |")
    return "\n".join([*lines, "", f"Start-up, before the first step: {result['start'][0]:.1f} s with Ray's own start, "
                                  f"{result['start'][1]:.1f} s where it runs already; one process "
                                  f"{result['start_local']:.1f} s."])


def main():
    "Measure and write."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("ray", "local"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(side(arguments.side)))
        return
    found = rounds(arguments.rounds)
    middle = lambda xs: sorted(xs)[len(xs) // 2]  # noqa: E731
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True,
                            text=True).stdout.strip()
    result = dict(command=f"python bench/cluster.py --rounds {arguments.rounds}", commit=commit, cores=os.cpu_count(),
                  rows=summary(found),
                  start=[middle([r["start"][0] for r in found["ray"]]),
                         middle([s for r in found["ray"] for s in r["start"][1:]])],
                         start_local=middle([r["start"][0] for r in found["one"]]))
    (HERE / "cluster.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__": main()
