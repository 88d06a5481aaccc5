"Panels from logs, what a chart sends, stills, stories: against the rows they were made of."
import io
import struct

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from copd_nb.policy.pair import minis_events
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule, Sync
from copd_nb.view import monitor as monitors
from copd_nb.view.charts import LineChart, Panel, opd_phases, probe_panel, signal_panel, training_panel
from copd_nb.view.dynamics import probe_values, training_curves
from copd_nb.view.monitor import MonitorState
from copd_nb.view.pages import still, svg_axes, svg_size
from copd_nb.view.saved import WIDGET, drop_live_views
from copd_nb.view.story import RunStory, Story, behaviour_distances, behaviour_plane, merges_of, save_story, shipped_run
from copd_nb.view.style import looks

EVENTS = pd.DataFrame(minis_events())


@pytest.fixture(scope="module")
def run(tmp_path_factory): return shipped_run(tmp_path_factory.mktemp("shipped") / "run")


def test_no_two_of_hundreds_of_lines_look_alike():
    for names in ([f"run {i}" for i in range(300)], [f"text · {i}" for i in range(60)], ["text", "image", "CoPD"]):
        assert len(set(looks(names).values())) == len(names)


def test_a_training_panel_holds_what_the_plot_draws():
    ax = Figure().subplots()
    training_curves(EVENTS, "gradient_norm", ax)
    lines = training_panel(EVENTS, "gradient_norm").lines
    assert [line.get_label() for line in ax.lines] == [name for name, _ in lines] and len(lines) == 4
    for line, (_, values) in zip(ax.lines, lines): np.testing.assert_array_equal(line.get_xydata(), values)


def test_bands_reach_over_seeds():
    other = EVENTS.assign(seed=1)
    other["overlap"] = other["overlap"] * 0.9
    panel = probe_panel(pd.concat([EVENTS.assign(seed=0), other]), "overlap", "overlap")
    means = probe_values(EVENTS, "overlap").groupby(["pair", "global_step"], sort=False)["value"].mean()
    for name, values in panel.lines:
        own = means[name].to_numpy()
        np.testing.assert_allclose(values[:, 1:], np.stack([0.95 * own, 0.9 * own, own], 1))


def test_what_is_not_logged_is_said():
    for make, name in ((training_panel, "cosines"), (signal_panel, "cosine")):
        with pytest.raises(ValueError, match=name): make(EVENTS, name)
    trained = EVENTS[EVENTS.kind == "train"]
    with pytest.raises(ValueError, match="probe_every"): probe_panel(trained, "overlap", "overlap")
    assert opd_phases(EVENTS.iloc[:0]) == []


def test_a_chart_sends_the_numbers_of_its_lines_in_order():
    table = pd.DataFrame(dict(line=["b", "a", "b"], x=[2.0, 1.0, 1.0], y=[5.0, 7.0, np.nan]))
    chart = LineChart()
    chart.draw([Panel(table, "y (m)")], "x (s)", "x", "file")
    assert [(line["name"], line["n"]) for line in chart.spec["panels"][0]["lines"]] == [("b", 2), ("a", 1)]
    numbers = struct.unpack("<6d", chart.data)
    assert numbers[:3] == (1.0, 2.0, pytest.approx(np.nan, nan_ok=True)) and numbers[3:] == (5.0, 1.0, 7.0)
    chart.draw([])
    assert chart.data == b"" and chart.spec["panels"] == []


def test_stills_are_small_pictures_and_refusals_are_pictures_too(run):
    state = MonitorState(run.path)
    state.tail.read()
    png = still(state.draw)
    assert Image.open(io.BytesIO(png)).size == (800, 340) and len(png) < 40_000
    state.metric = "cosine"
    assert Image.open(io.BytesIO(still(state.draw))).size == (800, 80)
    drawing = copd(["text", "image"], cycles=2).svg()
    ax = svg_axes(drawing, Figure().subplots())
    assert {t.get_text() for t in ax.texts} >= {"copd", "RL text", "merge"} and svg_size(drawing)[0] > 6


def test_the_rest_of_a_run_is_told_from_its_pace(run, monkeypatch):
    clock, state = [0.0], MonitorState(run.path)
    monkeypatch.setattr(monitors.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(MonitorState, "status", "running")
    monkeypatch.setattr(MonitorState, "progress", property(lambda s: (10 + 2 * int(clock[0]), 300)))
    assert state.remaining() is None
    clock[0] = 10.0
    assert state.remaining() == pytest.approx(135) and "about 2 min 15 s left" in state.head()
    clock[0] = 10.5
    assert state.remaining() == pytest.approx(134.5)


def test_planes_keep_the_distances_of_three_and_the_base_in_the_middle():
    found = behaviour_distances(EVENTS)
    plane = behaviour_plane(found).set_index(["global_step", "name"])[["x", "y"]]
    def at(step, name): return plane.loc[(step, name)]
    gaps = [np.linalg.norm(at(r.global_step, r.a) - at(r.global_step, r.b)) for r in found.itertuples()]
    np.testing.assert_allclose(gaps, found["distance"], atol=1e-9)
    assert not plane.xs("base", level="name").to_numpy().any()
    jsd = EVENTS.query("kind == 'probe' and global_step == 300 and a != 'base' and b != 'base'").jsd
    assert found.query("global_step == 300 and a == 'image'").distance.item() == pytest.approx(jsd.mean() ** 0.5)


def test_merges_come_from_syncs_and_the_result():
    plan = copd(["text", "image"], cycles=2, s_rl=2, s_opd=1)
    phases = (*plan.phases[:2], Sync(("text", "image"), weights=(1.0, 3.0)), *plan.phases[2:])
    found = merges_of(Schedule(plan.name, plan.branches, phases, plan.result))
    assert [step for step, _ in found] == [3, 6] and found[0][1] == dict(text=1.0, image=3.0)


def test_a_story_refuses_what_was_not_probed(run, tmp_path):
    with pytest.raises(ValueError, match="step 7 was not probed"): save_story(run, tmp_path / "a.gif", [7])
    with pytest.raises(ValueError, match="probe_every"): Story(EVENTS[EVENTS.kind == "train"])
    story = RunStory(run)
    story.controls["step"].value = 40
    assert "step 40, phase II OPD" in story.output.value and story.player.max == 75


def test_only_outputs_beside_a_picture_are_dropped(tmp_path):
    import json
    live = {WIDGET: dict(model_id="a"), "text/plain": "x"}
    outputs = [dict(data={"text/html": "<div class='copd-still'>"}), dict(data=dict(live)), dict(data=dict(live))]
    notebook = dict(cells=[dict(outputs=outputs)], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path / "n.ipynb").write_text(json.dumps(notebook))
    assert drop_live_views(tmp_path / "n.ipynb") == 2
    left = json.loads((tmp_path / "n.ipynb").read_text())["cells"][0]["outputs"]
    assert [sorted(o["data"]) for o in left] == [["text/html"], ["text/plain"]]
