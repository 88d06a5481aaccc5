"Reading JSON: one kind of error, messages that name the place and stay short, whatever the value."
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from copd_nb.data.schema import DEPTH, REAL, SHOWN, TEXT, check, listed, mapped, parse, read_bytes, read_json, record

SCHEMA = Draft202012Validator(record(dict(name=TEXT, weights=listed(REAL)), dict(more=mapped(TEXT))))
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(VALUES)
@settings(max_examples=60)
def test_what_json_writes_is_read(value):
    assert parse(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
@settings(max_examples=200)
def test_bytes_are_a_value_or_a_value_error(data):
    for strict in (False, True):
        try: parse(data, strict)
        except ValueError: pass


def nested(levels): return b"[" * levels + b"]" * levels


def test_depth_has_a_limit():
    parse(nested(DEPTH)), parse(b'{"a":' * DEPTH + b"1" + b"}" * DEPTH), parse(b"[" + b"[]," * 5000 + b"[]]")
    for data in (nested(DEPTH + 1), nested(900), nested(5000), nested(10 ** 6), b"[" * 10 ** 6, b'{"a":' * (DEPTH + 1)
                 + b"1" + b"}" * (DEPTH + 1)):
        with pytest.raises(ValueError, match=f"nested more than {DEPTH} levels deep|Expecting"): parse(data)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", '"\\ud800"', '{"\\udfff": 1}'])
def test_strict_reading_refuses_what_other_programs_dont_read(text):
    parse(text.encode())
    with pytest.raises(ValueError): parse(text.encode(), strict=True)


def test_a_pair_of_surrogates_is_a_letter(): assert parse(b'"\\ud83d\\ude00"', strict=True) == "😀"


@pytest.mark.parametrize("value, said", [
    ([], r"the whole: \[\] is not of type 'object'"), ({"name": "a"}, "the whole: 'weights' is a required property"),
    ({"name": 1, "weights": []}, "name: 1 is not of type 'string'"),
    ({"name": "a", "weights": [1, True]}, "weights/1: True is not of type 'number'"),
    ({"name": "a", "weights": [10 ** 400]}, "weights/0: .*greater than the maximum"),
    ({"name": "a", "weights": [], "more": {"b": 1}}, "more/b: 1 is not"),
    ({"name": "\ud800", "weights": []}, "name: .*does not match"),
    ({"name": "a", "weights": [], "more": {"\ud800": 1}}, r"more/\\ud800: 1 is not"),
    ({"name": "a", "weights": [], "else": 1}, "the whole: Additional properties"),
    ({"name": "a", "weights": [float("inf")]}, "weights/0: inf")])
def test_the_first_fault_is_named_by_its_path(value, said):
    with pytest.raises(ValueError, match=said): check(value, SCHEMA)


@pytest.mark.parametrize("value",
                         ["x" * 10 ** 6, {"x" * 10 ** 6: 1}, {"name": "a", "weights": [], "more": {"k" * 10 ** 6: 1}},
                          {"name": parse(nested(DEPTH)), "weights": []}])
def test_messages_stay_short(value):
    with pytest.raises(ValueError) as caught: check(value, SCHEMA)
    assert len(str(caught.value)) < 5 * SHOWN


def test_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError): read_bytes(tmp_path / "nothing")
    for make, said in ((lambda p: p.mkdir(), "f.json can't be read"),
                       (lambda p: p.write_bytes(b"\xff"), "f.json: 'utf-8' codec"),
                       (lambda p: p.write_text("{}"), "f.json: the whole: 'name'")):
        (folder := tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
        make(folder / "f.json")
        with pytest.raises(ValueError, match=said): read_json(folder / "f.json", SCHEMA)
