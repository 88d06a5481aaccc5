"Kinds: which values an annotation allows, and what a refusal says."
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.data.kinds import called, check_kinds, fits, kind_in_words, meanings
from copd_nb.data.names import check_names, check_reference, meant, nearest, unknown_name


@pytest.mark.parametrize("kind, good, bad", [
    (int, [0, -3], [True, 3.0, "3", None, [3]]), (float, [0, 0.5, -2], [True, "0.5", math.nan, math.inf, None]),
    (bool, [True, False], [1, 0, "true", None]), (str, ["", "a"], [1, None, ["a"]]), (None, [None], [0, ""]),
    (int | None, [3, None], ["3", True]), (Optional[float], [1, None], ["1"]),
    (list[str], [[], ["a"], ("a",)], ["a", ["a", 1], {"a": 1}]), (Iterable[str], [["a"], {"a"}], ["a", [1], 3]),
    (Sequence[str], [["a"]], ["a", 3]), (tuple[float, float], [(0.9, 1), [0, 1]], [[0.9], [0.9, 1, 1], ["a", "b"]]),
    (tuple[int, ...], [[], [1, 2, 3]], [[1, "2"], 1]), (tuple, [[], (1, "a")], ["ab", 3]),
    (dict[str, float], [{}, {"a": 1}], [{"a": "b"}, [1], {1: 1.0}]), (Mapping, [{"a": 1}], [["a"]]),
    (float | dict[str, float], [0.1, {"a": 0.1}], [{"a": "x"}, "0.1"]), (Callable, [len], [3]),
    (Exception, [ValueError()], [3, ValueError]), (Any, [3, None, "x"], []), (object, [3, None], []),
    (Literal["a", "b"], ["a"], [])])
def test_a_value_fits_its_annotation_or_does_not(kind, good, bad):
    assert [v for v in good if not fits(v, kind)] == [] and [v for v in bad if fits(v, kind)] == []
    assert isinstance(kind_in_words(kind), str)


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
                    lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6))
def test_every_json_value_is_judged_without_an_error(value):
    for kind in (int, float | None, list[str], dict[str, float], tuple[float, float], Iterable[str], Callable, str):
        assert fits(value, kind) in (True, False)


def plan(
    names: Iterable[str],  # two or more
    steps: int = 3,  # of each
    *,
    rate: float | None = None,  # of learning
): return list(names), steps, rate


@pytest.mark.parametrize("values, said", [
    ({}, r"plan needs a value for names \(two or more\); it takes names, steps, rate"),
    (dict(names="math,sort"), r"""names='math,sort': must be a list of texts, such as '\["math", "sort"\]' \(two"""),
    (dict(names=["a"], steps="4"), r"steps='4': must be a whole number, such as 4 without quotes \(of each\)"),
    (dict(names=["a"], rate=math.nan), r"rate=nan: must be a number or None, and finite \(of learning\)"),
    (dict(names=["a"], stepps=3), r"unknown parameter of plan 'stepps' \(did you mean 'steps'\?\): steps, names, rate"),
    (dict(names=["a"], step=3, names_=3), "unknown parameter of plan 'step'")])
def test_a_call_with_wrong_values_is_refused_before_it_runs(values, said):
    with pytest.raises(ValueError, match=said): called(plan, values, "plan")


def test_a_call_with_fitting_values_is_made():
    assert called(plan, dict(names=("a",), rate=1), "plan") == (["a"], 3, 1)
    assert called(plan, dict(steps=2), "plan", ["a", "b"]) == (["a", "b"], 2, None)
    assert called(lambda **more: more, dict(x=1), "any") == dict(x=1)
    with pytest.raises(ValueError, match="math.sqrt: "): called(math.sqrt, dict(x=4), "math.sqrt")
    assert meanings(plan)["rate"] == "of learning" and meanings(math.sqrt) == {}


def test_annotations_that_cannot_be_found_are_left_alone():
    def odd(x: "NoSuchName", y: int = 1): return x, y  # noqa: F821
    assert called(odd, dict(x=3, y="z"), "odd") == (3, "z")
    check_kinds(odd, dict(x=3), "odd")


def test_the_nearest_known_name_comes_first():
    known = ["math", "sort", "text"]
    assert nearest("srot", known) == ["sort", "math", "text"] and nearest("zzz", known) == known
    assert meant("tex", known) == " (did you mean 'text'?)" and meant("zzz", known) == "" == meant(3, known)
    assert unknown_name("x" * 500, known, "task").count("x") == 81
    check_names([], known, "task")
    with pytest.raises(ValueError, match=r"unknown task 'srot' \(did you mean 'sort'\?\): sort, math, text$"):
        check_names(["math", "srot", "q"], dict.fromkeys(known), "task")


@pytest.mark.parametrize("wrong, said", [
    ("nosuch:x", "no module nosuch in "), ("json", "write package.module:name"), (":x", "write package.module:name"),
    ("a/b.py:x", "a module is named without .py: write a.b:x"), (".x:y", "no module  in ")])
def test_a_reference_to_no_module_is_refused_without_importing(wrong, said):
    with pytest.raises(ValueError, match=f"^suite .*{said}"): check_reference(wrong, "suite")


def test_a_reference_to_a_module_of_the_working_directory_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "never_imported_here.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    check_reference("never_imported_here:suite?size=3", "suite")
