"""From raw rounds to the table: medians, paired ratios, shares of the peak, fitted exponents."""
import math
from statistics import median, quantiles

from contest import Case
from scipy.stats import linregress, t

GIB = 2 ** 30


def spread(values: list[float]) -> tuple[float, float, float]:
    "Lower quartile, median, upper quartile."
    if len(values) < 2: return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def seconds(rounds: list[dict]) -> list[float]: return [r["seconds"] for r in rounds]


def ratios(mine: list[dict], other: list[dict]) -> list[float]:
    "The other's seconds over mine, round by round."
    return [o / m for m, o in zip(seconds(mine), seconds(other))]


def slope(
    x: list[float],  # what grows
    y: list[float],  # seconds
    level: float = 0.95,
) -> tuple[float, float, float] | None:  # exponent and its interval, None for fewer than three points
    "Least-squares slope of log y against log x."
    if len(x) < 3: return None
    fit = linregress([math.log(v) for v in x], [math.log(v) for v in y])
    half = t.ppf((1 + level) / 2, len(x) - 2) * fit.stderr
    return fit.slope, fit.slope - half, fit.slope + half


def grown(case: Case, result: dict) -> tuple[list[float], list[float]]:
    "What the sides differ in, and their median seconds."
    size = lambda name, rounds: result["facts"][name].get(case.fit) or median(r[case.fit] for r in rounds)
    return [size(n, r) for n, r in result["rounds"].items()], [median(seconds(r)) for r in result["rounds"].values()]


def peak_share(result: dict, name: str) -> tuple[float, ...] | None:
    "Share of the matrix-product peak that a side reaches, by its own FLOPs and, if known, by those of a plain step."
    rounds, product = result["rounds"].get(name, []), result["rounds"].get("matrix product", [])
    if not rounds or not product: return None
    rate, best = median(r["flops"] / r["seconds"] for r in rounds), max(r["flops"] / r["seconds"] for r in product)
    plain = result["facts"][name].get("plain_share")
    return (rate / best,) if plain is None else (rate / best, rate * plain / best)


def shared_work(case: Case, result: dict) -> dict[str, dict]:
    "By side, where all make the same tokens: tokens a second, and the share of the peak by the first one's FLOPs."
    first, product = case.sides[0].name, result["rounds"].get("matrix product", [])
    if not case.rate or first not in result["rounds"]: return {}
    need = {key: median(r[key] for r in result["rounds"][first]) for key in ("tokens", "flops")}
    best = max((r["flops"] / r["seconds"] for r in product), default=math.inf)
    times = {s.name: median(seconds(result["rounds"][s.name])) for s in case.sides
             if s.compared and s.name in result["rounds"]}
    return {name: dict(tokens_per_second=need["tokens"] / s) | (dict(share=need["flops"] / s / best) if product else {})
            for name, s in times.items()}


def summary(case: Case, result: dict) -> dict:
    "The numbers of a case: by side, then those about all of it."
    rounds, first = result["rounds"], case.sides[0].name
    sides = {}
    for name, compared in ((s.name, s.compared) for s in case.sides if s.name in rounds):
        measured = rounds[name]
        sides[name] = dict(seconds=spread(seconds(measured)), peak_bytes=measured[-1]["peak_bytes"],
                           set_up_bytes=result["facts"][name]["peak_bytes"])
        if compared and name != first and first in rounds and not case.fit:
            sides[name]["ratio"] = spread(ratios(rounds[first], measured))
    found = dict(sides=sides)
    for name, told in shared_work(case, result).items(): sides[name] |= told
    if share := peak_share(result, first): found["peak_share"] = share
    if case.fit and rounds and (fitted := slope(*grown(case, result))): found["exponent"] = fitted
    return found


def _number(value: float) -> str: return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _with_quartiles(values: tuple) -> str:
    low, middle, high = map(_number, values)
    return f"{middle} ({low} to {high})"


def _aim(case: Case, name: str, side: dict) -> str:
    "What a side should reach, and whether it does."
    told = lambda text, reached: f"{text} {'reached' if reached else 'missed'}"
    if case.within and name == case.sides[0].name:
        return told(f"under {case.within:.3g} s", side["seconds"][1] < case.within)
    if name in case.aim and "ratio" in side: return told(f"{case.aim[name]:.3g}", side["ratio"][1] >= case.aim[name])
    return ""


def _row(case: Case, name: str, side: dict, when: str) -> str:
    "One line of the table."
    ratio = _with_quartiles(side["ratio"]) if "ratio" in side else ""
    cells = case.line, case.title, name, _with_quartiles(side["seconds"]), ratio, _aim(case, name,
            side), f"{side['peak_bytes'] / GIB:.2f}", when
    return f"| {' | '.join(map(str, cells))} |"


def _memory(mine: dict, naive: dict) -> str:
    "Peak memory in chunks against all logits at once."
    beyond = [s["peak_bytes"] - s["set_up_bytes"] for s in (mine, naive)]
    times, more = naive["peak_bytes"] / mine["peak_bytes"], beyond[1] / max(1, beyond[0])
    return (f"peak memory {times:.1f} times smaller chunked than naive; beyond the inputs, which both hold, "
            f"{beyond[0] / GIB:.2f} against {beyond[1] / GIB:.2f} GiB, {more:.0f} times (aim 8)")


def _copies(adapters: dict, full: dict) -> str:
    "Peak memory of branches as adapters against full copies."
    small, large = adapters["peak_bytes"] / GIB, full["peak_bytes"] / GIB
    return (f"peak memory {small:.2f} GiB as adapters, {large:.2f} GiB as full copies, "
            f"{large / small:.1f} times as much")


def _remarks(case: Case, found: dict, failures: dict) -> list[str]:
    "What a case says beside its rows."
    lines = [f"{name} failed: `{text}`" for name, text in failures.items()]
    if "peak_share" in found:
        own, *plain = found["peak_share"]
        precision = next((s.task.get("precision", "fp32") for s in case.sides if s.program == "product"), "fp32")
        aim = f" (aim {case.peak_aim:.0%})" if case.peak_aim else ""
        more = f"; {plain[0]:.0%} if counted as a step without shared prompts" if plain else ""
        lines.append(f"{own:.0%} of the {precision} matrix-product peak{aim}{more}")
    if told := {n: s for n, s in found["sides"].items() if "tokens_per_second" in s}:
        share = lambda s: f", {s['share']:.0%} of the peak" if "share" in s else ""
        lines.append("tokens a second: " + "; ".join(f"{n} {_number(s['tokens_per_second'])}{share(s)}"
                                                     for n, s in told.items()))
    if "exponent" in found:
        lines.append("seconds grow with {} to the power {:.2f} (95 % interval {:.2f} to {:.2f})".format(case.fit,
                *found["exponent"]))
    first = found["sides"].get(case.sides[0].name)
    if first and "naive" in found["sides"]: lines.append(_memory(first, found["sides"]["naive"]))
    if first and "full copies" in found["sides"]: lines.append(_copies(first, found["sides"]["full copies"]))
    if case.note: lines.append(case.note)
    return [f"- Line {case.line}, {case.title}: {text}." for text in lines]


def _where(result: dict) -> dict:
    "With what a case was measured, as far as it was written down."
    return result.get("where") or dict(commit=result.get("commit") or "unknown")


def _when(found: dict) -> str:
    "Commit and day."
    return f"{found['commit']}, {found['date'][:10]}" if "date" in found else f"{found['commit']}, older"


def _measured(results: list[dict]) -> list[str]:
    "A line for each commit, machine and set of versions that something was measured with, and what."
    groups = {}
    for r in results:
        w = _where(r)
        if "date" not in w: text = "machine and versions were not written down for each case then"
        else: text = (f"{w['cpu']}, {w['threads']} threads of {w['cores']} cores, {w['memory_gib']:.0f} GiB; "
                      + ", ".join(f"{n} {v}" for n, v in sorted(w["versions"].items())))
        group = groups.setdefault((_when(w), text), dict(lines={}, loads=[]))
        group["lines"][r["line"]] = None
        if "load" in w: group["loads"].append(w["load"][0])
    load = lambda g: f"; load when a case ended {min(g['loads']):.1f} to {max(g['loads']):.1f}" if g["loads"] else ""
    return [f"- {when}, line{'s' * (len(g['lines']) > 1)} {', '.join(map(str, g['lines']))}: {text}{load(g)}."
            for (when, text), g in groups.items()]


def table(
    cases: list[Case],
    results: list[dict],  # one for each case, with "summary" and "failures"
    about: dict,  # machine, date, versions
) -> str:
    "The results as Markdown."
    head = ["# Benchmark results", "",
            f"Last run: `{about['command']}` on {about['date']}, commit {about['commit']}, preset {about['preset']}. "
            "Lines that it did not measure are kept from earlier runs: the last column tells the commit and the day of "
            "each, the list at the end the machine.", "",
            "Seconds of one repetition, and its ratio to the first side of the same case: medians (quartiles) of "
            "paired rounds. "
            "A ratio above 1 means that the first side is faster. Peak: the most memory that the process ever held, in "
            "GiB.", "",
            "| line | case | side | seconds | ratio | aim | peak | measured |", "|---|---|---|---|---|---|---|---|"]
    rows = [_row(c, name, side, _when(_where(r))) for c, r in zip(cases, results)
            for name, side in r["summary"]["sides"].items()]
    remarks = [line for c, r in zip(cases, results) for line in _remarks(c, r["summary"], r["failures"])]
    return "\n".join([*head, *rows, "", *remarks, "", "## Measured with", "", *_measured(results), ""])
