"What makes a comparison fair: equal steps, equal trials, other seeds."
import pandas as pd
import pytest

from copd_nb.study.comparison import (
    FAMILIES, PRESETS, Choice, best, criterion, job_plan, jobs_of, paradigms, settings_of, sweep_jobs, trials, tuned,
    tuned_choices)
from copd_nb.engine.config import Config

PLAIN = {f: Choice() for f in FAMILIES}


@pytest.mark.parametrize("name, setting", settings_of().items())
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_unified_models_have_equal_total_steps(name, setting, share):
    rows = paradigms(setting, 80, {f: Choice(share=share) for f in FAMILIES})
    assert {p.schedule.total_steps for p in rows if p.family != "expert"} == {80 * len(setting.capabilities)}
    for p in rows: p.schedule.validate(setting.capabilities)
    assert len({p.label for p in rows}) == len(rows)


def test_tuned_choices_fit_the_presets():
    for name, preset in PRESETS.items():
        choices = {f: Choice(**{**vars(c), **preset.choice}) for f, c in tuned_choices().items()}
        for setting in settings_of().values(): assert paradigms(setting, preset.steps, choices), name


def test_every_family_has_the_same_number_of_different_trials():
    for f in FAMILIES: assert len(set(trials(f))) == len(trials(f)) == len(trials("copd"))


def test_tuning_seeds_are_not_used():
    for preset in PRESETS.values(): assert not set(preset.seeds) & set(tuned()["seeds"])


def test_chosen_settings_are_the_best_of_the_committed_trials():
    table, record = pd.DataFrame(tuned()["trials"]), tuned()
    assert set(table.family) == set(FAMILIES) and table.groupby("family").trial.nunique().eq(record["trials_each"]).all()
    assert set(table.seed) == set(record["seeds"])
    rate = record["chosen"]["expert"]["learning_rate"]
    assert {f: vars(trials(f, rate)[t]) for f, t in best(table).items()} == record["chosen"]


def test_criterion_weighs_capabilities_equally():
    rows = pd.DataFrame([("result", "a", 1.0, 0.5)] * 3 + [("result", "b", 0.0, 0.0), ("branch", "a", 0.0, 0.0)], columns=["model", "capability", "greedy", "sampled"])
    assert criterion(rows, ["a", "b"]) == 0.375 and criterion(rows, ["a"]) == 0.75


def test_cycles_must_fit():
    with pytest.raises(ValueError, match="75 steps.*12 \\+ 8"): paradigms(settings_of()["two_branch"], 75, PLAIN, ["copd"])


def test_settings_need_two_capabilities():
    assert list(settings_of(["a", "b"])) == ["two_branch"]
    with pytest.raises(ValueError, match="two capabilities"): settings_of(["a"])
    with pytest.raises(ValueError, match="unknown family 'sft'"): trials("sft")


def test_every_job_waits_for_its_experts_and_those_for_shorter_ones():
    jobs = jobs_of(paradigms(settings_of()["three_branch"], 80, PLAIN), [0, 1], Config())
    listed = job_plan(jobs.values())
    place = {(j.name, j.prompts): i for i, (j, _) in enumerate(listed)}
    assert {j.name for j in jobs.values()} <= {name for name, _ in place} and len(place) == len(listed)
    assert all(place[n.name, n.prompts] < i for i, (_, needs) in enumerate(listed) for n in needs)
    experts = [(j, needs) for j, needs in listed if j.prompts == 0]
    assert sorted(j.schedule.total_steps for j, _ in experts) == [60] * 6 + [80] * 6
    for j, needs in experts:
        assert [(n.config, n.schedule.name, n.schedule.total_steps) for n in needs] == ([(j.config, j.schedule.name, 60)] if j.schedule.total_steps == 80 else [])
    needed = {j.schedule.name: {n.schedule.name for n in needs} for j, needs in listed if j.prompts != 0}
    assert not needed["copd-hub"] and not needed["mixed"] and needed["mopd"] == needed["merged"] == {"expert-text", "expert-image", "expert-video"}


def test_sweep_jobs_are_quiet_and_seeded():
    jobs = sweep_jobs("copd", [7, 8])
    assert len(jobs) == 12 and all(j.config.probe_every == j.config.eval_every == 0 and j.config.seed == s for (_, s, _), j in jobs.items())
