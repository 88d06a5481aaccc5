"""Worker: a command in a fresh process, from start to end."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from serve import Server


def main(words: list[str]):
    "Run a program that stands beside this interpreter for each repetition; it must succeed."
    program = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    def step() -> dict:
        with tempfile.TemporaryDirectory() as new:  # nothing is left from the repetition before
            subprocess.run([w.replace("{new}", new) for w in program], check=True, stdout=subprocess.DEVNULL)
        return dict(peak_bytes=1024 * getrusage(RUSAGE_CHILDREN).ru_maxrss)
    Server().serve(step)


if __name__ == "__main__": main(**json.loads(sys.argv[1]))
