"""The two pictures at the top of the README: `python docs/finding.py`, from the published records."""
import json
from pathlib import Path

import matplotlib.pyplot as plt

from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.drawing import svg
from copd_nb.view.style import palette

DOCS = Path(__file__).parent
PANELS = {  # title → record, setting, rows from the top
    "embedded suite, 3 capabilities, 10 seeds": ("experiment-coevolution", "three", (
        "mixed RLVR", "MOPD", "merged experts", "averaged every 5", "CoPD, taught by the base")),
    "SmolLM2-135M, 2 capabilities, 3 seeds": ("experiment-smollm2", "all", ("mixed RLVR", "MOPD", "merged experts"))}
MEASURES = {"greedy": (0.13, None), "sampled": (-0.13, "white")}  # how high above its line, fill


def leads(record: str, setting: str, measure: str) -> dict[str, tuple[float, float, float]]:
    "Points above CoPD, paired by seed, with their interval, by paradigm."
    found = json.loads((DOCS / "reports" / record / "results.json").read_text(encoding="utf-8"))["verdicts"]
    return {r["other"]: (-r["difference"], -r["high"], -r["low"]) for r in found[f"{setting}/{measure}"]
            if r["paradigm"] == "CoPD"}


def draw(file: Path):
    "A panel for each comparison: every unified model minus CoPD, greedy and sampled."
    fig, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.9), layout="constrained")
    colours = palette(name for _, _, names in PANELS.values() for name in names)
    for ax, (title, (record, setting, names)) in zip(axes, PANELS.items()):
        ax.axvline(0, color="0.55", linewidth=1)
        for measure, (shift, fill) in MEASURES.items():
            found = leads(record, setting, measure)
            for at, name in enumerate(names):
                mean, low, high = found[name]
                ax.errorbar(mean, -at + shift, xerr=[[mean - low], [high - mean]], fmt="o", ms=6, capsize=2,
                            color=colours[name], mfc=fill)
        ax.set_yticks([-i for i in range(len(names))], names)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("points above CoPD, 95 % interval", fontsize=9)
        ax.tick_params(labelsize=9)
        for side in ("top", "right"): ax.spines[side].set_visible(False)
    marks = [axes[0].plot([], [], "o", color="0.3", mfc=fill or "0.3", label=label)[0] for (_, fill), label in
             zip(MEASURES.values(), ("greedy", "sampled at temperature 1"))]
    fig.legend(handles=marks, frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    fig.savefig(file, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    draw(DOCS / "img" / "finding.png")
    drawing = svg(copd(["text", "image"], cycles=2))
    (DOCS / "img" / "copd.svg").write_text(drawing + "\n", encoding="utf-8")
