"""Worker side of a contest: one repetition for each line of standard input, its measurements as a line of JSON."""
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def device() -> str: return os.environ.get("BENCH_DEVICE", "cpu")


def finish():
    "Wait for what a graphics card was told to do."
    if device() == "cpu": return
    import torch
    torch.cuda.synchronize()


def _resident(process: int) -> int:
    "The most memory that a process ever held resident, with its children that live; 0 if it has ended (Linux)."
    try:
        told = Path(f"/proc/{process}/status").read_text()
        children = [c for f in Path(f"/proc/{process}/task").glob("*/children") for c in f.read_text().split()]
    except OSError: return 0
    most = re.search(r"VmHWM:\s+(\d+) kB", told)  # a process that has just ended has none
    return 1024 * int(most[1] if most else 0) + sum(_resident(int(c)) for c in children)


def peak_bytes() -> int:
    """The most memory that this process and its children ever held: on the graphics card if it uses one, else resident.
    A child's peak is added even if it was at another time."""
    if device() != "cpu":
        import torch
        return torch.cuda.max_memory_allocated()
    return _resident(os.getpid())


def versions(*packages: str) -> dict[str, str]:
    "Installed versions; packages that are absent are left out."
    found = {}
    for package in packages:
        try: found[package] = version(package)
        except PackageNotFoundError: continue
    return found


class Server:
    "Keeps standard output for itself: whatever else the process prints goes to standard error."
    def __init__(self):
        self.channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, **facts):
        "One line of JSON; the first one tells that the set-up is done."
        self.channel.write(json.dumps(dict(peak_bytes=peak_bytes()) | facts) + "\n")

    def wait(self):
        "Block until the next repetition is wanted; SystemExit when there is none."
        if not sys.stdin.readline(): raise SystemExit

    def serve(
        self,
        step: Callable[[], dict | None],  # one repetition; may return further measurements, or its own "seconds"
        **facts,  # said once, when ready
    ):
        "Answer requests until the input ends."
        self.say(**facts)
        while True:
            self.wait()
            began = time.perf_counter()
            measured = step() or {}
            finish()
            self.say(**{"seconds": time.perf_counter() - began} | measured)
