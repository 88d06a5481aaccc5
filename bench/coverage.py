"""Coverage of 95 % intervals where one run in five collapses: `python bench/coverage.py [--out FILE.png]`.

The simulation of `copd_nb.analysis.typical` with many studies a cell; about two minutes with the default."""
import argparse
import time

import matplotlib
import pandas as pd

from copd_nb.analysis.typical import METHODS, collapse_coverage

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = dict(t="#D55E00", bootstrap="#999999", trimmed="#0072B2")


def figure(found: pd.DataFrame, path: str):
    "Coverage of the mean and of the median run against seeds, a column for each size of collapse."
    drops = sorted(found["drop"].unique())
    drawn, axes = plt.subplots(2, len(drops), figsize=(3.1 * len(drops), 5.2), layout="constrained", sharey=True)
    for line, truth in zip(axes, ("mean", "median")):
        for ax, drop in zip(line, drops):
            for method in METHODS:
                own = found[(found.method == method) & (found["drop"] == drop)]
                ax.plot(own.seeds.astype(str), 100 * own[truth], marker="o", color=COLORS[method], label=method)
            ax.axhline(95, color="black", linewidth=0.8, linestyle=":")
            ax.set_title(f"{truth} of runs; a collapse costs {drop:g} SDs", fontsize=9)
        line[0].set_ylabel("coverage (%)")
    for ax in axes[-1]: ax.set_xlabel("training seeds")
    axes[0][0].legend(frameon=False)
    drawn.savefig(path, dpi=110)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--repeats", type=int, default=20_000, help="studies a cell")
    ask.add_argument("--share", type=float, default=0.2, help="of runs that collapse")
    ask.add_argument("--out", help="a picture")
    given, began = ask.parse_args(), time.time()
    many = collapse_coverage(share=given.share, repeats=given.repeats, methods=("t", "trimmed"))
    few = collapse_coverage(share=given.share, repeats=max(1, given.repeats // 10), methods=("bootstrap",))
    found = pd.concat([many, few], ignore_index=True)
    wide = found.pivot(index=["drop", "seeds"], columns="method", values=["mean", "median", "width"])
    print(wide.round(3).to_string())
    print(f"{given.repeats} studies a cell ({given.repeats // 10} of the bootstrap), {time.time() - began:.0f} s")
    if given.out: figure(found, given.out)
