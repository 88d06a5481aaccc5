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


def peak_bytes() -> int:
    "The most memory that this process ever held: on the graphics card if it uses one, else resident (Linux)."
    if device() != "cpu":
        import torch
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


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
