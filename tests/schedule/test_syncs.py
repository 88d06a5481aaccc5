"Syncs as data: round trip, refusals, price, drawing; local RLVR and its row in comparisons."
from dataclasses import replace

import pytest

from copd_nb.schedule.changes import move_steps
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule, Sync
from copd_nb.schedule.costs import ModelShape, Workload
from copd_nb.schedule.paradigms import merged_experts, mixed_rlvr, mopd, schedule_from
from copd_nb.schedule.parts import OPD, RL, Merge, Phase, Update
from copd_nb.schedule.rows import FAMILIES, KNOWN, choice_of, paradigms, settings_of
from copd_nb.schedule.local import local_rlvr
from copd_nb.study.rehearsal import rehearsed
from copd_nb.study.variants import with_frozen_teachers, with_signals

PAIR = ["text", "image"]
RLVR = Phase("I", 2, [Update(n, [RL(n)]) for n in PAIR])


def made(*phases, **starts): return Schedule("own", dict(text="base", image="base") | starts, phases, Merge(PAIR))


@pytest.mark.parametrize("schedule", [
    local_rlvr(PAIR, 5, 2, "ties", (1, 2), "average", 0.7, 0.9, 0.5),
    made(RLVR, Sync(PAIR, weights=[1, 3], name="meet", cycle=2), RLVR),
    replace(mopd(PAIR, 2, 2), branches=dict(text="base", image="base", student=Merge(PAIR, "ties", density=0.3)))])
def test_json_keeps_everything(schedule):
    again = Schedule.from_dict(schedule.validate().to_dict())
    assert again == schedule and again.content_hash() == schedule.content_hash() and hash(again) == hash(schedule)


def test_the_hash_of_a_schedule_without_syncs_stays():
    "As it was before there were syncs."
    assert copd(PAIR).content_hash()[:16] == HASHES[0] and mopd(PAIR, 2, 2).content_hash()[:16] == HASHES[1]
    assert merged_experts(PAIR, 3, "ties").content_hash()[:16] == HASHES[2]


HASHES = ("e47e7cfb6f9022cf", "f0712c5bff818edc", "c702a797e73e76f1")
REFUSED = [
    (made(RLVR, Sync(["text", "imagine"])), "unknown branch 'imagine'"),
    (made(RLVR, Sync(["text", "base"])), "unknown branch 'base'"),
    (made(RLVR, Sync(["text"])), "at least 2 branches"),
    (made(RLVR, Sync(PAIR, "mean")), "unknown merge method"),
    (made(RLVR, Sync(PAIR, weights=[1])), "1 weights for 2 branches"),
    (made(RLVR, Sync(PAIR, moments="mean")), "unknown moments 'mean'"),
    (made(RLVR, Sync(PAIR, outer_lr=0)), "outer_lr must be > 0"),
    (made(RLVR, Sync(PAIR, outer_momentum=1)), r"outer_momentum must be in \[0, 1\)"),
    (made(RLVR, Sync(PAIR, cycle=0)), "cycle must be an integer"),
    (made(RLVR, Sync(PAIR, name="")), "the name must be printable"),
    (made(Sync(PAIR), RLVR), "none of .* has learned"),
    (made(RLVR, Sync(PAIR), Sync(PAIR), RLVR), "none of .* has learned"),
    (made(RLVR, Sync(PAIR, outer_lr=0.5), image="text"), "an outer step needs branches that come from one point"),
    (made(RLVR, Sync(PAIR, "ties"), image="text"), "'ties' needs branches that come from one point"),
    (made(RLVR, Sync(PAIR[::-1]), RLVR, Sync(PAIR, outer_momentum=0.5)), "come from one point"),
    (made(RLVR, Sync(PAIR), Phase("II", 1, [Update("text", [OPD("image", "image")])])),
     "teacher 'image' no longer exists"),
    (made(RLVR, image=Merge(["text", "video"])), "starts from unknown 'video'"),
    (made(RLVR, image=Merge(["text"])), "at least 2 branches"),
    (made(RLVR, text=Merge(["image", "third"]), third="text"), "starts form a circle"),
]


@pytest.mark.parametrize("schedule, told", REFUSED, ids=[told for _, told in REFUSED])
def test_what_cannot_work_is_refused(schedule, told):
    with pytest.raises(ValueError, match=told): schedule.validate()


@pytest.mark.parametrize("schedule", [
    made(RLVR, Sync(PAIR), Phase("II", 1, [Update("text", [OPD("image", "image")]), Update("image", [RL("image")])])),
    made(RLVR, Sync(PAIR), RLVR, Phase("II", 1, [Update("text", [OPD("image", "image")])])),
    made(RLVR, Sync(PAIR), Phase("II", 1, [Update("third", [OPD("image", "image")])]), third="base"),
    made(RLVR, Sync(PAIR), RLVR, Sync(["text", "image", "third"]), third="base")])
def test_teachers_and_groups_that_work(schedule):
    "A teacher that learns again, a student that was not in the sync, groups that grow."
    schedule.validate()


def test_a_sync_lets_branches_wait_for_each_other():
    "The longest chain: 4 steps of text, then 1 of image behind the sync."
    alone = [Phase("text", 4, [Update("text", [RL("text")])]), Phase("image", 1, [Update("image", [RL("image")])])]
    assert made(*alone).critical_steps == 4 and made(alone[0], Sync(PAIR), alone[1]).critical_steps == 5
    third = made(*alone, Phase("third", 1, [Update("third", [RL("text")])]), third=Merge(PAIR))
    assert replace(third, result="third").critical_steps == 5


def test_the_price_has_no_tokens_and_the_weights_that_move():
    shape = ModelShape(1000, 0, 2, 8)
    load = Workload(4, 2, 4, dict.fromkeys(PAIR, 10), dict.fromkeys(PAIR, 5), shape)
    table = local_rlvr(PAIR, 6, 2, moments="average").price(load)
    rows = table[table.stream == "sync"]
    assert list(rows.moved) == [6000.0] * 2 and not rows[["tokens", "flops", "updates"]].any(axis=None)
    assert list(table.phase_index) == sorted(table.phase_index)
    assert table.tokens.sum() == merged_experts(PAIR, 6).price(load).tokens.sum()
    assert "moved" not in merged_experts(PAIR, 6).price(load)
    assert local_rlvr(PAIR, 6, 2).price(replace(load, shape=replace(shape, frozen=True))).moved.isna().sum() == 2


@pytest.mark.parametrize("steps, period, lengths", [(6, 2, [2, 2, 2]), (5, 2, [2, 2, 1]), (3, 3, [3]), (3, 9, [3])])
def test_rounds(steps, period, lengths):
    schedule = local_rlvr(PAIR, steps, period)
    assert [p.steps for p in schedule.phases if p.steps] == lengths
    assert sum(isinstance(p, Sync) for p in schedule.phases) == len(lengths) - 1
    assert schedule.total_steps == 2 * steps == mixed_rlvr(PAIR, 2 * steps).total_steps
    outer = local_rlvr(PAIR, steps, period, outer_momentum=0.9)
    assert isinstance(outer.phases[-1], Sync) and outer.result == Merge(PAIR)


@pytest.mark.parametrize("values, told", [
    (dict(period=0), "period"), (dict(steps=0), "steps"), (dict(method="mean"), "unknown merge"),
    (dict(moments="no"), "unknown moments")], ids=str)
def test_what_local_rlvr_refuses(values, told):
    with pytest.raises(ValueError, match=told): local_rlvr(**dict(capabilities=PAIR, steps=4, period=2) | values)


def test_it_is_drawn_and_told():
    schedule = local_rlvr(PAIR, 4, 2, outer_lr=0.7, outer_momentum=0.9)
    drawing, words = schedule.svg(), schedule.describe()
    assert "η 0.7, μ 0.9 · moments reset" in drawing and drawing.count("<circle") == 4
    assert "text and image go on from their linear merge, by an outer step of rate 0.7 and momentum 0.9" in words
    student = replace(mopd(PAIR, 2, 2), branches=dict(text="base", image="base", student=Merge(PAIR)))
    assert "student from the linear merge of text and image" in student.describe() and "from the merge" in student.svg()


def test_a_row_of_comparisons_and_a_name():
    setting = settings_of(PAIR)["two_branch"]
    row, = paradigms(setting, 10, None, [("local_rlvr", choice_of("local_rlvr", dict(period=2, outer_lr=0.7)))])
    assert row.family == "local" and row.label == "local RLVR, H 2"
    assert row.schedule == local_rlvr(PAIR, 10, 2, outer_lr=0.7) == schedule_from(
        "local_rlvr", dict(capabilities=PAIR, steps=10, period=2, outer_lr=0.7))
    assert "local" in KNOWN and "local" not in FAMILIES
    with pytest.raises(ValueError, match="period"): choice_of("local", dict(perod=2))


def test_changed_schedules_keep_their_syncs():
    "A rehearsal, ablations, and rules of control."
    schedule = made(replace(RLVR, cycle=1), Sync(PAIR, cycle=1), replace(RLVR, cycle=2), Sync(PAIR, cycle=2))
    assert [type(p) for p in rehearsed(schedule).phases] == [Phase, Sync]
    assert with_signals(schedule, lambda u: u.signals) == with_frozen_teachers(schedule) == schedule
    cycles = copd(PAIR, cycles=2, s_rl=2, s_opd=2).phases
    averaged = made(*cycles[:2], Sync(PAIR, cycle=1), *cycles[2:], Sync(PAIR, cycle=2))
    changed, _ = move_steps(averaged, 1, 1, {})
    assert [p.steps for p in changed.phases] == [2, 2, 0, 1, 3, 0]
