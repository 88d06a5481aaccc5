"""Numbers of the published records, each with where it comes from"""
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from copd_nb.analysis.evidence import phase_change
from copd_nb.analysis.page import claims_of, kind_of
from copd_nb.analysis.records import read_results
from copd_nb.analysis.typical import typical_interval

REPORTS = Path(__file__).parent / "reports"


def signed(value: float, digits: int = 1) -> str:
    "With a real minus sign, and no sign at zero."
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


@dataclass(frozen=True)
class Measured:
    "An estimate with its interval, and where it is recorded."
    source: str
    value: float
    low: float
    high: float
    p: float = float("nan")
    digits: int = 1

    def __neg__(self): return Measured(self.source, -self.value, -self.high, -self.low, self.p, self.digits)

    def __format__(self, form: str) -> str:
        "`points` and plain: value and interval; `mean`, `p`, `ends` (low to high), `bounds`: a part."
        value, low, high = (signed(x, self.digits) for x in (self.value, self.low, self.high))
        if form == "p": return "p < 0.001" if self.p < 1e-3 else f"p = {self.p:.2g}"
        if form == "mean": return value
        if form == "ends": return f"{low} to {high}"
        if form == "bounds": return f"[{low}, {high}]"
        return f"{value}{' points' * (form == 'points')} [{low}, {high}]"


@dataclass(frozen=True)
class Counted:
    "A number without an interval."
    source: str
    value: float

    def __format__(self, form: str) -> str: return format(self.value, form)


@cache
def record(name: str) -> dict: return read_results(REPORTS / name / "results.json")


def lead(name: str, a: str, b: str, key: str) -> Measured:
    "One row minus another, as the plan (`setting/planned`) or the verdicts have it, either way round."
    setting, _, kind = key.partition("/")
    if kind == "planned":
        rows = [(r, r["a"], r["b"]) for r in record(name)["planned"] if r["setting"] == setting]
    else: rows = [(r, r["paradigm"], r["other"]) for r in record(name)["verdicts"][key]]
    for r, first, second in rows:
        found = Measured(f"{name}: {kind}", r["difference"], r["low"], r["high"], r.get("p_holm", float("nan")))
        if (first, second) == (a, b): return found
        if (first, second) == (b, a): return -found
    raise ValueError(f"{name}: {key}: {a} and {b} are not compared")


def ahead_of(name: str, paradigm: str, key: str) -> Measured:
    "Points by which the first of a ranking is ahead of a row."
    r = next(r for r in record(name)["leaders"][key] if r["paradigm"] == paradigm)
    return Measured(f"{name}: leaders", r["lead"], r["lead_low"], r["lead_high"])


def seed_differences(found: dict, setting: str, a: str, b: str) -> pd.Series:
    "Greedy differences of two rows of a record, mean over capabilities, by seed."
    table = pd.DataFrame(found["per_seed"][f"{setting}/greedy"])
    table = table[table.capability.isin(found["parameters"]["settings"][setting])]
    each = table.pivot_table(index="paradigm", columns="seed", values="accuracy", aggfunc="mean")
    return each.loc[a] - each.loc[b]


def typical(name: str, a: str, b: str, setting: str) -> Measured:
    "One row minus another in the typical run, which is what an interval can say where some runs collapse."
    i = typical_interval(seed_differences(record(name), setting, a, b))
    return Measured(f"{name}: per_seed", i.mean, i.low, i.high)


def against(name: str, paradigm: str, part: str, key: str, **where) -> Measured:
    "A row minus the reference, from the tables at equal entropy or equal budgets."
    r = next(r for r in record(name)[part][key] if r["paradigm"] == paradigm and where.items() <= r.items())
    return Measured(f"{name}: {part}", r["difference"], r["low"], r["high"])


def found(name: str, claim: str, digits: int = 3) -> Measured:
    r = record(name)["claims"][claim]
    return Measured(f"{name}: claims", r["value"], r["low"], r["high"], digits=digits)


def kl_change(distils: bool) -> Measured:
    "Change of symmetric KL between CoPD's branches in a phase of OPD or of RLVR."
    i = phase_change(record(DYNAMICS)["tables"]["changes"], "symmetric_kl", distils)
    return Measured(f"{DYNAMICS}: changes", i.mean, i.low, i.high, digits=3)


def told(name: str, words: str, digits: int) -> Measured:
    "An interval that follows some words in the record's own sentences."
    sentences = " ".join([record(name)["headline"], *record(name)["shown"]]).replace("−", "-")
    number = r"(-?[0-9.]+)"
    values = re.search(rf"{re.escape(words)} {number} \[{number}, {number}\]", sentences)
    return Measured(f"{name}: sentences", *map(float, values.groups()), digits=digits)


def distance() -> Measured:
    "Points lost for a standard deviation of distance, at equal accuracy before."
    fits = record("pilot-standard")["tables"]["fits"]
    r = next(r for r in fits if (r["outcome"], r["distance"]) == ("greedy", "JSD"))
    return -Measured("pilot-standard: fits", r["value"], r["low"], r["high"])


def within_form() -> Measured:
    "The same among pairs of student and teacher that reason in one form."
    r = next(r for r in record("pilot-standard")["tables"]["checks"] if r["model"] == "teacher's dialect only")
    return -Measured("pilot-standard: checks", r["value"], r["low"], r["high"])


def pilot_said(pattern: str) -> Counted:
    "A number in the record's own sentences."
    pilot = record("pilot-standard")
    said = " ".join([pilot["headline"], *pilot["shown"]])
    return Counted("pilot-standard: sentences", float(re.search(pattern, said)[1]))


def live() -> Measured:
    "Points that completions of the student as it is are ahead of those of the frozen initial student."
    r = next(r for r in record("pilot-standard")["tables"]["live"] if r["outcome"] == "greedy")
    return Measured("pilot-standard: live", r["lead"], r["low"], r["high"])


def rises() -> tuple[Counted, Counted]:
    "The smallest and largest rise of an expert in the last quarter of its steps."
    said = next(x for x in record(CO)["limits"] if "last quarter" in x)
    found = sorted(map(float, re.findall(r"\+([0-9.]+) \(", said)))
    return Counted(f"{CO}: limits", found[0]), Counted(f"{CO}: limits", found[-1])


def level(paradigm: str, temperature: float) -> Counted:
    "Accuracy at a temperature, mean over capabilities and seeds, in %."
    rows = pd.DataFrame(record(CO)["over_temperature"]["three/last weights"])
    rows = rows[(rows.paradigm == paradigm) & (rows.temperature == temperature)]
    return Counted(f"{CO}: over_temperature", rows.groupby("capability").accuracy.mean().mean())


def pass_at_4(paradigm: str) -> Counted:
    rows = pd.DataFrame(record(CO)["pass_at_k"]["three/pass@4"])
    means = rows[(rows.paradigm == paradigm) & (rows.capability != "mean")]["mean"]
    return Counted(f"{CO}: pass_at_k", means.mean())


def over_seeds(paradigm: str, how: str) -> Counted:
    "`std` or `min` over seeds of the greedy accuracy, mean over capabilities."
    table = pd.DataFrame(record(CO)["per_seed"]["three/greedy"])
    each = table[(table.paradigm == paradigm) & (table.capability != "mean")].groupby("seed").accuracy.mean()
    return Counted(f"{CO}: per_seed", each.agg(how))


def missing(paradigm: str) -> Measured:
    "Points by which a unified model is below the experts on their own capabilities, mean over these."
    r = next(r for r in record(CO)["gaps"]["three/greedy"] if (r["paradigm"], r["capability"]) == (paradigm, "mean"))
    return Measured(f"{CO}: gaps", r["value"], r["low"], r["high"])


@cache
def claims_page() -> pd.DataFrame:
    "Every claim with a row for each record that says something about it."
    return claims_of({f.parent.name: record(f.parent.name) for f in sorted(REPORTS.glob("*/results.json"))})


@cache
def claims() -> pd.DataFrame:
    "The row that decides each claim, with the kind of its verdict."
    page = claims_page()
    return page[page.main].assign(kind=lambda t: t.verdict.map(kind_of))


def verdicts() -> dict[str, Counted]:
    "How many claims there are, and how many have which verdict."
    kinds = claims().kind
    return {k: Counted("all records: claims", n) for k, n in [("all", len(kinds)), *kinds.value_counts().items()]}


def of_claim(id: str, name: str = "") -> Measured:
    "The estimate that decides a claim, or what one record says about it."
    rows = claims_page() if name else claims()
    r = (rows[rows.record == name] if name else rows).set_index("id").loc[id]
    return Measured(f"{r.record}: claims", r.value, r.low, r.high, r.p_holm)


def in_balance(paradigm: str) -> pd.Series:
    "Greedy accuracy by seed in the first attempt at balancing, mean of both capabilities."
    table = pd.DataFrame(record(BALANCE)["per_seed"]["pair/greedy"])
    return table[(table.paradigm == paradigm) & (table.capability == "mean")].set_index("seed").accuracy


def price() -> Counted:
    "Tokens generated and scored by CoPD over those of mixed RLVR."
    r = claims().set_index("id").loc["m2rl_cheaper"]
    return Counted(f"{r.record}: claims", r.value)


def pilot(what: str) -> Counted:
    r = record("pilot-standard")
    counts = dict(teachers=len(r["tables"]["slopes"]), pairs=len(r["tables"]["students"]),
                  steps=r["parameters"]["opd_steps"], agree=sum(t["jsd_sd"] < 0 for t in r["tables"]["slopes"]))
    return Counted("pilot-standard: tables", counts[what])


CO, SMOL, BALANCE, DYNAMICS = "experiment-coevolution", "experiment-smollm2", "experiment-balance", "dynamics-standard"
PARTS, TOKENS, MAP = "experiment-parts", "experiment-tokens", "regimes-standard"
AGAIN, UNEVEN = "experiment-replication", "experiment-uneven"
LONG = "separate, 240 steps"  # a cell of the map
FALLING = "contradicting 25 %", "contradicting 100 %", "mirrored", "another sign"


def co(a: str, b: str, key: str = "planned") -> Measured: return lead(CO, a, b, f"three/{key}")


def again(a: str, b: str, key: str = "planned") -> Measured: return lead(AGAIN, a, b, f"three/{key}")


def part(a: str, b: str, key: str = "planned") -> Measured: return lead(PARTS, a, b, f"two_branch/{key}")


def uneven(a: str, b: str, key: str = "planned") -> Measured: return lead(UNEVEN, a, b, f"pair/{key}")


def of_uneven(paradigm: str, capability: str = "mean") -> Counted:
    "Greedy accuracy in %, where two skills are uneven."
    r = next(r for r in record(UNEVEN)["tables"]["pair/greedy"] if (
        r["paradigm"], r["capability"]) == (paradigm, capability))
    return Counted(f"{UNEVEN}: tables", r["mean"])


def steps_in_a_row(paradigm: str) -> Counted:
    "Consecutive steps of a row where two skills are uneven, mean over seeds."
    r = next(r for r in record(UNEVEN)["costs"]["pair"] if r["paradigm"] == paradigm)
    return Counted(f"{UNEVEN}: costs", r["critical_steps"])


def longer() -> Measured:
    "Mixed RLVR of as many tokens minus CoPD."
    return lead(TOKENS, "mixed RLVR, as many tokens", "CoPD", "three/planned")


def over(paradigm: str, table: str = "over_cells/greedy", start: str = "") -> Measured:
    "A paradigm's lead over all cells of the map, or in another cell (`new_`), or over its suites (`suite_`)."
    r = next(r for r in record(MAP)["tables"][table] if r["paradigm"] == paradigm)
    value = r["lead"] if start == "new_" else r[f"{start}lead"]
    return Measured(f"{MAP}: {table}", value, r[f"{start}low"], r[f"{start}high"])


def conflicting(paradigm: str, share: int) -> Measured:
    "Points by which a paradigm is below mixed RLVR where gradients were seen to conflict, greedy."
    name = "regimes-conflict"
    r = next(r for r in record(name)["tables"]["alone"] if (r["metric"], r["paradigm"], r["cell"]) == (
        "greedy", paradigm, f"learned, contradicting {share} %"))
    return -Measured(f"{name}: alone", r["lead"], r["low"], r["high"], r["p_holm"])


def in_cell(cell: str, paradigm: str) -> Measured:
    "Points by which a paradigm is above mixed RLVR in one cell of the map, greedy."
    r = next(r for r in record(MAP)["tables"]["alone"] if (
        r["metric"], r["paradigm"], r["cell"]) == ("greedy", paradigm, cell))
    return Measured(f"{MAP}: alone", r["lead"], r["low"], r["high"], r["p_holm"])


def in_large(paradigm: str, metric: str = "greedy") -> Measured:
    "Points by which a paradigm is above mixed RLVR in the large model."
    name = "regimes-large"
    r = next(r for r in record(name)["tables"]["alone"] if (r["metric"], r["paradigm"]) == (metric, paradigm))
    return Measured(f"{name}: alone", r["lead"], r["low"], r["high"], r["p_holm"])


def spread(paradigm: str) -> Measured:
    "SD over seeds relative to that of mixed RLVR, over the cells of the map, greedy."
    r = next(r for r in record(MAP)["tables"]["over_cells/greedy"] if r["paradigm"] == paradigm)
    return Measured(f"{MAP}: over_cells", r["spread"], r["spread_low"], r["spread_high"], digits=2)


def below_base(paradigm: str, part: str = "runs", cells: tuple[str, ...] = ()) -> Counted:
    "How many runs of the map ended below their base when greedy, in all or some cells, or out of how many (`of`)."
    tables = record(MAP)["tables"]
    if cells:
        base = {r["cell"]: r["base"] for r in tables["levels"]}
        hits = [r["accuracy"] < base[r["cell"]] for r in tables["per_seed"] if r["cell"] in cells and (
            r["metric"], r["paradigm"]) == ("greedy", paradigm)]
        return Counted(f"{MAP}: per_seed", sum(hits))
    r = next(r for r in tables["fallen"] if (
        r["metric"], r["kind"], r["paradigm"]) == ("greedy", "below the base", paradigm))
    return Counted(f"{MAP}: fallen", r[part])


def gradients(cell: str, part: str) -> Counted:
    return Counted(f"{MAP}: checked", next(r[part] for r in record(MAP)["tables"]["checked"] if r["cell"] == cell))


def ends(shape: str) -> Counted:
    "How many experts of the map end in some shape, or how many there are."
    shapes = [r["shape"] for r in record(MAP)["tables"]["flat"]]
    return Counted(f"{MAP}: flat", shapes.count(shape) if shape else len(shapes))


def between() -> tuple[Counted, Counted]:
    "The smallest and the largest spread between cells; ValueError where leads may be equal."
    rows = record(MAP)["tables"]["over_cells/greedy"]
    if max(r["differ"] for r in rows) >= 0.001: raise ValueError(f"{MAP}: some leads may be equal in all cells")
    return tuple(Counted(f"{MAP}: over_cells", of(r["between"] for r in rows)) for of in (min, max))


def chance() -> Counted:
    "p of the best early measurement."
    said = next(x for x in record(MAP)["shown"] if "early measurements" in x)
    return Counted(f"{MAP}: shown", float(re.search(r"; p ([0-9.]+) for the best", said)[1]))


def ratios() -> tuple[Counted, Counted]:
    "How far the worst ratio of CoPD's phases is below the paper's, and the best above it."
    found = [part(f"CoPD, {r}", "CoPD").value for r in ("4 : 1", "1 : 1", "2 : 3", "1 : 4")]
    return Counted(f"{PARTS}: planned", -min(found)), Counted(f"{PARTS}: planned", max(found))
