"""The pictures of the README and of the six answers: `python docs/figures.py`, from the published records."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from copd_nb.analysis.deciding import MATTERS
from copd_nb.analysis.frontier import mean_curves
from copd_nb.analysis.page import IN_COUNTS, KINDS
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.drawing import svg
from copd_nb.view import plots
from copd_nb.view.frontier import frontier
from copd_nb.view.style import OKABE_ITO, finish, new_axes, palette
from from_records import claims as deciding_claims  # beside this file
from from_records import lead, record, seed_differences

DOCS = Path(__file__).parent
PANELS = {  # title → record, setting, rows from the top
    "embedded suite, 3 capabilities, 10 seeds": ("experiment-coevolution", "three", (
        "mixed RLVR", "MOPD", "merged experts", "averaged every 5", "CoPD, taught by the base")),
    "SmolLM2-135M, 2 capabilities, 3 seeds": ("experiment-smollm2", "all", ("mixed RLVR", "MOPD", "merged experts"))}
MEASURES = {"greedy": (0.13, None), "sampled": (-0.13, "white")}  # how high above its line, fill
SHADES = dict(zip(KINDS, (OKABE_ITO[2], OKABE_ITO[1], "#56b4e9", "#cfe0f0", "#e6c35c", "0.8", "0.65", "0.92")))


def finding():
    "A panel for each comparison: every unified model minus CoPD, greedy and sampled."
    fig, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.9), layout="constrained")
    colours = palette(name for _, _, names in PANELS.values() for name in names)
    for ax, (title, (source, setting, names)) in zip(axes, PANELS.items()):
        ax.axvline(0, color="0.55", linewidth=1)
        for measure, (shift, fill) in MEASURES.items():
            for at, name in enumerate(names):
                d = lead(source, name, "CoPD", f"{setting}/{measure}")
                ax.errorbar(d.value, -at + shift, xerr=[[d.value - d.low], [d.high - d.value]], fmt="o", ms=6,
                            capsize=2, color=colours[name], mfc=fill)
        ax.set_yticks([-i for i in range(len(names))], names)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("points above CoPD, 95 % interval", fontsize=9)
        ax.tick_params(labelsize=9)
        for side in ("top", "right"): ax.spines[side].set_visible(False)
    marks = [axes[0].plot([], [], "o", color="0.3", mfc=fill or "0.3", label=label)[0] for (_, fill), label in
             zip(MEASURES.values(), ("greedy", "sampled at temperature 1"))]
    fig.legend(handles=marks, frameon=False, fontsize=9, loc="outside lower center", ncols=2)


def by_seed(found: dict, setting: str, pairs: pd.DataFrame) -> pd.DataFrame:
    "Greedy differences of pairs of rows, mean over capabilities, seed by seed."
    return pd.DataFrame([dict(a=r.a, b=r.b, difference=d) for r in pairs.itertuples()
                         for d in seed_differences(found, setting, r.a, r.b)])


def planned(name: str):
    "What the plan of an experiment with one setting names as primary."
    found = record(name)
    pairs = pd.DataFrame(found["planned"])
    plots.planned(pairs, by_seed(found, pairs.setting[0], pairs), found["parameters"]["primary"]["matters"])


def unplanned(name: str, setting: str):
    "CoPD minus every other unified model, where no plan was written; verdicts after Holm's correction over them."
    found = record(name)
    p = {r["arm"]: r["p_holm"] for r in found["over_runs"][f"{setting}/greedy"]}
    rows = [dict(a="CoPD", b=r["other"], difference=r["difference"], low=r["low"], high=r["high"],
                 verdict="not detected" if p[r["other"]] >= 0.05 else "above" if r["difference"] > 0 else "below")
            for r in found["verdicts"][f"{setting}/greedy"] if r["paradigm"] == "CoPD" and r["other"] != "base"]
    plots.planned(pd.DataFrame(rows), by_seed(found, setting, pd.DataFrame(rows)))


def overlap():
    "Accuracy after distillation against distance, both without what accuracy before explains within a teacher."
    pairs = pd.DataFrame(record("pilot-standard")["tables"]["students"])
    def rest(column):
        known = np.column_stack([pd.get_dummies(pairs.teacher).astype(float), pairs.before_greedy])
        return pairs[column] - known @ np.linalg.lstsq(known, pairs[column], rcond=None)[0]
    ax, x, y = new_axes(None, 6.5, 3.4), rest("jsd_sd"), rest("after_greedy")
    for (group, own), colour in zip(pairs.groupby("speaks"), OKABE_ITO):
        ax.plot(x[own.index], y[own.index], "o", color=colour, markersize=5, label=f"student speaks {group}")
    slope, ends = x @ y / (x @ x), np.array([x.min(), x.max()])
    ax.plot(ends, slope * ends, color="0.3", linewidth=1)
    ax.legend(frameon=False, fontsize=9)
    finish(ax, "distance from the teacher, standard deviations of JSD", "points after OPD,\ngiven accuracy before")


def over_temperature():
    "Accuracy against entropy with three capabilities: base, mixed RLVR, merging once and often, CoPD and its placebo."
    rows = pd.DataFrame(record("experiment-coevolution")["over_temperature"]["three/last weights"])
    shown = ["mixed RLVR", "CoPD", "averaged every 5", "CoPD, taught by the base", "merged experts", "base"]
    curves = mean_curves(rows, ["text", "image", "video"]).set_index("paradigm").loc[shown].reset_index()
    frontier(curves, new_axes(None, 7.5, 3.4))


def cells():
    "The map: every paradigm minus mixed RLVR in each cell, seed by seed, and over all cells."
    tables = {name: pd.DataFrame(rows) for name, rows in record("regimes-standard")["tables"].items()}
    plots.leads_by_cell(tables["per_seed"].query("metric == 'greedy'"), "mixed RLVR", tables["over_cells/greedy"],
                        MATTERS["points"])


def claims():
    "How many claims have which verdict, by who makes them."
    main = deciding_claims()
    counts = pd.crosstab(main.source, main.kind).reindex(index=main.source.unique())
    ax, left = new_axes(None, 7.5, 0.9 + 0.36 * len(counts)), np.zeros(len(counts))
    for kind in (k for k in KINDS if k in counts):
        ax.barh(range(len(counts)), counts[kind], left=left, color=SHADES[kind], edgecolor="white",
                label=IN_COUNTS.get(kind, kind))
        for y, (n, start) in enumerate(zip(counts[kind], left)):
            if n: ax.text(start + n / 2, y, n, ha="center", va="center", fontsize=9)
        left += counts[kind].to_numpy()
    names = {"CoPD": "the paper", "reviewers": "its reviewers", "here": "asked here"}
    ax.set_yticks(range(len(counts)), [names.get(s, f"arXiv {s}" if s[0].isdigit() else s) for s in counts.index])
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    finish(ax, "claims", "", grid="x")


FIGURES = {  # file → its maker
    "finding": finding, "answer-coevolution": lambda: planned("experiment-coevolution"),
    "answer-frontier": over_temperature, "answer-overlap": overlap, "answer-cells": cells,
    "answer-parts": lambda: planned("experiment-parts"),
    "answer-replication": lambda: planned("experiment-replication"),
    "answer-balance": lambda: planned("experiment-uneven"), "answer-claims": claims,
    "answer-smollm2": lambda: unplanned("experiment-smollm2", "all")}

if __name__ == "__main__":
    for name, make in FIGURES.items():
        make()
        plt.savefig(DOCS / "img" / f"{name}.png", dpi=130)
        plt.close()
    drawing = svg(copd(["text", "image"], cycles=2))
    (DOCS / "img" / "copd.svg").write_text(drawing + "\n", encoding="utf-8")
