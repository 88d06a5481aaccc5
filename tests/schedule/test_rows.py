"Rows of a comparison: equal steps, arguments of one's own, paradigms of one's own."
import pytest

from copd_nb.schedule.core import Schedule
from copd_nb.schedule.costs import ModelShape, Workload
from copd_nb.schedule.parts import RL, Merge, Phase, Update
from copd_nb.schedule.rows import (
    FAMILIES, FORMER, Choice, choice_of, cycles_of, paradigms, settings_of, shortened)

PLAIN = {f: Choice() for f in FAMILIES}


@pytest.mark.parametrize("name, setting", settings_of().items())
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_unified_models_have_equal_total_steps(name, setting, share):
    rows = paradigms(setting, 80, {f: Choice(share=share) for f in FAMILIES})
    assert {p.schedule.total_steps for p in rows if p.family != "expert"} == {80 * len(setting.capabilities)}
    for p in rows: p.schedule.validate(setting.capabilities)
    assert len({p.label for p in rows}) == len(rows)


def test_cycles_must_fit():
    with pytest.raises(ValueError, match=r"75 steps.*12 \+ 8.*take 60 or 80 steps"):
        paradigms(settings_of()["two_branch"], 75, PLAIN, ["copd"])
    with pytest.raises(ValueError, match="take 20 steps"): cycles_of(10, 12, 8)
    assert cycles_of(80, 12, 8) == 4


@pytest.mark.parametrize("n", range(2, 60))
def test_shortened_cycles_fit(n):
    c = shortened(Choice(beta=0.3), n)
    assert cycles_of(n, c.s_rl, c.s_opd) >= 1 and c.s_rl >= 1 and c.s_opd >= 1 and c.beta == 0.3
    assert n % 20 or c == Choice(beta=0.3)


def test_settings_need_two_capabilities():
    assert list(settings_of(["a", "b"])) == ["two_branch"]
    with pytest.raises(ValueError, match="two capabilities"): settings_of(["a"])


def test_arguments_reach_the_schedule():
    made = choice_of("copd", dict(beta=0.1, s_rl=6, s_opd=4, estimator="reverse", learning_rate=1e-3, label="mine"))
    row, = paradigms(settings_of()["two_branch"], 20, None, [("copd", made)])
    assert (row.label, row.changes, row.schedule.total_steps) == ("mine", dict(learning_rate=1e-3), 40)
    opd = [s for _, u in row.schedule.updates for s in u.opd]
    assert {(s.beta, s.estimator) for s in opd} == {(0.1, "reverse")}
    once, = paradigms(settings_of()["two_branch"], 20, None, [("mopd", choice_of("mopd", dict(start="image")))])
    assert once.schedule.name == "mopd-from-image"
    both = paradigms(settings_of()["two_branch"], 20, None, [("opd", choice_of("opd", dict(label="static")))])
    assert [p.label for p in both] == ["static: OPD text→image", "static: OPD image→text"]


def test_shares_of_copd_are_those_of_a_settings_capabilities():
    chosen = choice_of("copd", dict(shares={"video": 1, "text": 3, "image": 1}))
    rows = {name: paradigms(s, 20, None, [("copd", chosen)])[0] for name, s in settings_of().items()}
    alone = {n: [(p.steps, [u.branch for u in p.updates]) for p in r.schedule.phases][:-1] for n, r in rows.items()}
    assert alone == {"two_branch": [(6, ["text", "image"]), (12, ["text"])],
                     "three_branch": [(7, ["text", "image", "video"]), (15, ["text"])]}
    assert all(r.schedule.total_steps == 20 * len(settings_of()[n].capabilities) for n, r in rows.items())


def test_shares_of_a_mixture_are_those_of_a_settings_capabilities():
    chosen = choice_of("mixed", dict(shares={"video": 1, "text": 3, "image": 4}))
    rows = {name: paradigms(s, 20, None, [("mixed", chosen)])[0] for name, s in settings_of().items()}
    assert {n: r.label for n, r in rows.items()} == {
        "two_branch": "mixed RLVR, 3 : 4", "three_branch": "mixed RLVR, 3 : 4 : 1"}
    assert [s.share for _, u in rows["three_branch"].schedule.updates for s in u.rl] == [3, 4, 1]
    with pytest.raises(ValueError, match="not of .'text'."):
        paradigms(settings_of()["two_branch"], 20, None, [("mixed", choice_of("mixed", dict(shares={"text": 1})))])


@pytest.mark.parametrize("former, family", FORMER.items())
def test_functions_name_their_family(former, family):
    setting = settings_of()["two_branch"]
    assert [p.schedule for p in paradigms(setting, 20, None, [former])] == \
        [p.schedule for p in paradigms(setting, 20, None, [family])]


@pytest.mark.parametrize("name, values, words", [
    ("copd", dict(betta=1), "no argument 'betta' .did you mean 'beta'.*it takes learning_rate, beta, s_rl"),
    ("mixed", dict(beta=1), "no argument 'beta'"), ("copd", dict(cycles=3), "no argument 'cycles'"),
    ("copd", dict(s_rl=1.5), "s_rl is 1.5: a positive whole number"), ("expert", dict(learning_rate="high"), "'high'"),
    ("copd", dict(beta=True), "beta is True"), ("copd", dict(beta=0), "beta is 0"),
    ("opd", dict(opd_lr=float("nan")), "opd_lr is nan"), ("mixed", dict(shares=[1, 2]), r"not \[1, 2\]"),
    ("mixed", dict(shares={"text": 0}), "share of 'text' is 0"),
    ("copd", dict(shares={"text": 0}), "share of 'text' is 0"),
    ("local", dict(shares={"text": 1}), "no argument 'shares'")])
def test_bad_arguments_are_named(name, values, words):
    with pytest.raises(ValueError, match=words): choice_of(name, values)


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
    assert rows[0].changes == {}  # the configuration's learning rate


def test_another_budget_is_shown_beside_the_row():
    assert labels([lambda names, total: apart(names, total // 2, "half")]) == ["half (20 of 40 steps)"]
    assert labels([apart(TWO.capabilities, 80, "double")]) == ["double (80 of 40 steps)"]


def test_a_schedule_that_does_not_fit_a_setting_is_left_out():
    two_only = apart(TWO.capabilities, 40)
    assert labels([two_only]) == ["apart"] and labels([two_only], THREE) == []
    assert labels([lambda names, total: None]) == []


@pytest.mark.parametrize("wanted, error, words", [
    ("ring", ValueError, "paradigm 'ring': one of expert, mixed, .*, copd, local, semi_opd, .* or package"),
    ("no_such_module:ring", ValueError, "no module no_such_module in .* or among the installed packages"),
    ("copd_nb.schedule.rows:ring", ValueError, "has no ring"),
    ("copd_nb.schedule.rows:FAMILIES", ValueError, "is a tuple"),
    (lambda names, total: 3, TypeError, "gave a int, not a Schedule"),
    (lambda names, total: apart(names[:1], total), ValueError, r"never trains \['image'\]: return None"),
    (lambda names, total: apart((*names, "audio"), total), ValueError, "audio")])
def test_bad_paradigms_are_named(wanted, error, words):
    with pytest.raises(error, match=words): labels([wanted])


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two rows are called \['apart'\]"): labels([apart, apart])


def test_mixed_rlvr_may_have_a_larger_batch_and_fewer_steps():
    "The same prompts in all, so the same tokens."
    rows = paradigms(settings_of()["two_branch"], 80, {}, [("mixed", choice_of("mixed", v)) for v in (
        {}, dict(prompts=64, steps=80))])
    assert [(p.label, p.schedule.total_steps, p.changes) for p in rows] == [
        ("mixed RLVR", 160, {}), ("mixed RLVR, 64 prompts", 80, dict(prompts=64))]
    with pytest.raises(ValueError, match="prompts is 1.5: a positive whole"): choice_of("mixed", dict(prompts=1.5))
    with pytest.raises(ValueError, match="copd' has no argument 'prompts'"): choice_of("copd", dict(prompts=3))
    load = Workload(32, 16, 8, dict(text=9), dict(text=5), ModelShape(1_000, 0, 1, 8))
    assert [p.load(load).prompts for p in rows] == [32, 64]
