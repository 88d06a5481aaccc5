"What only Linux has is taken away: the package imports, scores rewards, and names what is missing."
import multiprocessing
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
STOREYS = ["data", "policy", "signals", "schedule", "engine", "analysis", "study", "view", "report", "scale"]
MODULES = [f"copd_nb.{s}.{p.stem}" for s in STOREYS for p in sorted((ROOT / "copd_nb" / s).glob("[a-z]*.py"))]
TAKE_AWAY = """
import asyncio, importlib, multiprocessing.connection, os, selectors, signal, subprocess, sys, threading, warnings
for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None
for name in ("fork", "forkpty", "sched_getaffinity", "killpg", "setsid", "setresuid", "setresgid", "setgroups",
             "getuid", "getgid", "memfd_create"): delattr(os, name)
for name in ("SIGALRM", "SIGXCPU", "setitimer", "alarm", "ITIMER_REAL"): delattr(signal, name)
sys.platform = PLATFORM
"""


OTHERS = f"""
import importlib, sys
for name in {MODULES}: importlib.import_module(name)  # and with it other packages, whose portability is their own
for name in [n for n in sys.modules if n.split(".")[0] == "copd_nb"]: del sys.modules[name]
"""


def without_linux(code, platform="darwin", before="", **env):
    "Run Python in a process where the features of Linux are missing; `before` runs while they are still there."
    text = before + TAKE_AWAY.replace("PLATFORM", repr(platform)) + textwrap.dedent(code)
    env = {k: v for k, v in os.environ.items() if k != "COPD_UNSAFE_CODE"} | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_every_module_imports(platform):
    assert "copd_nb.data.sandbox" in MODULES and "copd_nb.data.guarded" in MODULES
    without_linux(f"for name in {MODULES}: importlib.import_module(name)", platform, OTHERS)


def test_rewards_that_run_no_program_are_scored():
    scores = without_linux("""
        from copd_nb.data.capability import Example
        from copd_nb.data.guarded import Guarded, close_workers
        from copd_nb.data.verifiers import named_reward
        names = {"numeric": "42", "choice": "B", "boxed": "x", "math_verify": "1/2", "format?pattern=4.*": "",
                 "instructions": '[{"kind": "no_commas"}]'}
        texts = ["42", "B", r"\\\\boxed{x}", r"$0.5$", "4 or so", "a, b"]
        for text, (name, answer) in zip(texts, names.items()):
            print(*named_reward(name)([text], [Example("q", answer, "c")]))
        close_workers()
        from copd_nb.data.capability import Capability
        from copd_nb.data.scoring import score
        rows = [Example(q, "4", "sums") for q in ("2+2=", "1+3=")]
        print(*score(Capability("sums", rows[:1], rows[1:], named_reward("exact")), ["4", "5"], rows, seconds=9))
    """, "win32")
    assert scores.split() == ["1.0"] * 5 + ["0.0"] + ["1.0", "0.0"]


def test_a_program_is_refused_and_what_is_missing_is_named():
    told = without_linux("""
        from copd_nb.data.capability import Example
        from copd_nb.data.sandbox import isolation, judge_code, run_code
        from copd_nb.data.verifiers import named_reward
        example = Example("q", '{"tests": "assert f() == 1"}', "c")
        reward = lambda: named_reward("code")(["def f(): return 1"], [example])
        for act in (lambda: run_code("print(1)"), lambda: judge_code("", [(True, "assert 1")]), reward):
            try: act()
            except RuntimeError as error: print(error)
        print(isolation())
    """).splitlines()
    assert len(told) == 4 and len(set(told[:3])) == 1
    for word in ("namespaces", "Landlock", "seccomp", "module resource", "os.fork", "COPD_UNSAFE_CODE=1"):
        assert word in told[0]
    assert told[3] == str(dict.fromkeys(["network", "files", "processes", "user", "limits"], ""))


# they run without isolation: nothing here may kill, delete or fill anything
CHEATS = ["class Same:\n  __eq__ = lambda *_: True\ndef f(x): return Same()", "import os\nos._exit(0)",
          "def f(x): f(x)",
          "import os\nfor h in range(64):\n  try: os.write(h, b'passed 0\\npassed 1\\n')\n  except OSError: pass\n"
          "def f(x): return 0", "import builtins\nbuiltins.abs = abs = lambda x: 0\ndef f(x): return 5"]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_a_program_runs_without_isolation_where_that_is_allowed(platform):
    lines = without_linux(f"""
        from copd_nb.data.capability import Example
        from copd_nb.data.sandbox import judge_code, run_code
        from copd_nb.data.verifiers import named_reward
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = run_code("import os, sys; print(input(), len(os.environ) < 9)", stdin="7")
        print(outcome.stdout, outcome.reason or "well", outcome.steps, len(caught))
        print(caught[0].message)
        warnings.simplefilter("ignore")
        ends = dict(seconds=1, output=1000)
        for source in ("while True: pass", "while True: print(1)", "1 / 0", "print('x' * 2000)"):
            print(run_code(source, **ends).reason)
        example = Example("q", '{{"tests": "assert f(2) == 4\\\\nassert abs(f(3) - 9) < 1e-6"}}', "c")
        programs = ["def f(x): return x * x", "def f(x): return 4", "print('hello')\\ndef f(x): return x * x"]
        print(named_reward("code?share=true&seconds=20")(programs, [example] * 3))
        print(named_reward("code?share=true&seconds=20")({CHEATS!r}, [example] * {len(CHEATS)}))
        print(judge_code("def f(x):\\n  while True: pass", [(True, "assert f(1) == 1")], seconds=1).reason)
    """, platform, COPD_UNSAFE_CODE="1").splitlines()
    assert lines[:2] == ["7 True", " well () 1"]
    unprotected = "network, files, processes, user, limits"
    assert lines[2].startswith(f"code runs without isolation of {unprotected}: this machine lacks")
    assert lines[3:7] == ["timeout", "output", "exit 1", "output"]
    assert lines[7:] == ["[1.0, 0.5, 1.0]", str([0.0] * len(CHEATS)), "timeout"]


def test_windows_gives_a_worker_its_handle(monkeypatch):
    "The calls only: Windows itself is not at hand."
    from copd_nb.data import machine
    near, far = multiprocessing.Pipe()
    inherited, started = [], []
    monkeypatch.setattr(machine, "os", types.SimpleNamespace(
        name="nt", set_handle_inheritable=lambda *a: inherited.append(a)))
    monkeypatch.setattr(subprocess, "STARTUPINFO", lambda **options: options, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append((command, options)))
    machine.start_worker(far, "far.send(1)", {})
    (command, options), = started
    assert inherited == [(far.fileno(), True)] and "pass_fds" not in options
    assert options["startupinfo"] == {"lpAttributeList": {"handle_list": [far.fileno()]}}
    assert command[-1].endswith(f"far = Connection({far.fileno()}); far.send(1)")
