"Rewards that hang, and the workers that score them."
import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import pytest

from copd_nb.data.capability import Example
from copd_nb.data.guarded import Guarded, close_workers
from copd_nb.data.machine import start_worker
from copd_nb.data.rewards import Exact, Failed, Format, Numeric, Weighted

EXAMPLE = Example("q", "85", "c")


@dataclass(frozen=True)
class Act:
    "A reward that does what the completion says."
    def __call__(self, completions, examples):
        return [getattr(self, c.partition(" ")[0])(c.partition(" ")[2]) for c in completions]
    def score(self, text): return float(text)
    def sleep(self, text): time.sleep(float(text)); return 1
    def spin(self, text): re.fullmatch("(a+)+b", "a" * 60)
    def deep(self, text): return self.deep(text)
    def die(self, text): os.kill(os.getpid(), signal.SIGKILL)
    def leave(self, text): os._exit(3)
    def fail(self, text): return Failed("as asked")
    def none(self, text): return None
    def pid(self, text): return os.getpid()


@pytest.fixture(autouse=True, scope="module")
def importable():
    "Workers import this module by name."
    sys.path.insert(0, str(Path(__file__).parent))
    Act.__module__ = "test_guarded"
    yield
    close_workers()
    sys.path.remove(str(Path(__file__).parent))


def test_guarded_scores_are_those_of_the_reward():
    completions, examples = [f"x:{i}" for i in range(83, 88)] * 9, [EXAMPLE] * 45
    for reward in (Exact(), Numeric(), Weighted(((.5, Exact()), (.5, Format("x.*"))))):
        assert Guarded(reward)(completions, examples) == reward(completions, examples)
    assert Guarded(Exact())([], []) == []
    with pytest.raises(ValueError): Guarded(Exact())(["a"], [])


def test_what_fails_is_told_and_the_rest_is_scored():
    asked = ["score 1", "spin", "score 2", "sleep 9", "deep", "die", "leave", "fail", "none", "score x", "score 3",
             "no"]
    scores = Guarded(Act(), seconds=1.5, workers=3)(asked, [EXAMPLE] * len(asked))
    assert [s for s in scores if not isinstance(s, Failed)] == [1, 2, 3]
    reasons = {a: s.reason for a, s in zip(asked, scores) if isinstance(s, Failed)}
    assert reasons["spin"] == reasons["sleep 9"] == "timeout after 1.5 s" and reasons["fail"] == "as asked"
    assert "RecursionError" in reasons["deep"]
    assert "status -9" in reasons["die"] and "status 3" in reasons["leave"] and "TypeError" in reasons["none"]
    assert "ValueError" in reasons["score x"] and "AttributeError" in reasons["no"]


def test_each_completion_has_a_clock_of_its_own():
    assert Guarded(Act(), seconds=2, workers=1)(["sleep 0.7"] * 3, [EXAMPLE] * 3) == [1] * 3


def test_workers_are_kept_and_replaced():
    pid = lambda seconds=5: Guarded(Act(), seconds, workers=1)(["pid"], [EXAMPLE])[0]
    close_workers()
    first = pid()
    assert pid() == first
    Guarded(Act(), workers=1)(["fail"], [EXAMPLE])
    assert pid() == first  # an error is no reason to replace a worker
    Guarded(Act(), .2, workers=1)(["sleep 5"], [EXAMPLE])
    assert pid() != first and not os.path.exists(f"/proc/{first:.0f}")
    os.kill(int(pid()), signal.SIGKILL)
    time.sleep(.1)
    assert pid() > 0


def test_rewards_that_can_not_be_sent_or_loaded():
    with pytest.raises(ValueError, match="can't be sent to a worker"): Guarded(lambda c, e: [1.0])(["x"], [EXAMPLE])


def test_guarded_in_threads_and_in_processes():
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda n: Guarded(Exact())([f":{n}"], [EXAMPLE]), (84, 85, 86))) == [[0], [1], [0]]
    code = ("from copd_nb.data.rewards import Exact; from copd_nb.data.guarded import Guarded; "
            "from copd_nb.data.capability import Example")
    script = (f"{code}\nimport multiprocessing\n"
              f"def f(n): return Guarded(Exact())([f':{{n}}'], [Example('q', '85', 'c')])[0]\n"
              "if __name__ == '__main__':\n  import concurrent.futures\n"
              "  with concurrent.futures.ProcessPoolExecutor(2) as p: print(list(p.map(f, [84, 85])))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.stdout == "[0.0, 1.0]\n", done.stderr


def runs_still(pid):
    "Whether a process is there and no zombie."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False


def test_no_worker_outlives_its_process():
    script = ("import os\nfrom copd_nb.data.rewards import Exact\nfrom copd_nb.data.guarded import Guarded, _idle\n"
              "from copd_nb.data.capability import Example\n"
              "Guarded(Exact())([':1'] * 3, [Example('q', '1', 'c')] * 3)\n"
              "print(*[w.process.pid for w in _idle[os.getpid()]])")
    for end in ("", "\nimport sys; sys.stdout.flush(); os.kill(os.getpid(), 9)"):
        pids = subprocess.run([sys.executable, "-c", script + end], capture_output=True, text=True,
                              timeout=180).stdout.split()
        for _ in range(400):  # a busy machine takes its time
            if not any(map(runs_still, pids)): break
            time.sleep(.05)
        assert pids and not any(map(runs_still, pids))


def test_a_busy_worker_ends_by_itself_if_its_process_is_gone():
    near, far = Pipe()
    folder = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    code = "import copd_nb.data.guarded as g; g.GRACE = .5; g._serve(far)"
    worker = start_worker(far, code, os.environ | {"PYTHONPATH": folder})
    far.close()
    near.send((Act(), "spin", EXAMPLE, .5))
    assert near.recv() == "begin"
    near.close()
    assert worker.wait(timeout=60) == 1


def test_the_name_of_a_guarded_reward_is_stable():
    assert repr(Guarded(Exact(), 3.0, workers=7)) == "Guarded(reward=Exact(mark=':'), seconds=3.0)"
    with pytest.raises(ValueError, match="seconds=0"): Guarded(Exact(), 0)
