"Controls: what each rule makes of a cycle, what it leaves alone, and that a run which is cut off decides the same."

import json
import math
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from everywhere import everywhere
from hypothesis import given
from hypothesis import strategies as st
from same_runs import PAIR, small_base, small_suite

from copd_nb.engine import phase as phase_module
from copd_nb.engine import walk
from copd_nb.schedule.paradigms import mixed_rlvr, mopd
from copd_nb.schedule.changes import scale_beta, share_steps
from copd_nb.schedule.control import capability_progress, divergence_band, gradient_share, token_share
from copd_nb.schedule.drift import drift
from copd_nb.schedule.controllers import check_control, controlled, realised
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run, request_stop
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.adaptive import CONTROLS, Control
from copd_nb.schedule.parts import OPD, RL, Phase, Update
from copd_nb.schedule.price import budget_curve
from copd_nb.schedule.rules import Rule, Setting, control_from, control_rule, rule_of



def train_row(branch, stream, cycle=1, phase_index=1, step=0, **numbers):
    return (
        dict(
            kind="train",
            cycle=cycle,
            phase_index=phase_index,
            step=step,
            branch=branch,
            stream=stream,
            capability=branch,
        )
        | numbers
    )


def probe_row(a, b, owner, cycle=1, phase_index=1, step=7, **numbers):
    return dict(kind="probe", cycle=cycle, phase_index=phase_index, step=step, a=a, b=b, owner=owner) | numbers


def betas(schedule, cycle):
    return {u.branch: [s.beta for s in u.opd] for p in schedule.phases if p.cycle == cycle for u in p.updates if u.opd}


def steps(schedule, cycle):
    return [(p.name, p.steps, tuple(u.branch for u in p.updates)) for p in schedule.phases if p.cycle == cycle]


# The field of a schedule


def test_schedules_without_a_control_keep_their_hashes():
    assert copd(PAIR).content_hash() == "e47e7cfb6f9022cfa5223b1ca23e2b9cc04982498b91cd6581f6fd9234876fbc"
    assert mopd(PAIR, 3, 3).content_hash() == "9cb5daf532dc35d613cff4c446524064bf8adadf8090e8d344c182ba4346ee69"
    assert "control" not in copd(PAIR).to_dict()


CONTROLLED = [
    divergence_band(0.1, 0.2),
    divergence_band(0.8, 0.95, measure="overlap", moves="steps", step=3),
    gradient_share(0.3),
    capability_progress(2.0, window=4),
    token_share(1.0),
]


@pytest.mark.parametrize("control", CONTROLLED, ids=str)
def test_a_control_is_data(control):
    schedule = copd(PAIR, control=control)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule and hash(schedule) == hash(
        copd(PAIR, control=control)
    )
    assert schedule.content_hash() != copd(PAIR).content_hash() and schedule != copd(PAIR)
    assert Control(control.rule, dict(reversed(control.settings))) == control
    assert control.words in schedule.describe() and control.words.startswith(f"{control}: ")
    assert str(control) in schedule.svg().replace("&lt;", "<")
    assert check_control(schedule) is schedule and schedule.total_steps == copd(PAIR).total_steps


def test_built_in_rules_are_found_by_name_and_are_their_own_constructors():
    rules = [divergence_band, gradient_share, capability_progress, token_share, drift]
    assert [rule.__name__ for rule in rules] == list(CONTROLS) and all(rule_of(r.__name__) is r for r in rules)
    assert {c.rule for c in CONTROLLED} == {*CONTROLS} - {"drift"} and all(control_from(c) == c for c in CONTROLLED)
    assert all(control_from({"rule": c.rule, "settings": dict(c.settings)}) == c for c in CONTROLLED)
    assert (
        token_share()
        == control_from("token_share")
        == control_from(token_share)
        == Control(token_share, {"floor": 0.5})
    )


@pytest.mark.parametrize(
    "control, words",
    [
        (Control("by_hand"), ["'by_hand'", "divergence_band", "token_share"]),
        (Control("token_share", {"share": 1.0}), ["'share'", "floor"]),
        (Control("token_share", (("floor", 0.5), ("floor", 0.6))), ["'floor'", "twice"]),
        (Control("token_share", {"floor": math.nan}), ["'floor'", "finite"]),
        (Control("token_share", {"floor": 0}), ["floor=0", "(0, 1]"]),
        (Control("gradient_share"), ["'share'", "limit"]),
    ],
)
def test_a_control_that_is_wrong_is_named(control, words):
    with pytest.raises(ValueError) as error:
        check_control(replace(copd(PAIR), control=control))
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: divergence_band(0.2, 0.1), "high=0.1: must be > low=0.2"),
        (lambda: divergence_band(-1, 1), "low=-1"),
        (lambda: divergence_band(0.5, 2, "overlap"), "high=2.*≤ 1"),
        (lambda: divergence_band(0, 1, "kl"), "measure='kl'.*symmetric_kl"),
        (lambda: divergence_band(0, 1, moves="lr"), "moves='lr'.*beta"),
        (lambda: divergence_band(0, 1, factor=1), "factor=1"),
        (lambda: divergence_band(0, 1, step=0), "step=0"),
        (lambda: divergence_band("a", 1), "low='a'"),
        (lambda: gradient_share(1), "share=1"),
        (lambda: gradient_share(0.5, limit=1), "limit=1"),
        (lambda: gradient_share(True), "share=True"),
        (lambda: capability_progress(0), "power=0"),
        (lambda: capability_progress(window=0), "window=0"),
        (lambda: capability_progress(floor=1.5), "floor=1.5"),
        (lambda: token_share(0), r"floor=0: must be in \(0, 1\]"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "schedule, words",
    [
        (replace(mixed_rlvr(PAIR, 4), control=gradient_share(0.5)), r"phases in cycles with rising numbers, not \[\]"),
        (copd(PAIR, s_opd=0, control=gradient_share(0.5)), "cycle 1: no phase has OPD"),
        (copd(PAIR, s_rl=0, control=token_share()), "cycle 1: it needs a phase without OPD"),
        (copd(PAIR, s_rl=0, control=divergence_band(0, 1, moves="steps")), "moves='beta'"),
        (
            copd(PAIR, topology="student", control=divergence_band(0, 1, moves="steps")),
            "equally many branches; use moves='beta'",
        ),
    ],
)
def test_a_control_that_does_not_fit_the_phases_is_refused(schedule, words):
    with pytest.raises(ValueError, match=words):
        check_control(schedule)
    with pytest.raises(ValueError, match=words):
        controlled(schedule, 1, [])


def test_cycles_must_rise():
    backwards = replace(copd(PAIR, cycles=2, control=gradient_share(0.5)), phases=copd(PAIR, cycles=2).phases[::-1])
    with pytest.raises(ValueError, match=r"rising numbers, not \[2, 1\]"):
        check_control(backwards)


# A rule of one's own


def halve(schedule, cycle, rows, factor=0.5):
    "Multiplies every β."
    factors = dict.fromkeys(schedule.starts, factor)
    return scale_beta(schedule, cycle, factors, {b: dict(measure="none", measured=0, target=0) for b in factors})


@control_rule(needs=("evals",), words="ends with factor {factor:g}", line="× {factor:g}")
def careful(
    schedule, cycle, rows, factor=Setting(0.5, above=0, most=1), note="x", window=Setting(None, least=1, whole=True)
):
    "Not shown."
    return halve(schedule, cycle, rows, factor)


SEEN = []


def looks(schedule, cycle, rows):
    "Notes what it is shown."
    SEEN.append([(row["kind"], row["cycle"]) for row in rows])
    return schedule, []


def rewrites(schedule, cycle, rows):
    return replace(schedule, phases=schedule.phases[1:]), []


def renames(schedule, cycle, rows):
    return replace(schedule, name="other"), []


def forgets(schedule, cycle, rows):
    return None


HERE = f"{__name__}:"


NAMED = {"function": halve, "its name": HERE + "halve", "rule": careful, "name of a rule": HERE + "careful"}


@pytest.mark.parametrize("rule", NAMED.values(), ids=NAMED)
def test_a_rule_of_ones_own_is_named_like_a_built_in_one(rule):
    plan = copd(PAIR, cycles=3, control=rule)
    assert plan.control.rule == (rule if isinstance(rule, str) else HERE + rule.__name__)
    assert (
        Schedule.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan == copd(PAIR, cycles=3, control=plan.control)
    )
    after, decisions = controlled(plan, 1, [])
    assert betas(after, 1) == {"text": [0.1], "image": [0.1]} and betas(after, 3) == {"text": [0.05], "image": [0.05]}
    assert [d["new"] for d in decisions] == [0.05, 0.05] and betas(realised(plan, []), 3)["text"] == [0.025]


def test_words_and_settings_of_ones_own_rule():
    assert control_from(halve).words.endswith("halve (factor 0.5): Multiplies every β")
    assert careful(0.25).line == "× 0.25" and careful(0.25).words.endswith(": ends with factor 0.25")
    assert dict(careful(note="y", window=3).settings) == dict(factor=0.5, note="y", window=3)
    for wrong, words in (
        (lambda: careful(2), r"factor=2: must be in \(0, 1\]"),
        (lambda: careful(note=1), "note=1: must be a text"),
        (lambda: careful(window=0), "window=0: must be None or an integer"),
        (lambda: careful(1, 2, 3, 4), "once"),
        (lambda: careful(1, factor=1), "once"),
        (lambda: careful(facto=1), "'facto' is unknown.*factor"),
        (lambda: control_from({"settings": {}}), "a rule and settings"),
        (lambda: Rule(halve, needs=("sleep",)), "'sleep'"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_what_a_rule_needs_must_be_measured():
    plan = copd(PAIR, control=careful())
    assert check_control(plan) is plan and check_control(plan, Config(eval_every=1)) is plan
    with pytest.raises(ValueError, match="config eval_every=0: control .*careful' needs evals"):
        check_control(plan, Config(eval_every=0))


def test_a_rule_sees_the_cycles_so_far_and_not_its_own_decisions():
    SEEN.clear()
    rows = [dict(kind=k, cycle=c) for c in (None, 1, 2, 3) for k in ("train", "control")]
    controlled(copd(PAIR, cycles=3, control=looks), 2, rows)
    assert SEEN == [[("train", 1), ("control", 1), ("train", 2)]]


@pytest.mark.parametrize(
    "rule, words",
    [(rewrites, "phases of later cycles"), (renames, "phases of later cycles"), (forgets, "returned a NoneType")],
)
def test_a_rule_that_changes_more_than_later_cycles_is_refused(rule, words):
    with pytest.raises(ValueError, match=words):
        controlled(copd(PAIR, cycles=3, control=rule), 2, [])


def test_a_rule_without_a_name_works_but_is_not_written():
    plan = copd(PAIR, cycles=2, control=lambda schedule, cycle, rows: halve(schedule, cycle, rows))
    assert (
        betas(controlled(plan, 1, [])[0], 2)["text"] == [0.05]
        and "lambda" in plan.describe()
        and "lambda" in plan.svg()
    )
    for write in (plan.to_dict, plan.content_hash):
        with pytest.raises(ValueError, match="no name to be written by: define it in a module"):
            write()


def test_reading_a_schedule_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "own_rule.py").write_text("def rule(schedule, cycle, rows): return schedule, []")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = copd(PAIR).to_dict() | {"control": {"rule": "own_rule:rule", "settings": {}}}
    plan = Schedule.from_dict(data).validate()
    assert "own_rule" in plan.describe() and "own_rule" in plan.svg() and "own_rule" not in sys.modules
    assert check_control(plan) is plan and "own_rule" in sys.modules


@pytest.mark.parametrize(
    "rule, error, words",
    [
        ("no_such_module:rule", ValueError, "no module no_such_module"),
        ("math:nothing", ValueError, "math has no nothing"),
        ("math:pi", ValueError, "float: expected something callable"),
        ("nothing", ValueError, "divergence_band.*package.module:name"),
    ],
)
def test_a_rule_that_is_not_there_is_named(rule, error, words):
    with pytest.raises(error, match=words):
        copd(PAIR, control=rule)


def test_a_run_with_a_rule_of_ones_own_is_replayed(suite, start, tmp_path, monkeypatch):
    plan = copd(PAIR, cycles=3, s_rl=1, s_opd=1, beta=0.5, control=halve)
    whole = train(plan, suite, start, TINY, tmp_path / "whole", progress=False)
    assert betas(whole.schedule, 3) == {b: [0.125] for b in PAIR} and whole.planned == plan
    with monkeypatch.context() as patch:
        cut(patch, "change_schedule", 2)
        with pytest.raises(KeyboardInterrupt):
            train(plan, suite, start, TINY, tmp_path / "cut", progress=False)
    again = train(plan, suite, start, TINY, tmp_path / "cut", progress=False)
    assert rows_of(again) == rows_of(whole) and again.schedule == whole.schedule == realised(plan, rows_of(whole))


# The rules, on rows made by hand


def test_divergence_band_moves_the_beta_of_each_branch():
    schedule = copd(
        ["text", "image", "video"],
        cycles=3,
        beta={"text": 0.1, "image": 0.2, "video": 0.4},
        control=divergence_band(0.1, 0.3, factor=3),
    )
    rows = [
        probe_row("text", "image", "text", symmetric_kl=0.3),
        probe_row("text", "image", "image", symmetric_kl=0.6),
        probe_row("text", "base", "text", symmetric_kl=9.0),
        probe_row("text", "image", "text", step=3, symmetric_kl=9.0),
        probe_row("text", "image", "text", cycle=2, phase_index=3, symmetric_kl=0.0),
        probe_row("image", "text", "text", symmetric_kl=0.01),
        probe_row("image", "video", "image", symmetric_kl=0.03),
        probe_row("image", "video", "video", symmetric_kl=None),
        probe_row("video", "text", "text", symmetric_kl=0.3),
    ]
    after, decisions = controlled(schedule, 1, rows)
    for cycle in (2, 3):
        found = betas(after, cycle)
        assert found == {"text": [pytest.approx(0.3)] * 2, "image": [pytest.approx(0.2 / 3)] * 2, "video": [0.4] * 2}
    assert betas(after, 1) == betas(schedule, 1)
    assert decisions[0] == dict(
        branch="text",
        setting="beta",
        old=0.1,
        new=pytest.approx(0.3),
        measure="symmetric_kl",
        measured=pytest.approx(0.45),
        target=0.3,
    )
    assert [(d["branch"], d["old"], d["measured"], d["target"]) for d in decisions[1:]] == [
        ("image", 0.2, 0.02, 0.1),
        ("video", 0.4, 0.3, 0.3),
    ]


def test_overlap_is_closeness():
    schedule = copd(PAIR, cycles=2, beta=0.1, control=divergence_band(0.8, 0.9, measure="overlap"))
    rows = [probe_row("text", "image", "text", overlap=0.7), probe_row("image", "text", "text", overlap=0.95)]
    assert betas(controlled(schedule, 1, rows)[0], 2) == {"text": [0.2], "image": [0.05]}


@pytest.mark.parametrize("distance, found", [(0.5, (10, 10)), (0.01, (14, 6)), (0.15, (12, 8))])
def test_divergence_band_moves_steps(distance, found):
    schedule = copd(PAIR, cycles=2, control=divergence_band(0.1, 0.2, moves="steps"))
    rows = [
        probe_row("text", "image", "text", symmetric_kl=distance - 0.01),
        probe_row("image", "text", "text", symmetric_kl=distance + 0.01),
    ]
    after, decisions = controlled(schedule, 1, rows)
    assert tuple(n for _, n, _ in steps(after, 2)) == found and after.total_steps == schedule.total_steps
    assert [(d["branch"], d["setting"], d["old"], d["new"]) for d in decisions] == [
        ("all", "s_rl", 12, found[0]),
        ("all", "s_opd", 8, found[1]),
    ]
    assert decisions[0]["measured"] == pytest.approx(distance)


def test_moved_steps_leave_one_in_each_phase():
    schedule = copd(PAIR, cycles=4, s_rl=3, s_opd=2, control=divergence_band(0.1, 0.2, moves="steps", step=5))
    far, near = ([probe_row("text", "image", "text", cycle=c, symmetric_kl=d) for c in (1, 2, 3)] for d in (1.0, 0.0))
    assert [[n for _, n, _ in steps(realised(schedule, far), c)] for c in (1, 2, 3, 4)] == [
        [3, 2],
        [1, 4],
        [1, 4],
        [1, 4],
    ]
    assert [[n for _, n, _ in steps(realised(schedule, near), c)] for c in (1, 2, 3, 4)] == [
        [3, 2],
        [4, 1],
        [4, 1],
        [4, 1],
    ]


def test_gradient_share_sets_beta():
    schedule = copd(
        ["text", "image", "video"], cycles=2, topology="hub", beta=0.1, control=gradient_share(0.75, limit=4)
    )
    rows = [
        train_row("text", s, gradient_norm=g, step=i)
        for i, more in enumerate((0, 1))
        for s, g in (("rl", 1 + more), ("rl", 1 + more), ("opd:image:image", 3 + more), ("opd:video:video", 4 - more))
    ]
    rows += [train_row("image", "rl", phase_index=0, gradient_norm=50.0)]  # Phase I does not count
    rows += [train_row("image", s, gradient_norm=g) for s, g in (("rl", 8.0), ("opd:text:text", 0.5))]
    rows += [train_row("video", s, gradient_norm=g) for s, g in (("rl", 0.0), ("opd:text:text", 0.5))]
    after, decisions = controlled(schedule, 1, rows)
    cross, native = (5 + 5) / 2, 1.5  # √(3²+4²) in both steps
    assert betas(after, 2) == {
        "text": [pytest.approx(0.1 * 3 * native / cross)] * 2,
        "image": [pytest.approx(0.4)],
        "video": [0.1],
    }
    assert [(d["branch"], d["measured"], d["target"]) for d in decisions] == [
        ("text", pytest.approx(cross / (cross + native)), 0.75),
        ("image", pytest.approx(0.5 / 8.5), 0.75),
    ]


def test_gradient_share_leaves_the_student_alone_and_multiplies_a_plan():
    schedule = copd(PAIR, cycles=2, topology="student", control=gradient_share(0.5))
    rows = [train_row("student", s, gradient_norm=1.0) for s in ("opd:text:text", "opd:image:image")]
    assert controlled(schedule, 1, rows) == (schedule, [])
    phases = [
        Phase("II", 2, [Update("a", [RL("a"), OPD("b", "b", 0.1 * n)]), Update("b", [RL("b")])], cycle=n)
        for n in (1, 2, 3)
    ] + [Phase("after", 1, [Update("a", [OPD("b", "b", 9.0)])])]
    rising = Schedule("rising", ["a", "b"], phases, "a", gradient_share(0.5))
    after, (decision,) = controlled(
        rising, 1, [train_row("a", s, gradient_norm=g) for s, g in (("rl", 2.0), ("opd:b:b", 1.0))]
    )
    assert [p.updates[0].opd[0].beta for p in after.phases] == [0.1, 0.4, pytest.approx(0.6), 9.0] and (
        decision["old"],
        decision["new"],
    ) == (0.2, 0.4)


def rewards(values, cycle=1, n=2):
    return [
        train_row(b, "rl", cycle, 0, step=s, reward=r, generated=1, trained=1)
        for b, r in values.items()
        for s in range(n)
    ]


def test_capability_progress_deals_steps_out():
    schedule = copd(PAIR, cycles=3, control=capability_progress())
    after, decisions = controlled(schedule, 1, rewards(dict(text=0.4, image=0.8)))
    assert steps(after, 2) == [
        ("I RLVR", 6, ("text", "image")),
        ("I RLVR", 12, ("text",)),
        ("II OPD", 8, ("text", "image")),
    ]
    assert decisions == [
        dict(
            branch="text",
            setting="s_rl",
            old=12,
            new=18,
            measure="headroom",
            measured=pytest.approx(0.6),
            target=pytest.approx(18),
        ),
        dict(
            branch="image",
            setting="s_rl",
            old=12,
            new=6,
            measure="headroom",
            measured=pytest.approx(0.2),
            target=pytest.approx(6),
        ),
    ]
    again, _ = controlled(after, 2, rewards(dict(text=0.5, image=0.5), cycle=2))  # back to equal: one phase again
    assert (
        steps(again, 3) == steps(schedule, 3)
        and again.phases[:5] == after.phases[:5]
        and again.total_steps == schedule.total_steps
    )


def test_power_window_and_floor():
    rows = [
        train_row(b, "rl", 1, i, step=s, reward=r)
        for b, r in (("text", 0.4), ("image", 0.7))
        for i, s, r in ((0, 0, 0.0), (0, 1, 0.0), (1, 0, r))
    ]

    def dealt(**options):
        return {
            d["branch"]: d["new"]
            for d in controlled(copd(PAIR, cycles=2, s_rl=10, control=capability_progress(**options)), 1, rows)[1]
        }

    assert dealt(window=1, floor=0.1) == {"text": 13, "image": 7}  # 0.6 : 0.3
    assert dealt(window=1, power=2.0, floor=0.1) == {"text": 16, "image": 4}  # 0.36 : 0.09
    assert dealt(window=1, power=9.0, floor=0.1) == {"text": 19, "image": 1} and dealt(window=1, power=9.0) == {
        "text": 15,
        "image": 5,
    }
    assert dealt(floor=0.1) == {"text": 11, "image": 9}  # 0.867 : 0.767, that is 10.6 : 9.4


def test_nothing_left_to_gain_means_equal_steps_and_nothing_measured_no_change():
    schedule = copd(PAIR, cycles=2, control=capability_progress())
    after, decisions = controlled(schedule, 1, rewards(dict(text=1.0, image=1.0)))
    assert after == schedule and [d["target"] for d in decisions] == [0, 0]
    for control in CONTROLLED:
        assert controlled(
            copd(PAIR, control=control), 1, rewards(dict(text=0.3)) + rewards(dict(image=0.1), cycle=2)
        ) == (copd(PAIR, control=control), [])


def test_token_share_gives_equal_tokens():
    schedule = copd(["text", "image", "video"], cycles=2, s_rl=11, topology="student", control=token_share(0.1))
    rows = [
        train_row(b, "rl", 1, 0, step=s, reward=0.5, generated=n, trained=n)
        for b, n in (("text", 600), ("image", 300), ("video", 200))
        for s in (0, 1)
    ]
    rows += [train_row("text", "opd:image:student", 1, 1, generated=10**6, trained=10**6)]
    after, decisions = controlled(schedule, 1, rows)
    dealt = {d["branch"]: d["new"] for d in decisions}
    assert (
        dealt == {"text": 6, "image": 11, "video": 16} and sum(dealt.values()) == 3 * 11
    )  # 5.5 : 11 : 16.5, the remainder goes to the first
    assert [d["measured"] for d in decisions] == [1200, 600, 400]
    assert steps(after, 2)[:3] == [
        ("I RLVR", 6, ("text", "image", "video")),
        ("I RLVR", 5, ("image", "video")),
        ("I RLVR", 5, ("video",)),
    ]


def test_events_as_a_table_give_the_same():
    schedule = copd(PAIR, cycles=2, control=capability_progress())
    rows = rewards(dict(text=0.2, image=0.7)) + [probe_row("text", "image", "text", symmetric_kl=1.0)]
    assert controlled(schedule, 1, pd.DataFrame(rows).to_dict("records")) == controlled(schedule, 1, rows)


def test_after_the_last_cycle_nothing_is_decided():
    schedule = copd(PAIR, cycles=1, control=gradient_share(0.5))
    assert controlled(
        schedule, 1, [train_row("text", s, gradient_norm=g) for s, g in (("rl", 1.0), ("opd:image:image", 2.0))]
    ) == (schedule, [])
    assert controlled(copd(PAIR), 1, []) == (copd(PAIR), [])


# What holds for all rows


@given(st.dictionaries(st.sampled_from("abcde"), st.floats(0, 1e6), min_size=1), st.integers(0, 200), st.floats(0, 1))
def test_steps_are_dealt_out_whole_and_none_below_the_floor(weights, total, floor):
    dealt = share_steps(weights, total, floor)
    assert sum(dealt.values()) == total and list(dealt) == list(weights)
    assert min(dealt.values()) >= min(math.ceil(floor * total / len(weights) - 1e-9), total // len(weights))
    for a in weights:
        for b in weights:
            assert weights[a] <= weights[b] or dealt[a] >= dealt[b] - 1


NUMBERS = st.floats(0, 1e3, allow_nan=False)
NAMES = ["text", "image", "video"]


def every_row(draw, cycle, topology):
    "All rows that a cycle of a schedule would log, with any numbers."
    rows = []
    for index, phase in (
        (i, p) for i, p in enumerate(copd(NAMES, 3, 3, 2, topology=topology).phases) if p.cycle == cycle
    ):
        for update in phase.updates:
            for signal in update.signals:
                reward = dict(reward=draw(st.floats(0, 1))) if isinstance(signal, RL) else {}
                rows.append(
                    train_row(
                        update.branch,
                        signal.stream,
                        cycle,
                        index,
                        gradient_norm=draw(NUMBERS),
                        generated=draw(st.integers(1, 9)),
                        trained=1,
                        **reward,
                    )
                )
                if isinstance(signal, OPD):
                    rows.append(
                        probe_row(
                            update.branch,
                            signal.teacher,
                            update.branch,
                            cycle,
                            index,
                            symmetric_kl=draw(NUMBERS),
                            overlap=draw(st.floats(0, 1)),
                        )
                    )
    return rows


@given(st.data(), st.sampled_from(CONTROLLED), st.sampled_from(["pairwise", "hub"]))
def test_no_rule_changes_the_past_or_the_total(data, control, topology):
    schedule = copd(NAMES, 3, 3, 2, topology=topology, control=control)
    rows = [row for cycle in (1, 2, 3) for row in every_row(data.draw, cycle, topology)]
    before, decided = schedule, []
    for cycle in (1, 2, 3):
        after, decisions = controlled(before, cycle, rows)
        end = max(i for i, p in enumerate(before.phases) if p.cycle == cycle) + 1
        assert after.phases[:end] == before.phases[:end] and after.total_steps == schedule.total_steps
        assert (
            replace(after, phases=schedule.phases) == schedule
            and after.validate(NAMES)
            and Schedule.from_dict(after.to_dict()) == after
        )
        assert all(0 < s.beta < math.inf for _, u in after.updates for s in u.opd)
        assert check_control(after) is after and all(
            math.isfinite(d[k]) for d in decisions for k in ("old", "new", "measured", "target")
        )
        assert realised(schedule, rows, cycle) == after == realised(schedule, json.loads(json.dumps(rows)), cycle)
        before, decided = after, decided + decisions
    assert realised(schedule, rows) == before and all(d["branch"] in (*NAMES, "all") for d in decided)


# The engine

TINY = Config(
    prompts=4,
    opd_prompts=2,
    group_size=4,
    max_new_tokens=8,
    probe_every=0,
    probe_prompts=2,
    eval_every=0,
    learning_rate=1e-4,
    warmup=2,
    checkpoint_every=2,
    device="cpu",
)
PROBED = replace(TINY, probe_every=2)
SHARE = copd(PAIR, cycles=3, s_rl=2, s_opd=1, beta=0.5, control=gradient_share(0.5))
DEALT = copd(PAIR, cycles=3, s_rl=2, s_opd=1, beta=0.5, control=capability_progress(power=50.0))
BAND = copd(PAIR, cycles=3, s_rl=1, s_opd=2, control=divergence_band(1.0, 2.0, moves="steps", step=1))


@pytest.fixture(scope="module")
def start():
    return small_base()


@pytest.fixture(scope="module")
def suite():
    return small_suite()


@pytest.fixture(scope="module")
def straight(suite, start, tmp_path_factory):
    "Each schedule trained without an interruption."
    return {
        s.control.rule: train(s, suite, start, c, tmp_path_factory.mktemp("straight") / "run", progress=False)
        for s, c in ((SHARE, TINY), (DEALT, TINY), (BAND, PROBED))
    }


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.result.model.parameters()])


def rows_of(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in EventLog(run.path / "events.jsonl").rows()]


@pytest.mark.parametrize("plan", [SHARE, DEALT, BAND], ids=lambda s: s.control.rule)
def test_a_run_logs_decisions_and_follows_them(plan, straight):
    run = straight[plan.control.rule]
    rows = EventLog(run.path / "events.jsonl").rows()
    decisions = [row for row in rows if row["kind"] == "control"]
    assert run.planned == plan != run.schedule and run.schedule.total_steps == plan.total_steps
    assert run.schedule == realised(plan, rows) and {d["cycle"] for d in decisions} == {1, 2}
    assert run.manifest["realised"] == run.schedule.to_dict() and run.manifest["schedule"] == plan.to_dict()
    for decision in decisions:
        phase = run.schedule.phases[decision["phase_index"]]
        assert (phase.name, phase.cycle, phase.steps - 1) == (
            decision["phase"],
            decision["cycle"],
            decision["step"],
        ) and phase.name == "II OPD"
        last = max(r["global_step"] for r in rows if r["kind"] == "train" and r["cycle"] == decision["cycle"])
        assert decision["global_step"] == last
    trained = [(r["phase_index"], r["step"], r["branch"]) for r in rows if r["kind"] == "train" and r["stream"] == "rl"]
    assert trained == [
        (i, s, u.branch) for i, p in enumerate(run.schedule.phases) for s in range(p.steps) for u in p.updates
    ]
    assert budget_curve(run.events, run.schedule).total_steps.iloc[-1] == plan.total_steps
    assert sorted(set(r["global_step"] for r in rows if r["kind"] == "train")) == list(
        range(1, 1 + sum(p.steps for p in run.schedule.phases))
    )


def test_the_new_beta_is_the_one_that_is_trained_with(straight, suite, start, tmp_path):
    "The second cycle of the run is that of a schedule that was written with these β from the start."
    run = straight["gradient_share"]
    by_hand = replace(run.schedule, control=None)
    again = train(by_hand, suite, start, TINY, tmp_path / "by_hand", progress=False)
    assert [r for r in rows_of(run) if r["kind"] != "control"] == rows_of(again) and torch.equal(
        weights(run), weights(again)
    )
    first = run.events.query("kind == 'control' and cycle == 1").set_index("branch")
    assert betas(run.schedule, 1) == {b: [0.5] for b in PAIR} and betas(run.schedule, 2) == {b: [0.5] for b in PAIR} | {
        b: [first.new[b]] for b in first.index
    }
    assert len(first) and (first.new != 0.5).all()


def cut(monkeypatch, name: str, calls: int, after: bool = False):
    "Make the n-th call of one of the engine's functions die like a killed process, before or after its work."
    real, left = getattr(walk if hasattr(walk, name) else phase_module, name), [calls]

    def dying(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            if after:
                real(*args, **options)
            raise KeyboardInterrupt
        return real(*args, **options)

    for module in everywhere(name, real): monkeypatch.setattr(module, name, dying)


PLACES = {
    "in the first cycle": ("train_step", 2, False),
    "before the first decision": ("controlled", 1, False),
    "decided, not logged": ("controlled", 1, True),
    "logged, not followed": ("change_schedule", 1, False),
    "followed": ("change_schedule", 1, True),
    "before the next phase": ("_enter", 3, False),
    "first step after it": ("train_step", 4, True),
    "at the second decision": ("change_schedule", 2, False),
    "in the last cycle": ("train_step", 8, True),
    "at the end": ("finish", 1, False),
}


OFTEN = (
    "before the first decision",
    "decided, not logged",
    "logged, not followed",
    "followed",
)  # around a decision; elsewhere is slow


@pytest.mark.parametrize(
    "plan, place",
    [pytest.param(SHARE, place, marks=() if place in OFTEN else pytest.mark.slow) for place in PLACES]
    + [(DEALT, "logged, not followed"), (DEALT, "in the last cycle")],
    ids=lambda x: getattr(x, "name", x),
)
def test_an_interrupted_run_decides_the_same(plan, place, straight, suite, start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut(patch, *PLACES[place])
        with pytest.raises(KeyboardInterrupt):
            train(plan, suite, start, TINY, tmp_path / "run", progress=False)
    assert not Run(tmp_path / "run").finished
    again = train(plan, suite, start, TINY, tmp_path / "run", progress=False)
    whole = straight[plan.control.rule]
    assert rows_of(again) == rows_of(whole) and torch.equal(weights(again), weights(whole))
    assert (
        again.schedule == whole.schedule
        and again.planned == plan
        and again.manifest["content_hash"] == whole.manifest["content_hash"]
    )


def test_a_run_that_is_stopped_at_the_end_of_a_cycle_decides_when_it_goes_on(
    straight, suite, start, tmp_path, monkeypatch
):
    real, count = phase_module.train_step, iter(range(2))

    def asking(*args):
        if next(count, None) is None:
            request_stop(tmp_path / "run")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(phase_module, "train_step", asking)
        stopped = train(SHARE, suite, start, TINY, tmp_path / "run", progress=False)
    assert (
        stopped.manifest["status"] == "stopped"
        and stopped.schedule == SHARE
        and "control" not in set(stopped.events.kind)
    )
    again = train(SHARE, suite, start, TINY, tmp_path / "run", progress=False)
    assert (
        rows_of(again) == rows_of(straight["gradient_share"]) and again.schedule == straight["gradient_share"].schedule
    )


def test_a_finished_run_is_loaded_with_what_was_realised(straight, suite, start, monkeypatch):
    run = straight["gradient_share"]
    monkeypatch.setattr(phase_module, "train_step", lambda *a: pytest.fail("trained again"))
    assert train(SHARE, suite, start, TINY, run.path, progress=False).schedule == run.schedule
    with pytest.raises(ValueError, match="holds another run"):
        train(replace(SHARE, control=gradient_share(0.4)), suite, start, TINY, run.path, progress=False)


def test_parts_of_a_phase_share_their_optimizer_state(suite, start, tmp_path):
    "A Phase I in two parts is one phase: where optimizers are reset, they are not reset between the parts."
    both, alone = [Update(b, [RL(b)]) for b in PAIR], [Update("text", [RL("text")])]
    whole = Schedule("whole", PAIR, [Phase("I", 2, both, 1), Phase("II", 1, both, 1)], "text")
    parts = Schedule("parts", PAIR, [Phase("I", 1, both, 1), Phase("I", 1, alone, 1), Phase("II", 1, both, 1)], "text")
    other = Schedule(
        "other", PAIR, [Phase("I", 1, both, 1), Phase("I again", 1, alone, 1), Phase("II", 1, both, 1)], "text"
    )
    config = replace(TINY, optimizer_state="reset")
    a, b, c = (
        weights(train(s, suite, start, config, tmp_path / s.name, progress=False)) for s in (whole, parts, other)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "schedule, config, words",
    [
        (BAND, TINY, "probe_every=0.*'divergence_band'"),
        (replace(SHARE, control=Control("sleep")), TINY, "'sleep'"),
        (replace(SHARE, control=Control("gradient_share", {"share": 2.0})), TINY, "share=2.0"),
        (copd(PAIR, s_opd=0, control=gradient_share(0.5)), TINY, "no phase has OPD"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(schedule, config, words, suite, start, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(schedule, suite, start, config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
