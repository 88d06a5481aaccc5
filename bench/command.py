"""Worker: a command in a fresh process, from start to end."""
import json
import subprocess
import sys
from resource import RUSAGE_CHILDREN, getrusage

from serve import Server


def main(words: list[str]):
    "Run the command for each repetition; it must succeed."
    def step() -> dict:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return dict(peak_bytes=1024 * getrusage(RUSAGE_CHILDREN).ru_maxrss)
    Server().serve(step)


if __name__ == "__main__": main(**json.loads(sys.argv[1]))
