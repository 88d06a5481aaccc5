"""Damaged inputs for every reader of files, and the contract that a reader keeps.

`python tests/fuzzer.py INPUTS SEED READER …` tries so many inputs times the share of each reader, each reader in a
process of its own. An input that breaks the contract goes to `tests/corpus/`, where `test_fuzz.py` tries it again in
every run. Inputs are damaged seeds: bits, lengths and pieces of the bytes, or values, types and keys of the JSON in
them. An input that provokes a new behaviour of its reader is damaged further.

A fuzzer of bytes that is guided by coverage (atheris 3.0) was tried on schedules. Of 595,000 inputs the last 277,000
reached no new branch, because damaged bytes are hardly ever JSON. The damage to values would have to be written for
it, too, and it has wheels for some platforms only.
"""
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from copd_nb.data import schema as schema_module
from copd_nb.policy import gguf as gguf_module
from copd_nb.data.columns import Columns
from copd_nb.data.files import capability_from
from copd_nb.data.guess import guess_from
from copd_nb.data.faults import problems
from copd_nb.analysis.records import read_results
from copd_nb.engine.checkpoints import load_checkpoint, save_checkpoint
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run, list_runs
from copd_nb.schedule.core import Schedule

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 20_000  # bytes of an input
SECONDS = 5  # of the processor, for one input
MEMORY = 4 * 2 ** 30  # bytes beyond what is mapped before the first input


class Hang(BaseException): "A reader did not come back."


class Breach(Exception): "A reader did what it may not do."


class Reader(NamedTuple):
    file: str  # name of the file that it reads, in a folder of its own
    read: Callable  # of the file's path
    share: int  # of a million inputs, in thousands
    way: str  # how its files are damaged: "json", "lines" or "bytes"
    prepare: Callable = lambda folder: None  # puts what else it needs into the folder


# --- the readers ----------------------------------------------------------------------------------------------------

CHOICE = Columns("q.text", "answer", options="options", extract="letter", images=("image", "images"),
                 template="Q: {prompt}", where=(("kind", "mc"),))
REWARDS = ("exact", "numeric", "choice", "instructions", "code")


def _pictures(folder):
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(folder / "dot.png")
    np.save(folder / "film.npy", np.zeros((2, 2, 2, 3), np.uint8))


def read_rows(path):
    "Problems, a guess, then the capability; the columns and the reward are chosen by the file."
    data = path.read_bytes()
    columns, reward = (CHOICE, "choice") if b"options" in data else (Columns(), REWARDS[len(data) % 5])
    wrong = problems(path, columns, reward)
    assert set(wrong.file) <= {path.name} and wrong.problem.map(bool).all()
    if not (wrong.problem == "holds no prompts").any(): assert guess_from(path, verify=False).reasons
    capability_from(path, "sums", reward, columns, limit=50)


def read_run(path):
    run = Run(path.parent)
    assert isinstance(run.finished, bool) and repr(run)
    run.schedule.content_hash()


def read_store(path):
    "A damaged run is shown as damaged, and the other one as it is."
    found = list_runs(path.parents[1])
    assert len(found) == 2 and found.seed.iloc[0] == 7 and found.status.iloc[0] == "interrupted"
    assert (found.status.iloc[1] == "damaged") == pd.isna(found.content_hash.iloc[1])


def _store(folder): shutil.copytree(CORPUS / "manifest" / "store", folder.parent, dirs_exist_ok=True)


def read_state(path):
    tensors, state = load_checkpoint(path.parent)
    assert set(tensors) <= {"text~weights"} and "files" not in state


def _checkpoint(folder): save_checkpoint(folder, {"text~weights": {"w": torch.arange(4)}}, {})


def read_tensors(path):
    "A file of tensors whose hash is right."
    state = path.with_name("state.json")
    state.write_text(json.dumps(dict(files={path.name: hashlib.sha256(path.read_bytes()).hexdigest()})))
    load_checkpoint(path.parent)


def read_schedule(path):
    schedule = Schedule.from_dict(schema_module.parse(path.read_bytes())).validate()
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def read_record(path): json.dumps(read_results(path), ensure_ascii=False, allow_nan=False).encode()


READERS = {
    "jsonl": Reader("rows.jsonl", read_rows, 5, "lines", _pictures),
    "json": Reader("rows.json", read_rows, 5, "json", _pictures),
    "parquet": Reader("rows.parquet", read_rows, 5, "bytes", _pictures),
    "manifest": Reader("store/b/manifest.json", read_run, 40, "json"),
    "store": Reader("store/b/manifest.json", read_store, 5, "json", _store),
    "events": Reader("events.jsonl", lambda path: EventLog(path).rows(), 645, "lines"),
    "frame": Reader("run/events.jsonl", lambda path: Run(path.parent).events, 10, "lines",
                    lambda folder: shutil.copy(CORPUS / "manifest" / "seed-plan.json", folder / "manifest.json")),
    "state": Reader("000007/state.json", read_state, 110, "json", _checkpoint),
    "tensors": Reader("000007/text~weights.safetensors", read_tensors, 60, "bytes", _checkpoint),
    "schedule": Reader("schedule.json", read_schedule, 50, "json"),
    "record": Reader("results.json", read_record, 45, "json"),
    "gguf": Reader("model.gguf", gguf_module._check_gguf, 20, "bytes"),
}
SAME = {"store": "manifest", "frame": "events"}  # reader → the one whose corpus it shares


def corpus(name): return sorted(p for p in (CORPUS / SAME.get(name, name)).iterdir() if p.is_file())


def limited(_signal, _frame): raise Hang


def attempt(name: str, data: bytes, folder: Path) -> str:
    "The behaviour of a reader on an input, in a few words; Breach if it breaks the contract."
    reader, path = READERS[name], folder / READERS[name].file
    path.write_bytes(data)
    signal.signal(signal.SIGVTALRM, limited)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try: reader.read(path)
    except ValueError as error:
        if name != "schedule" and path.name not in str(error) and str(path.parent) not in str(error):
            raise Breach(f"the message doesn't name the file: {error!r:.300}") from error
        if str(error) != str(error).encode("utf-8", "replace").decode():
            raise Breach(f"the message can't be printed: {error!r:.300}") from error
        return re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|/\S+", "·", str(error))[-90:]
    except (Hang, Exception) as error: raise Breach(f"{type(error).__name__}: {error!s:.300}") from error
    finally: signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return "accepted"


# --- damage ---------------------------------------------------------------------------------------------------------

RAW = ["1e400", "-1e400", "NaN", "Infinity", "-0", "9" * 4000, "9" * 5000, "1" + "0" * 310, "1e-400", '"\\ud800"',
       '"\\udfff\\u0000"', '"\x00"', "[" * 60 + "]" * 60, "[" * 990 + "]" * 990,
       '{"a":' * 200 + "1" + "}" * 200, "[" * 3000, '{"a":1,"a":2}', "tru", "", "01", "1.", "'x'", "\xff",
       '"\ud83d\ude00"'.encode("utf-16", "surrogatepass").decode("utf-16")]
ODD = [None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, 2 ** 64, -2 ** 70, 0.5, 1e300, -1e-300, "", " ", "\n", "a", "é",
       "日本", "\u202e", "../../x", "/etc/passwd", "dot.png", "film.npy", "x" * 300, "base", "rl", "opd", "sft",
       "text", "0.5", "(" * 300, "[" * 3000, "-" * 5000 + "1", "[" * 900 + "]" * 900, "A", [], [[]], [None],
       [1, "a", None], {}, {"": {}}, {"a": [1]}, {"bytes": "x"}, {"path": "dot.png"}, {"role": "user", "content": 3},
       "{\"a\"", "copd_nb.schedule/2"]
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"\r\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf",
          b"null", b"true", b"1e999", b'"a":1,', b"\\ud800", b"[" * 1200, b"PAR1", b"GGUF", b"\xed\xa0\x80"]
NUMBERS = [n.to_bytes(8, "little") for n in (0, 1, 2, 8, 9, 255, 2 ** 16, 2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 40,
                                             2 ** 62, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1)]


def cut(rng, data):
    "Two places of an input, near each other as often as not."
    a = rng.randrange(len(data) + 1)
    b = min(len(data), a + rng.randrange(9)) if rng.random() < .5 else rng.randrange(len(data) + 1)
    return min(a, b), max(a, b)


def bytes_damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    "One piece of damage to bytes."
    (a, b), kind = cut(rng, data), rng.randrange(7)
    if kind == 0 and data:
        bit = rng.randrange(8 * len(data))
        return data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]
    if kind == 1: return data[:a]
    if kind == 2: return data[:a] + data[b:]
    if kind == 3: return data[:b] + data[a:]
    if kind == 4: return data[:a] + rng.choice(TOKENS) + data[a if rng.random() < .5 else b:]
    if kind == 5:
        number = rng.choice(NUMBERS)[:rng.choice((1, 4, 8))]
        return data[:a] + number + data[a + len(number):]
    c, d = cut(rng, other)
    return data[:a] + other[c:d] + data[b:]


def places(value) -> list[tuple]:
    "Every (container, key) of a JSON value."
    found, todo = [], [value]
    while todo:
        x = todo.pop()
        keys = list(x) if isinstance(x, dict) else range(len(x))
        found += [(x, k) for k in keys]
        todo += [x[k] for k in keys if isinstance(x[k], (dict, list))]
    return found


def turned(rng, value):
    "The same in another type."
    return rng.choice((str(value), [value], {"a": value}, [value, value], value if isinstance(value, bool)
                       else len(str(value)), float(len(str(value))), not value))


def value_damaged(rng: random.Random, box: list, other) -> None:
    "One piece of damage to the JSON value in a box."
    x, k = rng.choice(places(box))
    kind = rng.randrange(8)
    if kind == 0 and x is not box: del x[k]
    elif kind == 1 and isinstance(x, dict):
        x[rng.choice(("", "a", "seed", "lr", "kind", "name", "\ud800", "x" * 300, str(k) + "2"))] = x.pop(k)
    elif kind == 2 and isinstance(x, list) and x is not box: x.insert(k, x[k])
    elif kind == 3: x[k] = turned(rng, deepcopy(x[k]))
    elif kind == 4: x[k] = deepcopy((lambda y, j: y[j])(*rng.choice(places([other]))))
    elif kind == 5: x[k] = f"@{rng.randrange(len(RAW))}@"
    else: x[k] = deepcopy(rng.choice(ODD))


@cache
def parsed(data: bytes):
    "A JSON value, or None for what is none."
    try: return json.loads(data)
    except (ValueError, RecursionError): return None


def json_damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    "Damage to the value, where there is one."
    if parsed(data) is None: return bytes_damaged(rng, data, other)
    box = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))): value_damaged(rng, box, parsed(other))
    try: text = json.dumps(box[0], ensure_ascii=rng.random() < .9)
    except RecursionError: return bytes_damaged(rng, data, other)
    return re.sub(r'"@(\d+)@"', lambda m: RAW[int(m[1])], text).encode("utf-8", "surrogatepass")


def damaged(rng: random.Random, way: str, data: bytes, other: bytes) -> bytes:
    "An input made of two others."
    if way == "bytes" or rng.random() < .3:
        for _ in range(rng.choice((1, 1, 2, 3, 8))): data = bytes_damaged(rng, data, other)
        return data
    if way == "json": return json_damaged(rng, data, other)
    lines, more = data.split(b"\n"), other.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = json_damaged(rng, lines[at], rng.choice(more))
    return b"\n".join(lines)


# --- the loop -------------------------------------------------------------------------------------------------------

class Lines:
    "Which lines of the readers' modules run."
    files = {m.__file__ for n, m in sys.modules.items() if n.startswith("copd_nb.") and m.__file__}

    def __init__(self): self.seen = set()

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.files: return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self


def place_for(name: str, folder: Path) -> Path:
    "A folder with all that a reader needs but its file."
    parent = (folder / READERS[name].file).parent
    parent.mkdir(parents=True, exist_ok=True)
    READERS[name].prepare(parent)
    return folder


def explore(name: str, inputs: int, seed: int, folder: Path) -> dict:
    "Try inputs, and damage those further that provoke a new behaviour; returns counts, behaviours and breaches."
    rng, seeds = random.Random(f"{seed}/{name}"), [p.read_bytes() for p in corpus(name)]
    pool, seen, broken = list(seeds), Counter(), {}
    for _ in range(inputs):
        data = damaged(rng, READERS[name].way, rng.choice(pool if rng.random() < .5 else seeds),
                       rng.choice(pool))[:LONGEST]
        try: said = attempt(name, data, folder)
        except Breach as error:
            said = f"BREACH {error!s:.60}"
            if said not in seen: broken[data] = str(error)
        if said not in seen and len(pool) < 400: pool.append(data)
        seen[said] += 1
    return dict(inputs=inputs, accepted=seen["accepted"], behaviours=len(seen), lines=lines_reached(name, pool, folder),
                broken=broken)


def lines_reached(name: str, pool: list[bytes], folder: Path) -> int:
    "Lines of the package that the kept inputs reach."
    tracer = Lines()
    for data in pool:
        sys.settrace(tracer)
        try: attempt(name, data, folder)
        except Breach: pass
        finally: sys.settrace(None)
    return len(tracer.seen)


def mapped_memory() -> int: return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def keep(name: str, data: bytes, said: str):
    "Write an input that broke a reader into its corpus, and report it."
    path = CORPUS / SAME.get(name, name) / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"{path}: {said}", file=sys.stderr, flush=True)


def explored(name: str, inputs: int, seed: int, folder: Path):
    "Try inputs in this process, keep what broke the reader, and print what was found."
    began = time.process_time()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (mapped_memory() + MEMORY, resource.RLIM_INFINITY))
    found = explore(name, inputs, seed, place_for(name, folder))
    for data, said in found.pop("broken").items(): keep(name, data, said)
    print(json.dumps(dict(reader=name, **found, seconds=round(time.process_time() - began, 1))), flush=True)


def main(inputs: str, seed: str, *names: str):
    "A process for each reader: where it dies, the input that lies there killed it."
    for name in names:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            child = os.fork()
            if not child:
                explored(name, int(inputs) * READERS[name].share, int(seed), Path(folder))
                os._exit(0)
            if status := os.waitpid(child, 0)[1]:
                keep(name, (Path(folder) / READERS[name].file).read_bytes(), f"its process died with status {status}")


if __name__ == "__main__": main(*sys.argv[1:])
