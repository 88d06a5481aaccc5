"The benchmark's own machinery: what a side has started ends with it."
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from contest import Case, Failed, Side, Worker, hold  # noqa: E402

FIRST = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
"""
ENDINGS = {"killed": "os.kill(os.getpid(), 9)", "ended": "sys.stdin.read()", "deaf": "import time; time.sleep(600)"}


def lives(pid: int) -> bool:
    "Whether a process runs; one that nobody has waited for is a zombie, and does not."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


@pytest.mark.parametrize("how", ENDINGS)
def test_nothing_that_a_side_has_started_goes_on(how, monkeypatch):
    worker = Worker([sys.executable, "-c", FIRST + ENDINGS[how]], dict(os.environ))
    child = worker.answer()
    assert lives(child)
    if how == "killed":
        with pytest.raises(Failed, match="killed by SIGKILL, as where memory ends"): worker.answer()
    if how == "deaf": monkeypatch.setattr(worker.process, "wait", impatient(worker.process.wait))
    worker.close()
    end = time.monotonic() + 10
    while lives(child) and time.monotonic() < end: time.sleep(0.05)
    assert not lives(child) and worker.process.poll() is not None


def impatient(wait): return lambda timeout=None: wait(timeout and 0.2)


def test_a_side_that_fails_leaves_the_contest():
    def start(side):
        loop = "import sys; print('{}', flush=True)\nfor _ in sys.stdin: print('{\"seconds\": 1}', flush=True)"
        return Worker([sys.executable, "-c", loop if side.name == "good" else "raise ValueError('no card')"],
                      dict(os.environ))
    found = hold(Case(1, "t", (Side("good", "x", {}), Side("bad", "x", {}))), start, 2)
    assert found == dict(facts={"good": {}}, rounds={"good": [{"seconds": 1}] * 2},
                         failures={"bad": "ValueError: no card"})
