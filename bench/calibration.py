"""Pairs for `copd preflight`: what was measured before, and what distillation gained: `python bench/calibration.py`.

Each suite has its own base. On the small suites experts of 80 and 20 steps are trained, then seven kinds of pairs for
each capability: good and weak teachers, students of several distances, and teachers that know less than their student.
A student learns for 40 steps of on-policy distillation. On SmolLM2 the pairs are those of the finished experiment
`copd compare examples/smollm2.yaml`: base and other expert, taught by an expert, three seeds.

Features come from `preflight` on 64 held-out prompts (SmolLM2: 24); gains from other held-out prompts, sampled, in
points. Everything is kept in `runs/calibration` and resumes. `--table` writes the table of the package; the suites in
UNSEEN never enter it, `--unseen` holds the forecast against them."""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import copd_nb  # noqa: F401 – sets the threads' waiting before torch loads
import pandas as pd
import torch

from copd_nb.analysis.calibration import FEATURES, PAIR_COLUMNS, calibrate, read_pairs
from copd_nb.analysis.outlook import judge_pair, preflight
from copd_nb.data.capability import Capability
from copd_nb.engine.config import Config
from copd_nb.engine.evaluation import evaluate
from copd_nb.engine.runs import Run
from copd_nb.engine.training import train
from copd_nb.policy.suites import load_suite
from copd_nb.study.experiment import read_experiment
from copd_nb.study.loading import load
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.paradigms import expert, merged_experts
from copd_nb.schedule.parts import OPD, Phase, Update

STORE = Path("runs/calibration")
SMALL = ["minis", *(f"skills?names={names}&warm=250&folder={STORE}/bases" for names in
                    ("add,multiply", "subtract,sort", "digits,remainder", "again,mirror"))]
UNSEEN = [f"skills?names={names}&warm=250&hidden=64&layers=4&folder={STORE}/bases"
          for names in ("multiply,digits", "sort,add")]
CONFIG = Config(opd_prompts=16, learning_rate=1e-4, probe_every=0, eval_every=0, checkpoint_every=1000, device="cpu")
STEPS, EARLY, DISTILLED, ASKED, JUDGED = 80, 20, 40, 64, 256


def label(suite: str) -> str: return suite.split("names=")[-1].split("&")[0]


def branches(suite: str, store: Path) -> tuple[dict, dict]:
    "Capabilities, and every policy that takes part in a pair, by its name."
    capabilities, base = load_suite(suite)
    found = {"base": base}
    for name in capabilities:
        for steps in (STEPS, EARLY):
            run = train(expert(name, steps), capabilities, base, CONFIG, store / f"{name}-{steps}", progress=False)
            found[f"{name} {steps}"] = run.branch(name)
    names = list(capabilities)
    merge = merged_experts(names, STEPS)
    merged = train(merge, capabilities, base, CONFIG, store / "merged", progress=False)
    return capabilities, found | {"merged": merged.result}


def pairs(names: list[str]) -> list[tuple[str, str, str]]:  # student, teacher, capability
    listed = []
    for name, other in zip(names, names[1:] + names[:1]):
        good, weak, far = f"{name} {STEPS}", f"{name} {EARLY}", f"{other} {STEPS}"
        listed += [("base", good, name), (far, good, name), (weak, good, name), ("base", weak, name),
                   ("merged", good, name), (good, "base", name), (good, far, name)]
    return listed


def held_out(capability: Capability, start: int, stop: int | None) -> Capability:
    return replace(capability, test=capability.test[start:stop])


def accuracy(policy, capability: Capability) -> float:
    rows = evaluate(policy, {capability.name: held_out(capability, ASKED, ASKED + JUDGED)}, samples=4,
                    max_new_tokens=CONFIG.max_new_tokens)
    return 100 * rows.sampled.mean()


def features(student, teacher, capability: Capability, prompts: list, config: Config) -> dict:
    return preflight(student, teacher, prompts, config, {capability.name: capability.reward}).features(capability.name)


def kept(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def note(file: Path, **row):
    with file.open("a") as out: out.write(json.dumps(row) + "\n")
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def small(suite: str):
    store, name = STORE / label(suite), label(suite)
    store.mkdir(parents=True, exist_ok=True)
    capabilities, policies = branches(suite, store)
    done = {(r["student"], r["teacher"], r["capability"]) for r in kept(store / "pairs.jsonl")}
    for n, (student, teacher, taught) in enumerate(pairs(list(capabilities))):
        if (student, teacher, taught) in done: continue
        capability = capabilities[taught]
        known = features(policies[student], policies[teacher], capability, capability.test[:ASKED], CONFIG)
        schedule = Schedule("pair", ["teacher", "student"],
                            [Phase("OPD", DISTILLED, [Update("student", [OPD(taught, "teacher")])])], "student")
        starts = dict(student=policies[student], teacher=policies[teacher])
        run = train(schedule, capabilities, policies["base"], CONFIG, store / f"pair-{n}", progress=False,
                    starts=starts)
        gain = accuracy(run.result, capability) - accuracy(policies[student], capability)
        note(store / "pairs.jsonl", suite=name, student=student, teacher=teacher, capability=taught, **known, gain=gain)


def _of(runs: list, start: str, seed: int):
    own = (r for r in runs if r.path.name.startswith(f"{start}-s{seed}-") and (r.path / "scores").exists())
    return next(r for r in own if r.finished)


def _sampled(folder: Path, name: str) -> float:
    return 100 * pd.read_parquet(next((folder / "scores").glob(f"{name}-*.parquet"))).sampled.mean()


def smollm2():
    "Pairs of the finished experiment; runs of several trainings are told apart by what was judged."
    experiment = read_experiment("examples/smollm2.yaml")
    capabilities, base = load(experiment)
    runs = [Run(p.parent) for p in Path("runs/smollm2").glob("*/manifest.json")]
    file = STORE / "smollm2" / "pairs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["student"], r["teacher"], r["capability"]) for r in kept(file)}
    before = 100 * evaluate(base, capabilities, prompts=96, samples=4).groupby("capability").sampled.mean()
    for seed in range(3):
        for name, other in (("colours", "reverse"), ("reverse", "colours")):
            one, hub = _of(runs, f"opd-{name}-to-{other}", seed), _of(runs, "mopd", seed)
            experts = {n: _of(runs, f"expert-{n}", seed) for n in (name, other)}
            for student, run, policy, start in (
                    ("base", hub, base, before[name]),
                    (f"{other}, seed {seed}", one, experts[other].branch(other), _sampled(experts[other].path, name))):
                teacher = f"{name}, seed {seed}"
                if (student, teacher, name) in done: continue
                known = features(policy, run.branch(name), capabilities[name], capabilities[name].train[:24],
                                 replace(experiment.config, seed=seed))
                note(file, suite="smollm2", student=student, teacher=teacher, capability=name, **known,
                     gain=_sampled(run.path, name) - start)


def table() -> pd.DataFrame:
    files = [STORE / label(s) / "pairs.jsonl" for s in [*SMALL, "smollm2"]]
    found = pd.DataFrame([row for file in files for row in kept(file)])
    columns = dict.fromkeys((*FEATURES, "gain"), 4)
    return found[[*PAIR_COLUMNS]].round(columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("suites", nargs="*", help=", ".join([*map(label, SMALL), "smollm2"]))
    parser.add_argument("--unseen", action="store_true", help="train pairs outside the table, and forecast them")
    parser.add_argument("--table", action="store_true", help="write the table of the package")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    every = UNSEEN if asked.unseen else [*SMALL, "smollm2"]
    for suite in every:
        if not asked.table and (asked.unseen or not asked.suites or label(suite) in asked.suites):
            smollm2() if suite == "smollm2" else small(suite)
    if asked.table: table().to_csv("copd_nb/assets/calibration.csv", index=False)
    if asked.unseen:
        known = calibrate(read_pairs())
        for row in (r for suite in UNSEEN for r in kept(STORE / label(suite) / "pairs.jsonl")):
            said = judge_pair({k: row[k] for k in FEATURES}, known)
            print(f"{row['suite']}, {row['student']} ← {row['teacher']}: gained {row['gain']:.1f}; {said}")
