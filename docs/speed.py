"The table of the page on results that says how fast the package is: from `bench/results.json` alone."
import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "bench" / "results.json"
LINES = 1, 2, 3, 4, 11, 12, 13  # of the benchmark: those with another program beside us
OTHERS = "TRL", "transformers", "vLLM"
GIB = 2 ** 30


def _number(value: float) -> str: return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _rows(case: dict) -> list[str]:
    "A row for each other program of a case."
    sides = case["summary"]["sides"]
    mine, when = next(iter(sides)), case.get("where") or {}
    known = sides[mine].get("share") or next(iter(case["summary"].get("peak_share", ())), None)
    share = f"{known:.0%}" if known else "–"
    made = f"{when['commit']}, {when['date'][:10]}" if "date" in when else "before 0.2"
    memory = lambda name: f"{sides[name]['peak_bytes'] / GIB:.1f}"
    ratio = lambda low, middle, high: f"{middle:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")
    return [f"| {case['title']} | {_number(sides[mine]['seconds'][1])} | {name} {_number(side['seconds'][1])} | "
            f"{ratio(*side['ratio'])} | {memory(mine)}, {memory(name)} | {share} | {made} |"
            for name, side in sides.items() if name.startswith(OTHERS) and "ratio" in side]


def speed() -> str:
    "Seconds of a repetition beside other programs, the ratio with its quartiles, peak memory, share of the peak."
    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    rows = [row for case in cases if case["line"] in LINES for row in _rows(case)]
    head = ("| step | copd_nb, s | beside, s | times faster, quartiles of several rounds | peak, GiB | "
            "of the product peak | measured at |")
    return "\n".join([head, "|---" * 7 + "|", *rows])
