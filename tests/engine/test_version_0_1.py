"""Run folders, schedules and records of version 0.1 are read, and a run that was stopped then is continued now.

`tests/fixtures/run-0.1` was trained by 0.1 (rank-1 adapters on the shipped base, a teacher that stays the base) and
stopped in its second step; `whole-0.1.jsonl` is the log of the same run to its end."""
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from copd_nb.analysis.records import read_results
from copd_nb.engine.config import config_from
from copd_nb.engine.log import EventLog
from copd_nb.engine.monitors import Watch
from copd_nb.engine.runs import Run, latest_checkpoint, list_runs
from copd_nb.engine.checkpoints import load_checkpoint
from copd_nb.engine.training import train
from copd_nb.policy.lora_branches import lora
from copd_nb.policy.suites import load_suite
from copd_nb.policy.toys import minis, minis_base
from copd_nb.schedule.core import Schedule
from copd_nb.view.monitor import RunMonitor

pytestmark = pytest.mark.integration

OLD = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def old(tmp_path):
    "A copy of the run folder: reading may not, but training would change it."
    return Path(shutil.copytree(OLD / "run-0.1", tmp_path / "run-0.1"))


def test_a_run_of_0_1_is_read(old):
    run = Run(old)
    assert run.status == "stopped" and run.schedule == run.planned and run.schedule.name == "taught"
    assert run.date.year == 2026 and set(run.manifest["prompts"]["base"]) == {"text", "image"}
    events = run.events
    assert set(events.kind) == {"train", "probe", "eval"} and events.global_step.max() == 2
    assert {"reward", "loss", "gradient_norm", "delta_mean", "entropy", "symmetric_kl", "greedy"} <= set(events)
    assert "taught" in run._repr_html_()


def test_a_store_of_0_1_is_listed(old):
    listed = list_runs(old.parent)
    assert listed[["schedule", "status", "seed"]].values.tolist() == [["taught", "stopped", 0]]


def test_monitors_and_the_live_view_follow_a_log_of_0_1(old):
    watch = Watch()
    assert watch.see(EventLog(old / "events.jsonl").rows()) == [] and ("text", "rl", "text") in watch.streams
    assert RunMonitor(old).state.status == "stopped"


def test_a_checkpoint_of_0_1_is_read(old):
    tensors, state = load_checkpoint(latest_checkpoint(Run(old)))
    assert set(tensors) == {"text~weights", "text~all", "image~weights"} and state["branches"]["text"]["updates"] == 2


def test_a_run_of_0_1_is_continued_to_the_numbers_that_0_1_had(old):
    run = Run(old)
    config = config_from({k: v for k, v in run.manifest["config"].items()})
    done = train(run.planned, minis(("text", "image")), lora(minis_base(), rank=1), config, old, progress=False)
    rows, expected = done.events.to_dict("records"), [json.loads(line) for line in (OLD / "whole-0.1.jsonl").open()]
    assert done.finished and len(rows) == len(expected)
    for row, was in zip(rows, expected):
        for key, value in was.items():
            if key in ("seconds", "flops"): continue
            if isinstance(value, float):
                assert math.isclose(row[key], value, rel_tol=1e-3, abs_tol=1e-4), (key, row, was)
            elif value is not None: assert row[key] == value, (key, row, was)


def test_another_request_in_a_folder_of_0_1_is_refused_with_the_thing_to_do(old):
    config = replace(config_from(Run(old).manifest["config"]), seed=1)
    with pytest.raises(ValueError, match="holds another run.*use another folder, or remove it"):
        train(Run(old).planned, minis(("text", "image")), lora(minis_base(), rank=1), config, old, progress=False)


def test_a_schedule_of_0_1_is_read():
    found = Schedule.from_dict(json.loads((OLD / "schedule-0.1.json").read_text()))
    assert found.validate(["text", "image"]).content_hash() == Run(OLD / "run-0.1").planned.content_hash()


def test_a_record_of_0_1_is_read():
    assert read_results(OLD / "results-0.1.json")["headline"]


@pytest.mark.slow
def test_suites_keep_the_names_that_0_1_wrote():
    for name in ("copd_nb.minis:suite", "copd_nb.skills:suite"):
        capabilities, base = load_suite(name)
        assert capabilities and base.name
