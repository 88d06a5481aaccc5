"""The two pictures at the top of the README: `python docs/finding.py`, from the published records."""
import json
from pathlib import Path

import matplotlib.pyplot as plt

from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.drawing import svg
from copd_nb.view.style import palette

DOCS = Path(__file__).parent
PANELS = {  # title → record, setting, rows from the top
    "embedded suite, 2 capabilities, 3 seeds": ("experiment-neighbours", "two", {
        name: name for name in ("mixed RLVR", "MOPD", "merged experts", "averaged every 5", "CoPD")}),
    "3 capabilities, no teacher but in CoPD, 3 seeds": ("experiment-averaging", "three", {
        "mixed RLVR": "mixed RLVR", "averaged once": "merged experts", "averaged every 10": "averaged every 10",
        "averaged every step": "averaged every step", "CoPD": "CoPD"}),
    "SmolLM2-135M, 2 capabilities, 3 seeds": ("experiment-smollm2", "all", {
        name: name for name in ("mixed RLVR", "MOPD", "merged experts", "CoPD")})}


def rows(record: str, setting: str, measure: str) -> dict[str, tuple[float, float, float]]:
    "Mean over capabilities and its interval, by paradigm."
    tables = json.loads((DOCS / "reports" / record / "results.json").read_text(encoding="utf-8"))["tables"]
    return {r["paradigm"]: (r["mean"], r["low"], r["high"]) for r in tables[f"{setting}/{measure}"]
            if r["capability"] == "mean"}


def draw(file: Path):
    "A panel for each comparison: greedy and sampled accuracy of the unified models."
    fig, axes = plt.subplots(1, len(PANELS), figsize=(11, 2.8), layout="constrained")
    colours = palette(name for _, _, names in PANELS.values() for name in names.values())
    for ax, (title, (record, setting, names)) in zip(axes, PANELS.items()):
        for shift, measure in ((0.14, "greedy"), (-0.14, "sampled")):
            found = rows(record, setting, measure)
            for at, name in enumerate(names):
                mean, low, high = found[name]
                ax.errorbar(mean, -at + shift, xerr=[[mean - low], [high - mean]], fmt="o", ms=5.5, capsize=2,
                            color=colours[names[name]], mfc="white" if measure == "sampled" else None)
        ax.set_yticks([-i for i in range(len(names))], names.values())
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("accuracy, %", fontsize=8)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"): ax.spines[side].set_visible(False)
    marks = [axes[0].plot([], [], "o", color="0.3", mfc=fill, label=measure)[0]
             for measure, fill in (("greedy", "0.3"), ("sampled at temperature 1", "white"))]
    fig.legend(handles=marks, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    fig.savefig(file, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    draw(DOCS / "img" / "finding.png")
    drawing = svg(copd(["text", "image"], cycles=2))
    (DOCS / "img" / "copd.svg").write_text(drawing + "\n", encoding="utf-8")
