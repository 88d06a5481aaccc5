"The package imports and trains where only what macOS and Windows have is there."
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

CODE = '''
import importlib, os, pkgutil, signal, sys, tempfile
from pathlib import Path
import copd_nb

def everything():
    names = [m.name for m in pkgutil.walk_packages(copd_nb.__path__, "copd_nb.")]
    for name in names: importlib.import_module(name)
    return names

everything()  # other packages know their platforms: they are imported while all is there
for name in [n for n in sys.modules if n == "copd_nb" or n.startswith("copd_nb.")]: del sys.modules[name]
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
for owner, names in ((os, "sched_getaffinity sched_setaffinity unshare setns memfd_create pidfd_open fork"),
                     (os, "killpg setsid getuid geteuid getgid getpgid O_NOFOLLOW O_DIRECTORY mkfifo"),
                     (signal, "SIGALRM SIGKILL setitimer getitimer ITIMER_REAL alarm pthread_sigmask")):
    for name in names.split():
        if hasattr(owner, name): delattr(owner, name)

import copd_nb
assert len(everything()) > 80
from copd_nb import Config, Run, copd, train
from copd_nb.policy.toys import minis, tiny_policy
config = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=4, probe_prompts=2, eval_every=1, eval_prompts=2,
                eval_samples=1, device="cpu")
folder = Path(tempfile.mkdtemp()) / "run"
schedule = copd(["text", "image"], cycles=1, s_rl=1, s_opd=1)
small = tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)
run = train(schedule, minis(("text", "image")), small, config, folder, progress=False)
assert Run(folder).finished and run.manifest["peak_memory"] > 0 and set(run.events.kind) >= {"train", "probe", "eval"}
'''


def test_every_module_is_imported_and_two_steps_are_trained_without_what_only_linux_has(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_peak_memory_is_asked_of_psutil_where_resource_is_missing(monkeypatch):
    from copd_nb.engine.accelerator import peak_memory
    known = peak_memory()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0 < peak_memory() <= known * 1.5
