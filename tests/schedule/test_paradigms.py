"CoPD and its baselines: who is linked to whom, totals, names, errors."

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.schedule.paradigms import (
    equal_steps,
    expert,
    expert_phase,
    merged_experts,
    mixed_rlvr,
    mopd,
    static_opd,
    schedule_from,
)
from copd_nb.schedule.copd_schedules import copd, cycle_phases, link_table
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, Merge

NAMES = ["text", "image", "video", "code", "math", "maps"]
SIZES = range(2, 7)


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", SIZES)
def test_number_of_links(k):
    assert len(copd(NAMES[:k]).links()) == k * (k - 1)
    assert len(copd(NAMES[:k], topology="hub").links()) == 2 * (k - 1)
    assert len(copd(NAMES[:k], topology="student").links()) == 2 * k


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("center", [0, -1])
def test_hub_routing(k, center):
    names = NAMES[:k]
    hub = names[center]
    schedule = copd(names, topology="hub", hub=hub)
    assert schedule.links() == {(s, hub) for s in names if s != hub} | {(hub, s) for s in names if s != hub}
    for _, update in schedule.updates:
        for signal in update.opd:  # a teacher teaches its own capability, never another
            assert signal.capability == signal.teacher


def test_hub_is_the_first_capability_unless_named():
    assert (
        link_table(NAMES[:3], "hub")
        == link_table(NAMES[:3], "hub", hub="text")
        != link_table(NAMES[:3], "hub", hub="video")
    )


def test_two_branches_are_the_same_in_both_topologies():
    assert copd(NAMES[:2]).content_hash() == copd(NAMES[:2], topology="hub").content_hash()


@pytest.mark.parametrize("k", SIZES)
def test_student_learns_all_and_teaches_each_expert_the_others(k):
    names = NAMES[:k]
    table = link_table(names, "student")
    assert table["student"] == tuple((name, name) for name in names)
    for name in names:
        assert table[name] == tuple((other, "student") for other in names if other != name)


# --- copd -----------------------------------------------------------------------------------------------------------


@given(
    k=st.integers(2, 5), cycles=st.integers(1, 4), s_rl=st.integers(0, 6), s_opd=st.integers(1, 6), hub=st.booleans()
)
def test_total_steps(k, cycles, s_rl, s_opd, hub):
    schedule = copd(NAMES[:k], cycles, s_rl, s_opd, topology="hub" if hub else "pairwise")
    assert schedule.total_steps == k * cycles * (s_rl + s_opd)
    assert schedule.critical_steps == cycles * (s_rl + s_opd)
    assert all(schedule.steps_of(name) == cycles * (s_rl + s_opd) for name in NAMES[:k])


def test_student_adds_its_own_steps():
    schedule = copd(NAMES[:3], cycles=2, s_rl=3, s_opd=4, topology="student")
    assert schedule.total_steps == 3 * 2 * 7 + 2 * 4 and schedule.steps_of("student") == 8
    assert all(not update.rl for _, update in schedule.updates if update.branch == "student")


def test_native_signal_is_in_every_update():
    for _, update in copd(NAMES[:3]).updates:
        assert update.rl == (RL(update.branch),)


def test_phases_alternate_and_count_cycles():
    phases = copd(NAMES[:2], cycles=3, s_rl=6, s_opd=4).phases
    assert [(p.cycle, p.name, p.steps) for p in phases] == [
        (n, *rest) for n in (1, 2, 3) for rest in (("I RLVR", 6), ("II OPD", 4))
    ]
    assert not any(update.opd for update in phases[0].updates) and all(update.opd for update in phases[1].updates)


def test_empty_phases_are_left_out():
    assert {p.name for p in copd(NAMES[:2], s_opd=0).phases} == {"I RLVR"}
    assert {p.name for p in copd(NAMES[:2], s_rl=0).phases} == {"II OPD"}


def test_beta_and_estimator_reach_every_signal():
    schedule = copd(["text", "image"], beta={"text": 0.3, "image": 0.05}, estimator="reverse")
    found = {(u.branch, s.beta, s.estimator) for _, u in schedule.updates for s in u.opd}
    assert found == {("text", 0.3, "reverse"), ("image", 0.05, "reverse")}


def test_result_is_the_merge_the_student_or_a_branch():
    assert copd(NAMES[:2], merge="ties").result == Merge(("text", "image"), "ties")
    assert copd(NAMES[:2], result="image").result == "image"
    assert copd(NAMES[:2], topology="student").result == "student"
    assert copd(NAMES[:2], topology="student", result="merge").result == Merge(("text", "image"))


def test_names_of_copd():
    assert [copd(NAMES[:2], topology=t).name for t in ("pairwise", "hub", "student")] == [
        "copd",
        "copd-hub",
        "copd-student",
    ]


def test_a_controller_can_build_the_next_cycle():
    schedule, table = copd(NAMES[:2], cycles=1), link_table(NAMES[:2])
    longer = replace(schedule, phases=schedule.phases + cycle_phases(table, 2, s_rl=6, s_opd=14, beta=0.5)).validate()
    assert longer.total_steps == 2 * (20 + 20) and longer.phases[-1].title == "cycle 2 · II OPD"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"capabilities": ["text"]}, ValueError, r"at least 2 distinct names, not \['text'\]"),
        ({"capabilities": ["text", "text"]}, ValueError, r"at least 2 distinct names"),
        ({"capabilities": ["text", "student"]}, ValueError, r"'student' is reserved"),
        ({"capabilities": ["text", "merge"]}, ValueError, r"'merge' is reserved"),
        ({"capabilities": ["base", "text"]}, ValueError, r"'base' is reserved"),
        ({"capabilities": ["text", "a b"]}, ValueError, r"name 'a b' is not allowed"),
        ({"topology": "ring"}, ValueError, r"unknown topology 'ring'; allowed: \['pairwise', 'hub', 'student'\]"),
        ({"topology": "hub", "hub": "video"}, ValueError, r"unknown hub 'video'; allowed: \['text', 'image'\]"),
        ({"hub": "text"}, ValueError, r"hub='text' needs topology='hub', not 'pairwise'"),
        ({"cycles": 0}, ValueError, r"cycles must be ≥ 1, not 0"),
        ({"s_rl": -1}, ValueError, r"s_rl and s_opd must be ≥ 0"),
        ({"s_rl": 0, "s_opd": 0}, ValueError, r"not both 0"),
        ({"beta": 0}, ValueError, r"beta must be > 0"),
        ({"beta": {"text": 0.1}}, ValueError, r"beta has no value for branch 'image'; it has \['text'\]"),
        ({"shares": {"text": 1}}, ValueError, r"needed of the capabilities \['text', 'image'\], not of \['text'\]"),
        ({"shares": [1, 2]}, ValueError, r"as \{'text': 2, 'image': 1\}, not \[1, 2\]"),
        ({"shares": {"text": True, "image": 1}}, ValueError, r"share of 'text' is True"),
        ({"shares": {"text": 99, "image": 1}}, ValueError, r"of 24 steps that is none for 'image'"),
        ({"estimator": "k1"}, ValueError, r"unknown estimator 'k1'"),
        ({"merge": "mean"}, ValueError, r"unknown merge method 'mean'"),
        ({"result": "video"}, ValueError, r"result names unknown branch 'video'"),
        ({"topology": "student", "s_opd": 0}, ValueError, r"result branch 'student' is never trained"),
    ],
)
def test_copd_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        copd(**{"capabilities": ["text", "image"]} | arguments)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(9, 30))
def test_shares_keep_the_steps_and_begin_together(a, b, s_rl):
    tilted = copd(["text", "image"], cycles=2, s_rl=s_rl, s_opd=4, shares={"text": a, "image": b})
    even = copd(["text", "image"], cycles=2, s_rl=s_rl, s_opd=4)
    assert tilted.total_steps == even.total_steps and (tilted == even) == (own(tilted) == own(even))
    text, image = own(tilted)
    assert text + image == 4 * s_rl and abs(text / 2 - 2 * s_rl * a / (a + b)) < 1
    assert len(tilted.phases[0].updates) == 2 and tilted.links() == even.links()


def own(schedule):
    "Steps without OPD of text and image."
    return [sum(p.steps for p in schedule.phases for u in p.updates if u.branch == k and not u.opd)
            for k in ("text", "image")]


# --- baselines ------------------------------------------------------------------------------------------------------


def test_names_of_baselines():
    pair = ["text", "image"]
    schedules = [
        expert("text", 5),
        mixed_rlvr(pair, 5),
        static_opd("text", "image", 5, 3),
        mopd(pair, 5, 3),
        mopd(pair, 5, 3, start="text"),
        merged_experts(pair, 5),
        merged_experts(pair, 5, "ties", [1, 2], 0.2),
    ]
    names = ["expert-text", "mixed", "opd-text-to-image", "mopd", "mopd-from-text", "merged", "merged-ties"]
    assert [schedule.name for schedule in schedules] == names


def test_expert_phases_are_the_same_everywhere():
    phase, pair = expert_phase("text", 5), ["text", "image"]
    schedules = [
        expert("text", 5),
        static_opd("text", "image", 5, 3),
        static_opd("image", "text", 5, 3, lr=0.3),
        mopd(pair, 5, 3),
        mopd(pair, 5, 3, start="image"),
        merged_experts(pair, 5),
    ]
    for schedule in schedules:
        assert schedule.phases_of("text") == (phase,) and schedule.starts["text"] == "base"


def test_static_opd_is_one_frozen_teacher():
    schedule = static_opd("text", "image", 5, 3, beta=0.5, estimator="forward", lr=0.2)
    phase = schedule.phases[-1]
    assert schedule.starts == {"text": "base", "image": "base", "student": "image"} and schedule.result == "student"
    assert phase.updates[0].signals == (OPD("text", "text", 0.5, "forward"),) and len(phase.updates) == 1
    assert [p.lr for p in schedule.phases] == [1, 1, 0.2] and [p.steps for p in schedule.phases] == [5, 5, 3]


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("start", ["base", "text"])
def test_mopd_learns_from_all_experts(k, start):
    schedule = mopd(NAMES[:k], 5, 3, start=start)
    assert schedule.links() == {("student", name) for name in NAMES[:k]} and schedule.starts["student"] == start
    assert schedule.total_steps == 5 * k + 3 and schedule.critical_steps == 8


def test_mixed_shares_one_update():
    schedule = mixed_rlvr(NAMES[:3], 7)
    assert schedule.total_steps == schedule.critical_steps == 7 and schedule.capabilities() == (
        "text",
        "image",
        "video",
    )
    assert {signal.stream for _, update in schedule.updates for signal in update.signals} == {"rl"}


def test_merged_experts_keep_the_merge_settings():
    assert merged_experts(NAMES[:2], 5, "ties", [1, 2], 0.2).result == Merge(("text", "image"), "ties", (1.0, 2.0), 0.2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: static_opd("text", "text", 5, 3), r"at least 2 distinct names"),
        (lambda: static_opd("text", "student", 5, 3), r"'student' is reserved"),
        (
            lambda: mopd(["text", "image"], 5, 3, start="video"),
            r"unknown start 'video'; allowed: \['base', 'text', 'image'\]",
        ),
        (lambda: mopd(["text"], 5, 3), r"at least 2 distinct names"),
        (lambda: mixed_rlvr([], 5), r"at least 1 distinct names"),
        (lambda: mixed_rlvr(["text"], 0), r"steps must be an integer ≥ 1"),
        (lambda: expert("base", 5), r"'base' is the frozen starting point"),
        (lambda: merged_experts(["text", "image"], 5, "mean"), r"unknown merge method"),
    ],
)
def test_baselines_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(k=st.integers(1, 9), steps=st.integers(2, 500), share=st.floats(0.01, 0.99))
def test_equal_steps_is_exact_and_as_near_as_it_can_be(k, steps, share):
    each, distil = equal_steps(k, steps, share)
    assert k * each + distil == k * steps and each >= 1 and distil >= 1
    wanted = share * k * steps
    assert all(abs(distil - wanted) <= abs(k * (steps - other) - wanted) + 1e-6 for other in range(1, steps))


@pytest.mark.parametrize("arguments", [(0, 10, 0.5), (2, 1, 0.5), (2, 10, 0), (2, 10, 1)])
def test_equal_steps_refuses(arguments):
    with pytest.raises(ValueError, match="share in"):
        equal_steps(*arguments)


@pytest.mark.parametrize("k", SIZES)
def test_all_paradigms_can_have_equal_totals(k):
    names, (each, distil) = NAMES[:k], equal_steps(k, 100, 0.4)
    schedules = [copd(names), merged_experts(names, 100), mixed_rlvr(names, 100 * k), mopd(names, each, distil)]
    assert {schedule.total_steps for schedule in schedules} == {100 * k}
    assert all(Schedule.from_dict(schedule.to_dict()) == schedule for schedule in schedules)


# A topology of one's own

RING = {"a": ["b"], "b": ["c"], "c": ["d"], "d": ["a"]}


def test_a_ring_links_each_branch_with_the_next():
    ring = copd("abcd", cycles=2, topology=RING)
    assert ring.name == "copd-table" and ring.links() == {("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")}
    assert link_table("abcd", RING) == {k: ((v[0], v[0]),) for k, v in RING.items()}
    assert ring.total_steps == copd("abcd", cycles=2).total_steps and ring.result.branches == tuple("abcd")
    assert (
        copd("abcd", topology=json.loads(json.dumps(RING))).content_hash() == copd("abcd", topology=RING).content_hash()
    )


def test_a_table_like_a_named_topology_gives_the_same_links():
    everybody = {a: [b for b in NAMES if b != a] for a in NAMES}
    assert (
        link_table(NAMES, everybody) == link_table(NAMES)
        and copd(NAMES, topology=everybody).phases == copd(NAMES).phases
    )
    assert link_table(NAMES, {"image": ("text",)})["text"] == () and copd(
        NAMES, topology={"image": ["text"]}
    ).links() == {("image", "text")}


@pytest.mark.parametrize(
    "table, message",
    [
        ({"e": ["a"]}, r"unknown branch 'e'; allowed: \['a', 'b', 'c', 'd'\]"),
        ({"a": ["e"]}, r"branch 'a': unknown teacher 'e'"),
        ({"a": ["b", "a"]}, "branch 'a': a branch cannot teach itself"),
        ({"a": ["b", "c", "b"]}, "branch 'a': teacher 'b' is listed twice"),
        ({"a": "b"}, "branch 'a': its teachers must be a list"),
        ({"a": 3}, "must be a list"),
        ({}, "has no links"),
        ({"a": []}, "has no links"),
        ({"a": ["base"]}, "unknown teacher 'base'"),
        ({"a": [["b"]]}, "unknown teacher"),
    ],
)
def test_a_table_that_is_wrong_is_named(table, message):
    with pytest.raises(ValueError, match=message):
        copd("abcd", topology=table)


def test_a_table_has_no_hub():
    with pytest.raises(ValueError, match="hub='a' needs topology='hub', not a table"):
        copd("abcd", topology=RING, hub="a")


# A schedule by name


def wrong():
    return {}


def once(capabilities=("text",), steps=1):
    return mixed_rlvr(capabilities, steps)


FIXED = mixed_rlvr(["text"], 3)


@pytest.mark.parametrize(
    "value, values, expected",
    [
        ("copd", dict(capabilities=["text", "image"], cycles=1), copd(["text", "image"], cycles=1)),
        (copd, dict(capabilities=list("abcd"), topology=RING), copd("abcd", topology=RING)),
        (FIXED, {}, FIXED),
        (once, {}, once()),
        (f"{__name__}:FIXED", {}, FIXED),
        (f"{__name__}:once", dict(steps=2), once(steps=2)),
        ("copd_nb:expert", dict(capability="text", steps=2), expert("text", 2)),
    ],
)
def test_a_schedule_is_named_in_four_ways(value, values, expected, tmp_path):
    assert schedule_from(value, values) == expected
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(expected.to_dict()))
    assert schedule_from(path) == schedule_from(str(path)) == expected
    with pytest.raises(ValueError, match=r"is fixed and has no parameters: \['cycles'\]"):
        schedule_from(path, dict(cycles=2))


@pytest.mark.parametrize(
    "value, values, error, message",
    [
        (
            "grpo",
            {},
            ValueError,
            "unknown paradigm 'grpo': copd, .*merged_experts, .*a .json file, or package.module:name",
        ),
        ("copd", dict(capabilities=["a", "b"], branches=2), ValueError, "parameter of copd 'branches': .*topology"),
        ("copd", dict(capabilities=["a", "b"], cycels=2), ValueError, r"'cycels' \(did you mean 'cycles'\?\): cycles"),
        ("copd", dict(capabilities="math"), ValueError, r"must be a list of texts, such as '\[\"math\"\]'"),
        ("copd", dict(capabilities=["a", "b"], cycles="2"), ValueError, "must be a whole number, such as 2 without"),
        ("copd", dict(capabilities=["a", "b"], beta=True), ValueError, "beta=True: must be a number or an object"),
        ("copd", {}, ValueError, r"copd needs a value for capabilities \(two or more distinct names"),
        ("mpod", {}, ValueError, r"unknown paradigm 'mpod' \(did you mean 'mopd'\?\): mopd, "),
        ("none.json", {}, FileNotFoundError, "there is no file of a schedule 'none.json'"),
        ("no_such:thing", {}, ValueError, "no module no_such"),
        ("math:sqrt", dict(x=4), ValueError, "math:sqrt: .*"),
        ("math:pi", {}, ValueError, "float: expected Schedule or Callable"),
        (wrong, {}, TypeError, "schedule 'wrong' returned a dict"),
        (FIXED, dict(steps=2), ValueError, r"fixed.*\['steps'\]"),
        (3, {}, TypeError, "int: expected"),
    ],
)
def test_a_schedule_that_is_not_there_is_named(value, values, error, message):
    with pytest.raises(error, match=message):
        schedule_from(value, values)


@pytest.mark.parametrize(
    "text, message",
    [("{", "plan.json"), ("[]", "plan.json: schema is"), ('{"schema": "copd_nb.schedule/1"}', "plan.json: .*name")],
)
def test_a_schedule_file_that_is_wrong_is_named(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        schedule_from(tmp_path / "plan.json")
