"""Kills a training again and again and resumes it each time: `python tests/crashing.py FOLDER MOMENTS SEED`.

It prints one JSON line a moment. It forks, so torch may not have started threads."""
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from everywhere import everywhere  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from copd_nb.data import scoring as scoring_module
from copd_nb.engine import checkpoints as checkpoints_module
from copd_nb.engine import storage as storage_module
from copd_nb.engine import update as update_module
from copd_nb.schedule import controllers as controllers_module
from copd_nb.signals import heads as heads_module
from copd_nb.signals import sampling as sampling_module  # noqa: E402
from copd_nb.schedule.control import gradient_share
from copd_nb.schedule.copd_schedules import copd  # noqa: E402
from copd_nb.engine.config import Config
from copd_nb.engine.training import train  # noqa: E402
from copd_nb.policy.toys import minis, tiny_policy  # noqa: E402
from copd_nb.policy.core import Policy  # noqa: E402
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run, latest_checkpoint  # noqa: E402

SCHEDULE = copd(["text", "image"], cycles=2, s_rl=2, s_opd=2, control=gradient_share(0.3))
CONFIG = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=8, learning_rate=1e-2, warmup=2, probe_every=2,
                probe_prompts=2, eval_every=4, eval_prompts=4, eval_samples=1, device="cpu")
SUITE, START = minis(("text", "image")), tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)


def die(): os.kill(os.getpid(), signal.SIGKILL)


def torn_append(log: EventLog, rows):
    "Write the first half of some rows, and die."
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    with open(log.path, "ab") as handle: handle.write(data[:len(data) * 2 // 3])
    die()


# What the training is doing when it dies: where → (object, function, what happens instead; None to die before it).
# A function of a module is replaced in every module that has imported it.
PLACES = {
    "rollouts": (sampling_module, "sample_many", None),
    "scoring": (heads_module, "token_scores", None),
    "rewards": (scoring_module, "score", None),
    "update": (update_module, "optimizer_step", None),
    "events, torn line": (EventLog, "append", torn_append),
    "log flushed": (EventLog, "sync", None),
    "checkpoint, between files": (checkpoints_module, "save_file", None),
    "checkpoint, before its state": (checkpoints_module, "_digest", None),
    "folder, before the renames": (storage_module, "_replace_folder", None),
    "file or folder, at a rename": (Path, "replace", None),
    "old checkpoint removed": (shutil, "rmtree", None),
    "branches saved": (Policy, "save", None),
    "manifest": (storage_module, "write_json", None),
    "control": (controllers_module, "controlled", None),
}


def arm(place: str, nth: int):
    "Let the process die in the n-th call of a function."
    owner, name, instead = PLACES[place]
    real, left = getattr(owner, name), [nth]

    def bomb(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0: instead(*args) if instead else die()
        return real(*args, **kwargs)
    for where in everywhere(name, real) if owner.__name__.startswith("copd_nb.") else [owner]: setattr(where, name,
                                                                                                       bomb)


def forked(work) -> int:
    "Do some work in a child; its process number."
    if child := os.fork(): return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(json.dumps(dict(error=repr(error))), flush=True)
        os._exit(1)


def ended(child: int) -> int: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_training(path: Path): train(SCHEDULE, SUITE, START, CONFIG, path, progress=False)


def outcome(path: Path) -> tuple:
    "Everything that a run leaves but times: events, weights, status, realised schedule, names of files."
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in EventLog(path / "events.jsonl").rows()]
    weights = {str(f.relative_to(path)): {k: v.numpy().tobytes() for k, v in load_file(f).items()}
               for f in sorted(path.rglob("*.safetensors"))}
    manifest = Run(path).manifest
    return rows, weights, manifest["status"], manifest.get("realised"), sorted(str(f.relative_to(path))
                                                                               for f in path.rglob("*"))


def lost_steps(path: Path) -> int:
    "Steps that the log has and the checkpoint lacks, after a crash."
    if not (path / "manifest.json").exists() or Run(path).finished: return 0
    kept, logged = latest_checkpoint(Run(path)), [r["global_step"] for r in EventLog(path / "events.jsonl").rows()
                                                  if r["kind"] == "train"]
    done = 0 if kept is None else sum(p.steps for p in SCHEDULE.phases[:int(kept.name[:4])]) + int(kept.name[5:])
    return max(logged, default=0) - done


def killed(path: Path, rng: random.Random, seconds: float, i: int) -> str:
    "Start a training and kill it: at places in turn, and every third time at a random moment."
    if i % 3 == 2:
        child, wait = forked(lambda: whole_training(path)), rng.uniform(0.02, seconds)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        return f"after {wait:.2f} s" if ended(child) == -signal.SIGKILL else "too late"
    place, nth = list(PLACES)[(i - i // 3) % len(PLACES)], rng.choice((1, 2, 3))
    def work():
        arm(place, nth)
        whole_training(path)
    return f"{place}, call {nth}" if ended(forked(work)) == -signal.SIGKILL else f"{place}, call {nth}: not reached"


def main(folder: str, moments: str, seed: str):
    rng, root = random.Random(int(seed)), Path(folder)
    began = time.monotonic()
    if ended(forked(lambda: whole_training(root / "whole"))): sys.exit("the uninterrupted run failed")
    seconds, expected = time.monotonic() - began, outcome(root / "whole")
    for i in range(int(moments)):
        path = root / f"run-{i}"
        moment = killed(path, rng, seconds, i)
        lost = lost_steps(path)
        resumed = ended(forked(lambda: whole_training(path)))
        print(json.dumps(dict(moment=moment, lost=lost, resumed=resumed, same=resumed == 0
                              and outcome(path) == expected)), flush=True)
        shutil.rmtree(path)
    path, deaths = root / "over-and-over", 0
    while not ((path / "manifest.json").exists() and Run(path).finished):
        child = forked(lambda: whole_training(path))
        time.sleep(rng.uniform(seconds / 6, seconds / 2))
        os.kill(child, signal.SIGKILL)
        deaths += ended(child) == -signal.SIGKILL
    print(json.dumps(dict(moment=f"over and over, {deaths} times", lost=0, resumed=0, same=outcome(path) == expected)),
          flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
