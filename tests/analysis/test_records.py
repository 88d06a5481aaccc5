"One schema for results.json: values are converted or refused, faults named by their path, committed records valid."
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.analysis.records import (
    RESULTS_SCHEMA, SCHEMA, check_results, markdown_table, plain, read_results, write_results)

ROOT = Path(__file__).parents[2]
FINDING = dict(value=1.0, low=0.5, high=2.0, unit="points", seeds=3, verdict="holds", sentence="It holds.")
GOOD = dict(schema=SCHEMA, report="x", parameters={}, environment={}, headline="h",
            tables=dict(main=[dict(a=1, b=None, c="t", d=True)]), shown=["s"], limits=["l"],
            claims=dict(some=FINDING), costs=[1, 2])


def written(folder, **changes):
    given = dict(report="x", parameters=dict(seeds=[0]), headline="h", tables={}, shown=["s"], limits=["l"]) | changes
    return write_results(folder, **given)


def test_a_record_with_keys_of_its_own_is_fine(): check_results(GOOD)


@pytest.mark.parametrize("key", RESULTS_SCHEMA["required"])
def test_every_required_key_is_missed(key):
    with pytest.raises(ValueError, match=f"the record: '{key}' is a required property"):
        check_results({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize("change, path", [
    (dict(schema="copd_nb.results/0"), "schema"), (dict(report=""), "report"), (dict(headline=None), "headline"),
    (dict(tables=dict(main=dict(a=1))), "tables/main"),
    (dict(tables=dict(main=[dict(a=1), dict(a=[1])])), "tables/main/1/a"), (dict(shown="one sentence"), "shown"),
    (dict(limits=["fine", 3]), "limits/1"),
    (dict(claims=dict(some=FINDING | dict(verdict="nearly"))), "claims/some/verdict"),
    (dict(claims=dict(some=FINDING | dict(seeds=1.5))), "claims/some/seeds"),
    (dict(claims=dict(some={k: v for k, v in FINDING.items() if k != "low"})), "claims/some")])
def test_the_path_of_a_fault_is_named(change, path):
    with pytest.raises(ValueError, match=f"not a results record: {path}: "): check_results(GOOD | change)


def test_numpy_pandas_and_missing_values_become_json(tmp_path):
    table = pd.DataFrame(dict(n=np.array([1, 2]), x=[math.nan, np.inf], on=[True, False],
                              name=pd.array(["a", pd.NA], dtype="string")), index=[7, 9])
    record = written(tmp_path, tables={("two", "greedy"): table, "none": pd.DataFrame()},
                     shares=np.array([[0.5, math.nan]]), seed=np.int64(3))
    assert record["tables"] == {"two/greedy": [dict(n=1, x=None, on=True, name="a"),
                                               dict(n=2, x=None, on=False, name=None)], "none": []}
    assert record["shares"] == [[0.5, None]] and type(record["seed"]) is int
    assert read_results(tmp_path / "results.json") == record == json.loads((tmp_path / "results.json").read_text())


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_whatever_plain_returns_survives_json(value):
    turned = plain(value)
    assert json.loads(json.dumps(turned, allow_nan=False)) == turned == plain(turned)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("a\"\\\n{[,", max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("a\"\n:", max_size=3), inner), max_leaves=8))
def test_a_written_record_is_read_as_it_was(tmp_path_factory, value):
    "Whatever is nested in a key of its own, empty lists and objects, too."
    folder = tmp_path_factory.mktemp("record")
    assert written(folder, costs=value)["costs"] == read_results(folder / "results.json")["costs"] == value


def test_a_row_of_a_table_takes_a_line(tmp_path):
    written(tmp_path, tables=dict(main=pd.DataFrame(dict(a=[1, 2], b=["x", "y"]))), costs=[1, 2, 3])
    lines = [line.strip(" ,") for line in (tmp_path / "results.json").read_text().splitlines()]
    assert '{"a": 1, "b": "x"}' in lines and '{"a": 2, "b": "y"}' in lines and '"costs": [1, 2, 3]' in lines


def test_what_has_no_form_is_refused_with_its_path():
    with pytest.raises(ValueError, match="costs/0/when: Timestamp"):
        plain(dict(costs=pd.DataFrame(dict(when=[pd.Timestamp(0)]))))
    with pytest.raises(ValueError, match="main: columns .* have a name twice"):
        plain(dict(main=pd.DataFrame([[1, 2]], columns=["a", "a"])))
    with pytest.raises(ValueError, match="the record: set"): plain({1})


def test_nothing_is_written_if_the_record_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="tables/main/0/a"):
        written(tmp_path / "new", tables=dict(main=pd.DataFrame(dict(a=[[1]]))))
    with pytest.raises(ValueError, match=r"keys \['environment'\] are written"):
        written(tmp_path / "new", environment={})
    assert not (tmp_path / "new").exists()


def test_writing_again_replaces_and_leaves_nothing_aside(tmp_path):
    written(tmp_path)
    assert written(tmp_path, headline="other") == read_results(tmp_path / "results.json")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text, said", [("{", "Expecting"), ('{"a": NaN}', "NaN"), ("[]", "is not of type 'object'")])
def test_a_file_that_holds_no_record_is_named(tmp_path, text, said):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=f"results.json: .*{said}"): read_results(tmp_path / "results.json")


def test_markdown_cells_stay_in_their_row():
    assert markdown_table(pd.DataFrame({"a|b": ["x\ny"], "c": [1]})).splitlines() == ["| a\\|b | c |", "| --- | --- |",
                                                                                      "| x y | 1 |"]


COMMITTED = sorted([*(ROOT / "docs" / "results").glob("*.json"), *(ROOT / "docs" / "reports").rglob("results.json")])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_committed_records_have_the_form(path): assert read_results(path)["limits"]
