"""What a run's length, a store's size and a command's imports cost: processor seconds, medians.

    python bench/growing.py                   # here
    python bench/growing.py ../before         # here, there, and there / here: medians of alternating rounds
    python bench/growing.py --only start      # monitor, browser or start
    RUNS="10 60" python bench/growing.py      # without a store of 300 runs, which versions before took minutes for

Logs are those of one short training, whose steps are repeated with other numbers until they are as long as asked.
"""
import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

STEPS, RUNS = (100, 1_000, 5_000), (10, 60, 300)
STORE_STEPS = 80  # of each run of the store
EVERY = 20  # steps between evaluations and between probes
REDRAWS = 5
SIZES = tuple(int(n) for n in os.environ.get("RUNS", "").split()) or RUNS  # RUNS="10 60" leaves large stores out
DATA = '{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "", "answer": 7}\n'
MINE = """
model: ./none
capabilities:
  a: {file: rows.jsonl, reward: exact}
  b: {file: rows.jsonl, reward: exact}
"""
COMMANDS = {  # label → words of `copd`; each is refused
    "copd train nothing": ["train", "nothing"],
    "copd train copd -p topology=ring": ["train", "copd", "-p", "capabilities", '["text", "image"]', "-p", "topology",
                                         "ring"],
    "copd train copd -c speed 1": ["train", "copd", "-p", "capabilities", '["text", "image"]', "-c", "speed", "1"],
    "copd train copd --suite nothing": ["train", "copd", "-p", "capabilities", '["text", "image"]', "--suite",
                                        "nothing"],
    "copd train copd, unknown capability": ["train", "copd", "-p", "capabilities", '["text", "foto"]'],
    "copd train copd --out full": ["train", "copd", "-p", "capabilities", '["text", "image"]', "--out", "full"],
    "copd train minis nothing": ["train", "minis", "nothing"],
    "copd train mine.yaml copd, no model": ["train", "mine.yaml", "copd"],
    "copd train absent.yaml copd": ["train", "absent.yaml", "copd"],
    "copd compare absent.yaml": ["compare", "absent.yaml"],
    "copd check absent.yaml": ["check", "absent.yaml"],
    "copd check wrong.yaml": ["check", "wrong.yaml"],
    "copd check absent.jsonl": ["check", "absent.jsonl"],
    "copd check faulty.jsonl": ["check", "faulty.jsonl"],
    "copd check minis --prompts 0": ["check", "minis", "--prompts", "0"],
    "copd runs store": ["runs", "store"],
}
MODULES = ("copd_nb", "copd_nb.engine.config", "copd_nb.engine.runs", "copd_nb.engine.training", "copd_nb.view.monitor",
           "copd_nb.view.browser", "copd_nb.study.experiment", "torch")


def short_run(folder: Path):
    "A real run of a few steps, with evaluations and probes."
    from copd_nb.engine.config import Config
    from copd_nb.engine.training import train
    from copd_nb.policy.toys import minis, minis_base
    from copd_nb.schedule.copd_schedules import copd
    config = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=10, probe_every=1, probe_prompts=4,
                    eval_every=1, eval_prompts=4, eval_samples=1, device="cpu", warmup=1)
    return train(copd(["text", "image"], cycles=1, s_rl=2, s_opd=2), minis(("text", "image")), minis_base(), config,
                 folder, progress=False)


def stretched(run, folder: Path, steps: int, seed: int, **settings):
    "A run folder whose log has so many steps, each of them one of `run`, with other numbers."
    from copd_nb.schedule.copd_schedules import copd
    draw, begun = random.Random(seed), {}
    for line in (run.path / "events.jsonl").read_text().splitlines():
        row = json.loads(line)
        begun.setdefault((row["phase"], row["kind"]), {}).setdefault(row["global_step"], []).append(row)
    schedule = copd(["text", "image"], cycles=math.ceil(steps / 20), s_rl=12, s_opd=8)
    places = [(i, p, s) for i, p in enumerate(schedule.phases) for s in range(p.steps)][:steps]
    lines = []
    for at, (index, phase, step) in enumerate(places, 1):
        for kind in ("train", "probe", "eval"):
            if kind != "train" and at % EVERY: continue
            same = begun[phase.name, kind]
            for row in same[max(same)]:
                place = dict(phase_index=index, cycle=phase.cycle, global_step=at, step=step)
                noise = {k: v * draw.uniform(0.5, 1.0) for k, v in row.items() if isinstance(v, float)}
                lines.append(json.dumps(row | place | noise))
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    config = run.manifest["config"] | settings | dict(seed=seed)
    manifest = run.manifest | dict(schedule=schedule.to_dict(), config=config, status="finished")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def materials(folder: Path):
    "Runs of each length, a store of each size, and files for the commands."
    run = short_run(folder / "short")
    for steps in STEPS: stretched(run, folder / f"long-{steps}", steps, 0)
    for n in SIZES:
        for i in range(n):
            settings = dict(learning_rate=(1e-5, 3e-5)[i % 2], temperature=(0.8, 1.0)[i // 2 % 2])
            stretched(run, folder / f"store-{n}" / f"run-{i:03}", STORE_STEPS, i // 4, **settings)
    (folder / "faulty.jsonl").write_text(DATA)
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}", "answer": "{i}"}}\n' for i in range(40)))
    (folder / "mine.yaml").write_text(MINE)
    (folder / "wrong.yaml").write_text("title: wrong\nmodel: {pth: models/none}\n")
    (folder / "store").symlink_to(folder / f"store-{SIZES[0]}")


def spent(action) -> float:
    "Processor seconds of a call."
    begin = time.process_time()
    action()
    return time.process_time() - begin


def live(label: str, words, state) -> dict[str, float]:
    "Seconds of a redraw of the chart in the browser, the kernel's part; nothing in checkouts without charts."
    if not hasattr(state, "panels"): return {}
    from copd_nb.view.charts import LineChart
    chart = LineChart()
    def redraw():
        words()
        chart.draw(state.panels())
    return {f"{label}, live redraw": statistics.median(spent(redraw) for _ in range(REDRAWS))}


def monitor(folder: Path) -> dict[str, float]:
    "Seconds of the first look at a run and of a redraw after one more step, the log growing as in a training."
    from copd_nb.view.monitor import MonitorState
    found = {}
    for steps in STEPS:
        path = folder / f"long-{steps}"
        lines = (path / "events.jsonl").read_bytes().splitlines(keepends=True)
        kept, later = lines[:-4 * REDRAWS], lines[-4 * REDRAWS:]
        (path / "events.jsonl").write_bytes(b"".join(kept))
        state = MonitorState(path)
        def look(state=state):
            state.tail.read()
            assert "data:image/png" in state.html()
        found[f"monitor, {steps:,} steps, first look"] = spent(look)
        redraws = []
        for i in range(REDRAWS):
            with open(path / "events.jsonl", "ab") as log: log.writelines(later[4 * i:4 * i + 4])
            redraws.append(spent(look))
        found[f"monitor, {steps:,} steps, redraw"] = statistics.median(redraws)
        found |= live(f"monitor, {steps:,} steps", lambda: state.above() + state.below(), state)
    return found


def browser(folder: Path) -> dict[str, float]:
    "Seconds of the first look at a store, and of showing it again."
    from copd_nb.view.browser import Store
    found = {}
    for n in SIZES:
        made = []
        def first(n=n, made=made):
            made.append(Store(folder / f"store-{n}"))
            assert "data:image/png" in made[0].html()
        found[f"browser, {n} runs, first look"] = spent(first)
        again = []
        for metric in ("greedy", "reward", "sampled"):
            made[0].metric = metric
            made[0].html()
            again.append(spent(made[0].html))
        found[f"browser, {n} runs, again"] = statistics.median(again)
        found |= live(f"browser, {n} runs", made[0].below, made[0])
    return found


def _process(words: list[str], folder: Path) -> float:
    "Processor seconds of a process, from start to end."
    def now() -> float:
        used = getrusage(RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    begin = now()
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True)
    return now() - begin


def start(folder: Path) -> dict[str, float]:
    "Seconds of refusals and of imports, each in a process of its own."
    call = "import sys; from copd_nb.report.command import main; sys.exit(main(sys.argv[1:]))"
    found = {label: _process(["-c", call, *words], folder) for label, words in COMMANDS.items()}
    return found | {f"import {m}": _process(["-c", f"import {m}"], folder) for m in MODULES}


GROUPS = dict(monitor=monitor, browser=browser, start=start)


def measured(checkout: Path, groups: list[str]) -> dict[str, float]:
    "The figures of some groups, in a process of its own that imports a checkout."
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, "--here", folder, "--only", *groups], cwd=folder,
                              env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
    if done.returncode: sys.exit(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def here(folder: Path, groups: list[str]):
    "Print the figures of this process's checkout as JSON."
    materials(folder)
    print(json.dumps({k: v for name in groups for k, v in GROUPS[name](folder).items()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="another checkout")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here: return here(given.here, given.only)
    places = [Path(__file__).parents[1].resolve(), *([given.before.resolve()] if given.before else [])]
    rounds = [[measured(p, given.only) for p in places] for _ in range(given.rounds)]
    for label in rounds[0][0]:
        seconds = [statistics.median(r[i][label] for r in rounds) for i in range(len(places))]
        ratio = statistics.median(r[-1][label] / r[0][label] for r in rounds)
        print(f"{label:40} " + "  ".join(f"{s:8.3f} s" for s in seconds) + (f"  {ratio:6.1f}×" if given.before else ""))


if __name__ == "__main__": main()
