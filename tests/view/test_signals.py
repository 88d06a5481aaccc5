"Curves of rows of kind `signal`, in plots and in the monitor."
import json

import matplotlib
import pandas as pd
import pytest

from copd_nb.view import plots
from copd_nb.view.monitor import WATCHED, MonitorState

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def rows():
    "Two steps of two branches that co-evolve: rewards and one distillation."
    for step in (1, 3):
        yield dict(kind="train", branch="text", stream="rl", capability="text", global_step=step, reward=0.5)
        for branch, stream, capability in (("text", "rl", "text"), ("image", "rl", "image"),
                                           ("text", "opd:image:image", "image")):
            yield dict(kind="signal", what="gradient", branch=branch, stream=stream, capability=capability,
                       global_step=step, coherence=0.1 * step, norm_squared=-0.5, token_share=1 / 3, floor=0.2)
        yield dict(kind="signal", what="conflict", branch="text", stream="rl", capability="text", other_branch="image",
                   other_stream="rl", other="image", cosine=-0.1 * step, floor=0.3, corrected=None, global_step=step)


def test_values_have_names_that_tell_signals_apart():
    events = pd.DataFrame(rows())
    found = plots.signal_values(events, "coherence")
    assert list(found.signal[:3]) == ["text · text", "image · image", "image · text · opd of image"]
    assert list(found[found.global_step == 3].value) == [pytest.approx(0.3)] * 3
    pairs = plots.signal_values(events, "cosine")
    assert set(pairs.signal) == {"text · text – image · image"} and list(pairs.value) == [-0.1, pytest.approx(-0.3)]


def test_curves_show_the_floor_of_a_cosine():
    ax = plots.signal_curves(pd.DataFrame(rows()), "cosine")
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [[0.3, 0.3]]
    assert len(plots.signal_curves(pd.DataFrame(rows()), "token_share").lines) == 3
    plt.close("all")


@pytest.mark.parametrize("metric", ["corrected", "cosine"])
def test_runs_without_such_rows(metric):
    events = pd.DataFrame(r for r in rows() if r["kind"] == "train" or metric == "corrected")
    with pytest.raises(ValueError, match=f"'{metric}': set Config.signals_every"): plots.signal_values(events, metric)


def test_the_monitor_draws_every_metric(tmp_path):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    state = MonitorState(tmp_path)
    state.tail.read()
    for metric in plots.SIGNALS[2:] + ("cosine",):
        assert metric in WATCHED
        state.metric, (figure, ax) = metric, plt.subplots()
        state.draw(ax)
        assert ax.lines
        plt.close(figure)
