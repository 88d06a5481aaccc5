"YAML written by people: values, lines, refusals, comments that survive."
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from copd_nb.data.schema import listed, record
from copd_nb.data.yaml_files import changed_yaml, faults, parse_yaml, read_yaml, refuse

ROOT = Path(__file__).parents[2]
NUMBER, TEXT = dict(type="number"), dict(type="string")
SCHEMA = Draft202012Validator(record(dict(model=TEXT), dict(
    steps=dict(type="integer", minimum=2), seeds=listed(dict(type="integer")),
    config=record({}, dict(rate=NUMBER, kind=dict(enum=["a", "b"]))),
    either=dict(anyOf=[TEXT, record(dict(path=TEXT), dict(rank=dict(type="integer")))]))))


@pytest.mark.parametrize("text, value", [
    ("1e-5", 1e-5), ("1.0e-5", 1e-5), ("2E5", 2e5), ("yes", "yes"), ("true", True), ("010", 10), ("0o10", 8),
    ("null", None), ("~", None), ("'1'", "1"), ("1_000", 1000), ("-3", -3), ("a: b", {"a": "b"})])
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text).value
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, words", [
    ("a: &x [1]\nb: *x", "line 1: an anchor or alias"), ("a: !!python/name:os.system", "line 1: a tag"),
    ("a: 1\na: 2", 'line 2: found duplicate key "a"'), ("a:\n - [1, 2\nb: 3", "line 3"), ("a: 1\n  b: 2", "line 2"),
    ("1: a", "line 1: key '1' must be a text"), ("x: {1.5: a}", "key '1.5'"), ("[" * 6000, "too many brackets"),
    ("a: " + "[" * 300 + "]" * 300, "nested more than"), ("a: 'b", "line 1"), ("\x00", "the file"),
    ("? [a]\n: 1", "key")])
def test_what_is_not_plain_is_refused_with_its_line(text, words):
    with pytest.raises(ValueError, match=words): parse_yaml(text)


@given(st.text(max_size=200))
def test_any_text_gives_a_value_or_a_value_error(text):
    try: parse_yaml(text)
    except ValueError: pass


@pytest.mark.parametrize("text, line, words", [
    ("model: m\nstepz: 3", 2, "unknown key 'stepz': did you mean 'steps'"), ("steps: 3", 1, "'model' is missing"),
    ("model: 3", 1, "model: 3 is not allowed: text is needed"), ("model: m\nsteps: 1.5", 2, "a whole number is needed"),
    ("model: m\nseeds: [0,\n  x]", 3, "seeds.1: 'x' is not allowed"), ("model: m\nseeds: 3", 2, "a list is needed"),
    ("model: m\nconfig:\n  kind: c", 3, "config.kind: 'c' is not allowed: a, b"),
    ("model: m\nconfig:\n  rate: high", 3, "a number is needed"),
    ("model: m\nsteps: 1", 2, "less than the minimum of 2"),
    ("model: m\neither: {rank: 3}", 2, "'path' is missing"), ("model: m\neither: 3", 2, "text or keys with values")])
def test_faults_have_lines_and_say_what_is_needed(text, line, words):
    (found, sentence), = faults(parse_yaml(text), SCHEMA)
    assert found == line and words in sentence


def test_all_faults_at_once_in_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("\ufeffmodel: m\nseeds: x\nsteps: y\n")
    with pytest.raises(ValueError, match="mine.yaml has 2 faults\n  line 2: seeds.*\n  line 3: steps"):
        read_yaml(file, SCHEMA)
    file.write_bytes(b"model: \xff")
    with pytest.raises(ValueError, match="not UTF-8"): read_yaml(file, SCHEMA)
    file.write_text("model: m\n" + "#" * 1_000_000)
    with pytest.raises(ValueError, match="bytes: at most"): read_yaml(file, SCHEMA)
    with pytest.raises(FileNotFoundError): read_yaml(tmp_path / "none.yaml", SCHEMA)
    refuse("nothing", [])


def test_changes_keep_comments_order_and_quotes():
    text = "# mine\nb: 'x'  # first\na:\n  - one  # kept\n  - two: {c: 1}\n\nz: 3\n"
    after = changed_yaml(text, {("a", 1): {"two": {"c": 2}}, ("new", "deep"): 1})
    assert parse_yaml(after).value == dict(b="x", a=["one", {"two": {"c": 2}}], z=3, new={"deep": 1})
    for kept in ("# mine", "b: 'x'  # first", "- one  # kept"): assert kept in after
    assert after.index("b:") < after.index("a:") < after.index("z:")
    assert changed_yaml(text, {}).split() == text.split()


EXPERIMENTS = sorted([*ROOT.glob("examples/*.yaml"), *ROOT.glob("copd_nb/assets/experiments/*.yaml")])


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_only_what_changes_is_written_otherwise(file):
    "Long lines and short objects in lists stay as they are."
    text = file.read_text(encoding="utf-8")
    assert changed_yaml(text, {}) == text
    before, after = text.splitlines(), changed_yaml(text, {("title",): "another"}).splitlines()
    assert [b for a, b in zip(before, after, strict=True) if a != b] == ["title: another"]
