"The order of jobs: shared experts first, shorter ones before longer ones."
from copd_nb.engine.config import Config
from copd_nb.schedule.rows import KNOWN, paradigms, settings_of
from copd_nb.study.grid import Arm, Scale, Study, job_plan


def test_every_job_waits_for_its_experts_and_those_for_shorter_ones():
    rows = paradigms(settings_of()["three_branch"], 80)
    jobs = Study("minis", Scale((0, 1), config=Config())).jobs({p.label: Arm(p.schedule, p.changes) for p in rows})
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


def test_rows_of_every_kind_have_a_plan():
    "Also those whose branches meet: only experts that train alone to their end are shared."
    rows = paradigms(settings_of()["two_branch"], 80, {}, KNOWN)
    jobs = Study("minis", Scale((0,), config=Config())).jobs({p.label: Arm(p.schedule, p.changes) for p in rows})
    needed = {j.schedule.name: {n.schedule.name for n in needs} for j, needs in job_plan(jobs.values())}
    assert not needed["local-5"] and not needed["copd-synced"] and not needed["codistill-grpo"]
    assert needed["semi-opd"] == needed["reward-and-teacher"] == {"expert-text", "expert-image"}
