"Runs that are killed, or meet a full disk, NaN, too little memory, a hanging reward or Ctrl-C: nothing is lost."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from copd_nb.engine import step as step_module
from copd_nb.engine import update as update_module
from copd_nb.engine import phase as phase_module
from copd_nb.engine import streams as streams_module
from copd_nb.schedule.paradigms import expert
from copd_nb.data.capability import Capability
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.memory import halved
from copd_nb.engine.training import train
from copd_nb.policy.toys import minis, tiny_policy
from copd_nb.policy.core import Policy
from copd_nb.data.scoring import score, within
from copd_nb.engine.checkpoints import load_checkpoint
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run, latest_checkpoint
from copd_nb.analysis.tests import t_interval

pytestmark = pytest.mark.integration

HERE = Path(__file__).parents[1]
PAIR = ["text", "image"]
COPD = copd(PAIR, cycles=1, s_rl=2, s_opd=2, beta=0.5)
TINY = Config(prompts=4, opd_prompts=4, group_size=4, max_new_tokens=8, learning_rate=1e-2, warmup=2, probe_every=0,
              eval_every=0, eval_prompts=4, eval_samples=1, device="cpu")


@pytest.fixture(scope="module")
def start(): return tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)


@pytest.fixture(scope="module")
def suite(): return minis(tuple(PAIR))


def weights(policy) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in policy.parameters()])


def close(a, b): torch.testing.assert_close(weights(a), weights(b), atol=2e-4, rtol=0)


def rows(run, kind) -> pd.DataFrame: return run.events.query(f"kind == '{kind}'")


def program(*words, **environment):
    "What a Python program prints, and its exit status."
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE.parent)} | environment)


# Killed

def crashes(folder, moments, seed):
    done = program(HERE / "crashing.py", folder, moments, seed)
    assert done.returncode == 0, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def all_well(found, moments):
    assert len(found) == moments + 1 and all("error" not in f for f in found)
    assert all(f["same"] and f["resumed"] == 0 and f["lost"] <= 1 for f in found), found


def test_killed_and_resumed_is_bit_identical(tmp_path):
    all_well(crashes(tmp_path, 4, 1), 4)


@pytest.mark.slow
def test_killed_at_many_moments_and_resumed_is_bit_identical(tmp_path):
    found = crashes(tmp_path, 45, 0)
    print(*(f["moment"] for f in found), sep="\n")
    all_well(found, 45)
    assert sum("not reached" not in f["moment"] and f["moment"] != "too late" for f in found) >= 30


def test_a_log_that_lost_rows_the_checkpoint_counts_on_is_an_error(suite, start, tmp_path):
    asked = interrupted(suite, start, tmp_path / "run", TINY)
    log = EventLog(asked.path / "events.jsonl")
    log.truncate(log.size // 2)
    with pytest.raises(ValueError, match="its checkpoint 0000-000001 counts on"): train(COPD, suite, start, TINY,
                                                                                        asked.path, progress=False)
    assert latest_checkpoint(asked) is not None


def interrupted(suite, start, path, config) -> Run:
    "A run that a KeyboardInterrupt cut off in its second step."
    real, calls = phase_module.train_step, []
    def step(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args)
    phase_module.train_step = step
    try:
        with pytest.raises(KeyboardInterrupt): train(COPD, suite, start, config, path, progress=False)
    finally: phase_module.train_step = real
    return Run(path)


def test_how_a_run_ended_is_told(suite, start, tmp_path, monkeypatch):
    run = interrupted(suite, start, tmp_path / "run", TINY)
    assert run.status == "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(phase_module, "train_step", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError): train(COPD, suite, start, TINY, run.path, progress=False)
    assert run.status == "failed" and "ZeroDivisionError" in run.manifest["reason"]
    again = train(COPD, suite, start, TINY, run.path, progress=False)
    assert again.status == "finished" and again.manifest["reason"] is None


# The disk

FILLED = """
import json, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import crashing
from crashing import *
from copd_nb.engine.storage import WriteError
from copd_nb.engine.checkpoints import load_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
def mount(options): subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
def refused():
    try: whole_training(folder / "run")
    except WriteError as error: return str(error)
def intact(): return load_checkpoint(latest_checkpoint(Run(folder / "run")))[1]["step"] >= 1
whole_training(Path(sys.argv[3]))
told = dict(full=refused(), kept=intact(), left=[p.name for p in (folder / "run" / "checkpoints").iterdir()])
mount("ro")
told |= dict(readonly=refused(), still=intact())
mount("rw,size=60m")
whole_training(folder / "run")
told |= dict(same=outcome(folder / "run") == outcome(Path(sys.argv[3])))
print(json.dumps(told))
"""


def small_disk(folder: Path, size: str, *words):
    "Run a program in a mount namespace of its own, where a folder is a small disk."
    inner = f"mount -t tmpfs -o size={size} tmpfs {folder} && exec " + " ".join(map(str, words))
    return subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inner], capture_output=True,
                          text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not shutil.which("unshare")
                    or subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"],
                                      capture_output=True).returncode != 0,
                    reason="this machine permits no mount namespaces")
def test_a_full_or_readonly_disk_is_a_clear_error_and_the_last_checkpoint_is_intact(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "filled.py").write_text(FILLED)
    done = small_disk(tmp_path / "disk", size_of_disk(), sys.executable, tmp_path / "filled.py", tmp_path / "disk",
                      HERE, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "No space left" in told["full"] or "os error 28" in told["full"].lower() or "code: 28" in told["full"], told
    assert "can't be written" in told["full"] and "make room" in told["full"]
    assert "Read-only file system" in told["readonly"] and "can't be written" in told["readonly"]
    assert told["kept"] and told["still"] and told["same"] and len(told["left"]) == 1, told


def size_of_disk() -> str:
    "Room for one checkpoint of the two branches with their moments, and not for two."
    one = 2 * 3 * sum(p.numel() for p in tiny_policy(hidden=48, layers=1, vision_hidden=32,
                                                     vision_depth=1).parameters()) * 4
    return f"{one * 3 // 2 // 1024}k"


# NaN

def poisoned(monkeypatch, at, poison):
    "Spoil the gradient or the loss of some updates of the branch text."
    real = update_module.stream_gradient
    def spoilt(training, policy, batch, limits):
        gradient, loss = real(training, policy, batch, limits)
        return poison(gradient,
                      loss) if policy.name == "text" and training.branch("text").updates in at else (gradient, loss)
    monkeypatch.setattr(update_module, "stream_gradient", spoilt)


POISONS = {"NaN gradient": lambda g, x: ([None if t is None else t * math.nan for t in g], x),
           "infinite gradient": lambda g, x: ([None if t is None else t + math.inf for t in g], x),
           "NaN loss": lambda g, x: (g, math.nan), "infinite loss": lambda g, x: (g, math.inf)}


@pytest.mark.parametrize("poison", POISONS)
def test_an_update_that_is_not_finite_is_left_out_and_logged(poison, suite, start, tmp_path, monkeypatch):
    before = {}
    real = step_module._skip
    def watched(training, name, fault):
        before["weights"] = weights(training.branch(name).policy).clone()
        found = real(training, name, fault)
        assert torch.equal(before["weights"], weights(training.branch(name).policy))
        return found
    monkeypatch.setattr(step_module, "_skip", watched)
    poisoned(monkeypatch, {1}, POISONS[poison])
    run = train(COPD, suite, start, TINY, tmp_path / "run", progress=False)
    skipped, trained = rows(run, "skipped"), rows(run, "train")
    assert skipped[["branch", "update", "global_step"]].values.tolist() == [["text", 1, 2]]
    reason = skipped.reason[skipped.index[0]]
    assert poison.split()[1] in reason and "not finite" in reason
    assert trained.query("branch == 'text'").updates.tolist() == [1, 0, 1, 1, 1, 1]
    assert (trained.query("branch == 'image'").updates == 1).all()
    assert weights(run.result).isfinite().all() and before


def test_too_many_in_a_row_end_the_run_and_keep_the_checkpoint(suite, start, tmp_path, monkeypatch):
    config = replace(TINY, skip_limit=1)
    with monkeypatch.context() as patch:
        poisoned(patch, {1, 2}, POISONS["NaN gradient"])
        said = "branch 'text', update 2: the gradient of stream .* is not finite .*; 2 in a row, config skip_limit=1"
        with pytest.raises(FloatingPointError, match=said):
            train(COPD, suite, start, config, tmp_path / "run", progress=False)
        assert Run(tmp_path / "run").status == "failed"
        with pytest.raises(FloatingPointError): train(COPD, suite, start, config, tmp_path / "run",
                                                      progress=False)  # the count survives the resume
    assert latest_checkpoint(Run(tmp_path / "run")).name == "0000-000002"
    assert train(COPD, suite, start, config, tmp_path / "run", progress=False).finished


def test_single_ones_do_not_add_up(suite, start, tmp_path, monkeypatch):
    poisoned(monkeypatch, {0, 2}, POISONS["NaN loss"])
    run = train(COPD, suite, start, replace(TINY, skip_limit=1), tmp_path / "run", progress=False)
    assert rows(run, "skipped")["update"].tolist() == [0, 2]


# Memory

def short_of_memory(monkeypatch, most: int):
    "Let every pass over more than so many completion rows fail like a full GPU."
    hidden, decode = Policy.completion_hidden, streams_module.sample_many
    def passed(self, prompts, ids, *args):
        if len(ids) > most: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return hidden(self, prompts, ids, *args)
    def decoded(policy, requests, max_new_tokens, temperature, drop, rows=None):
        if min(rows or 1000, sum(len(r.prompts) * r.group_size for r in requests)) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return decode(policy, requests, max_new_tokens, temperature, drop, rows)
    monkeypatch.setattr(Policy, "completion_hidden", passed)
    monkeypatch.setattr(streams_module, "sample_many", decoded)


@pytest.mark.parametrize("switches", [{}, dict(skip_flat=False), dict(epochs=2), dict(shared_prompt=False)], ids=str)
def test_half_as_much_at_once_when_memory_runs_out(switches, suite, start, tmp_path, monkeypatch):
    config = replace(TINY, learning_rate=1e-3, **switches)
    whole = train(COPD, suite, start, config, tmp_path / "whole", progress=False)
    short_of_memory(monkeypatch, 5)
    run = train(COPD, suite, start, config, tmp_path / "short", progress=False)
    noted = rows(run, "memory")
    assert set(noted.part) >= {"rollouts", "gradients"} and noted.reason.str.contains("out of memory").all()
    assert noted.query("part == 'rollouts'").rollout_rows.tolist()[-1] <= 5 and len(noted) <= 12
    close(run.result, whole.result)
    columns = ["global_step", "branch", "stream", "reward", "length"]
    pd.testing.assert_frame_equal(rows(run, "train")[columns].reset_index(drop=True), rows(
        whole, "train")[columns].reset_index(drop=True))


def test_lowered_limits_survive_a_resume(suite, start, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 5)
    whole = train(COPD, suite, start, TINY, tmp_path / "whole", progress=False)
    cut = interrupted(suite, start, tmp_path / "cut", TINY)
    limits = load_checkpoint(latest_checkpoint(cut))[1]["limits"]
    assert limits["rollout_rows"] <= 5
    resumed = train(COPD, suite, start, TINY, cut.path, progress=False)
    pd.testing.assert_frame_equal(resumed.events.drop(columns="seconds"), whole.events.drop(columns="seconds"),
                                  check_exact=True)
    assert torch.equal(weights(resumed.result), weights(whole.result))


def test_one_completion_that_does_not_fit_ends_the_run(suite, start, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"): train(COPD, suite, start, TINY, tmp_path / "run",
                                                                      progress=False)
    assert Run(tmp_path / "run").status == "failed"


def test_other_errors_are_not_taken_for_memory(suite, start, tmp_path, monkeypatch):
    calls = []
    def fail(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(streams_module, "sample_many", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"): train(COPD, suite, start, TINY, tmp_path / "run",
                                                                         progress=False)
    assert len(calls) == 1


@pytest.mark.parametrize("now, most, least, then", [
    ({}, dict(rollout_rows=9), {}, dict(rollout_rows=4)), (dict(rollout_rows=100), dict(rollout_rows=9), {},
                                                           dict(rollout_rows=4)),
    (dict(micro_prompts=1), dict(micro_prompts=8, micro_tokens=80), dict(micro_tokens=10), dict(micro_prompts=1,
                                                                                                micro_tokens=40)),
    (dict(micro_prompts=1, micro_tokens=3), dict(micro_prompts=8, micro_tokens=80), dict(micro_tokens=10), None),
    (dict(rollout_rows=1), dict(rollout_rows=9), {}, None)])
def test_halved_limits(now, most, least, then):
    found = halved(replace(TINY, **now), most, least)
    assert found is None if then is None else {k: getattr(found, k) for k in then} == then


# Rewards that hang

def hang_on(words):
    def reward(completions, examples):
        for c in completions:
            while c in words: time.sleep(0.01)
        return [1.0] * len(completions)
    return reward


def test_a_hanging_reward_is_ended_and_the_rest_is_scored(suite):
    c, noted = Capability("c", suite["text"].train[:4], suite["text"].test[:4], hang_on({"b"})), []
    assert score(c, ["a", "b", "c"], c.train[:3], failed=-1.0, note=noted.append, seconds=0.3) == [1, -1, 1]
    assert [n.reason for n in noted] == ["failed (timeout after 0.1 s)"]
    with pytest.raises(ValueError, match="'c' raised TimeoutError: timeout after 0.3 s"): score(c, ["b"], c.train[:1],
                                                                                                seconds=0.3)


@pytest.mark.parametrize("swallow", ["Exception", "TimeoutError"])
def test_a_reward_that_swallows_errors_does_not_swallow_the_alarm(swallow):
    caught = dict(Exception=Exception, TimeoutError=TimeoutError)[swallow]
    with pytest.raises(TimeoutError), within(0.1):
        while True:
            try: time.sleep(0.01)
            except caught: pass


def test_the_alarm_is_taken_back():
    before = signal.getsignal(signal.SIGALRM)
    with within(0.05): pass
    with pytest.raises(ZeroDivisionError), within(0.05): 1 / 0
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_run_goes_on_behind_a_hanging_reward(suite, start, tmp_path):
    first = []
    def reward(completions, examples):
        first.append(completions)
        if len(first) == 1: time.sleep(100)
        return [float(len(c) % 2) for c in completions]
    bad = dict(suite, text=Capability("text", suite["text"].train, suite["text"].test, reward))
    run = train(expert("text", 2), bad, start, replace(TINY, reward_seconds=0.2), tmp_path / "run", progress=False)
    assert run.finished and len(rows(run, "train")) == 2


# Ctrl-C

PRESSED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from crashing import *
print("begins", flush=True)
try: whole_training(Path(sys.argv[1]))
except KeyboardInterrupt: print("interrupted", Run(Path(sys.argv[1])).status, flush=True)
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_cleanly_and_twice_at_once(presses, tmp_path):
    (tmp_path / "pressed.py").write_text(PRESSED)
    words = [sys.executable, tmp_path / "pressed.py", tmp_path / "run", HERE]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE.parent)}) as child:
        assert child.stdout.readline() == "begins\n"
        while not list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) and child.poll() is None: time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "stopping after this step; once more to stop at once\n"
        if presses == 2: child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted stopped\n" and child.wait(60) == 0
    run = Run(tmp_path / "run")
    kept, logged = latest_checkpoint(run), max(r["global_step"] for r in EventLog(run.path / "events.jsonl").rows())
    done = 2 * int(kept.name[:4]) + int(kept.name[5:])
    assert done == logged if presses == 1 else logged - done <= 1


IN_A_NOTEBOOK = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from crashing import *
whole_training(Path({path!r}))
print(Run(Path({path!r})).status)
"""


@pytest.mark.slow
def test_a_kernel_is_interrupted_and_restarted(tmp_path):
    "Ctrl-C in a notebook, then a kernel that is killed in the middle, then a new one that finishes: the same run."
    from jupyter_client.manager import start_new_kernel
    whole, path = tmp_path / "whole", tmp_path / "run"
    done = program("-c", IN_A_NOTEBOOK.format(here=str(HERE), path=str(whole)))
    assert done.returncode == 0, done.stderr
    manager, client = start_new_kernel(env=os.environ | {"PYTHONPATH": str(HERE.parent)})
    try:
        def begin(steps):
            client.execute(IN_A_NOTEBOOK.format(here=str(HERE), path=str(path)))
            log = EventLog(path / "events.jsonl")
            while len(log.rows()) < steps: time.sleep(0.01)
        begin(1)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=180)["content"]["ename"] == "KeyboardInterrupt"
        assert Run(path).status == "stopped"
        begin(8)
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=180)
        assert Run(path).status in ("interrupted", "stopped")  # a manager interrupts a kernel before it kills it
        client.execute(IN_A_NOTEBOOK.format(here=str(HERE), path=str(path)))
        assert client.get_shell_msg(timeout=180)["content"]["status"] == "ok" and Run(path).status == "finished"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    a, b = (Run(p).events.drop(columns="seconds") for p in (whole, path))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert torch.equal(weights(Run(whole).result), weights(Run(path).result))


# Long runs

LONG = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from crashing import *
from copd_nb.engine import config as config_module, phase as phase_module
from copd_nb.policy import encoding
assert encoding.KEPT_BYTES > 2 ** 20
encoding.KEPT_BYTES = 2 ** 20  # filled within the steps that are left out below
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
found, real = [], phase_module.train_step
def step(*args):
    found.append(resident())
    return real(*args)
phase_module.train_step = step
small = dict(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=4, probe_every=200, eval_every=500,
             learning_rate=1e-4)
schedule = copd(["text", "image"], cycles=100, s_rl=10, s_opd=10)
config = config_module.config_from(vars(CONFIG) | small)
train(schedule, SUITE, START, config, Path(sys.argv[1]), progress=False)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_memory_of_a_long_run_is_flat(tmp_path):
    "Resident memory over 2,000 steps: the slope after the first 400, its 95 % interval from ten blocks, in KiB a step."
    (tmp_path / "long.py").write_text(LONG)
    done = program(tmp_path / "long.py", tmp_path / "run", HERE)
    assert done.returncode == 0, done.stderr
    found = pd.Series(json.loads(done.stdout.splitlines()[-1]))
    assert len(found) == 2000
    blocks = [found[i:i + 160] for i in range(400, 2000, 160)]
    steps = [(b.iloc[-20:].mean() - a.iloc[-20:].mean()) / 160 for a, b in zip(blocks, blocks[1:])]
    slope = t_interval(steps)
    print(f"memory {found[400] / 1024:.1f} → {found.iloc[-1] / 1024:.1f} MiB, "
          f"slope {slope.mean:.3f} [{slope.low:.3f}, {slope.high:.3f}] KiB a step")
    assert slope.low <= 0.5 and slope.high < 20  # a cache of prompts without a limit made 33 to 45

