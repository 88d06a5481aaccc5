"""Tables of the paradigms' pages that set CoPD beside other rows, from the records: `python docs/beside.py`"""
import re
from pathlib import Path

from from_records import Measured, lead, record  # beside this file

PARADIGMS = Path(__file__).parent / "paradigms"
TABLE = re.compile(  # under a paragraph that links to its report
    r"(?P<above>\(\.\./reports/(?P<name>[\w-]+)/experiment\.html\)[^\n]*\n\n"
    r"\| \| greedy \| CoPD minus it \| sampled \| CoPD minus it \|\n\|(?:---\|)+\n)(?P<rows>(?:\|[^\n]*\n)+)")


def row(name: str, setting: str, paradigm: str) -> str:
    "A line of a table: accuracy in %, and CoPD minus it in points, greedy and sampled."
    cells = [paradigm]
    for key in (f"{setting}/greedy", f"{setting}/sampled"):
        rows = {r["paradigm"]: r for r in record(name)["tables"][key] if r["capability"] == "mean"}
        if paradigm not in rows: raise ValueError(f"{name} has no row {paradigm!r}, but {', '.join(rows)}")
        r = rows[paradigm]
        cells += [f"{Measured(name, r['mean'], r['low'], r['high'])}",
                  "" if paradigm == "CoPD" else f"{lead(name, 'CoPD', paradigm, key)}"]
    return re.sub(" +", " ", f"| {' | '.join(cells)} |\n")


def refilled(page: str) -> str:
    "A page whose tables have the numbers of the records; rows stay as they are named there."
    def made(match: re.Match) -> str:
        setting, = record(match["name"])["parameters"]["settings"]
        names = [line.split("|")[1].strip() for line in match["rows"].splitlines()]
        return match["above"] + "".join(row(match["name"], setting, n) for n in names)
    return TABLE.sub(made, page)


if __name__ == "__main__":
    for file in sorted(PARADIGMS.glob("*.md")):
        file.write_text(refilled(file.read_text(encoding="utf-8")), encoding="utf-8")
