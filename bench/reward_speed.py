"""Completions a second of each reward.

    python bench/reward_speed.py                   # here
    python bench/reward_speed.py ../before         # here, there, and here / there: medians of alternating runs
"""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 5
PROSE = "The train leaves at nine and arrives at noon, so the way takes three hours and the answer is easy. " * 3
TESTS = json.dumps(dict(tests="assert f(1) == 2\nassert f(-3) == -6"))
TEXTS = {  # label → reward, completion, reference
    "numeric, bare": ("numeric?form=whole", "42", "42"),
    "numeric, 1,234.5": ("numeric?form=whole", "1,234.5", "1234.5"),
    "numeric, last of 60 words": ("numeric", PROSE + "It is 42.", "42"),
    "numeric, tag": ("numeric?form=tag:answer", PROSE + "<answer>42</answer>", "42"),
    "choice, (B)": ("choice", "(B)", "B"),
    "choice, 60 words": ("choice", PROSE + "The answer is B.", "B"),
    "boxed": ("boxed", PROSE + "\\boxed{42}", "42"),
    "exact": ("exact", "north", "north"),
    "math_verify": ("math_verify?form=boxed", "\\boxed{\\frac{6}{8}}", "\\frac{3}{4}"),
    "math_verify, formula": ("math_verify?form=boxed", "\\boxed{2x+1}", "1+2x"),
    "code": ("code?seconds=30", "def f(x): return 2 * x", TESTS),
}
COUNTS = {"math_verify": 200, "code": 32}  # completions of a call; 2,000 elsewhere


def here() -> dict[str, float]:
    "Completions a second of each reward, the better of two calls after a first one."
    from copd_nb.data.capability import Example
    from copd_nb.data.verifiers import named_reward
    found = {}
    for label, (name, text, answer) in TEXTS.items():
        reward, n = named_reward(name), COUNTS.get(name.partition("?")[0], 2000)
        reward([text] * 8, [Example("q", answer, "c")] * 8)
        spent = []
        for _ in range(2):
            begin = time.perf_counter()
            reward([text] * n, [Example("q", answer, "c")] * n)
            spent.append(time.perf_counter() - begin)
        found[label] = n / min(spent)
    return found


def measured(checkout: Path) -> dict[str, float]:
    "The same in a process of its own that imports another checkout."
    done = subprocess.run([sys.executable, __file__, "--here"], env=os.environ | {"PYTHONPATH": str(checkout)},
                          cwd=checkout, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main(words: list[str]):
    if words == ["--here"]: return print(json.dumps(here()))
    places = [Path(__file__).parents[1].resolve(), *(Path(w).resolve() for w in words[:1])]
    rounds = [[measured(p) for p in places] for _ in range(ROUNDS)]
    for label in TEXTS:
        speeds = [statistics.median(r[i][label] for r in rounds) for i in range(len(places))]
        ratios = sorted(r[0][label] / r[-1][label] for r in rounds)
        compared = f"  ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]" if words else ""
        print(f"{label:26} " + "  ".join(f"{s:12,.0f}/s" for s in speeds) + compared)


if __name__ == "__main__": main(sys.argv[1:])
