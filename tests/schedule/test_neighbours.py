"Named neighbours of CoPD: each is what is known of its paper, and costs what one can count by hand."
from dataclasses import replace

import pytest

from copd_nb.engine.request import schedule_from as by_query
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.costs import ModelShape, Workload
from copd_nb.schedule.neighbours import camopd, codistill_grpo, reward_and_teacher, semi_opd
from copd_nb.schedule.paradigms import mopd, schedule_from
from copd_nb.schedule.parts import OPD, RL, Phase, Update
from copd_nb.schedule.price import budget_table, total_cost
from copd_nb.schedule.rows import Choice, NEIGHBOURS, choice_of, paradigms, settings_of
from copd_nb.schedule.whose import rolled_prompts

PAIR = ("text", "image")
LENGTHS = dict.fromkeys(PAIR, 10)
SHAPE = ModelShape(1000, 0, 2, 8)
WORK = Workload(32, 16, 8, LENGTHS, LENGTHS, SHAPE, train_prompts=dict.fromkeys(PAIR, 64))
MADE = [semi_opd(PAIR, 4, 10), codistill_grpo(PAIR, 10, lead=2), camopd(*PAIR, 4, 8),
        reward_and_teacher(PAIR, 4, 10, residual="bounded", gate="verified")]


def test_semi_opd_is_mopd_on_completions_of_the_initial_student():
    schedule, live = semi_opd(PAIR, 4, 10), mopd(PAIR, 4, 10, estimator="reverse")
    assert schedule.starts["student"] == "base"
    for mine, theirs in zip(schedule.phases[-1].updates[0].signals, live.phases[-1].updates[0].signals):
        assert mine.rollouts == "base" and replace(mine, rollouts="learner") == theirs
    by_hand = 2 * 64 * 8 * 10  # two capabilities, 64 prompts, 8 completions of 10 tokens, however long it is trained
    assert schedule.price(WORK).query("branch == 'student'").generated.sum() == by_hand
    assert semi_opd(PAIR, 4, 40).price(WORK).query("branch == 'student'").generated.sum() == by_hand
    assert live.price(WORK).query("branch == 'student'").generated.sum() == 2 * 10 * 16 * 8 * 10


def test_in_codistill_grpo_the_large_branch_never_generates():
    schedule = codistill_grpo(PAIR, 10)
    small, large = schedule.phases[0].updates
    assert [(s.teacher, s.rollouts) for s in small.rl] == [("large", "learner")] * 2
    assert [(s.teacher, s.rollouts) for s in large.rl] == [(None, "small")] * 2
    price = schedule.price(WORK).groupby("branch").sum(numeric_only=True)
    assert price.generated["small"] == 10 * 32 * 8 * 10 and price.generated["large"] == 0
    assert price.trained["large"] == price.trained["small"] == price.scored["small"]


def test_camopd_takes_turns_three_to_one():
    schedule = camopd("text", "image", 4, 8)
    turns = [(p.name, p.steps, s.capability, s.teacher) for p in schedule.phases[1:] for s in p.updates[0].opd]
    assert turns == [("recovery", 3, "text", "base"), ("preservation", 1, "image", "image")] * 2
    assert schedule.starts == dict(image="base", student="image")
    assert schedule.price(WORK).query("capability == 'text'").scored.sum() == 6 * 16 * 8 * 10
    with pytest.raises(ValueError, match="multiple of recovery"): camopd("text", "image", 4, 6)


def test_reward_and_teacher_is_mixed_rlvr_with_a_scoring_pass():
    schedule = reward_and_teacher(PAIR, 4, 10)
    row = schedule.price(WORK).query("branch == 'student'").sum(numeric_only=True)
    assert row.generated == row.scored == row.trained == 10 * 32 * 8 * 10
    gated = reward_and_teacher(PAIR, 4, 10, gate="verified").price(WORK).query("branch == 'student'")
    assert gated.generated.sum() == row.generated + 2 * 64 * 8 * 10  # each frozen expert answers each prompt once


def test_a_roller_that_has_learned_rolls_out_anew():
    "Kept completions are those of one state of a policy."
    first, second = (Phase(f"teacher {i}", 1, [Update("t", [RL("text")])]) for i in (1, 2))
    borrowing = Phase("borrow", 8, [Update("s", [OPD("text", "base", 1.0, "reverse", "t")])])
    schedule = Schedule("s", ["t", "s"], [first, borrowing, borrowing, second, borrowing], "s").validate()
    counts = [sum(sum(x) for x in found.values()) for found in rolled_prompts(schedule, WORK).values()]
    assert counts == [64, 0, 64]


@pytest.mark.parametrize("schedule", MADE, ids=lambda s: s.name)
def test_they_are_data(schedule):
    "JSON and back, a drawing, words, and a budget."
    assert Schedule.from_dict(schedule.to_dict()) == schedule and schedule.svg().startswith("<svg")
    assert all(name in schedule.describe() for name in schedule.starts)
    row = budget_table([schedule], WORK).iloc[0]
    assert row.tokens == pytest.approx(total_cost(schedule, WORK).tokens) and row.critical_tokens <= row.tokens
    assert schedule.price(WORK).tokens.sum() == pytest.approx(row.tokens)


def test_signals_without_anything_new_are_written_as_before():
    update = Update("a", [RL("x"), OPD("y", "base")])
    data = Schedule("s", ["a"], [Phase("p", 1, [update])], "a").to_dict()["phases"][0]["updates"][0]["signals"]
    assert data == [dict(kind="rl", capability="x"),
                    dict(kind="opd", capability="y", teacher="base", beta=0.1, estimator="sampled")]


def test_names_and_rows():
    assert schedule_from("semi_opd", dict(capabilities=PAIR, steps=4, opd_steps=10)) == MADE[0]
    assert by_query("codistill_grpo?steps=10&lead=2", list(PAIR)) == MADE[1]
    setting = settings_of(PAIR)["two_branch"]
    rows = paradigms(setting, 80, {}, list(NEIGHBOURS))
    assert {p.schedule.total_steps for p in rows} == {160} and [p.family for p in rows] == ["own"] * len(NEIGHBOURS)
    row, = paradigms(setting, 80, {}, [("reward_and_teacher", choice_of("reward_and_teacher", dict(beta=0.7)))])
    assert row.schedule.phases[-1].updates[0].rl[0].beta == 0.7
    with pytest.raises(ValueError, match="bta"): paradigms(setting, 80, {}, [("semi_opd", Choice(more=dict(bta=1)))])
    three = settings_of(("text", "image", "video"))["three_branch"]
    assert [p.label for p in paradigms(three, 80, {}, list(NEIGHBOURS))] == [
        "semi-opd", "codistill-grpo", "reward-and-teacher", "copd-synced", "copd-placebo"]
