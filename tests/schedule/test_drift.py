"Merging by drift: rounds of another length, the rule, and averaging inside any schedule of cycles."
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.engine.config import Config
from copd_nb.engine.measure import probe_list
from copd_nb.schedule.controllers import check_control, controlled
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule, Sync
from copd_nb.schedule.drift import change_period, drift
from copd_nb.schedule.local import local_rlvr, synced, synced_copd
from copd_nb.schedule.paradigms import mopd

PAIR = ("text", "image")


def rounds(schedule):
    "Cycle → steps of its phases, and how many syncs."
    found = {}
    for part in schedule.phases: found.setdefault(part.cycle, []).append(part)
    return {c: ([p.steps for p in parts if not isinstance(p, Sync)], sum(isinstance(p, Sync) for p in parts))
            for c, parts in found.items()}


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 60), st.data())
def test_another_period_keeps_the_steps(steps, period, wanted, data):
    plan = local_rlvr(PAIR, steps, period)
    cycle = data.draw(st.sampled_from(sorted(rounds(plan))))
    changed = change_period(plan, cycle, wanted).validate()
    before, after = rounds(plan), rounds(changed)
    assert changed.total_steps == plan.total_steps and list(after) == list(range(1, len(after) + 1))
    assert all(after[c] == before[c] for c in before if c <= cycle)
    later = [s for c, (s, _) in after.items() if c > cycle]
    assert not later or max(map(sum, later)) - min(map(sum, later)) <= 1
    assert [n for _, n in after.values()] == [1] * (len(after) - 1) + [0]


@given(st.integers(2, 6), st.integers(0, 4), st.integers(1, 4), st.floats(0, 40))
def test_every_phase_of_a_cycle_keeps_its_steps(cycles, s_rl, s_opd, wanted):
    plan = synced(copd(PAIR, cycles, s_rl, s_opd))
    changed = change_period(plan, 1, wanted)
    def kinds(s): return {n: sum(p.steps for p in s.phases if p.name == n) for n in {p.name for p in s.phases}}
    assert kinds(changed) == kinds(plan)


def rows(cycle, *apart):
    "Probes at the end of a cycle."
    pairs = (("text", "image"), ("image", "text"), ("text", "base"))
    return [dict(kind="probe", cycle=cycle, phase_index=0, step=0, a=a, b=b, symmetric_kl=d)
            for (a, b), d in zip(pairs, apart)]


@pytest.mark.parametrize("apart, new", [((0.02, 0.02, 9.0), 4), ((0.08, 0.08, 0.0), 2), ((0.005, 0.005, 0.0), 8),
                                        ((1e-9, 1e-9, 0.0), 8), ((0.0, 0.0, 0.0), 4), ((), 4)])
def test_the_period_is_that_of_the_wanted_divergence(apart, new):
    "By the root of the ratio, within the limit; the base is no neighbour, and no measurement changes nothing."
    plan = local_rlvr(PAIR, 36, 4, control=drift(target=0.02))
    after, notes = controlled(plan, 1, rows(1, *apart))
    assert [p.steps for p in after.phases if p.cycle == 2][0] == new
    assert (notes == []) == (not any(apart[:2])) and after.total_steps == plan.total_steps


def test_beta_moves_against_the_period():
    plan = synced_copd(PAIR, 40, 3, 2, 0.1, control=drift(target=0.02, beta="scale"))
    after, notes = controlled(plan, 1, rows(1, 0.08, 0.08))
    assert {n["setting"]: (n["old"], n["new"]) for n in notes} == {"period": (5, 3), "beta": (0.1, 0.2)}
    assert {s.beta for p in after.phases if p.cycle == 2 for u in p.updates for s in u.opd} == {0.2}
    assert {s.beta for p in after.phases if p.cycle == 1 for u in p.updates for s in u.opd} == {0.1}


def test_branches_that_meet_are_measured_against_each_other():
    plan = local_rlvr(("text", "image", "video"), 4, 2)
    pairs = probe_list(plan, plan.phases[0])
    assert ("text", "video", "text") in pairs and ("video", "text", "video") in pairs and len(pairs) == 9
    once = local_rlvr(PAIR, 4, 4)
    assert {b for _, b, _ in probe_list(once, once.phases[0])} == {"base"}


@pytest.mark.parametrize("plan, message", [
    (copd(PAIR, 3, 2, 2), "cycle 1: it ends without a sync"), (mopd(PAIR, 4, 4), "needs phases in cycles"),
    (Schedule("two", PAIR, [*local_rlvr(PAIR, 4, 2).phases[:2], replace(copd(PAIR, 1, 1, 1).phases[1], cycle=2)],
              "text"), "cycle 2: it has other phases than the first cycle")])
def test_schedules_that_cannot_drift_are_refused(plan, message):
    with pytest.raises(ValueError, match=message): check_control(replace(plan, control=drift(target=0.1)))


def test_the_rule_needs_probes_and_a_target():
    plan = local_rlvr(PAIR, 8, 2, control=drift(target=0.1))
    with pytest.raises(ValueError, match="needs probes"): check_control(plan, Config(probe_every=0))
    with pytest.raises(ValueError, match="needs a value for .'target'"): local_rlvr(PAIR, 8, 2, control="drift")
    with pytest.raises(ValueError, match="target=0"): drift(target=0)
    assert Schedule.from_dict(plan.to_dict()) == plan and "0.1 nats apart" in plan.describe()


def test_what_synced_refuses():
    with pytest.raises(ValueError, match="branch 'student'"): synced(mopd(PAIR, 4, 4))
    with pytest.raises(ValueError, match="every must be"): synced(copd(PAIR, 2, 1, 1), 0)
    with pytest.raises(ValueError, match="no whole number of cycles"): synced_copd(PAIR, 14, 3, 2)
    every_other = synced(copd(PAIR, 5, 2, 1), every=2)
    assert [p.cycle for p in every_other.phases if isinstance(p, Sync)] == [2, 4]
