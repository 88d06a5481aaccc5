"What makes a comparison fair: equal steps, equal trials, other seeds."
import pandas as pd
import pytest

from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import RL, Merge, Phase, Update
from copd_nb.engine.config import Config
from copd_nb.study.comparison import COMPARISON_SCALES, FAMILIES, Choice, paradigms, settings_of
from copd_nb.study.grid import Scale, Study, job_plan, scale_of
from copd_nb.study.sweep import best, criterion, sweep_jobs, trials, tuned, tuned_choices

PLAIN = {f: Choice() for f in FAMILIES}


@pytest.mark.parametrize("name, setting", settings_of().items())
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_unified_models_have_equal_total_steps(name, setting, share):
    rows = paradigms(setting, 80, {f: Choice(share=share) for f in FAMILIES})
    assert {p.schedule.total_steps for p in rows if p.family != "expert"} == {80 * len(setting.capabilities)}
    for p in rows: p.schedule.validate(setting.capabilities)
    assert len({p.label for p in rows}) == len(rows)


def test_tuned_choices_fit_the_scales():
    for name, scale in COMPARISON_SCALES.items():
        for setting in settings_of().values(): assert paradigms(setting, scale.steps, tuned_choices(scale)), name
    assert tuned_choices(COMPARISON_SCALES["full"]) == tuned_choices()
    smoke = tuned_choices(COMPARISON_SCALES["smoke"])["copd"]
    assert (smoke.s_rl, smoke.s_opd) == (1, 1) and smoke.beta == tuned_choices()["copd"].beta


def test_scales_of_the_comparison_are_those_of_version_01():
    "Its runs are named by them: finished runs of a store are loaded."
    found = {name: (s.seeds, s.steps, s.prompts, s.samples) for name, s in COMPARISON_SCALES.items()}
    assert found == dict(smoke=((0,), 4, 16, 2), quick=((0,), 80, 256, 4), standard=(tuple(range(5)), 80, 512, 4),
                         full=(tuple(range(10)), 80, 512, 4))
    assert COMPARISON_SCALES["quick"].config == Config(probe_every=20, eval_samples=1, checkpoint_every=20)
    with pytest.raises(ValueError, match="unknown preset 'fast': smoke, quick"):
        scale_of("fast", None, COMPARISON_SCALES)


def test_every_family_has_the_same_number_of_different_trials():
    for f in FAMILIES: assert len(set(trials(f))) == len(trials(f)) == len(trials("copd"))


def test_tuning_seeds_are_not_used():
    for scale in COMPARISON_SCALES.values(): assert not set(scale.seeds) & set(tuned()["seeds"])


def test_chosen_settings_are_the_best_of_the_committed_trials():
    table, record = pd.DataFrame(tuned()["trials"]), tuned()
    assert set(table.family) == set(FAMILIES)
    assert table.groupby("family").trial.nunique().eq(record["trials_each"]).all()
    assert set(table.seed) == set(record["seeds"])
    rate = record["chosen"]["expert"]["learning_rate"]
    assert {f: vars(trials(f, rate)[t]) for f, t in best(table).items()} == record["chosen"]


def test_criterion_weighs_capabilities_equally():
    rows = pd.DataFrame([("result", "a", 1.0, 0.5)] * 3 + [("result", "b", 0.0, 0.0), ("branch", "a", 0.0, 0.0)],
                        columns=["model", "capability", "greedy", "sampled"])
    assert criterion(rows, ["a", "b"]) == 0.375 and criterion(rows, ["a"]) == 0.75


def test_cycles_must_fit():
    with pytest.raises(ValueError, match="75 steps.*12 \\+ 8"):
        paradigms(settings_of()["two_branch"], 75, PLAIN, ["copd"])


def test_settings_need_two_capabilities():
    assert list(settings_of(["a", "b"])) == ["two_branch"]
    with pytest.raises(ValueError, match="two capabilities"): settings_of(["a"])
    with pytest.raises(ValueError, match="unknown family 'sft'"): trials("sft")


def test_every_job_waits_for_its_experts_and_those_for_shorter_ones():
    rows = paradigms(settings_of()["three_branch"], 80, PLAIN)
    jobs = Study("minis", Scale((0, 1), config=Config())).jobs({p.label: p.arm for p in rows})
    listed = job_plan(jobs.values())
    place = {j.key: i for i, (j, _) in enumerate(listed)}
    assert {j.name for j in jobs.values()} <= {name for name, *_ in place} and len(place) == len(listed)
    assert all(place[n.key] < i for i, (_, needs) in enumerate(listed) for n in needs)
    experts = [(j, needs) for j, needs in listed if j.prompts == 0]
    assert sorted(j.schedule.total_steps for j, _ in experts) == [60] * 6 + [80] * 6
    for j, needs in experts:
        assert [(n.config, n.schedule.name, n.schedule.total_steps)
                for n in needs] == ([(j.config, j.schedule.name, 60)] if j.schedule.total_steps == 80 else [])
    needed = {j.schedule.name: {n.schedule.name for n in needs} for j, needs in listed if j.prompts != 0}
    assert not needed["copd-hub"] and not needed["mixed"]
    assert needed["mopd"] == needed["merged"] == {"expert-text", "expert-image", "expert-video"}


def test_sweep_jobs_are_quiet_and_seeded():
    jobs = sweep_jobs("copd", [7, 8])
    assert len(jobs) == 12
    assert all(j.config.probe_every == j.config.eval_every == 0 and j.config.seed == s for (_, s, _), j in jobs.items())


# paradigms of one's own

TWO, THREE = settings_of()["two_branch"], settings_of()["three_branch"]


def apart(capabilities, total, name="apart"):
    n = total // len(capabilities)
    phase = Phase("RL", n, [Update(k, [RL(k)]) for k in capabilities])
    return Schedule(name, list(capabilities), [phase], Merge(list(capabilities)))


def labels(wanted, setting=TWO, n=20): return [p.label for p in paradigms(setting, n, PLAIN, wanted)]


def test_a_function_a_schedule_and_a_reference_are_rows_beside_the_built_in_ones(tmp_path, monkeypatch):
    (tmp_path / "my_paradigms.py").write_text("from tests_of_mine import apart as ring\n")
    (tmp_path / "tests_of_mine.py").write_text(
        "from copd_nb import Merge, Phase, RL, Schedule, Update\n"
        "def apart(names, total):\n"
        "    updates = [Update(k, [RL(k)]) for k in names]\n"
        "    return Schedule('ring', list(names), [Phase('RL', total // len(names), updates)], Merge(list(names)))\n")
    monkeypatch.chdir(tmp_path)
    assert labels(["mixed", apart, "my_paradigms:ring", apart(TWO.capabilities, 40, "given")]) == [
        "mixed RLVR", "apart", "ring", "given"]
    rows = paradigms(TWO, 20, PLAIN, [apart])
    assert rows[0].family == "own" and rows[0].learning_rate == PLAIN["copd"].learning_rate
    assert rows[0].arm.changes == dict(learning_rate=rows[0].learning_rate)


def test_another_budget_is_shown_beside_the_row():
    assert labels([lambda names, total: apart(names, total // 2, "half")]) == ["half (20 of 40 steps)"]
    assert labels([apart(TWO.capabilities, 80, "double")]) == ["double (80 of 40 steps)"]


def test_a_schedule_that_does_not_fit_a_setting_is_left_out():
    two_only = apart(TWO.capabilities, 40)
    assert labels([two_only]) == ["apart"] and labels([two_only], THREE) == []
    assert labels([lambda names, total: None]) == []


@pytest.mark.parametrize("wanted, error, words", [
    ("ring", ValueError, "paradigm 'ring': one of expert, mixed, opd, mopd, merged, copd, or package.module:name"),
    ("no_such_module:ring", ValueError, "no module no_such_module in .* or among the installed packages"),
    ("copd_nb.study.comparison:ring", ValueError, "has no ring"),
    ("copd_nb.study.comparison:FAMILIES", ValueError, "is a tuple"),
    (lambda names, total: 3, TypeError, "gave a int, not a Schedule"),
    (lambda names, total: apart(names[:1], total), ValueError, r"never trains \['image'\]: return None"),
    (lambda names, total: apart((*names, "audio"), total), ValueError, "audio")])
def test_bad_paradigms_are_named(wanted, error, words):
    with pytest.raises(error, match=words): labels([wanted])


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two rows are called \['apart'\]"): labels([apart, apart])
