"A copy of the log for trackers: every number once, at its step, and never at the cost of a training."
import json
import threading
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.scale import trackers as trackers_module
from copd_nb.schedule.paradigms import expert
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.policy.toys import image, text, tiny_policy
from copd_nb.report.command import main
from copd_nb.engine.runs import request_stop
from copd_nb.scale.trackers import Stream, follow, scalars

CONFIG = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=3, probe_every=1, probe_prompts=2, eval_every=1,
                eval_prompts=2, eval_samples=1, checkpoint_every=1, device="cpu")


def trained(path):
    return train(copd(["text", "image"], cycles=1, s_rl=1, s_opd=1), [text(8), image(8, 8)], tiny_policy(), CONFIG,
                 path, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory): return trained(tmp_path_factory.mktemp("track") / "run")


def expected(run):
    return [(r["global_step"], scalars(r))
            for r in map(json.loads, (run.path / "events.jsonl").read_text().splitlines())]


def test_every_row_is_sent_once_at_its_step(run):
    seen = []
    assert follow(run.path, lambda numbers, step: seen.append((step, numbers))) == len(seen) and seen == expected(run)


def test_rows_of_a_step_do_not_share_names(run):
    for kind in ("train", "probe", "eval"):
        names = [n for step, numbers in expected(run) for n in numbers if n.startswith(kind) and step == 1]
        assert names and len(names) == len(set(names))


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(-10**6, 10**6), st.floats(),
                                            st.text())))
def test_scalars_are_finite_numbers_of_any_row(row):
    found = scalars(row | dict(kind="train", global_step=1))
    assert all(isinstance(v, float) and abs(v) < float("inf") for v in found.values())


def test_tensorboard_holds_what_the_log_holds_and_a_second_stream_adds_nothing(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for _ in range(2): assert follow(run.path, "tensorboard") == len(expected(run))
    held = EventAccumulator(str(run.path / "tracking" / "tensorboard"), size_guidance=dict(scalars=0))
    held.Reload()
    points = {(name, e.step): e.value for name in held.Tags()["scalars"] for e in held.Scalars(name)}
    numbers = {(name, step): value for step, found in expected(run) for name, value in found.items()}
    assert points == pytest.approx(numbers, rel=1e-6) and sum(len(held.Scalars(n))
                                                              for n in held.Tags()["scalars"]) == len(numbers)


def test_a_stopped_and_resumed_run_is_streamed_without_gap_or_repetition(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(trackers_module.TRACKERS, "tensorboard", lambda run,
                        folder: ((lambda numbers, step: seen.append((step, numbers))), lambda: None))
    schedule, path = expert("text", 6), tmp_path / "run"
    go = lambda: train(schedule, [text(8)], tiny_policy(), CONFIG, path, progress=False)
    with Stream(path, "tensorboard", every=0.01):
        worker = threading.Thread(target=go)
        worker.start()
        while not seen: time.sleep(0.01)
        request_stop(path)
        worker.join()
    before, resumed = len(seen), go()
    assert resumed.finished and follow(path, "tensorboard") == len(seen) > before > 0
    drop = lambda rows: [(step, {n: v for n, v in numbers.items() if "seconds" not in n}) for step, numbers in rows]
    assert drop(seen) == drop(expected(resumed))


def test_a_tracker_that_fails_is_given_up_with_one_warning_and_the_run_finishes(tmp_path):
    def broken(numbers, step): raise OSError("disk full")
    with pytest.warns(UserWarning, match="run are not sent.*OSError: disk full") as seen, Stream(tmp_path / "run",
            broken, every=0.01):
        run = trained(tmp_path / "run")
    assert run.finished and len([w for w in seen if "not sent" in str(w.message)]) == 1


def test_a_tracker_that_fails_at_its_end_harms_nobody(run, monkeypatch):
    def end(): raise OSError("no")
    monkeypatch.setitem(trackers_module.TRACKERS, "wandb", lambda run, folder: (lambda numbers, step: None, end))
    monkeypatch.setattr(trackers_module, "_check_tracker", lambda name: None)
    with pytest.warns(UserWarning, match="OSError: no"): assert follow(run.path, "wandb") == len(expected(run))


def test_what_is_unknown_or_not_installed_is_said_before_anything_starts(tmp_path, run, monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow': one of trackio, tensorboard, wandb"):
        Stream(tmp_path, "mlflow")
    real = trackers_module.importlib.import_module
    def absent(name):
        if name.startswith("copd_nb"): return real(name)
        raise ImportError(name)
    monkeypatch.setattr(trackers_module.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'copd_nb\[track\]'"): Stream(tmp_path, "wandb")
    with pytest.raises(FileNotFoundError, match="no manifest.json"): follow(tmp_path, print)
    assert main(["track", str(run.path), "--to", "wandb"]) == 2 and "copd_nb[track]" in capsys.readouterr().err


def test_the_command_sends_a_finished_run(tmp_path, capsys):
    made = trained(tmp_path / "run")
    assert main(["track", str(made.path), "--to", "tensorboard"]) == 0
    assert f"{len(expected(made)):,} rows sent" in capsys.readouterr().out and list((made.path / "tracking"
            / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_other_trackers_where_installed(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    made = trained(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are not sent")
        assert follow(made.path, name) == len(expected(made))
    assert any((tmp_path / "trackio").glob("*.db")) if name == "trackio" else any((made.path / "tracking"
            / "wandb").glob("offline-run-*"))
