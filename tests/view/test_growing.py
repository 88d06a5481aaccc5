"What a redraw does, counted: it looks at what is new, and shows what a look at everything would show."
import json
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from copd_nb.analysis import curves
from copd_nb.analysis.curves import at_budget, band
from copd_nb.analysis.results import learning_curve
from copd_nb.data import names
from copd_nb.engine import following, runs
from copd_nb.engine.following import Columns, Tail, stamp
from copd_nb.engine.runs import Run
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule, Sync
from copd_nb.view import browser as browsing
from copd_nb.view.browser import LINES, RunBrowser, Store, config_table
from copd_nb.view.dynamics import dynamics, probe_values, signal_curves, training_curves
from copd_nb.view.monitor import LATEST, MonitorState, RunMonitor

FIXTURES = Path(__file__).parents[1] / "fixtures"
REAL = [json.loads(line) for line in (FIXTURES / "whole-0.1.jsonl").read_text().splitlines()]
SHAPES = {kind: next(row for row in REAL if row["kind"] == kind) for kind in ("train", "probe", "eval")}
MANIFEST = json.loads((FIXTURES / "run-0.1" / "manifest.json").read_text())


def logged(steps: int, seed: int = 0) -> tuple[Schedule, list[dict]]:
    "A schedule, and rows in the form of a real log: two branches, with a reward and a teacher in every second phase."
    draw, rows = random.Random(seed), []
    schedule = copd(["text", "image"], cycles=-(-steps // 4), s_rl=2, s_opd=2)
    places = [(i, p, s) for i, p in enumerate(schedule.phases) for s in range(p.steps)][:steps]
    def row(kind, at, **values):
        index, phase, step = places[at]
        place = dict(phase_index=index, phase=phase.name, cycle=phase.cycle, global_step=at + 1, step=step)
        noise = {k: v * draw.uniform(0.5, 1) for k, v in SHAPES[kind].items() if isinstance(v, float)}
        rows.append(SHAPES[kind] | noise | place | values)
    for at, (_, phase, _) in enumerate(places):
        for update in phase.updates:
            for signal in update.signals:
                row("train", at, branch=update.branch, stream=signal.stream, capability=signal.capability)
        if at % 3 == 0:
            for owner in ("text", "image"): row("probe", at, a="text", b="image", capability="text", owner=owner)
            for name in ("text", "image"): row("eval", at, model="result", capability=name)
        if at % 5 == 4:
            place = {k: rows[-1][k] for k in ("phase_index", "phase", "cycle", "global_step", "step")}
            rows.append(place | dict(kind="warning", monitor="reward", branch="text", stream="rl", capability="text",
                                     value=1.0, bound=0.5, message=f"warning of step {at + 1}"))
    return schedule, rows


def write(folder: Path, steps: int, seed: int = 0, status="finished", schedule=None, **settings) -> Path:
    "A run folder with such a log."
    made, rows = logged(steps, seed)
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = MANIFEST["config"] | settings | dict(seed=seed)
    manifest = MANIFEST | dict(schedule=(schedule or made).to_dict(), config=config, status=status)
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "realised"}))
    return folder


def append(folder: Path, rows: list[dict]):
    with open(folder / "events.jsonl", "a") as log: log.writelines(json.dumps(row) + "\n" for row in rows)


def axes(): return Figure(figsize=(8, 3.4), layout="constrained").subplots()


def counted(monkeypatch, owner, name: str) -> list:
    "The calls of a function from now on."
    calls, real = [], getattr(owner, name)
    def note(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, name, note)
    return calls


def drawn(ax) -> list:
    "Everything that lines and areas show, as numbers."
    lines = [(line.get_label(), line.get_linestyle(), np.asarray(line.get_xydata())) for line in ax.lines]
    return lines + [("area", "", path.vertices) for c in ax.collections for path in c.get_paths()]


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a[:2] == b[:2]
        np.testing.assert_array_equal(a[2], b[2])


# --- curves

@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_a_band_is_read_in_one_go_and_equals_point_after_point(monkeypatch, seeds):
    draw = np.random.default_rng(seeds)
    parts = [pd.DataFrame(dict(seed=s, x=np.sort(draw.choice(400, 120, replace=False)) / 7.0,
                               y=np.where(draw.random(120) < 0.1, np.nan, draw.normal(size=120))))
             for s in range(seeds)]
    table = pd.concat(parts).sample(frac=1, random_state=0)
    grid = np.sort(table["x"].unique())
    points = np.array([[at_budget(part, g, "x", "y") for g in grid] for part in parts])
    points = points[:, ~np.isnan(points).any(0)]
    calls = counted(monkeypatch, curves.np, "interp")
    found = band(table, "x", "y")
    assert len(calls) == seeds and len(found) == points.shape[1] > 0
    np.testing.assert_array_equal(found["mean"], points.mean(0))
    np.testing.assert_array_equal(found[["min", "max"]].T, [points.min(0), points.max(0)])


def test_a_band_still_refuses_repeated_steps_and_knows_no_point():
    with pytest.raises(ValueError, match="repeats a value"):
        band(pd.DataFrame(dict(x=[1, 1], y=[0.0, 1.0], seed=0)), "x", "y")
    assert np.isnan(at_budget(pd.DataFrame(dict(x=[1.0], accuracy=[np.nan])), 1.0, "x"))
    assert band(pd.DataFrame(dict(x=[1.0], y=[np.nan], seed=0)), "x", "y").empty


# --- columns of a log

def test_columns_equal_a_frame_of_all_rows(tmp_path):
    folder = write(tmp_path / "run", 30)
    tail = Tail(folder / "events.jsonl")
    columns = Columns(tail)
    tail.read()
    columns.follow()
    append(folder, [dict(logged(31)[1][-1], kind="train", late=1.5), dict(logged(31)[1][-1], kind="train")])
    tail.read()
    events = pd.DataFrame(tail.rows)
    for kind in ("train", "probe", "eval", "warning"):
        whole = events[events["kind"] == kind].dropna(axis=1, how="all").reset_index(drop=True)
        found = columns.frame([kind])
        pd.testing.assert_frame_equal(found[list(whole)], whole, check_dtype=False)
    late = columns.frame(["train"])["late"]
    assert late.notna().sum() == 1 and late.iloc[-2] == 1.5
    both = columns.frame(["train", "warning"], ["kind", "global_step", "monitor", "reward"])
    assert len(both) == (events.kind.isin(["train", "warning"])).sum() and list(both)[-1] == "reward"
    assert columns.frame(["signal"]).empty


def test_columns_begin_again_with_the_log(tmp_path):
    folder = write(tmp_path / "run", 12)
    tail = Tail(folder / "events.jsonl")
    columns = Columns(tail)
    tail.read()
    columns.follow()
    assert columns.step == 12
    rows = logged(5, seed=1)[1]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tail.read()
    columns.follow()
    assert columns.step == 5 and columns.seen == len(rows) and tail.begun == 1
    assert len(columns.frame(["train"])) == sum(row["kind"] == "train" for row in rows)
    (folder / "events.jsonl").unlink()
    tail.read()
    columns.follow()
    assert columns.step == columns.seen == 0 and not columns.latest


def test_a_stamp_changes_with_every_write(tmp_path):
    path = tmp_path / "file"
    assert stamp(path) is None
    path.write_text("a")
    first = stamp(path)
    assert stamp(path) == first
    with open(path, "a") as handle: handle.write("b")
    assert stamp(path) != first
    first = stamp(path)
    (tmp_path / "new").write_text("cd")
    os.utime(tmp_path / "new", ns=(0, first[1]))
    os.replace(tmp_path / "new", path)  # as manifests are written
    assert stamp(path) != first


# --- monitor

def test_a_redraw_looks_at_new_rows_only(tmp_path, monkeypatch):
    looked = {}
    for steps in (20, 200):
        folder = write(tmp_path / str(steps), steps)
        state = MonitorState(folder)
        state.tail.read()
        state.html()
        new = [row for row in logged(steps + 1)[1] if row["global_step"] > steps and row["kind"] == "train"]
        append(folder, new)
        with monkeypatch.context() as patch:
            parsed = counted(patch, following.json, "loads")
            added = counted(patch, state.columns, "_add")
            plans = counted(patch, runs, "_sound")
            read = counted(patch, curves.np, "interp")
            state.tail.read()
            assert f"step {min(steps + 1, len(new) + steps)}" in state.html()
        looked[steps] = len(parsed), len(added), len(plans), len(read)
        lines = len(state.columns.frame(["train"], ["branch", "stream"]).drop_duplicates())
        assert looked[steps] == (len(new), len(new), 0, lines)
    assert looked[20] == looked[200]


@pytest.mark.parametrize("metric", ["reward", "overlap"])
def test_the_number_of_artists_does_not_grow_with_steps_phases_or_warnings(tmp_path, metric):
    counts = set()
    for steps in (60, 240):
        state = MonitorState(write(tmp_path / str(steps), steps))
        state.tail.read()
        state.metric, ax = metric, axes()
        state.draw(ax)
        counts.add(len(ax.lines) + len(ax.collections) + len(ax.patches) + len(ax.texts))
    assert len(counts) == 1


def test_a_monitor_shows_what_a_frame_of_all_rows_shows(tmp_path):
    folder = write(tmp_path / "run", 40)
    state = MonitorState(folder)
    rows = logged(40)[1]
    (folder / "events.jsonl").write_text("")
    for first in range(0, len(rows), 25):
        append(folder, rows[first:first + 25])
        state.tail.read()
        state.head()
    events = pd.DataFrame(rows)
    for metric in ("reward", "entropy", "length", "overlap", "symmetric_kl"):
        state.metric, ours, whole = metric, axes(), axes()
        state.draw(ours)
        if metric in ("overlap", "symmetric_kl"): dynamics(probe_values(events, metric), metric, whole)
        else: training_curves(events, metric, whole)
        same(drawn(ours), drawn(whole))
        assert [t.get_text() for t in ours.get_legend().get_texts()] == [t.get_text() for t in
                                                                        whole.get_legend().get_texts()]
    last = events[events.kind == "train"].reindex(columns=LATEST).groupby(["branch", "stream"], sort=False).tail(1)
    pd.testing.assert_frame_equal(state.latest(), last.reset_index(drop=True), check_dtype=False)
    assert state.progress == (40, 40) and "8 warnings of the monitors" in state.warnings()
    for metric, said in (("cosine", "signals_every"), ("loss_of_nothing", "nothing of 'loss_of_nothing' is logged")):
        state.metric = metric
        with pytest.raises(ValueError, match=said): state.draw(axes())


def test_signals_of_a_monitor_equal_those_of_the_events(tmp_path):
    folder = write(tmp_path / "run", 4)
    row = dict(kind="signal", branch="text", stream="rl", capability="text", other_branch="image",
               other_stream="opd:text", other="image", floor=0.1)
    rows = [row | dict(global_step=step, cosine=step / 10) for step in range(1, 9)]
    append(folder, rows)
    state = MonitorState(folder)
    state.tail.read()
    state.metric, ours, whole = "cosine", axes(), axes()
    state.draw(ours)
    signal_curves(pd.DataFrame(logged(4)[1] + rows), "cosine", whole)
    same(drawn(ours), drawn(whole))
    assert ours.lines[0].get_label() == "text · text – image · image · opd of text"


def test_the_plan_is_read_again_when_the_manifest_is_written(tmp_path, monkeypatch):
    folder = write(tmp_path / "run", 8)
    monitor = RunMonitor(folder, every=60)
    assert monitor.state.progress == (8, 8)
    calls = counted(monkeypatch, runs, "_sound")
    assert monitor.state.progress == (8, 8) and not calls
    Run(folder).note(schedule=logged(16)[0].to_dict())
    assert monitor.state.progress == (8, 16) and len(calls) == 1
    monitor.close()


# --- schedules

def test_equal_schedules_are_checked_once(tmp_path, monkeypatch):
    runs._sound.cache_clear()
    calls = counted(monkeypatch, runs.Schedule, "from_dict")
    found = [Run(write(tmp_path / str(seed), 24, seed)).schedule for seed in range(4)]
    assert len(calls) == 1 and len(set(found)) == 1
    Run(tmp_path / "0").note(schedule=logged(24)[0].to_dict() | dict(name="?"))
    for _ in range(2):
        with pytest.raises(ValueError, match="manifest.json: schedule name"): Run(tmp_path / "0").schedule


def test_known_names_are_not_compared(monkeypatch):
    monkeypatch.setattr(names.difflib, "get_close_matches", lambda *a: pytest.fail("compared"))
    assert names.meant("text", ["text", "image"]) == "" and logged(8)[0].validate(["text", "image"])


# --- browser

@pytest.fixture
def store(tmp_path):
    for i in range(6): write(tmp_path / "store" / f"run-{i}", 12, i // 2, learning_rate=(1e-5, 3e-5)[i % 2])
    return tmp_path / "store"


def test_a_browser_reads_what_has_changed(store, monkeypatch):
    rows, logs = counted(monkeypatch, browsing, "_row"), counted(monkeypatch, browsing, "Curves")
    state = Store(store)
    first = state.html()
    assert "data:image/png" in first and (len(rows), len(logs)) == (6, 6)
    for metric in ("greedy", "reward", "sampled"):
        state.metric = metric
        state.html()
    assert state.refresh() == [] and state.html() == first and (len(rows), len(logs)) == (6, 6)
    append(store / "run-3", [row for row in logged(12)[1] if row["global_step"] == 12])
    state.html()
    assert (len(rows), len(logs)) == (6, 7) and logs[-1][0].path.name == "run-3"
    write(store / "run-9", 12, 4, learning_rate=9e-5)
    Run(store / "run-1").note(status="stopped")
    assert state.refresh() == ["run-1", "run-9"] and "7 of 7 runs" in state.html()
    assert (len(rows), [args[0].path.name for args in logs[7:]]) == (8, ["run-1", "run-9"])
    assert set(state.runs.status) == {"finished", "stopped"}
    (store / "run-9" / "manifest.json").unlink()
    assert state.refresh() == [] and len(state.runs) == 6


def test_a_damaged_log_is_read_once(store, monkeypatch):
    with open(store / "run-2" / "events.jsonl", "a") as log: log.write("{]\n")
    state, logs = Store(store), counted(monkeypatch, browsing, "Curves")
    assert [state.curves()["seed"].tolist().count(1) for _ in range(2)] == [4, 4] and len(logs) == 6


def test_running_runs_are_looked_at_again(store):
    write(store / "run-7", 12, status="running")  # nobody holds its lock
    state = Store(store)
    assert state.runs.set_index("run").status["run-7"] == "interrupted" and state.refresh() == ["run-7"]


def test_curves_of_a_browser_equal_learning_curves(store):
    state = Store(store)
    for metric in ("sampled", "greedy"):
        state.metric = metric
        found = state.curves()
        for (label, seed), part in found.groupby(["paradigm", "seed"]):
            run = Run(next(store / row.run for _, row in state.runs.iterrows()
                           if state.label(row) == label and row.seed == seed))
            whole = learning_curve(run, run.schedule.capabilities(), metric)
            pd.testing.assert_frame_equal(part[list(whole)].reset_index(drop=True), whole)
    state.metric = "reward"
    events = Run(store / "run-0").events
    rewards = events[events.kind == "train"].groupby(["phase_index", "step"])["reward"].mean()
    assert state.curves().query("seed == 0").iloc[:12].accuracy.tolist() == rewards.tolist()


def test_a_refresh_keeps_filters_and_offers_new_settings(store):
    browser = RunBrowser(store)
    browser.menus["learning_rate"].value = "3e-05"
    assert "3 of 6 runs" in browser.below.value
    write(store / "run-8", 12, 0, learning_rate=3e-5, prompts=99)
    browser.button.click()
    assert browser.menus["learning_rate"].value == "3e-05" and "4 of 7 runs" in browser.below.value
    assert "99" in browser.menus["prompts"].options and browser.bar.children[-1] is browser.button
    browser.menus["prompts"].value = "99"
    assert "1 of 7 runs" in browser.below.value
    (store / "run-8" / "manifest.json").unlink()
    browser.refresh()
    assert "prompts" not in browser.menus and "3 of 6 runs" in browser.below.value


def test_a_chart_of_a_browser_has_every_setting_with_its_band(store):
    browser = RunBrowser(store)
    lines, = (p["lines"] for p in browser.chart.spec["panels"])
    assert [line["band"] for line in lines] == [True, True] and len(browser.chart.data) == 8 * sum(
        4 * line["n"] for line in lines)
    assert browser.state.telling == ["learning_rate"] and len({(l["color"], str(l["dash"])) for l in lines}) == 2
    browser.controls["sort"].value, browser.controls["descending"].value = "last", True
    last = browser.state.listed()["last"]
    assert last.is_monotonic_decreasing and last.notna().all()


def test_a_picture_has_as_many_settings_as_its_legend_has_room_for(tmp_path):
    for i in range(LINES + 3): write(tmp_path / f"run-{i:02}", 4, learning_rate=1e-5 * (i + 1))
    state, ax = Store(tmp_path), axes()
    state.draw(ax)
    assert len(ax.get_legend().get_texts()) == LINES
    assert f"the first {LINES} of {LINES + 3} settings" in ax.get_title(loc="left")
    assert state.curves().paradigm.nunique() == LINES + 3


def test_runs_with_syncs_are_listed(tmp_path):
    plan, _ = logged(8)
    phases = (*plan.phases[:2], Sync(("text", "image")), *plan.phases[2:])
    write(tmp_path / "run", 8, schedule=Schedule(plan.name, plan.branches, phases, plan.result))
    assert config_table(tmp_path).steps.tolist() == [2 * 8]
