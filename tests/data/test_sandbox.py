"Programs that try to get out of the sandbox or to use it up."
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from copd_nb.data import confinement as confinement_module
from copd_nb.data import sandbox as sandbox_module
from copd_nb.data.machine import missing
from copd_nb.data.sandbox import isolation, judge_code, run_code, run_many

pytestmark = pytest.mark.skipif(bool(missing()), reason="hostile programs run in the sandbox only")
LINUX = all(isolation().values())
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
