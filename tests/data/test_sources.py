"Rows in memory, numbers as answers, info, missing answers, and faults that many rows share."
import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from copd_nb.data.capability import Example, Info
from copd_nb.data.columns import EXTRACT, Columns
from copd_nb.data.faults import problems
from copd_nb.data.files import capability_from, prompt_key, read_examples
from copd_nb.data.verifiers import named_reward

SUMS = [dict(prompt=f"{a} + {a + 1} =", answer=2 * a + 1) for a in range(60)]
SCAN = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


# Rows in memory

def as_dataset(rows): return datasets.Dataset.from_list(rows)


KINDS = {"list": list, "iterator": iter, "Dataset": as_dataset, "DataFrame": pd.DataFrame,
         "DatasetDict": lambda rows: datasets.DatasetDict(train=as_dataset(rows)),
         "IterableDataset": lambda rows: as_dataset(rows).to_iterable_dataset(),
         "examples": lambda rows: [Example(r["prompt"], str(r["answer"]), "any") for r in rows]}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_memory_give_the_capability_of_their_file(tmp_path, kind):
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    wanted = capability_from(tmp_path / "sums.jsonl", "sums", "numeric")
    made = capability_from(KINDS[kind](SUMS), "sums", "numeric")
    assert made.fingerprint == wanted.fingerprint and made.train[0].capability == "sums"
    assert problems(KINDS[kind](SUMS), reward="numeric").empty


@pytest.mark.parametrize("kind", ["list", "Dataset", "DataFrame"])
def test_errors_name_the_row_in_memory(kind):
    rows, name = [*SUMS[:2], dict(prompt=" ", answer=1)], f"the {kind}"
    with pytest.raises(ValueError, match=f"row 3 of {name}: column 'prompt' is blank"):
        capability_from(KINDS[kind](rows), "sums", "numeric")
    assert problems(KINDS[kind](rows))[["file", "row"]].values.tolist() == [[name, 3]]


def test_splits_and_other_data():
    both = datasets.DatasetDict(train=as_dataset(SUMS[:40]), test=as_dataset(SUMS[40:]))
    made = capability_from(both, "sums", "numeric", split="train", test_split="test")
    assert (len(made.train), len(made.test)) == (40, 20)
    assert capability_from(SUMS[:40], "sums", "numeric", test=SUMS[40:]).fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="the DatasetDict has no split None: train, test"): read_examples(both)
    for data in ({"prompt": "a"}, 7, None):
        with pytest.raises(ValueError, match="a list of mappings or examples is needed"): read_examples(data)
    with pytest.raises(ValueError, match="row 1 of the list: '7' is not an object"): read_examples([7])
    with pytest.raises(ValueError, match="several columns 'prompt'"):
        read_examples(pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]))


def test_pictures_in_memory(tmp_path):
    picture, film = Image.fromarray(SCAN), np.stack([SCAN, 255 - SCAN])
    Image.fromarray(SCAN).save(tmp_path / "scan.png")
    named = as_dataset([dict(prompt="?", images=str(tmp_path / "scan.png"))]).cast_column("images", datasets.Image())
    stored = datasets.Dataset.from_dict(dict(prompt=["?"], images=[[picture]]), features=datasets.Features(
        prompt=datasets.Value("string"), images=datasets.Sequence(datasets.Image())))
    data = (tmp_path / "scan.png").read_bytes()
    bare = [[dict(prompt="?", images=i)] for i in (picture, [picture], SCAN, [SCAN], data)]
    for data in (named, stored, *bare, pd.DataFrame(bare[0])):
        assert np.array_equal(read_examples(data)[0].images[0], SCAN)
    grey = read_examples([dict(prompt="?", images=SCAN[..., 0])])[0].images[0]
    assert np.array_equal(grey, SCAN[..., :1].repeat(3, -1))
    for videos in (film, [film], [list(film)], [[picture, Image.fromarray(255 - SCAN)]]):
        assert np.array_equal(read_examples([dict(prompt="?", videos=videos)])[0].videos[0], film)
    with pytest.raises(ValueError, match=r"row 1 of the list: a picture is float64 of shape \(2, 3, 3\)"):
        read_examples([dict(prompt="?", images=SCAN / 255)])


def test_names_of_pictures_in_memory_lead_below_a_folder_only(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"): Image.fromarray(SCAN).save(folder / "scan.png")
    monkeypatch.chdir(tmp_path / "in")
    assert read_examples([dict(prompt="?", images="scan.png")])[0].images[0].shape == SCAN.shape
    with pytest.raises(ValueError, match="row 1 of the list: .*outside"):
        read_examples([dict(prompt="?", images="../scan.png")])


def test_changing_a_picture_afterwards_changes_no_example():
    mine = SCAN.copy()
    example = read_examples([dict(prompt="?", images=mine)])[0]
    mine[:] = 0
    assert np.array_equal(example.images[0], SCAN)


# Numbers as answers

CLEAR = [(15, "15"), (2196.0, "2196"), (0.1, "0.1"), (-0.0, "0"), (1e-7, "0.0000001"), (2 ** 70, str(2 ** 70)),
         (np.int64(7), "7"), (np.float32(0.1), "0.1"), (np.float64(2.5), "2.5"), (Decimal("12.50"), "12.50"),
         (Decimal(10) ** 22, "1" + "0" * 22), ("1.0", "1.0"), (" 7", " 7")]
UNCLEAR = [0.1 + 0.2, 1 / 3, 1e22, 2.0 ** 53, -1e300, Decimal("0.12345678901234567"), np.float64(1e22)]


@pytest.mark.parametrize("value, text", CLEAR, ids=str)
def test_numbers_whose_digits_are_certain_are_read(value, text):
    found = read_examples([dict(prompt="?", answer=value)])[0].answer
    assert found == text and type(found) is str


@pytest.mark.parametrize("value", UNCLEAR, ids=str)
def test_numbers_that_may_have_been_rounded_are_named_with_the_cure(value):
    with pytest.raises(ValueError, match="may have been rounded.*extract=number"):
        read_examples([dict(prompt="?", answer=value)])
    assert read_examples([dict(prompt="?", answer=value)], columns=Columns(extract="number"))


@pytest.mark.parametrize("value", [True, np.bool_(False), float("inf"), [3], {"a": 1}, b"3", 1 + 2j])
def test_what_is_no_answer(value):
    with pytest.raises(ValueError, match="row 1 of the list: .*(number or text|finite number)"):
        read_examples([dict(prompt="?", answer=value)])


@given(st.decimals(-10 ** 6, 10 ** 6, places=6) | st.integers(-10 ** 15, 10 ** 15).map(Decimal))
def test_a_number_of_fifteen_digits_survives_a_float(exact):
    digits = len(str(abs(exact)).replace(".", "").strip("0"))
    if digits <= 15: assert Decimal(EXTRACT["text"](float(exact), [])) == exact


def test_json_numbers_are_what_is_written_and_parquet_floats_are_refused(tmp_path):
    lines = '{"prompt": "a", "answer": 1e22}', '{"prompt": "b", "answer": 9007199254740993.0}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [e.answer for e in read_examples(tmp_path / "a.jsonl")] == ["1" + "0" * 22, "9007199254740993.0"]
    pq.write_table(pa.table(dict(prompt=["a", "b"], answer=pa.array([1.5, 2.0 ** 53]))), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2 of a.parquet: 9007199254740992.0 may have been rounded"):
        read_examples(tmp_path / "a.parquet")


def test_a_column_of_integers_with_gaps_is_read_as_integers(tmp_path):
    pd.DataFrame(dict(prompt=["a", "b"], answer=[7, None])).to_parquet(tmp_path / "a.parquet")
    assert [e.answer for e in read_examples(tmp_path / "a.parquet")] == ["7", ""]


def test_options_by_number():
    columns = Columns(options="o", extract="letter")
    def letter(value): return read_examples([dict(prompt="?", answer=value, o=["x", "y"])], columns=columns)[0].answer
    assert [letter(v) for v in (1, 1.0, np.int64(0), "y", "A")] == ["B", "B", "A", "B", "A"]
    for wrong in (True, 2, 0.5, -1):
        with pytest.raises(ValueError, match="none of the 2 options"): letter(wrong)


# What a reward needs beside the answer

def test_info_is_frozen_and_part_of_the_id_only_if_there_is_any():
    told = Example("f?", "", "code", info=dict(tests=["assert f(1)"], more=dict(seed=np.int64(3), names=("a",))))
    assert told.info == dict(tests=("assert f(1)",), more=dict(seed=3, names=("a",)))
    assert Example("f?", "", "code").id == Example("f?", "", "code", info={}).id == "e2a8e96180cc9106" != told.id
    assert told.id == Example("f?", "", "code", info=dict(reversed(told.info.items()))).id
    for change in (lambda i: i.update(a=1), lambda i: i.pop("tests"), lambda i: i["more"].clear(),
                   lambda i: i.__setitem__("a", 1), lambda i: i.__delitem__("tests"), lambda i: i.setdefault("b", 1)):
        with pytest.raises(TypeError, match="can't be changed"): change(told.info)
    with pytest.raises(FrozenInstanceError): told.info = {}
    for same in (pickle.loads(pickle.dumps(told)), copy.deepcopy(told), replace(told, capability="x")):  # noqa: S301
        assert (same.id, same.info) == (told.id, told.info) and type(same.info["more"]) is Info
    assert "with tests, more" in repr(told) and "tests, more" in told._repr_html_()
    assert json.loads(json.dumps(told.info))["more"] == dict(seed=3, names=["a"])
    assert prompt_key(told) == prompt_key(Example("f?", "", "code"))


NO_INFO = [{"a": float("nan")}, {1: "a"}, {"a": {"b": {1}}}, {"a": Decimal(1)}, {"a": b""}, "x", 7]


@pytest.mark.parametrize("info", NO_INFO)
def test_info_is_json(info):
    with pytest.raises(ValueError, match="info"): Example("f?", "", "code", info=info)


@pytest.mark.parametrize("info, wanted", [
    ("extra", dict(tests="t", deep=dict(n=3))), (("extra",), dict(extra=dict(tests="t", deep=dict(n=3)))),
    ("entry", dict(entry="f")), (("extra.tests", "entry"), dict(tests="t", entry="f")), ("a.b", {"a.b": 1}),
    ("extra.deep", dict(n=3)), ("none", {})])
def test_columns_of_info(tmp_path, info, wanted):
    row = {"prompt": "?", "extra": dict(tests="t", deep=dict(n=3), gone=None), "entry": "f", "a.b": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    for data in ([row], tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        assert read_examples(data, columns=Columns(info=info))[0].info == wanted


def test_faults_of_info_are_named_with_their_column():
    columns = Columns(info=("a.x", "b.x"))
    assert "names must differ" in problems([dict(prompt="?", a=dict(x=1), b=dict(x=2))], columns).problem[0]
    found = problems([dict(prompt="?", extra=dict(t=float("inf")))], Columns(info="extra"))
    assert (found.column[0], found.problem[0][:17]) == ("extra", "info.t is inf: te")
    assert "no row has a column 'tests'" in problems([dict(prompt="?")], Columns(info="tests")).problem[0]


def test_rewards_read_info_and_answers():
    tests = dict(tests="assert f(2) == 4", entry_point="f")
    kept = [Example("f?", json.dumps(tests), "c"), Example("f?", "", "c", info=tests),
            Example("f?", "", "c", info=dict(test_list=["assert f(2) == 4"], index=3)),
            Example("import math\ndef f(x):\n    'Square.'\n", "", "c", info=tests)]
    code = named_reward("code")
    assert code(["def f(x): return x * x"] * 4, kept) == [1] * 4 and code(["def f(x): return x"] * 4, kept) == [0] * 4
    assert code(["def f(x): return math.floor(x * x)"] * 4, kept) == [0, 0, 0, 1]  # the prompt's import comes before it
    prose = Example("Complete\ndef f(x):", "", "c", info=tests)
    assert code(["def f(x): return x * x"], [prose]) == [1]
    wish = Example("?", "", "c", info=dict(constraints=[dict(kind="words_max", n=2)]))
    assert named_reward("instructions")(["a b", "a b c"], [wish] * 2) == [1, 0]
    for bad, text in ((dict(tests=" "), "has no tests"), (dict(tests="assert f("), "no Python")):
        assert text in problems([Example("f?", "", "c", info=bad)], reward="code").problem[0]


# Missing answers

def test_missing_answers_are_counted_where_the_reward_compares_with_them():
    rows = [dict(prompt=f"{i}?", answer=None if i % 5 == 0 else str(i)) for i in range(1, 61)]
    for reward in ("numeric", "exact", "math_verify", "sum?parts=[[1,\"numeric\"],[1,\"length?budget=9\"]]"):
        with pytest.raises(ValueError, match="row 5 of the list: column 'answer' is empty: 12 of 60 rows have no"):
            capability_from(rows, "c", reward)
        found = problems(rows, reward=reward)
        assert found[["row", "column", "rows"]].values.tolist() == [[5, "answer", 12]]
        assert "is empty" in found.problem[0] and "12 of 60 rows: 5, 10, 15, 20, 25, …" in found.problem[0]
    def mine(completions, examples): return [float(len(c)) for c in completions]
    for reward in ("format?pattern=.*", "length?budget=9", mine):
        assert len(capability_from(rows, "c", reward).train) > 30 and problems(rows, reward=reward).empty
        assert problems([dict(prompt=r["prompt"]) for r in rows], reward=reward).empty


def test_a_missing_column_of_answers_is_one_line():
    found = problems([dict(prompt="a"), dict(prompt="b")], reward="numeric")
    assert found[["row", "column"]].values.tolist() == [[0, "answer"]]


# Faults that many rows share

def test_many_rows_with_one_fault_are_one_line():
    rows = [dict(prompt=f"{i}?", answer=["7", f"a{i} 'x'", True][i % 3]) for i in range(30)]
    found, each = problems(rows, reward="numeric"), problems(rows, reward="numeric", each=True)
    assert list(found.row) == [2, 3] and list(found.rows) == [10, 10] and len(each) == 20 and set(each.rows) == {1}
    assert found.problem.str.contains(r"\(10 of 30 rows: \d+, \d+, \d+, \d+, \d+, …\)").all()
    assert found.attrs["rows"] == each.attrs["rows"] == 20
    few = problems(rows[:9], reward="numeric")
    assert len(few) == 6 and not few.problem.str.contains("of 9 rows").any()
