"Programs that try to get out of the sandbox or to use it up, and rewards that hang."
import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import pytest

from copd_nb.data import confinement as confinement_module
from copd_nb.data import sandbox as sandbox_module
from copd_nb.data.capability import Example
from copd_nb.data.machine import start_worker
from copd_nb.data.rewards import Exact, Failed, Format, Numeric, Weighted
from copd_nb.data.guarded import Guarded, close_workers
from copd_nb.data.sandbox import isolation, judge_code, run_code, run_many

LINUX = sys.platform == "linux" and all(isolation().values())
full = pytest.mark.skipif(not LINUX, reason="this machine does not permit all of the isolation")
# everything; without a root of its own; without namespaces: Landlock and seccomp hold
WAYS = [(), ("view",), ("namespaces",)]
each_way = pytest.mark.parametrize("without", WAYS, ids=lambda w: "without " + " ".join(w) if w else "all")


def said(source, **options):
    "What a program prints, which must end well."
    outcome = run_code(source, **options)
    assert outcome.ok, outcome
    return outcome.stdout


@pytest.mark.parametrize("source, reason, code", [
    ("", "", 0), ("import sys; sys.exit(0)", "", 0), ("import sys; sys.exit(7)", "exit 7", 7),
    ("import os; os._exit(3)", "exit 3", 3), ("assert 0", "exit 1", 1), ("x =", "exit 1", 1),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9", -9),
    ("import ctypes; ctypes.string_at(0)", "signal 11", -11), ("\0", "exit 1", 1), ("\ud800", "exit 1", 1),
    ("raise MemoryError", "memory", 1), ("import sys; sys.stderr.write('x'); sys.exit('bye')", "exit 1", 1),
    ("import os; os.abort()", "signal 6", -6),
    ("import os; os.close(1); os.close(2)", "", 0), ("def f(): f()\nf()", "exit 1", 1),
])
def test_how_programs_end(source, reason, code):
    outcome = run_code(source)
    assert (outcome.reason, outcome.returncode, outcome.ok) == (reason, code, not reason)


def test_output_is_text_whatever_the_bytes():
    outcome = run_code("import sys\nsys.stdout.buffer.write(b'a\\xff\\0b'); print('é', file=sys.stderr)")
    assert outcome.stdout == "a\ufffd\0b" and outcome.stderr == "é\n"


def test_input_and_packages():
    assert said("print(input() * 2)", stdin="ab\n") == "abab\n"
    assert run_code("input()").stderr.endswith("EOFError: EOF when reading a line\n")
    assert run_code("import numpy").reason == "exit 1"
    assert said("import numpy; print(numpy.arange(3).sum())", packages=True, memory=2 ** 31, seconds=20) == "3\n"


@pytest.mark.parametrize("limit",
                         [dict(seconds=0), dict(seconds=float("nan")), dict(memory=1), dict(output=0), dict(disk=1),
                          dict(processes=0)])
def test_limits_that_make_no_sense(limit):
    with pytest.raises(ValueError, match=next(iter(limit))): run_code("", **limit)


def test_the_environment_is_empty():
    os.environ["COPD_SECRET"] = "s3cret"
    try: assert "s3cret" not in said("import os; print(dict(os.environ))")
    finally: del os.environ["COPD_SECRET"]


@full
@each_way
@pytest.mark.parametrize("source",
                         ["while True: pass", "import time; time.sleep(60)", "import os\nwhile True: os.getpid()",
                          "import signal\nsignal.pause()",
                          "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
                          "  except (OSError, ValueError): pass\nwhile True: pass",
                          "import threading\nthreading.Thread(target=threading.Event().wait).start()"])
def test_endless_programs(source, without):
    outcome = run_code(source, seconds=.7, without=without)
    assert outcome.reason == "timeout" and outcome.returncode is None and .7 <= outcome.seconds < 30


def processes_of(mark):
    "Processes whose command line holds a mark."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try: found += [path.parent.name] * (mark.encode() in path.read_bytes())
        except OSError: pass
    return found


@full
@each_way
def test_nothing_survives(without):
    "A daemon that leaves its group and its parent, where processes are allowed; refused otherwise."
    mark = f"left-{os.getpid()}-{'-'.join(without)}"
    daemon = ("import os, sys, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
              f"    os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)', {mark!r}])\n"
              "time.sleep(.3)")
    run_code(daemon, processes=8 if "namespaces" not in without else 1, seconds=3, without=without)
    assert processes_of(mark) == []


@full
@each_way
@pytest.mark.parametrize("processes", [1, 6])
def test_fork_bomb(without, processes):
    outcome = run_code("import os\nwhile True: os.fork()", seconds=1, processes=processes, without=without)
    assert not outcome.ok
    if processes == 1 or without: assert "BlockingIOError" in outcome.stderr


@full
def test_threads_and_some_processes():
    assert said("import threading\nt = [threading.Thread(target=print, args=('x',)) for _ in range(4)]\n"
                "[x.start() for x in t]\n[x.join() for x in t]").split() == ["x"] * 4
    assert said("import os\nif os.fork(): print(os.wait()[1])", processes=4) == "0\n"
    assert run_code("import threading, time\n"
                    "for _ in range(500): threading.Thread(target=time.sleep, args=(9,), "
                    "daemon=True).start()").reason == "exit 1"


@each_way
@pytest.mark.parametrize("source",
                         ["x = [0] * 10 ** 9", "x = []\nwhile True: x.append(bytes(10 ** 6))",
                          "import mmap\nx = [mmap.mmap(-1, 2 ** 26) for _ in range(99)]\nraise MemoryError",
                          "x = 10 ** 10 ** 9 % 7 if 0 else bytearray(2 ** 30)"])
def test_memory_bomb(source, without):
    outcome = run_code(source, seconds=5, without=without)
    assert not outcome.ok and (outcome.reason == "memory" or "Cannot allocate memory" in outcome.stderr)


@each_way
def test_endless_output(without):
    for stream in ("stdout", "stderr"):
        outcome = run_code(f"import sys\nwhile True: sys.{stream}.write('x' * 4096)", output=10_000, without=without)
        assert outcome.reason == "output" and len(getattr(outcome, stream)) == 10_000
    assert said("print('x' * 9_999)", output=10_000) == "x" * 9_999 + "\n"


@full
def test_the_disk_is_bounded_and_nothing_is_left_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for write in ("f = open('a', 'wb')\nfor _ in range(99): f.write(bytes(2 ** 20))",
                  "for i in range(99): open(str(i), 'wb').write(bytes(2 ** 20))"):
        outcome = run_code(write)
        assert outcome.reason == "exit 1" and re.search("No space left|File too large", outcome.stderr)
    hostile = ("import os\n"
               "os.makedirs('a/b/c'); os.symlink('/etc', 'link'); open('a/f', 'w').close(); os.mkdir('a/d', 0)\n"
               "try: os.chmod('a/b', 0)\nexcept OSError: pass")
    modes = os.stat("/etc").st_mode
    for without in WAYS: said(hostile, without=without)
    assert os.listdir(tmp_path) == []
    assert os.stat("/etc").st_mode == modes


READ = """
import os
def tried(path):
    try:
        if os.path.isdir(path): return bool(os.listdir(path))
        with open(path, 'rb') as file: return bool(file.read(1)) or True
    except OSError: return False
print([p for p in PATHS if tried(p)])
"""

@full
@each_way
def test_files_outside_can_not_be_read(without, tmp_path):
    tmp_path.chmod(0o755)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    paths = [str(secret), str(tmp_path), "/etc/passwd", "/etc/hostname", "/etc", "/", "/root", "/home", "/proc",
             "/proc/1/environ", "/proc/self/environ", "/sys", "/tmp", "/dev", "/var",
             os.path.expanduser("~"), str(Path(confinement_module.__file__).parents[1]), "/proc/self/root/etc/passwd",
             "/proc/self/fd", "../../etc/passwd", "/box/../etc/passwd", "/dev/shm", "/dev/mem"]
    assert said(READ.replace("PATHS", repr(paths)), without=without) == "[]\n"
    link = (f"import os\nos.symlink({str(secret)!r}, 'link')\nfor make in (os.link,):\n"
            f"  try: make({str(secret)!r}, 'hard')\n  except OSError: pass\n")
    assert said(link + READ.replace("PATHS", "['link', 'hard']"), without=without) == "[]\n"


WRITE = """
import os
done = []
for path in PATHS:
    for act in (lambda: open(path, 'a').write('x'), lambda: os.mkdir(path + '.d'), lambda: os.unlink(path),
                lambda: os.chmod(path, 0o777), lambda: os.rename(path, path + '.r')):
        try: act(); done.append(path)
        except OSError: pass
print(done)
"""

@full
@each_way
def test_files_outside_can_not_be_written(without, tmp_path):
    "Only paths made for this test, and new names in system folders: a broken sandbox would destroy nothing of value."
    tmp_path.chmod(0o777)
    target = tmp_path / "target.txt"
    target.write_text("kept")
    target.chmod(0o666)
    name = f"copd-test-{os.getpid()}"
    paths = [str(target), str(tmp_path / "new"),
             *(f"{folder}/{name}"
               for folder in ("", "/etc", "/tmp", "/dev", "/lib", "/usr/lib", "/var/tmp", sys.base_prefix,
                              os.path.expanduser("~")))]
    assert said(WRITE.replace("PATHS", repr(paths)), without=without) == "[]\n"
    run_code(f"import os\nos.symlink({str(target)!r}, 'link')\nopen('link', 'w').write('changed')", without=without)
    assert target.read_text() == "kept" and os.listdir(tmp_path) == ["target.txt"]
    assert not any(os.path.exists(p) for p in paths[1:])
    assert said("open('mine', 'w').write('x')\nprint(open('mine').read())", without=without) == "x\n"


@full
@each_way
def test_no_network(without):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        kinds = ("[(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM), "
                 "(socket.AF_INET6, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_STREAM)]")
        source = (f"import socket\nfor kind in {kinds}:\n  try: socket.socket(*kind); print('open')\n"
                  "  except OSError: pass\n"
                  f"try: socket.create_connection(('127.0.0.1', {port})); print('connected')\nexcept OSError: pass")
        assert said(source, without=without) == ""
        if "namespaces" not in without:  # and without the filter there is still no device to send by
            assert said(source.replace("print('open')", "pass"), without=(*without, "seccomp")) == ""


@full
@each_way
def test_signals_do_not_reach_other_processes(without):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        source = (f"import os\nfor pid in ({victim.pid}, {os.getpid()}, os.getppid(), -{victim.pid}):\n"
                  f"  try: os.kill(pid, {int(signal.SIGTERM)}); print('hit', pid)\n  except OSError: pass")
        assert said(source, without=without) == "" and victim.poll() is None
    finally: victim.kill(), victim.wait()


@full
@each_way
def test_system_calls_that_lead_out(without):
    calls = ("[(101, 16, 1), (165, 0, 0), (272, 0x10000000), (272, 0x20000), (161, 0), (310, 1), (321, 0), "
             "(425, 1, 0), (435, 0, 0), (319, 0, 0), (304, 0), (56, 0x10000000 | 17)]")
    if os.uname().machine != "x86_64": pytest.skip("the numbers are those of x86-64")
    source = ("import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
              f"print([(c[0], ctypes.get_errno()) for c in {calls} if library.syscall(*map(ctypes.c_long, c)) >= 0 "
              "or ctypes.get_errno() not in (1, 38)])")
    assert said(source, without=without) == "[]\n"


@full
def test_the_program_is_nobody():
    uid, groups = said("import os\nprint(os.getuid(), os.getgroups())").split(" ", 1)
    assert int(uid) not in (0, os.getuid()) and groups in ("[]\n", "[65534]\n")
    assert said("import os\ntry: os.setuid(0); print('root')\nexcept OSError: print('no')") == "no\n"


def test_a_machine_that_permits_little_is_told_of(monkeypatch):
    monkeypatch.setattr(sandbox_module, "_unusable", lambda: ("namespaces", "seccomp"))
    with pytest.warns(UserWarning, match="without isolation of network, processes"): run_code("")
    assert isolation()["network"] == "" and isolation()["limits"] == "limits"


def test_a_machine_that_permits_nothing_names_all_five(monkeypatch):
    steps = ("namespaces", "view", "user", "limits", "landlock", "seccomp", "weak", "tied")
    monkeypatch.setattr(sandbox_module, "_unusable", lambda: steps)
    told = "without isolation of network, files, processes, user, limits: this machine does not permit it"
    with pytest.warns(UserWarning, match=told): outcome = run_code("print(1)")
    assert outcome.stdout == "1\n" and outcome.steps == () and not any(isolation().values())


@full
@pytest.mark.parametrize("options", [{}, dict(without=("view",)), dict(seconds=1e-6)],
                         ids=["all", "chosen", "not started"])
def test_no_wrong_warning(options):
    "None where all is permitted, for steps left out on purpose, or for a program that never reported its steps."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = run_code("", **options)
        verdict = judge_code("", [(True, "assert 1")], **options)
    early = "seconds" in options
    assert (outcome.steps is None) == (verdict.steps is None) == early and (outcome.reason == "timeout") == early


def test_many_programs_keep_their_order():
    assert [o.stdout for o in run_many([f"print({i})" for i in range(12)], workers=4)] == [f"{i}\n" for i in range(12)]
    assert run_many([]) == []


def test_no_handles_are_left():
    before = len(os.listdir("/proc/self/fd"))
    for source in ("", "while True: print(1)", "import time; time.sleep(9)"): run_code(source, seconds=.3)
    assert len(os.listdir("/proc/self/fd")) == before


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
    Act.__module__ = "test_sandbox"
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
