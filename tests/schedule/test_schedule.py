"Schedules: what is refused, round trips, clocks and prices against slow loops, drawings."

import base64
import json
import math
from dataclasses import replace
from fractions import Fraction
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.schedule.costs import Cost, ModelShape, Workload
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.paradigms import mixed_rlvr
from copd_nb.schedule.parts import ESTIMATORS, METHODS, OPD, RL, SFT, Merge, Phase, Update, split_prompts
from copd_nb.schedule.price import budget_curve, budget_table, critical_path, total_cost, update_cost
from copd_nb.schedule.shapes import palette

SVG = "{http://www.w3.org/2000/svg}"
SHAPE = ModelShape(parameters=1000, embedding=0, layers=2, hidden=8, vocabulary=10)
WORKLOAD = Workload(
    prompts=7,
    opd_prompts=3,
    group_size=2,
    shape=SHAPE,
    prompt_tokens={"a": 5, "b": 8, "c": 3},
    completion_tokens={"a": 4, "b": 2, "c": 9},
)


def small(**changes) -> Schedule:
    "Two branches, two phases; keyword arguments replace fields."
    first = Phase("one", 3, [Update("a", [RL("a")]), Update("b", [RL("b")])])
    second = Phase("two", 2, [Update("a", [RL("a"), OPD("b", "b")]), Update("b", [OPD("a", "a")])])
    return replace(Schedule("small", {"a": "base", "b": "base"}, [first, second], Merge(["a", "b"])), **changes)


def with_signals(*signals) -> Schedule:
    "The small schedule with one phase that updates a from these signals."
    return small(phases=[Phase("one", 1, [Update("a", signals), Update("b", [RL("b")])])])


# --- validation -----------------------------------------------------------------------------------------------------

REFUSED = {
    "capability": (with_signals(RL("video")), r"unknown capability 'video'; allowed: \['a', 'b'\]"),
    "opd capability": (with_signals(OPD("video", "b")), r"unknown capability 'video'"),
    "capability name": (with_signals(RL("a:b")), r"capability name 'a:b' is not allowed: use letters"),
    "teacher": (
        with_signals(OPD("b", "z")),
        r"phase 0 'one', branch 'a': unknown teacher 'z'; allowed: \['base', 'a', 'b'\]",
    ),
    "self": (with_signals(OPD("b", "a")), r"branch 'a': the branch cannot teach itself"),
    "beta": (with_signals(OPD("b", "b", beta=0)), r"beta must be > 0 and finite, not 0.0"),
    "nan beta": (with_signals(OPD("b", "b", beta=float("nan"))), r"beta must be > 0 and finite, not nan"),
    "estimator": (
        with_signals(OPD("b", "b", estimator="k1")),
        r"unknown estimator 'k1'; allowed: \['sampled', .*'topk', 'low_probability'\], or package.module:name",
    ),
    "duplicate rl": (with_signals(RL("a"), RL("a")), r"duplicate signals: \['rl', 'rl'\]"),
    "duplicate sft": (with_signals(SFT("a"), SFT("a")), r"duplicate signals: \['sft', 'sft'\]"),
    "sft capability": (with_signals(SFT("video")), r"unknown capability 'video'"),
    "duplicate opd": (
        with_signals(OPD("b", "b"), OPD("b", "b", beta=1)),
        r"duplicate signals: \['opd:b:b', 'opd:b:b'\]",
    ),
    "no signals": (with_signals(), r"branch 'a' has no signals; allowed: RL"),
    "branch": (
        small(phases=[Phase("one", 1, [Update("z", [RL("a")])])]),
        r"updates unknown branch 'z'; allowed: \['a', 'b'\]",
    ),
    "base learns": (small(phases=[Phase("one", 1, [Update("base", [RL("a")])])]), r"updates unknown branch 'base'"),
    "twice": (
        small(phases=[Phase("one", 1, [Update("a", [RL("a")]), Update("a", [RL("b")])])]),
        r"branch 'a' is updated twice",
    ),
    "no updates": (small(phases=[Phase("one", 1, [])]), r"phase 0 'one' has no updates"),
    "phase name": (
        small(phases=[Phase("a\nb", 1, [Update("a", [RL("a")])])]),
        r"the name must be printable text, not 'a\\nb'",
    ),
    "zero steps": (small(phases=[Phase("one", 0, [Update("a", [RL("a")])])]), r"steps must be an integer ≥ 1, not 0"),
    "half steps": (
        small(phases=[Phase("one", 1.5, [Update("a", [RL("a")])])]),
        r"steps must be an integer ≥ 1, not 1.5",
    ),
    "lr": (small(phases=[Phase("one", 1, [Update("a", [RL("a")])], lr=0)]), r"lr must be > 0 and finite, not 0.0"),
    "no branches": (small(branches=[]), r"schedule 'small' has no branches"),
    "branch name": (small(branches={"a b": "base"}), r"branch name 'a b' is not allowed"),
    "dots": (small(branches={"..": "base"}), r"branch name '..' is not allowed"),
    "reserved": (small(branches={"base": "base"}), r"'base' is the frozen starting point and cannot be a branch name"),
    "listed twice": (small(branches=[("a", "base"), ("a", "base")]), r"branch 'a' is listed twice"),
    "start": (
        small(branches={"a": "base", "b": "z"}),
        r"branch 'b' starts from unknown 'z'; allowed: \['base', 'a', 'b'\]",
    ),
    "circle": (small(branches={"a": "b", "b": "a"}), r"starts form a circle: a → b → a"),
    "own start": (small(branches={"a": "a", "b": "base"}), r"starts form a circle: a → a"),
    "name": (small(name="a/b"), r"schedule name 'a/b' is not allowed"),
    "result": (small(result="z"), r"result names unknown branch 'z'; allowed: \['a', 'b'\]"),
    "base result": (small(result="base"), r"result names unknown branch 'base'"),
    "untrained": (
        small(branches={"a": "base", "b": "base", "c": "a"}, result="c"),
        r"result branch 'c' is never trained",
    ),
    "no phases": (small(phases=[]), r"result branch 'a' is never trained"),
    "untrained member": (
        small(branches=["a", "b", "c"], result=Merge(["a", "c"])),
        r"result branch 'c' is never trained",
    ),
    "one member": (small(result=Merge(["a"])), r"at least 2 branches, not \['a'\]"),
    "same member": (small(result=Merge(["a", "a"])), r"merge lists a branch twice"),
    "method": (
        small(result=Merge(["a", "b"], "mean")),
        r"unknown merge method 'mean'; allowed: \['linear', .*'slerp'\]",
    ),
    "weights": (small(result=Merge(["a", "b"], weights=[1])), r"merge has 1 weights for 2 branches"),
    "density": (small(result=Merge(["a", "b"], density=0)), r"merge density must be in \(0, 1\], not 0.0"),
    "no weight": (
        small(result=Merge(["a", "b"], weights=[0, 0])),
        r"merge weights must be finite and not negative, with a sum above 0, not \(0.0, 0.0\)",
    ),
    "negative weight": (
        small(result=Merge(["a", "b"], weights=[2, -1])),
        r"merge weights must be finite and not negative",
    ),
    "endless weight": (small(result=Merge(["a", "b"], weights=[1, float("inf")])), r"merge weights must be finite"),
    "arc of three": (
        small(
            branches=["a", "b", "c"],
            phases=[Phase("one", 1, [Update(n, [RL("a")]) for n in "abc"])],
            result=Merge("abc", "slerp"),
        ),
        r"slerp merges exactly 2 branches",
    ),
    "endless beta": (with_signals(OPD("b", "b", beta=float("inf"))), r"beta must be > 0 and finite, not inf"),
    "endless lr": (
        small(phases=[Phase("one", 1, [Update("a", [RL("a")])], lr=float("inf"))]),
        r"lr must be > 0 and finite, not inf",
    ),
    "cycle": (
        small(phases=[Phase("one", 1, [Update("a", [RL("a")])], cycle="1")]),
        r"cycle must be an integer ≥ 1 or None, not '1'",
    ),
    "number for a name": (
        small(phases=[Phase(3, 1, [Update("a", [RL("a")])])]),
        r"the name must be printable text, not 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(case):
    schedule, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        schedule.validate(["a", "b"])


def test_a_second_circle_behind_a_branch_is_found_too():
    with pytest.raises(ValueError, match="circle"):
        small(branches=[("a", "base"), ("b", "c"), ("c", "d"), ("d", "c")]).validate()


def test_valid_schedules_pass_and_return_themselves():
    schedule = small(result=Merge(["a", "b"], "ties", weights=[1, 2], density=0.2))
    assert schedule.validate(("a", "b")) is schedule and schedule.validate() is schedule
    assert with_signals(OPD("b", "base")).validate().links() == {("a", "base")}
    assert with_signals(RL("a"), RL("b"), OPD("b", "b"), OPD("a", "b")).validate()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_allowed(estimator):
    assert with_signals(OPD("b", "b", estimator=estimator)).validate()


@pytest.mark.parametrize("method", METHODS)
def test_every_merge_method_is_allowed(method):
    assert small(result=Merge(["a", "b"], method)).validate()


# --- data -----------------------------------------------------------------------------------------------------------


def test_lists_dicts_and_names_are_normalised():
    from_names, from_dict = small(branches=["a", "b"]), small(branches={"a": "base", "b": "base"})
    assert from_names == from_dict == small(branches=[["a", "base"], ["b", "base"]])
    assert hash(from_names) == hash(from_dict) and from_names.starts == {"a": "base", "b": "base"}


def test_counts_by_hand():
    schedule = small()
    assert schedule.total_steps == 2 * 3 + 2 * 2 and schedule.steps_of("a") == 5 and schedule.steps_of("z") == 0
    assert [phase.name for phase in schedule.phases_of("b")] == ["one", "two"]
    assert schedule.links() == {("a", "b"), ("b", "a")} and schedule.capabilities() == ("a", "b")


names = st.sampled_from(["a", "b", "c"])
words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)  # printable: &, <, quotes, emoji
weight = st.floats(0.01, 5)
distilled = st.builds(OPD, names, names, weight, st.sampled_from(ESTIMATORS))
signals = st.lists(st.one_of(st.builds(RL, names), st.builds(SFT, names), distilled), min_size=1, max_size=4)
phases = st.builds(
    Phase,
    words,
    st.integers(1, 9),
    st.lists(st.builds(Update, names, signals), min_size=1, max_size=3, unique_by=lambda update: update.branch),
    st.none() | st.integers(1, 4),
    weight,
)
results = names | st.builds(
    Merge, st.just(["a", "b"]), st.sampled_from(METHODS), st.none() | st.just([1, 2]), st.floats(0.1, 1)
)
schedules = st.builds(
    Schedule,
    words,
    st.sampled_from([("a", "b", "c"), (("a", "base"), ("b", "a"), ("c", "b"))]),
    st.lists(phases, min_size=1, max_size=9),
    results,
)


@given(schedules)
@settings(max_examples=60)
def test_json_round_trip(schedule):
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict(), sort_keys=True)))
    assert again == schedule and again.content_hash() == schedule.content_hash()


def test_hash_ignores_the_display_name_and_nothing_else():
    schedule, seen = small(), {small().content_hash()}
    assert replace(schedule, name="other").content_hash() in seen
    first, second = schedule.phases
    variants = [
        {"result": "a"},
        {"result": Merge(["a", "b"], "ties")},
        {"branches": {"a": "base", "b": "a"}},
        {"phases": (second, first)},
        {"phases": (replace(first, steps=4), second)},
        {"phases": (replace(first, lr=0.5), second)},
        {
            "phases": (
                first,
                replace(second, updates=[Update("a", [RL("a"), OPD("b", "b", beta=0.2)]), second.updates[1]]),
            )
        },
    ]
    for variant in variants:
        seen.add(replace(schedule, **variant).content_hash())
    assert len(seen) == 1 + len(variants)


def test_whole_numbers_hash_like_floats():
    assert with_signals(OPD("b", "b", beta=1)).content_hash() == with_signals(OPD("b", "b", beta=1.0)).content_hash()


def test_foreign_json_is_refused():
    with pytest.raises(ValueError, match=r"schema is 'other/1', not 'copd_nb.schedule/1'"):
        Schedule.from_dict(small().to_dict() | {"schema": "other/1"})
    data = small().to_dict()
    data["phases"][0]["updates"][0]["signals"][0]["kind"] = "dpo"
    with pytest.raises(
        ValueError, match=r"phases/0/updates/0/signals/0/kind: 'dpo' is not one of \['rl', 'opd', 'sft'\]"
    ):
        Schedule.from_dict(data)


plain = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.floats()
    | st.sampled_from(["a", "b", "base", "rl", "opd", "ties", "", "a b", "..", "topk"])
)
anything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "capability", "branch", "a"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def valid_schedules(draw):
    "Schedules that may be run: branches with starts, phases that train all of them at least once, a result."
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    starts = [(n, draw(st.sampled_from(["base", *names[:i]]))) for i, n in enumerate(names)]

    def signal(learner, capability):
        teachers = ["base", *(n for n in names if n != learner)]
        return draw(
            st.one_of(
                st.just(RL(capability)),
                st.just(SFT(capability)),
                st.builds(OPD, st.just(capability), st.sampled_from(teachers), weight, st.sampled_from(ESTIMATORS)),
            )
        )

    def update(learner):
        return Update(
            learner,
            [signal(learner, c) for c in draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3, unique=True))],
        )

    def phase(learners):
        return Phase(
            draw(words),
            draw(st.integers(1, 9)),
            [update(n) for n in learners],
            draw(st.none() | st.integers(1, 4)),
            draw(weight),
        )

    chosen = draw(st.lists(st.lists(st.sampled_from(names), min_size=1, unique=True), max_size=3))
    result, method = draw(st.sampled_from(names)), draw(st.sampled_from(METHODS))
    if len(names) > 1 and draw(st.booleans()):
        members = names[:2] if method == "slerp" else names
        result = Merge(members, method, draw(st.none() | st.just([1, 2, 3][: len(members)])), draw(st.floats(0.1, 1)))
    return Schedule(draw(st.sampled_from(["s", "a.b-c_1"])), starts, [phase(names), *map(phase, chosen)], result)


@given(valid_schedules())
@settings(max_examples=25)
def test_every_valid_schedule_is_accepted_and_comes_back_from_json(schedule):
    assert schedule.validate("xyz") is schedule
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict(), sort_keys=True))).validate("xyz")
    assert again == schedule and again.content_hash() == schedule.content_hash() and hash(again) == hash(schedule)


def places(value, path=()):
    "Every place in JSON data, as the keys that lead to it."
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def change_and_check(schedule, data):
    "Replace or leave out something in a schedule's JSON data: what comes is a schedule that works, or a ValueError."
    changed = schedule.to_dict()
    for _ in range(data.draw(st.integers(1, 2))):
        *path, key = data.draw(st.sampled_from(list(places(changed))))
        holder = changed
        for step in path:
            holder = holder[step]
        if data.draw(st.booleans()):
            holder[key] = data.draw(anything)
        else:
            del holder[key]
        if not changed:
            return
    try:
        again = Schedule.from_dict(changed).validate()
    except ValueError as error:
        assert str(error)
    else:
        assert (
            Schedule.from_dict(json.loads(json.dumps(again.to_dict()))) == again
            and again.critical_steps > 0
            and again._repr_html_()
        )


@given(valid_schedules(), st.data())
@settings(max_examples=50)
def test_a_schedule_changed_at_any_place_is_valid_or_refused_with_a_value_error(schedule, data):
    change_and_check(schedule, data)


@pytest.mark.slow
@given(valid_schedules(), st.data())
@settings(max_examples=5000)
def test_thousands_of_changed_schedules_are_valid_or_refused(schedule, data):
    change_and_check(schedule, data)


PLACES = [
    (("name",), 3),
    (("branches",), {"a": "base"}),
    (("branches", 0), ["a"]),
    (("branches", 0, 1), None),
    (("phases",), None),
    (("phases", 0), []),
    (("phases", 0, "steps"), "3"),
    (("phases", 0, "steps"), True),
    (("phases", 0, "lr"), 10**400),
    (("phases", 0, "lr"), "1"),
    (("phases", 0, "lr"), float("inf")),
    (("phases", 0, "cycle"), "1"),
    (("phases", 0, "else"), 1),
    (("phases", 0, "updates", 0, "signals"), "rl"),
    (("phases", 0, "updates", 0, "signals", 0), {"kind": "rl"}),
    (("phases", 0, "updates", 0, "signals", 0), {"kind": "sft", "capability": "a", "teacher": "b"}),
    (("phases", 0, "updates", 0, "signals", 0), {"kind": ["rl"]}),
    (("phases", 0, "updates", 0, "signals", 0), {"kind": "opd", "capability": "a"}),
    (("phases", 0, "updates", 0, "signals", 0), {"kind": "opd", "capability": "a", "teacher": "b", "beta": "0.1"}),
    (("result",), ["a", "b"]),
    (("result",), {"branches": ["a", "b"], "weights": ["1", "2"]}),
    (("result",), {"method": "ties"}),
    (("control",), None),
    (("control",), {"rule": "token_share", "settings": [["floor", 1]]}),
    (("control",), {"rule": "token_share", "settings": {"floor": [1]}}),
    (("future",), 1),
]


@pytest.mark.parametrize("place, value", PLACES, ids=str)
def test_a_value_of_the_wrong_type_is_named_by_its_place(place, value):
    data = small().to_dict()
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match="/".join(map(str, place)).replace("/else", "").replace("future", "the whole")):
        Schedule.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "copd",
        3,
        {},
        {"schema": "copd_nb.schedule/2"},
        {"schema": ["copd_nb.schedule/1"]},
        {"schema": "x" * 10**6},
    ],
    ids=lambda d: str(d)[:30],
)
def test_another_schema_is_refused_in_few_words(data):
    with pytest.raises(ValueError, match="^schema is .{,82}, not 'copd_nb.schedule/1'$"):
        Schedule.from_dict(data)


# --- prompts --------------------------------------------------------------------------------------------------------


def signals(*shares): return [RL(f"c{i}", share=w) for i, w in enumerate(shares)]


@given(n=st.integers(0, 60), k=st.integers(1, 9), step=st.integers(0, 200))
def test_split_is_the_slot_rule_and_fair(n, k, step):
    equal = signals(*[1] * k)
    shares = split_prompts(n, equal, step)
    slots = [p % k for p in range(step * n, (step + 1) * n)]
    assert shares == tuple(slots.count(i) for i in range(k))
    assert sum(shares) == n and max(shares) - min(shares) <= 1
    assert [sum(column) for column in zip(*(split_prompts(n, equal, step + j) for j in range(k)))] == [n] * k


def webster(shares, slots):
    "Slot by slot: the next one goes to the largest share / (2 · slots so far + 1), the first of equal ones."
    held = [0] * len(shares)
    for _ in range(slots):
        held[max(range(len(held)), key=lambda i: (Fraction(shares[i]) / (2 * held[i] + 1), -i))] += 1
    return held


@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), n=st.integers(0, 9), step=st.integers(0, 12))
def test_uneven_shares_are_websters_method(shares, n, step):
    found = split_prompts(n, signals(*shares), step)
    before, after = webster(shares, step * n), webster(shares, (step + 1) * n)
    assert found == tuple(b - a for a, b in zip(before, after)) and sum(found) == n and min(found) >= 0


@given(shares=st.lists(st.integers(1, 9), min_size=2, max_size=4), factor=st.sampled_from([0.125, 3.0, 1e6]))
def test_only_the_proportions_of_shares_count(shares, factor):
    n = 3 * sum(shares)
    assert split_prompts(n, signals(*shares), 5) == tuple(3 * share for share in shares)
    assert split_prompts(7, signals(*shares), 4) == split_prompts(7, signals(*(factor * s for s in shares)), 4)
    assert split_prompts(n, [SFT(f"c{i}", share) for i, share in enumerate(shares)], 0) == tuple(3 * s for s in shares)


def test_shares_are_data():
    mixed = mixed_rlvr(("a", "b"), 3, shares={"a": 3, "b": 1})
    assert Schedule.from_dict(mixed.to_dict()) == mixed
    assert mixed.content_hash() != mixed_rlvr(("a", "b"), 3).content_hash()
    assert mixed_rlvr(("a", "b"), 3, shares={"b": 1, "a": 1}) == mixed_rlvr(("a", "b"), 3)
    assert "the reward on a (share 3) and the reward on b." in mixed.describe() and "RL a · share 3" in texts(mixed)
    load = Workload(8, 4, 4, dict(a=3, b=5), dict(a=10, b=10), SHAPE)
    assert list(mixed.price(load).prompts) == [18, 6]
    for share in (0, -1, math.inf, math.nan):
        wrong = Schedule("s", ["x"], [Phase("mixed", 1, [Update("x", [RL("a", share=share), RL("b")])])], "x")
        with pytest.raises(ValueError, match="share must be > 0 and finite"): wrong.validate()


@pytest.mark.parametrize("shares, words", [
    (2, "positive numbers, as .*, not 2"), ({}, "not {}"), ({"a": 1}, r"capabilities \['a', 'b'\], not of \['a'\]"),
    ({"a": 1, "b": 1, "c": 1}, "'c'"), ({"a": 1, "b": 0}, "share of 'b' is 0"),
    ({"a": "x", "b": 1}, "share of 'a' is 'x'"), ({"a": True, "b": 1}, "share of 'a' is True")])
def test_wrong_shares_are_named(shares, words):
    with pytest.raises(ValueError, match=words): mixed_rlvr(("a", "b"), 3, shares=shares)


# --- clocks ---------------------------------------------------------------------------------------------------------


def cost_of(table):
    "A cost function by branch."
    return lambda phase_index, step, update: table[update.branch]


def test_clocks_by_hand():
    # after phase one: a = 3·2 = 6, b = 3·5 = 15
    # phase two, step one: both start at 15 → a = 17, b = 20; step two: at 20 → 22, 25
  
  
    path = critical_path(small(), cost_of({"a": 2, "b": 5}))
    assert path.length == 25 and [row["critical"] for row in path.curve] == [5, 10, 15, 20, 25]
    assert [(row["phase_index"], row["step"]) for row in path.curve] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert critical_path(small(result="a"), cost_of({"a": 2, "b": 5})).length == 22


def test_updates_of_a_step_are_simultaneous():
    # if b waited for a's update of the same step, b would end at 7
    schedule = Schedule("s", ["a", "b"], [Phase("p", 1, [Update("a", [RL("a")]), Update("b", [OPD("a", "a")])])], "b")
    assert critical_path(schedule, cost_of({"a": 5, "b": 2})).length == 2
    assert critical_path(replace(schedule, phases=schedule.phases * 2), cost_of({"a": 5, "b": 2})).length == 7


def test_sequential_experts_run_in_parallel_and_mixed_does_not():
    experts = [Phase(c, 10, [Update(c, [RL(c)])]) for c in "abc"]
    assert Schedule("s", list("abc"), experts, Merge("abc")).critical_steps == 10
    assert Schedule("s", ["m"], [Phase("m", 30, [Update("m", [RL(c) for c in "abc"])])], "m").critical_steps == 30


def test_a_copy_inherits_the_clock_at_its_first_use():
    train = Phase("a", 4, [Update("a", [RL("a")])])
    learn = Phase("b", 3, [Update("b", [RL("b")])])
    assert Schedule("s", {"a": "base", "b": "a"}, [train, learn], "b").critical_steps == 7
    assert Schedule("s", {"a": "base", "b": "base"}, [train, learn], "b").critical_steps == 3
    early = Phase("b", 1, [Update("b", [RL("b")])])  # b is copied before a trains, so it does not inherit a's clock
    assert Schedule("s", {"a": "base", "b": "a"}, [early, train, learn], "b").critical_steps == 4


def test_a_copy_used_first_as_a_teacher_is_made_then():
    # t copies a in phase two at clock 4 and stays there; a goes on, so c waits for 4 only
    schedule = Schedule(
        "s",
        {"a": "base", "t": "a", "c": "base"},
        [
            Phase("one", 4, [Update("a", [RL("a")])]),
            Phase("two", 5, [Update("a", [RL("a")]), Update("c", [OPD("a", "t")])]),
        ],
        "c",
    )
    assert schedule.critical_steps == 4 + 5


def test_a_chain_of_copies_reaches_back_to_the_first():
    chain = {"a": "base", "b": "a", "c": "b"}
    schedule = Schedule(
        "s", chain, [Phase("a", 4, [Update("a", [RL("a")])]), Phase("c", 2, [Update("c", [RL("c")])])], "c"
    )
    assert schedule.critical_steps == 6


# --- prices ---------------------------------------------------------------------------------------------------------


def priced() -> Schedule:
    "Three RL signals that share prompts unevenly, OPD from the base and from a branch."
    mixed = Update("m", [OPD("c", "base"), RL("a"), RL("b"), RL("c"), OPD("a", "n")])
    first, second = (
        Phase("x", 5, [mixed, Update("n", [RL("b")])], cycle=2),
        Phase("y", 2, [Update("n", [OPD("b", "m")])]),
    )
    return Schedule("p", ["m", "n"], [first, second], "m")


def slow_total(schedule: Schedule) -> Cost:
    "Step by step, slot by slot."
    total = Cost()
    for phase, update in schedule.updates:
        slot = 0
        for _ in range(phase.steps):
            total += Cost(updates=1)
            for _ in range(WORKLOAD.prompts):
                if update.rl:
                    total += WORKLOAD.rl_cost(update.rl[slot % len(update.rl)].capability, 1)
                if update.sft:
                    total += WORKLOAD.sft_cost(update.sft[slot % len(update.sft)].capability, 1)
                slot += 1
            for signal in update.opd:
                total += WORKLOAD.opd_cost(signal.capability, WORKLOAD.opd_prompts)
    return total


WARM = Schedule("warm", ["a"], [Phase("warm start", 4, [Update("a", [SFT("a"), SFT("b"), SFT("c"), RL("b")])])], "a")


@pytest.mark.parametrize("schedule", [small(), priced(), WARM], ids=["small", "priced", "warm"])
def test_price_equals_a_slow_loop(schedule):
    table, slow, total = schedule.price(WORKLOAD), slow_total(schedule), total_cost(schedule, WORKLOAD)
    for column in ("updates", "prompts", "prompt_tokens", "generated", "scored", "trained", "tokens", "flops"):
        expected = slow.tokens if column == "tokens" else vars(slow)[column]
        assert table[column].sum() == pytest.approx(expected, rel=1e-12)
    assert total.tokens == slow.tokens and total.updates == schedule.total_steps


def test_price_rows_are_tidy():
    table = priced().price(WORKLOAD)
    assert list(table["stream"]) == ["opd:c:base", "rl", "rl", "rl", "opd:a:n", "rl", "opd:b:m"]
    assert list(table["updates"]) == [5, 0, 0, 0, 0, 5, 2] and list(table["phase_index"]) == [0] * 6 + [1]
    assert list(table["prompts"]) == [15, 12, 12, 11, 15, 35, 6]  # 35 slots dealt to three signals
    assert table["teacher"].isna().sum() == 4 and table["cycle"].isna().sum() == 1


def test_update_cost_sums_to_the_total():
    steps = [update_cost(update, WORKLOAD, step) for phase, update in priced().updates for step in range(phase.steps)]
    assert sum(steps, Cost()).flops == pytest.approx(total_cost(priced(), WORKLOAD).flops, rel=1e-12)


def test_budget_table_uses_the_critical_path():
    row = budget_table([small()], WORKLOAD).iloc[0]
    per_step = {branch: WORKLOAD.rl_cost(branch, 7).tokens for branch in "ab"}
    phase_two = {"a": per_step["a"] + WORKLOAD.opd_cost("b", 3).tokens, "b": WORKLOAD.opd_cost("a", 3).tokens}
    start = max(3 * per_step["a"], 3 * per_step["b"])
    assert row["critical_tokens"] == start + 2 * max(phase_two.values())
    assert (
        row["tokens"] == total_cost(small(), WORKLOAD).tokens
        and row["critical_steps"] == 5
        and row["schedule"] == "small"
    )


# --- measured budgets -----------------------------------------------------------------------------------------------


def events_of(schedule: Schedule, seconds: dict[str, float]) -> list[dict]:
    "Events as a run logs them: one row per stream, generated 10, scored 5 if OPD, trained 10."
    same = {"kind": "train", "teacher": None, "updates": 1, "generated": 10, "trained": 10, "flops": 100.0}
    return [
        same
        | {
            "phase_index": i,
            "step": s,
            "branch": u.branch,
            "stream": stream,
            "scored": 5 * stream.startswith("opd"),
            "seconds": seconds[u.branch],
        }
        for i, p in enumerate(schedule.phases)
        for s in range(p.steps)
        for u in p.updates
        for stream in dict.fromkeys(signal.stream for signal in u.signals)
    ]


def test_a_log_without_counts_is_no_whole_log():
    rows = [dict(kind="train", phase_index=0, step=0, branch="mixed", updates=1, scored=0, trained=1, flops=1.0)]
    with pytest.raises(ValueError, match="events lack generated, seconds"):
        budget_curve(rows, small())


def test_budget_curve_by_hand():
    curve = budget_curve(events_of(small(), {"a": 1.0, "b": 2.0}), small())
    assert list(curve["total_steps"]) == [2, 4, 6, 8, 10] and list(curve["critical_steps"]) == [1, 2, 3, 4, 5]
    assert list(curve["tokens"]) == [40, 80, 120, 190, 260]  # phase two: a 20 + 25, b 25
    assert list(curve["critical_tokens"]) == [20, 40, 60, 105, 150]
    assert list(curve["seconds"]) == [3, 6, 9, 13, 17] and list(curve["critical_seconds"]) == [2, 4, 6, 8, 10]
    assert list(curve["flops"]) == [200, 400, 600, 900, 1200] and list(curve["phase_index"]) == [0, 0, 0, 1, 1]


def test_budget_curve_ignores_other_events_and_steps_to_come():
    events = events_of(small(), {"a": 1.0, "b": 2.0})
    events = [event for event in events if event["phase_index"] == 0] + [
        {"kind": "eval", "phase_index": 0, "step": 2, "branch": "a"}
    ]
    curve = budget_curve(pd.DataFrame(events), small())
    assert len(curve) == 3 and curve["tokens"].iloc[-1] == 120 and curve["critical_steps"].iloc[-1] == 3


def test_events_of_another_schedule_are_refused():
    events = events_of(small(), {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"schedule 'small' has not: \[\(1, 'a'\), \(1, 'b'\)\]"):
        budget_curve(events, small(phases=small().phases[:1]))


# --- words and drawings ---------------------------------------------------------------------------------------------


def texts(schedule: Schedule) -> list[str]:
    "The words of a drawing."
    return [element.text for element in ElementTree.fromstring(schedule.svg()).iter(SVG + "text")]


def test_description_tells_every_phase():
    lines = repr(small()).splitlines()
    assert lines[0] == "small: a from base and b from base; 10 optimizer steps, longest chain 5."
    assert lines[1] == "one, 3 steps: a learns from the reward on a; b learns from the reward on b."
    assert lines[2].startswith(
        "two, 2 steps: a learns from the reward on a and teacher b on b (β 0.1); b learns from teacher a on a"
    )
    assert lines[3] == "Result: linear merge of a and b."


def test_frozen_teachers_rates_and_cycles_are_told():
    distil = Phase("two", 1, [Update("b", [OPD("a", "a", beta=1, estimator="forward")])], lr=0.3)
    shown = small(phases=[small().phases[0], distil], result="b").describe()
    assert "two, 1 step, learning rate × 0.3: b learns from frozen teacher a on a (β 1, forward)." in shown
    assert "3 times over:\n  one, 3 steps" in small(phases=small().phases * 3).describe()


def test_supervised_signals_have_their_words_blocks_and_stream():
    assert (
        "a learns from reference answers on a, reference answers on b, reference answers on c and the reward on b."
        in WARM.describe()
    )
    assert {"SFT a", "SFT b", "SFT c", "RL b"} <= set(texts(WARM)) and WARM.links() == set()
    assert {signal.stream for signal in WARM.phases[0].updates[0].sft} == {"sft"} and WARM.validate(
        "abc"
    ).total_steps == 4


def test_repeated_blocks_are_folded_between_other_phases():
    warm, cool = Phase("warm", 1, [Update("a", [RL("a")])]), Phase("cool", 1, [Update("b", [RL("b")])])
    folded = texts(small(phases=[warm, *small().phases * 4, cool]))
    assert "× 4" in folded and folded.count("one") == 1 and "warm" in folded and "cool" in folded
    assert folded.count("22") == 1  # the step axis ends with all steps: 1 + 4·5 + 1
    plain = texts(small(phases=small().phases * 3))
    assert plain.count("one") == 3 and not any(text.startswith("×") for text in plain)


@given(schedules)
@settings(max_examples=60, deadline=None)
def test_any_schedule_draws_well_formed_xml(schedule):
    shown = texts(schedule)
    assert schedule.name in shown and schedule.phases[-1].name in " ".join(shown)
    assert {"a", "b", "c", "result"} <= set(shown)


def test_names_are_escaped():
    evil = '<script>alert("&")</script>'
    phase = Phase(evil, 2, [Update(evil, [RL(evil), OPD(evil, "b")]), Update("b", [RL("b")])])
    schedule = Schedule(evil, [evil, "b"], [phase], evil)
    assert "<script" not in schedule.svg() and texts(schedule).count(evil) >= 4
    label = ElementTree.fromstring(schedule.svg()).get("aria-label")
    assert label.startswith(f"schedule {evil}: ")


def test_a_notebook_shows_the_drawing_as_a_picture():
    "JupyterLab strips inline SVG from a notebook that it doesn't trust, as every clone is, and keeps pictures."
    schedule = small()
    picture = ElementTree.fromstring(schedule._repr_html_().replace("></div>", "/></div>")).find("img")
    kind, _, data = picture.get("src").partition(",")
    assert kind == "data:image/svg+xml;base64" and base64.b64decode(data).decode() == schedule.svg()
    assert picture.get("alt") == f"schedule {schedule.name}: {schedule.total_steps} optimizer steps in all"


def test_drawing_is_self_contained():
    svg = small().svg()
    without_namespace = svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in without_namespace and "<script" not in svg and "<style" not in svg


def test_blocks_arrows_and_copies_are_drawn():
    root = ElementTree.fromstring(small(branches={"a": "base", "b": "a"}).svg())
    heads = [p for p in root.iter(SVG + "path") if "l-7,-4" in p.get("d")]
    dashed = [p for p in root.iter(SVG + "path") if p.get("stroke-dasharray")]
    hatched = [r for r in root.iter(SVG + "rect") if r.get("fill").startswith("url(#")]
    assert (len(heads), len(dashed), len(hatched)) == (2, 1, 2)
    patterns = {p.get("id") for p in root.iter(SVG + "pattern")}
    assert {r.get("fill")[5:-1] for r in hatched} <= patterns


def test_texts_stay_inside_the_panel():
    for schedule in (small(), priced(), small(phases=small().phases * 5)):
        root = ElementTree.fromstring(schedule.svg())
        width, height = float(root.get("width")), float(root.get("height"))
        for text in root.iter(SVG + "text"):
            assert 0 < float(text.get("x")) < width and 0 < float(text.get("y")) < height


def test_base_gets_a_lane_only_as_a_teacher():
    assert "frozen" in texts(with_signals(OPD("b", "base"))) and "frozen" not in texts(small())


def test_colors_differ_for_seven_capabilities():
    assert len(set(palette("abcdefg").values())) == 7
