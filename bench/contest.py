"""Processes that take turns: one repetition each, round after round."""
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Side:
    "One of the things that are compared."
    name: str  # as shown in the table
    program: str  # a file of this folder, without ".py"
    task: dict  # what the program is told
    compared: bool = True  # False: a yardstick, its ratio means nothing
    place: str = "own"  # environment: this one, that of "trl" or that of "vllm"


@dataclass(frozen=True)
class Case:
    "Some sides that do the same work; the first is the one that the others are measured against."
    line: int  # of the benchmark
    title: str
    sides: tuple[Side, ...]
    repeats: int = 9  # rounds
    warmup: int = 2  # rounds that don't count
    aim: dict[str, float] = field(default_factory=dict)  # side → wanted ratio of its seconds to those of the first
    within: float | None = None  # wanted seconds of the first side
    fit: str | None = None  # what the sides differ in: the exponent of seconds against it is fitted
    peak_aim: float | None = None  # wanted share of the matrix-product peak
    rate: bool = False  # every side makes the same tokens: tokens a second are told
    note: str = ""  # shown under the table when a side of this case needs a word


class Failed(Exception):
    "A worker ended; the message is what it said last."


class Worker:
    "One side in its own process: set up once, then asked for repetitions. Idle, it blocks on its input."
    def __init__(self, command: list[str], environment: dict[str, str]):
        self.errors = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.process = subprocess.Popen(command, text=True, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def answer(self) -> dict:
        "The next line of the worker; the first holds the facts of its set-up."
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        self.errors.seek(0)
        said = [text.strip() for text in self.errors if text.strip()]
        if (status := self.process.wait()) < 0:  # nothing that it said is the reason
            raise Failed(f"killed by {signal.Signals(-status).name}, as where memory ends")
        raise Failed(said[-1][:600] if said else f"ended with status {status}")

    def repeat(self) -> dict:
        "One repetition."
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError: pass  # `answer` tells why
        return self.answer()

    def close(self):
        "End the process, and whatever it has started: the workers of an engine that was killed go on and take time."
        try: self.process.stdin.close()
        except BrokenPipeError: pass
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: pass
        with suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def hold(
    case: Case,
    start: Callable[[Side], Worker],  # may raise Failed
    repeats: int,  # rounds that count
) -> dict:  # facts and rounds of the sides that lasted, and the failures of the others
    "Start every side, warm up, then let them take turns; a side that fails leaves the contest."
    workers, facts, failures = {}, {}, {}

    def ask(name: str, act: Callable):
        "What a side answers, None once it has failed."
        if name in failures: return None
        try: return act()
        except Failed as error: failures[name] = str(error)

    try:
        for side in case.sides:
            worker = ask(side.name, lambda side=side: start(side))
            if worker is None: continue
            workers[side.name] = worker
            facts[side.name] = ask(side.name, worker.answer)
            for _ in range(case.warmup): ask(side.name, worker.repeat)
        rounds = [{name: ask(name, worker.repeat) for name, worker in workers.items()} for _ in range(repeats)]
    finally:
        for worker in workers.values(): worker.close()
    lasted = [name for name in workers if name not in failures]
    return dict(facts={n: facts[n] for n in lasted}, rounds={n: [r[n] for r in rounds] for n in lasted},
                failures=failures)
