"Widgets: states without a browser, controls that change them, static frames that show something true."
import ast
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from copd_nb.schedule.paradigms import expert
from copd_nb.data.capability import Example
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.costs import ModelShape, Workload
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.view.browser import RunBrowser, Store
from copd_nb.view.dynamics import SIGNALS
from copd_nb.view.designer import Design, ScheduleDesigner
from copd_nb.view.gap_explorer import GapExplorer, gap_state
from copd_nb.engine.following import Tail
from copd_nb.view.monitor import MonitorState, RunMonitor
from copd_nb.view.saved import WIDGET, drop_live_views
from copd_nb.view.token_inspector import TokenInspector, TokenState
from copd_nb.policy.toys import minis_base, minis
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run, request_stop
from copd_nb.engine.storage import is_written
from copd_nb.engine.storage import locked
from copd_nb.schedule.core import Schedule
from copd_nb.view.token_data import METRICS, PAGE, Choice, Completion, TokenView

ROOT = Path(__file__).parents[2]
SMALL = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=10, probe_every=1, probe_prompts=4,
               probe_k=(10, 1), eval_every=2, eval_prompts=4, eval_samples=1,
               device="cpu", warmup=1, learning_rate=2e-4)
LOAD = Workload(4, 2, 4, {"text": 20, "image": 24}, {"text": 8, "image": 6}, ModelShape(1000, 0, 1, 8, vocabulary=10))


@pytest.fixture(scope="module")
def suite(): return minis(("text", "image"))


@pytest.fixture(scope="module")
def start(): return minis_base()


@pytest.fixture(scope="module")
def store(tmp_path_factory, suite, start):
    folder = tmp_path_factory.mktemp("store")
    for seed in (0, 1):
        train(copd(["text", "image"], cycles=1, s_rl=1, s_opd=2), suite, start, replace(SMALL, seed=seed),
              folder / f"copd-{seed}", progress=False)
    train(expert("text", 2), suite, start, replace(SMALL, learning_rate=1e-3), folder / "expert", progress=False)
    return folder


def view_of(*texts):
    def one(words):
        top = [[Choice(i, f"c{i}", 0.5) for i in range(2)] for _ in words]
        return Completion(Example("p<b>", "a", "text"), True, list(range(len(words))), list(words),
                          {m: [(-1) ** i * i / 10 for i in range(len(words))] for m in METRICS}, top, top)
    return TokenView("s", "t", "given", 1.0, 2, [one(t) for t in texts])


def shown(explorer): return explorer.output.value + explorer.below.value


def bundle(explorer): return explorer._repr_mimebundle_()


# --- designing

def test_exported_code_makes_the_schedule_that_is_shown():
    for arguments in (dict(), dict(topology="hub", hub="image"),
                      dict(topology="student", beta=0.5, estimator="reverse", cycles=1, s_rl=0)):
        design = Design(("text", "image", "video"), **arguments)
        made = {}
        exec(design.code, made)
        assert made["schedule"].content_hash() == design.schedule.content_hash() and isinstance(design.schedule,
                Schedule)


def test_controls_change_the_schedule():
    designer = ScheduleDesigner(["text", "image"], LOAD)
    designer.controls["s_rl"].value, designer.controls["cycles"].value, designer.controls["beta"].value = 5, 2, 0.4
    assert designer.schedule == copd(["text", "image"], cycles=2, s_rl=5, s_opd=8, beta=0.4)
    assert "s_rl=5" in designer.output.value and "<svg" in designer.output.value
    assert designer.controls["hub"].disabled
    designer.controls["topology"].value = "hub"
    assert not designer.controls["hub"].disabled and designer.schedule.name == "copd-hub"


def test_prices_are_those_of_the_schedule():
    design = Design(("text", "image"), cycles=2, workload=LOAD)
    total, price = design.price().set_index("branch").loc["all"], design.schedule.price(LOAD)
    for column in ("updates", "generated", "scored", "trained", "tokens", "flops"):
        assert total[column] == pytest.approx(price[column].sum())
    with pytest.raises(ValueError, match="no workload"): Design(("text", "image")).price()
    assert "Pass a workload" in Design(("text", "image")).html()


def test_what_is_refused_is_a_sentence_and_is_over_when_it_is_mended():
    designer = ScheduleDesigner(["text", "image"])
    designer.controls["beta"].value = 0
    assert "beta must be" in designer.output.value and "<svg" not in designer.output.value and "beta must be" in bundle(
        designer)["text/html"]
    designer.controls["beta"].value = 0.1
    assert "<svg" in designer.output.value


# --- gaps

def test_gap_state_equals_the_events(store):
    run = Run(store / "copd-0")
    state = gap_state(run)
    assert state.ks == (10, 1) and state.k == 10 and state.step == 3 and set(state.steps) == {1, 2,
            3} | ({0} & set(state.steps))
    probes = run.events.query("kind == 'probe' and global_step == 3 and capability == 'text' and owner == 'text'")
    state.pair, state.capability = "image – text", "text"
    direct = probes[((probes.a == "text") & (probes.b == "image")) | ((probes.a == "image") & (probes.b == "text"))]
    for k, column in ((10, "overlap"), (1, "overlap@1")):
        state.k = k
        now = state.now().query("owner == 'text'")
        assert now.value.item() == pytest.approx(direct[column].mean()) and now.low.item() == now.high.item(
            ) == now.value.item()
    state.metric, state.step = "symmetric_kl", 3
    row, before = (state.now().query("owner == 'text'") for state.step in (3, 2))
    assert row.change.item() == pytest.approx(row.value.item() - before.value.item())


def test_several_seeds_have_a_spread(store):
    state = gap_state([Run(store / "copd-0"), Run(store / "copd-1")])
    now = state.now()
    assert (now.low <= now.value + 1e-12).all() and (now.value <= now.high + 1e-12).all() and (now.low < now.high).any()
    assert "of 2 seeds" in state.html()


def test_gap_explorer_answers_its_controls(store):
    explorer = GapExplorer(Run(store / "copd-0"))
    first = shown(explorer)
    explorer.controls["step"].value = 1
    assert "step 1: one seed" in shown(explorer) and shown(explorer) != first
    explorer.controls["k"].value = 1
    assert explorer.state.column == "overlap@1" and "k = 1" in shown(explorer)
    explorer.controls["metric"].value = "symmetric_kl"
    assert "nats" in shown(explorer)
    explorer.controls["pair"].value, explorer.controls["capability"].value = "base – text", "image"
    assert "no probe of pair" in shown(explorer)


def test_gaps_refuse_what_has_none(store, suite, start, tmp_path):
    run = train(expert("text", 1), suite, start, replace(SMALL, probe_every=0, eval_every=0), tmp_path / "run",
                progress=False)
    with pytest.raises(ValueError, match=r"no probe in \['run'\].*probe_every"): GapExplorer(run)
    other = train(expert("text", 1), suite, start, replace(SMALL, probe_k=5, eval_every=0), tmp_path / "other",
                  progress=False)
    with pytest.raises(ValueError, match="different top-k"): gap_state([Run(store / "copd-0"), other])
    state = gap_state(other)
    state.k = 3
    with pytest.raises(ValueError, match="k=3 was not logged"): state.now()


# --- tokens

def test_a_click_chooses_a_token():
    inspector = TokenInspector(view_of("abc", "de"))
    inspector.strip.index = 1
    assert inspector.state.token == 1 and inspector.chosen["text"] == "b" and "token 2 of 3" in inspector.output.value
    assert "button:nth-child(2){outline" in inspector.colors.value
    inspector.controls["row"].value = 1
    assert inspector.state.row == 1 and [label for label,
                                         _ in inspector.state.labels()] == ["d", "e"] and inspector.state.token == 1
    inspector.controls["metric"].value = "overlap"
    assert inspector.state.metric == "overlap" and "no id in common" in inspector.head.value


def test_twenty_thousand_tokens_are_paged():
    inspector = TokenInspector(view_of("x" * 20_000, "y"))
    assert len(inspector.strip.options) == PAGE and inspector.controls["page"].max == 78 and inspector.controls[
        "page"].layout.display != "none"
    inspector.controls["page"].value = 78
    assert list(inspector.state.shown) == list(range(19_968, 20_000)) and inspector.state.token >= 19_968
    inspector.strip.index = 5
    assert inspector.chosen["position"] == 19_973
    inspector.controls["row"].value = 1
    assert inspector.state.page == 0 and inspector.controls[
        "page"].layout.display == "none" and inspector.strip.options[0][0] == "y"
    assert len(inspector.frame()) < 1_000_000


def test_empty_completions_are_said_to_be_empty():
    inspector = TokenInspector(view_of("", "ab"))
    assert "no tokens" in inspector.output.value and inspector.strip.index is None
    inspector.controls["row"].value = 1
    assert inspector.strip.index == 1
    with pytest.raises(ValueError, match="no completions"): TokenInspector(view_of())


def test_labels_are_visible_and_panels_escaped():
    state = TokenState(view_of(["<script>", "\u202e", "\n"]))
    assert [label for label, _ in state.labels()] == ["<script>", "\\u202e", "␊"]  # the buttons escape
    assert "<script>" not in state.words() and "p&lt;b&gt;" in state.words()


def test_the_static_frame_shows_the_same_place():
    inspector = TokenInspector(view_of("ab", "cd", "ef"))
    inspector.controls["row"].value, inspector.controls["metric"].value = 2, "jsd"
    html = bundle(inspector)["text/html"]
    assert "completion 2" in html and "completion 1" not in html and '<option value="jsd" selected' in html


# --- tail and monitor

def test_tail_reads_each_row_once_and_waits_for_whole_lines(tmp_path):
    log, tail = EventLog(tmp_path / "events.jsonl"), Tail(tmp_path / "events.jsonl")
    assert not tail.read() and tail.rows == []
    log.append([dict(step=0), dict(step=1)])
    assert tail.read() and not tail.read() and [r["step"] for r in tail.rows] == [0, 1]
    with open(log.path, "a") as f: f.write('{"step": ')
    assert not tail.read() and len(tail.rows) == 2
    with open(log.path, "a") as f: f.write("2}\n")
    assert tail.read() and [r["step"] for r in tail.rows] == [0, 1, 2]


@pytest.mark.parametrize("again", [[5], [5, 6, 7, 8, 9, 10, 11, 12], []])
def test_tail_notices_a_log_that_was_cut_back(tmp_path, again):
    log, tail = EventLog(tmp_path / "events.jsonl"), Tail(tmp_path / "events.jsonl")
    log.append([dict(step=0)])
    size = log.size
    log.append([dict(step=1), dict(step=2)])
    tail.read()
    log.truncate(size)
    log.append(dict(step=s) for s in again)
    assert tail.read() and [r["step"] for r in tail.rows] == [0, *again]
    log.path.unlink()
    assert tail.read() and tail.rows == [] and not tail.read()


def slowly(monkeypatch, seconds=0.05):
    "Make every step take a while."
    from copd_nb.engine import step as step_module
    real = step_module.train_step
    monkeypatch.setattr(step_module, "train_step", lambda *a: (time.sleep(seconds), real(*a))[1])


def until(true, seconds=180):
    "Wait for something."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_monitor_starts_stops_and_resumes(tmp_path, suite, start, monkeypatch):
    slowly(monkeypatch)
    path, config = tmp_path / "run", replace(SMALL, probe_every=0, eval_every=0)
    monitor = RunMonitor(path, lambda: train(expert("text", 8), suite, start, config, path, progress=False), every=0.05)
    assert monitor.state.status == "absent" and "nothing is logged" in monitor.output.value
    assert monitor.buttons["resume"].description == "start" and monitor.buttons[
        "stop"].disabled and not monitor.buttons["resume"].disabled
    monitor.buttons["resume"].click()
    until(lambda: monitor.state.tail.rows and not monitor.buttons["stop"].disabled)
    assert monitor.buttons["resume"].disabled
    monitor.buttons["stop"].click()
    assert monitor.wait() == "stopped" and 0 < monitor.state.progress[0] < 8
    until(lambda: monitor.buttons["resume"].description == "resume" and not monitor.buttons["resume"].disabled)
    monitor.buttons["resume"].click()
    assert monitor.wait(status=("finished",)) == "finished" and monitor.state.progress == (8, 8)
    until(lambda: not monitor.thread.is_alive())
    straight = train(expert("text", 8), suite, start, config, tmp_path / "straight", progress=False)
    pd.testing.assert_frame_equal(pd.DataFrame(monitor.state.tail.rows).drop(columns="seconds"),
                                  straight.events.drop(columns="seconds"))


def test_monitor_watches_another_process(tmp_path, store):
    "A child holds the run's lock and writes rows, until it is asked to stop."
    path = tmp_path / "run"
    path.mkdir()
    manifest = json.loads((store / "expert" / "manifest.json").read_text()) | dict(status="running")
    (path / "manifest.json").write_text(json.dumps(manifest))
    code = ("import sys, time\nfrom pathlib import Path\nfrom copd_nb.engine.log import EventLog\nfrom "
            "copd_nb.engine.storage import locked\nfrom copd_nb.engine.runs import stop_requested\npath = "
            "Path(sys.argv[1])\n"
            "with locked(path):\n    step = 0\n    while not stop_requested(path) and step < 2000:\n        step += 1\n"
            "        EventLog(path / 'events.jsonl').append([dict(kind='train', global_step=step, step=step, "
            "branch='text', stream='rl', phase='expert', phase_index=0, reward=.5)])\n        time.sleep(.03)\n")
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], env=os.environ | dict(PYTHONPATH=str(ROOT)))
    monitor = RunMonitor(path, every=0.05)
    until(lambda: monitor.state.tail.rows)
    until(lambda: monitor.state.status == "running" and not monitor.buttons["stop"].disabled)
    assert monitor.buttons["resume"].disabled and "resume=" in monitor.buttons["resume"].tooltip
    monitor.buttons["stop"].click()
    assert child.wait(30) == 0
    assert monitor.wait() == "interrupted" and len(monitor.state.tail.rows) < 2000
    monitor.close()


def test_a_failing_training_is_shown(tmp_path):
    def fail(): raise RuntimeError("no <memory>")
    monitor = RunMonitor(tmp_path / "run", fail, every=0.05)
    monitor.buttons["resume"].click()
    until(lambda: "no &lt;memory&gt;" in monitor.output.value)
    assert monitor.state.status == "absent"
    monitor.close()


def test_interrupted_and_locked_folders_are_told_apart(tmp_path, store):
    path = tmp_path / "run"
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps(json.loads((store / "expert" / "manifest.json").read_text())
                                                   | dict(status="running")))
    state = MonitorState(path)
    assert state.status == "interrupted"
    with locked(path):
        assert state.status == "running" and is_written(path)
        request_stop(path)
        assert state.status == "stopping"
        with pytest.raises(RuntimeError, match="is running"): state.start(lambda: None)
    assert state.status == "interrupted" and not is_written(path)


def test_finished_runs_show_every_metric(store):
    monitor = RunMonitor(store / "copd-0")
    monitor.thread.join(20)
    assert monitor.state.status == "finished" and all(b.disabled
                                                      for b in monitor.buttons.values(
        )) and not monitor.thread.is_alive()
    for metric in monitor.controls["metric"].options:
        monitor.controls["metric"].value = metric
        panels = monitor.chart.spec["panels"]
        if metric in SIGNALS: assert "signals_every" in monitor.output.value and not panels  # it watched no gradients
        else: assert [p["name"] for p in panels] == [metric] and panels[0]["lines"] and monitor.chart.data
    assert "step 3 of 3" in monitor.output.value


def test_a_monitor_draws_in_its_thread_while_others_draw(store):
    "No pyplot state is shared."
    import matplotlib.pyplot as plt
    state, errors = MonitorState(store / "copd-0"), []
    state.tail.read()
    def draw():
        try: state.html()
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=draw) for _ in range(3)]
    before = plt.get_fignums()
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and plt.get_fignums() == before


# --- store

def test_store_filters_by_what_differs(store):
    browser = Store(store)
    assert {"schedule", "seed", "learning_rate"} <= set(browser.differing) and "prompts" not in browser.differing
    browser.filters = dict(schedule="copd")
    assert set(browser.left.run) == {"copd-0", "copd-1"}
    assert browser.curves().paradigm.nunique() == 1 and set(browser.curves().seed) == {0, 1}
    browser.filters = dict(seed=7)
    assert browser.left.empty and "0 of 3 runs" in browser.html()
    browser.filters = dict(speed=1)
    with pytest.raises(KeyError, match="speed"): browser.left


def test_curves_equal_the_events(store):
    browser = Store(store)
    browser.filters, browser.metric = dict(schedule="expert-text"), "reward"
    rewards = Run(store / "expert").events.query("kind == 'train'").reward.tolist()
    assert browser.curves().accuracy.tolist() == pytest.approx(rewards)
    browser.metric = "sampled"
    evals = Run(store / "expert").events.query("kind == 'eval' and capability == 'text'")
    assert browser.curves().accuracy.tolist() == pytest.approx((100 * evals.sampled).tolist())


def test_browser_menus_filter(store):
    browser = RunBrowser(store)
    browser.menus["learning_rate"].value = "0.001"
    assert list(browser.state.left.run) == ["expert"] and "1 of 3 runs" in browser.below.value
    browser.menus["learning_rate"].value = "any"
    assert len(browser.state.left) == 3
    browser.controls["budget"].value = "tokens"
    assert browser.chart.spec["xname"] == "tokens"


def test_runs_of_one_name_and_seed_but_other_schedules_keep_their_own_curve(tmp_path, suite, start):
    for name, beta in (("a", 0.1), ("b", 0.9)):
        train(copd(["text", "image"], cycles=1, s_rl=1, s_opd=1, beta=beta), suite, start, SMALL, tmp_path / name,
              progress=False)
    browser = Store(tmp_path)
    browser.metric = "reward"
    assert set(browser.curves().paradigm) == {"a", "b"} and "data:image/png" in browser.html()


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run in"): RunBrowser(tmp_path)


# --- static frames

def explorers(store):
    return [ScheduleDesigner(["text", "image"], LOAD), GapExplorer(Run(store / "copd-0")),
            TokenInspector(view_of("abc")), RunBrowser(store), RunMonitor(store / "expert")]


def test_every_explorer_has_a_live_view_and_a_true_static_frame(store):
    for explorer in explorers(store):
        shown = bundle(explorer)
        assert shown[WIDGET]["model_id"] == explorer.view.model_id
        html = shown["text/html"]
        assert "<script" not in html and "http" not in html.replace("http://www.w3.org/2000/svg",
                "") and "Static picture" in html
        assert ("data:image/png" in html) or ("<svg" in html) or ("<label" in html), explorer
        assert shown["text/plain"].startswith(type(explorer).__name__)


def test_nbconvert_shows_the_static_frame(store, tmp_path):
    from copd_nb.report.driver import _to_html
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[
        nbformat.v4.new_output("display_data", data=bundle(e), metadata={}) for e in explorers(store)])])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    html = _to_html(tmp_path / "n.ipynb").read_text()
    assert html.count("Static picture") == 5 and WIDGET not in html


def test_live_views_are_dropped_from_saved_notebooks(tmp_path, store):
    data = bundle(ScheduleDesigner(["text", "image"]))
    notebook = nbformat.v4.new_notebook(metadata=dict(widgets={"x": 1}),
                                        cells=[nbformat.v4.new_code_cell("x",
                                        outputs=[nbformat.v4.new_output("display_data", data=data)])])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    assert drop_live_views(tmp_path / "n.ipynb") == 1
    saved = (tmp_path / "n.ipynb").read_text()
    assert WIDGET not in saved and "text/html" in saved and drop_live_views(tmp_path
            / "n.ipynb") == 0 and (tmp_path / "n.ipynb").read_text() == saved


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.name)
def test_committed_notebooks_hold_no_live_views(path):
    "They would be shown as errors where there is no kernel."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert not [1 for c in notebook["cells"] for o in c.get("outputs", [])
                if WIDGET in o.get("data", {})], "run copd_nb.view.saved.drop_live_views"


STATES = {"Design", "GapState", "TokenState", "MonitorState", "Store", "Curves"}


def test_states_need_no_widgets():
    "States are plain Python: their classes call nothing of ipywidgets."
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "copd_nb" / "view").glob("*.py")]
    found = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in STATES:
        assert not [n for n in ast.walk(found[name]) if isinstance(n, ast.Name) and n.id == "widgets"], name
