"""The benchmark: `python bench/run.py`, where copd_nb is installed; writes results.json and results.md beside it."""
import argparse
import datetime
import json
import os
import re
import shlex
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


def vllm_environment() -> Path:
    "The Python of vLLM's own environment, made by the rule that `make test-vllm` has."
    folder = ROOT / ".venv-vllm"
    if not (folder / ".done").exists():
        subprocess.run(["make", f"PYTHON={sys.executable}", ".venv-vllm/.done"], cwd=ROOT, check=True)
    return folder / "bin" / "python"


def environment(threads: int, device: str) -> dict[str, str]:
    "What every process sees: its threads and device, no network, this checkout."
    return os.environ | dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE",
                             GOMP_SPINCOUNT="10000", HF_HUB_OFFLINE="1",
                             TOKENIZERS_PARALLELISM="false", BENCH_DEVICE=device,
                             PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


def materials(cases: list[Case], folder: str, threads: int):
    "Write the models and prompts that the cases name."
    tasks = [side.task for case in cases for side in case.sides]
    named = (t.get(key) for t in tasks for key in ("model", "teacher", "capability", "tokens"))
    names = {name for name in named if isinstance(name, str)}  # tokens may be a number, too
    subprocess.run([sys.executable, HERE / "materials.py", folder, *sorted(names)], check=True,
                   env=environment(threads, "cpu"))


def for_vllm(threads: int) -> dict[str, str]:
    "What vLLM sees besides: its threads on the first processors, and what the usual torchvision lacks."
    mine = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    return environment(threads, "cpu") | dict(
        VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND=mine, VLLM_LOGGING_LEVEL="ERROR",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "vllm_site")]))


def starter(threads: int, device: str, pythons: dict[str, str | None]):
    "How a side becomes a process; `pythons` are those that the user gave."
    make = dict(own=lambda: sys.executable, trl=trl_environment, vllm=vllm_environment)

    def start(side: Side) -> Worker:
        try: python = pythons.get(side.place) or make[side.place]()
        except subprocess.CalledProcessError as error:
            raise Failed(f"the environment of {side.place} could not be made: {error}") from error
        seen = for_vllm(threads) if side.place == "vllm" else environment(threads, device)
        return Worker([str(python), str(HERE / f"{side.program}.py"), json.dumps(side.task)], seen)
    return start


def commit() -> str:
    "The last change of what is checked out; the results that this program writes change nothing."
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    others = ["--", ".", ":!bench/results.json", ":!bench/results.md"]
    changed = git("status", "--porcelain", "--untracked-files=no", *others)
    return (git("log", "-1", "--format=%h", *others) or "unknown") + ("-dirty" if changed else "")


def processor(device: str) -> str:
    "What computes: the processor, after the graphics card if it is used."
    named = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    card = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                          check=True).stdout.strip() if device == "cuda" else ""
    return ", ".join(filter(None, [card, named[1] if named else "unknown"]))


def told(words: list[str]) -> str:
    "The command, without paths of this machine."
    paths = {i + n for i, w in enumerate(words) if w in ("--trl-python", "--vllm-python", "--out") for n in (0, 1)}
    return shlex.join(["python", "bench/run.py", *(w for i, w in enumerate(words) if i not in paths)])


def machine(arguments: argparse.Namespace, results: list[dict]) -> dict:
    "Where and how it was measured."
    versions = {n: v for r in results for facts in r["facts"].values() for n, v in facts.get("versions", {}).items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    return dict(command=told(sys.argv[1:]), commit=commit(), preset=arguments.preset,
                device=arguments.device,
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"), load=os.getloadavg(),
                cpu=processor(arguments.device), cores=os.cpu_count(), threads=arguments.threads, memory_gib=memory,
                versions=versions | dict(python=sys.version.split()[0]))


def where(arguments: argparse.Namespace, result: dict) -> dict:
    "With what one case was measured."
    about = machine(arguments, [result])
    return {k: about[k] for k in ("commit", "date", "load", "cpu", "cores", "threads", "memory_gib", "versions")}


def parsed() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", type=int, metavar="LINE",
                        help="lines to run, 1 to 14; all if left out; the others keep their earlier results")
    parser.add_argument("--case", nargs="+", default=[], metavar="TEXT",
                        help="only cases whose titles contain one of these; the others keep their earlier results")
    parser.add_argument("--resume", action="store_true",
                        help="leave out cases that were measured with this very commit, without a failure")
    parser.add_argument("--list", action="store_true", help="tell the titles of the chosen cases, and measure nothing")
    parser.add_argument("--repeats", type=int, help="at most so many rounds; each case has its own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every process (all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where models are trained; cuda for lines 1 to 4 only")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="smoke is small, to see that everything runs")
    parser.add_argument("--trl-python", help="a Python that has TRL, instead of bench/.venv-trl")
    parser.add_argument("--vllm-python", help="a Python that has vLLM, instead of .venv-vllm")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and results.md")
    return parser.parse_args()


def earlier(arguments: argparse.Namespace) -> dict[str, dict]:
    "Results by title that an earlier run left with the same preset and threads."
    file = arguments.out / "results.json"
    if not file.exists(): return {}
    found = json.loads(file.read_text())
    same = all(found["about"][key] == getattr(arguments, key) for key in ("preset", "threads", "device"))
    return {r["title"]: r for r in found["results"]} if same else {}


def chosen_of(arguments: argparse.Namespace, every: list[Case], known: dict[str, dict]) -> list[Case]:
    "The cases that are to be measured."
    found = [c for c in every if not arguments.only or c.line in arguments.only]
    if arguments.case: found = [c for c in found if any(text in c.title for text in arguments.case)]
    done = lambda r: r and not r["failures"] and r.get("where", {}).get("commit") == commit()
    return [c for c in found if not (arguments.resume and done(known.get(c.title)))]


def main():
    "Run the chosen lines, writing what is known after each."
    arguments = parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        every = Lines(PRESETS[arguments.preset], folder, arguments.device).cases()
        results = earlier(arguments) if arguments.only or arguments.case or arguments.resume else {}
        chosen = chosen_of(arguments, every, results)
        if arguments.list: return print("\n".join(f"{c.line}: {c.title}" for c in chosen))
        materials(chosen, folder, arguments.threads)
        pythons = dict(trl=arguments.trl_python, vllm=arguments.vllm_python)
        for case in chosen:
            print(f"line {case.line}: {case.title}", flush=True)
            result = hold(case, starter(arguments.threads, arguments.device, pythons),
                          min(arguments.repeats or case.repeats, case.repeats))
            # the folder is of this run and this machine
            tasks = {side.name: {k: v for k, v in side.task.items() if k != "folder"} for side in case.sides}
            told = dict(line=case.line, title=case.title, where=where(arguments, result), tasks=tasks)
            results[case.title] = told | dict(summary=summary(case, result)) | result
            done = [c for c in every if c.title in results]
            about = machine(arguments, list(results.values()))
            (arguments.out / "results.json").write_text(json.dumps(dict(about=about,
                    results=[results[c.title] for c in done]), indent=1))
            (arguments.out / "results.md").write_text(table(done, [results[c.title] for c in done], about))
    if chosen: print((arguments.out / "results.md").read_text())


if __name__ == "__main__": main()
