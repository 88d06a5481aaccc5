"""The benchmark: `python bench/run.py`, where copd_nb is installed; writes results.json and results.md beside it."""
import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from contest import ROOT, Case, Failed, Side, Worker, hold
from lines import PRESETS, Lines
from report import summary, table

HERE = Path(__file__).parent


def trl_environment() -> Path:
    "The Python of TRL's own environment, installed or renewed when its requirements are newer."
    folder, wanted = HERE / ".venv-trl", HERE / "trl-requirements.txt"
    python, done = folder / "bin" / "python", folder / ".done"
    if not done.exists() or done.stat().st_mtime < wanted.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", wanted], check=True)
        done.touch()
    return python


def environment(threads: int, device: str) -> dict[str, str]:
    "What every process sees: its threads and device, no network, this checkout."
    return os.environ | dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE",
                             GOMP_SPINCOUNT="10000", HF_HUB_OFFLINE="1",
                             TOKENIZERS_PARALLELISM="false", BENCH_DEVICE=device,
                             PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


def materials(cases: list[Case], folder: str, threads: int):
    "Write the models and prompts that the cases name."
    tasks = [side.task for case in cases for side in case.sides]
    names = {t[key] for t in tasks for key in ("model", "teacher", "capability") if key in t}
    subprocess.run([sys.executable, HERE / "materials.py", folder, *sorted(names)], check=True,
                   env=environment(threads, "cpu"))


def starter(threads: int, device: str, trl: str | None):
    "How a side becomes a process."
    def start(side: Side) -> Worker:
        try: python = (trl or trl_environment()) if side.program == "trl_side" else sys.executable
        except subprocess.CalledProcessError as error:
            raise Failed(f"the environment of TRL could not be made: {error}") from error
        return Worker([str(python), str(HERE / f"{side.program}.py"), json.dumps(side.task)],
                      environment(threads, device))
    return start


def commit() -> str:
    "What is checked out."
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def processor(device: str) -> str:
    "What computes: the processor, after the graphics card if it is used."
    named = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    card = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                          check=True).stdout.strip() if device == "cuda" else ""
    return ", ".join(filter(None, [card, named[1] if named else "unknown"]))


def machine(arguments: argparse.Namespace, results: list[dict]) -> dict:
    "Where and how it was measured."
    versions = {n: v for r in results for facts in r["facts"].values() for n, v in facts.get("versions", {}).items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    return dict(command="python " + " ".join(["bench/run.py", *sys.argv[1:]]), commit=commit(), preset=arguments.preset,
                device=arguments.device,
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"), load=os.getloadavg(),
                cpu=processor(arguments.device), cores=os.cpu_count(), threads=arguments.threads, memory_gib=memory,
                versions=versions | dict(python=sys.version.split()[0]))


def parsed() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", type=int, metavar="LINE",
                        help="lines to run, 1 to 11; all if left out; the others keep their earlier results")
    parser.add_argument("--repeats", type=int, help="at most so many rounds; each case has its own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every process (all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where models are trained; cuda for lines 1 to 4 only")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="smoke is small, to see that everything runs")
    parser.add_argument("--trl-python", help="a Python that has TRL, instead of bench/.venv-trl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and results.md")
    return parser.parse_args()


def earlier(arguments: argparse.Namespace) -> dict[str, dict]:
    "Results by title that an earlier run left with the same preset and threads."
    file = arguments.out / "results.json"
    if not file.exists(): return {}
    found = json.loads(file.read_text())
    same = all(found["about"][key] == getattr(arguments, key) for key in ("preset", "threads", "device"))
    return {r["title"]: r for r in found["results"]} if same else {}


def main():
    "Run the chosen lines, writing what is known after each."
    arguments = parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        every = Lines(PRESETS[arguments.preset], folder, arguments.device).cases()
        chosen = [c for c in every if not arguments.only or c.line in arguments.only]
        results = earlier(arguments) if arguments.only else {}
        materials(chosen, folder, arguments.threads)
        for case in chosen:
            print(f"line {case.line}: {case.title}", flush=True)
            result = hold(case, starter(arguments.threads, arguments.device, arguments.trl_python),
                          min(arguments.repeats or case.repeats, case.repeats))
            # the folder is of this run and this machine
            tasks = {side.name: {k: v for k, v in side.task.items() if k != "folder"} for side in case.sides}
            told = dict(line=case.line, title=case.title, commit=commit(), tasks=tasks)
            results[case.title] = told | dict(summary=summary(case, result)) | result
            done = [c for c in every if c.title in results]
            about = machine(arguments, list(results.values()))
            (arguments.out / "results.json").write_text(json.dumps(dict(about=about,
                    results=[results[c.title] for c in done]), indent=1))
            (arguments.out / "results.md").write_text(table(done, [results[c.title] for c in done], about))
    print((arguments.out / "results.md").read_text())


if __name__ == "__main__": main()
