"Data files: what is read, and what is refused with the row's number."
import io
import json
import re
import tempfile
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from copd_nb.data import media as media_module
from copd_nb.data.capability import Example
from copd_nb.data.columns import Columns
from copd_nb.data.files import capability_from, prompt_key, read_examples
from copd_nb.data.recipes import RECIPES, from_recipe
from copd_nb.data.faults import opened_form, problems
from copd_nb.policy.toys import tiny_policy

RNG = np.random.default_rng(0)
SCAN = RNG.integers(0, 256, (16, 32, 3), np.uint8)
FILM = RNG.integers(0, 256, (4, 16, 16, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "data"
    (inner / "pictures").mkdir(parents=True)
    Image.fromarray(SCAN).save(inner / "pictures" / "scan.png")
    Image.fromarray(SCAN).save(tmp_path / "outside.png")
    for i, f in enumerate(FILM): Image.fromarray(f).save(inner / f"{i}.png")
    np.save(inner / "film.npy", FILM)
    return inner


def write(folder, *rows):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_jsonl_with_every_column(folder):
    frames = [f"{i}.png" for i in range(4)]
    path = write(folder, dict(prompt="1+1=", answer="2", capability="text"), "",
                 dict(prompt="what?", images="pictures/scan.png", capability="image"),
                 dict(prompt="then?", videos=["film.npy", frames], capability="video"),
                 dict(prompt="plain", answer=None, images=None))
    text, image, video, plain = read_examples(path)
    assert (text.prompt, text.answer, text.capability, text.images, text.videos) == ("1+1=", "2", "text", (), ())
    assert np.array_equal(image.images[0], SCAN) and len(image.images) == 1
    assert len(video.videos) == 2 and all(np.array_equal(v, FILM) for v in video.videos)
    assert (plain.capability, plain.answer) == ("prompts", "")
    assert [e.prompt for e in read_examples(path, limit=2)] == ["1+1=", "what?"]


def test_parquet_equals_jsonl(folder):
    rows = [dict(prompt="a", answer="1", images=["pictures/scan.png"], capability="image"),
            dict(prompt="b", answer=None, images=None, capability=None)]
    pd.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    kept = [{k: v for k, v in r.items() if v is not None} for r in rows]
    files = folder / "prompts.parquet", write(folder, *kept)
    assert [e.id for e in read_examples(files[0])] == [e.id for e in read_examples(files[1])]


def test_pictures_as_bytes_as_datasets_stores_them(folder):
    buffer = io.BytesIO()
    Image.fromarray(SCAN).save(buffer, "PNG")
    pd.DataFrame(dict(prompt=["a"],
                      images=[[dict(bytes=buffer.getvalue(), path=None)]])).to_parquet(folder / "prompts.parquet")
    assert np.array_equal(read_examples(folder / "prompts.parquet")[0].images[0], SCAN)


def test_moving_pictures_are_videos(folder):
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (0, 100, 200)]
    frames[0].save(folder / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    video = read_examples(write(folder, dict(prompt="a", videos=["film.webp"])))[0].videos[0]
    assert video.shape == (3, 16, 16, 3) and video[:, 0, 0, 0].tolist() == [0, 100, 200]


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "pictures/../../outside.png", "link.png"])
def test_pictures_outside_of_the_folder_are_refused(folder, name):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    for column in ("images", "videos"):
        with pytest.raises(ValueError, match="row 2 of prompts.jsonl: .* is outside of the data file's folder"):
            read_examples(write(folder, dict(prompt="fine"), {"prompt": "a", column: [name]}))


def test_a_link_to_the_folder_itself_is_no_way_out(folder, tmp_path):
    (tmp_path / "also").symlink_to(folder)
    assert read_examples(write(folder,
                               dict(prompt="a", images=["pictures/scan.png"])).parent.parent / "also" / "prompts.jsonl")


BAD = [("{", "is not JSON"), ('[1]', "is not an object with a prompt"),
       ({"question": "a"}, "'prompt' is None: text is needed"), ({"prompt": 3}, "'prompt' is 3"),
       ({"prompt": "a", "answer": [3]}, r"'\[3\]': a number or text"),
       ({"prompt": "a", "capability": "a/b"}, "'a/b' is not allowed"),
       ({"prompt": "a", "images": ["none.png"]}, "there is no file 'none.png'"),
       ({"prompt": "a", "images": ["film.npy"]}, "is no picture that can be read"),
       ({"prompt": "a", "images": [7]}, "'7' is no picture"), ({"prompt": "a", "images": 7}, "int"),
       ({"prompt": "a", "images": ["a\0b"]}, "null"),
       ({"prompt": "a", "videos": [["0.png", "pictures/scan.png"]]}, "frames of one size"),
       ({"prompt": "a", "videos": [[]]}, "frames of one size"),
       ({"prompt": "a", "videos": ["flat.npy"]}, r"a video is uint8 \(T, H, W, 3\)"),
       ({"prompt": "a", "videos": ["broken.npy"]}, "is no array"),
       ({"prompt": "a", "images": ["cut.png"]}, "damaged|can be read"), ({"prompt": "fine"}, "repeats row 1")]


@pytest.mark.parametrize("row, message", BAD, ids=[m for _, m in BAD])
def test_a_bad_row_is_named(folder, row, message):
    np.save(folder / "flat.npy", FILM[0])
    (folder / "broken.npy").write_bytes(b"\x93NUMPY broken")
    (folder / "cut.png").write_bytes((folder / "pictures" / "scan.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=f"row 2 of prompts.jsonl.*({message})"):
        read_examples(write(folder, dict(prompt="fine"), row))


def test_nothing_is_unpickled(folder):
    np.save(folder / "objects.npy", np.array([[[[{}]]]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="row 1.*is no array"):
        read_examples(write(folder, dict(prompt="a", videos=["objects.npy"])))


def test_pictures_that_are_too_large_are_refused_before_they_are_decoded(folder, monkeypatch):
    monkeypatch.setattr(media_module, "PIXELS", 16 * 32 - 1)
    monkeypatch.setattr(media_module, "pixels", None)
    for row in (dict(prompt="a", images=["pictures/scan.png"]), dict(prompt="a", videos=["film.npy"]),
                dict(prompt="a", videos=["pictures/scan.png"])):
        with pytest.raises(ValueError, match="row 1.*at most 511 are read"): read_examples(write(folder, row))


def test_files_that_are_none(folder):
    with pytest.raises(FileNotFoundError, match="there is no data file"): read_examples(folder / "none.jsonl")
    with pytest.raises(ValueError, match="holds no prompts"): read_examples(write(folder))
    (folder / "prompts.csv").write_text("prompt\na")
    with pytest.raises(ValueError, match="unknown ending"): read_examples(folder / "prompts.csv")
    (folder / "prompts.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="can't be read as Parquet"): read_examples(folder / "prompts.parquet")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
questions = st.lists(texts.filter(str.strip), min_size=1, max_size=6, unique=True)
DAMAGE = {"cut": lambda row, at: json.dumps(row)[:1 + at % (len(json.dumps(row)) - 1)], "not an object": lambda row,
          at: json.dumps([row]), "number": lambda row, at: json.dumps(row | dict(prompt=at)),
          "blank": lambda row, at: json.dumps(row | dict(prompt=" " * (at % 3))), "no prompt": lambda row,
          at: json.dumps(dict(answer="1")), "answer": lambda row, at: json.dumps(row | dict(answer=[at])),
          "no name": lambda row, at: json.dumps(row | dict(capability="a/b")), "no file": lambda row,
          at: json.dumps(row | dict(images=[f"none{at}.png"]))}


@settings(max_examples=25)
@given(questions, st.data())
def test_any_text_comes_back_from_every_kind_of_file(prompts, data):
    rows = [dict(prompt=p, answer=data.draw(st.none() | texts), extra=data.draw(st.none() | texts)) for p in prompts]
    with tempfile.TemporaryDirectory() as place:
        for name in ("a.jsonl", "a.json", "a.parquet"):
            found = read_examples(save(Path(place) / name, rows))
            assert [(e.prompt, e.answer) for e in found] == [(r["prompt"], r["answer"] or "") for r in rows], name


@settings(max_examples=32)
@given(questions.filter(lambda q: len(q) > 1), st.sampled_from(sorted(DAMAGE)), st.data())
def test_damage_in_any_row_is_named_with_its_number(prompts, kind, data):
    rows = [json.dumps(dict(prompt=p, answer="1")) for p in prompts]
    at = data.draw(st.integers(0, len(rows) - 1))
    rows[at] = DAMAGE[kind](json.loads(rows[at]), data.draw(st.integers(0, 100)))
    gaps = data.draw(st.lists(st.sampled_from(["", " ", "\t"]), max_size=2))  # blank lines count as lines of the file
    with tempfile.TemporaryDirectory() as place:
        path = write(Path(place), *gaps, *rows)
        with pytest.raises(ValueError, match=f"^row {at + 1 + len(gaps)} of prompts.jsonl: "): read_examples(path)
        assert at + 1 + len(gaps) in set(problems(path).row)


@pytest.mark.parametrize("line", [b"[" * 5000, b'{"prompt": "\\ud800"}', b'{"\\udfff": 1, "prompt": "a"}',
                                  b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": ' + b"9" * 5000 + b"}", b"\xff"])
def test_a_line_that_is_no_json_in_utf8_is_listed(tmp_path, line):
    (path := tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    assert problems(path)[["file", "row"]].values.tolist() == [["rows.jsonl", 2]]
    with pytest.raises(ValueError, match="row 2 of rows.jsonl: is not JSON"): read_examples(path)
    (path := tmp_path / "rows.json").write_bytes(b"[" + line + b"]")
    with pytest.raises(ValueError, match="rows.json is not JSON"): problems(path)


@pytest.mark.parametrize("row, column",
                         [(dict(options="-" * 5000 + "1"), "options"), (dict(options="[" * 3000), "options"),
                          (dict(id=["a"]), "id"), (dict(id={"a": 1}), "id"), (dict(answer="[" * 5000), "answer")])
def test_a_value_that_is_nested_without_end_is_listed(tmp_path, row, column):
    path = write(tmp_path, dict(prompt="a", answer="x") | row)
    columns = Columns(options="options") if column == "options" else Columns()
    found = problems(path, columns, "instructions" if column == "answer" else None)
    assert found.row.unique().tolist() == [1] and set(found.column) == ({"prompt", "answer"} if column == "options"
                                                                        else {column})


def test_a_byte_order_mark_is_no_damage(tmp_path):
    for name, text in (("rows.jsonl", '{"prompt": "é"}'), ("rows.json", '[{"prompt": "é"}]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_examples(tmp_path / name)[0].prompt == "é"


def test_a_file_that_leaves_a_split_empty_is_named(tmp_path):
    for n, kind in ((1, "held-out"), (60, "training")):
        with pytest.raises(ValueError, match=f"few.jsonl leaves capability 'sums' no {kind} prompts"):
            path = save(tmp_path / "few.jsonl", [dict(prompt=p["prompt"], answer="1") for p in sums(n)])
            capability_from(path, "sums", "exact", **dict(test=save(tmp_path / "same.jsonl", sums(n)), repeats="drop")
                            if kind == "training" else {})


# Columns, folders, splits

def sums(n=60, start=0): return [dict(prompt=f"{a} + {a + 1} =", answer=str(2 * a + 1))
                                 for a in range(start, start + n)]


def save(path, rows):
    "Rows as JSONL, as one JSON list, as Parquet or as a folder of `datasets`, by the ending."
    if path.suffix == ".parquet": pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json": path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl": path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else: datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a"])
def test_every_kind_of_file_gives_the_same_capability(tmp_path, name):
    made = capability_from(save(tmp_path / name, sums()), "sums", "exact")
    other = capability_from(save(tmp_path / "b.jsonl", sums()), "sums", "exact")
    assert made.fingerprint == other.fingerprint and len(made.train) + len(made.test) == 60
    assert {e.capability
            for e in made.train} == {"sums"} and made.reward([made.test[0].answer, "0"], [made.test[0]] * 2) == [1, 0]


def test_folders_with_splits_and_pictures(folder, tmp_path):
    rows = dict(prompt=["what?", "which?"], answer=["a", "b"],
                images=[[Image.fromarray(SCAN)], [Image.fromarray(SCAN[::-1])]])
    features = datasets.Features(prompt=datasets.Value("string"), answer=datasets.Value("string"),
                                 images=datasets.Sequence(datasets.Image()))
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "set")
    first, second = read_examples(tmp_path / "set", split="train")
    assert np.array_equal(first.images[0], SCAN) and np.array_equal(second.images[0], SCAN[::-1])
    with pytest.raises(ValueError, match="set has no split None: train, test"): read_examples(tmp_path / "set")
    with pytest.raises(ValueError, match="1 prompts of set are held out in set: rows 2 and 1"):
        capability_from(tmp_path / "set", "c", "exact", split="train", test_split="test")
    made = capability_from(tmp_path / "set", "c", "exact", split="train", test_split="test", repeats="drop")
    assert [e.prompt for e in made.train] == ["what?"] and [e.prompt for e in made.test] == ["which?"]
    with pytest.raises(ValueError, match="was not written by `save_to_disk`"): read_examples(folder)


def test_columns_have_other_names_and_depths(folder):
    chat = [dict(role="system", content="Be brief."), dict(role="user", content="2 + 2 =")]
    path = write(folder, dict(q=chat, reward_model=dict(ground_truth="4"), image_1="pictures/scan.png", image_2=None,
                              image_3="0.png"))
    columns = Columns("q", "reward_model.ground_truth", images=("image_1", "image_2", "image_3"),
                      template="{prompt}\nNumber only.")
    example, = read_examples(path, columns=columns)
    assert (example.prompt, example.answer, len(example.images)) == ("2 + 2 =\nNumber only.", "4", 2)
    for bad, message in ((dict(template="none"), "has no {prompt}"),
                         (dict(extract="last"), "no way 'last' to read an answer: text, ")):
        with pytest.raises(ValueError, match=message): Columns(**bad)


def test_folder_suffix_and_rows_of_one_kind(folder):
    (folder / "films").mkdir()
    np.save(folder / "films" / "7.npy", FILM)
    path = write(folder, dict(prompt="a", kind="x", clip="7"), dict(prompt="b", kind="y", clip="8"))
    example, = read_examples(path, columns=Columns(videos="clip", folder="films", suffix=".npy",
                                                   where=(("kind", "x"),)))
    assert np.array_equal(example.videos[0], FILM)
    with pytest.raises(ValueError, match="outside"):
        read_examples(write(folder, dict(prompt="a", clip="../0.png")), columns=Columns(images="clip", folder="films"))


@pytest.mark.parametrize("options, answer, prompt, letter", [
    (["red", "blue"], "B", "q\nA. red\nB. blue", "B"), (["A. red", "B) blue"], 1, "q\nA. red\nB. blue", "B"),
    ("['red', 'blue']", "blue", "q\nA. red\nB. blue", "B"),
    ({"A": "red", "B": "blue"}, "(A)", "q\nA. red\nB. blue", "A"), ([2, 3], "3", "q\nA. 2\nB. 3", "B"),
    (None, "C", "q", "C")])
def test_options_are_shown_and_answers_become_letters(folder, options, answer, prompt, letter):
    example, = read_examples(write(folder, dict(prompt="q", answer=answer, options=options)),
                             columns=Columns(options="options", extract="letter"))
    assert (example.prompt, example.answer) == (prompt, letter)


@pytest.mark.parametrize("extract, value, answer", [("number", 4, "4"), ("number", 4.0, "4"), ("number", 4.5, "4.5"),
                                                    ("number", "4", "4"), ("hashes", "so\n#### 1,200", "1200"),
                                                    ("number", 2 ** 53 + 1, "9007199254740993"),
                                                    ("number", 0.1, "0.1"), ("number", 1e-7, "0.0000001"),
                                                    ("number", 1e23, "1" + "0" * 23), ("number", -2.0, "-2"),
                                                    ("number", "1,234", "1,234"),
                                                    ("number", r"\frac{1}{2}", r"\frac{1}{2}"),
                                                    ("hashes", "#### −1 234".replace(" ", "\u202f"), "-1234"),
                                                    ("hashes", "#### 1,234.50", "1234.50"),
                                                    ("hashes", "#### 8.124,12.852", "8.124,12.852"),
                                                    ("hashes", "#### yes, sir", "yes, sir"),
                                                    ("hashes", "#### 1 #### 3/4 ", "3/4"),
                                                    ("hashes", "#### $18", "$18"),
                                                    ("boxed", r"\boxed {2}, in \boxed{}", "2"),
                                                    ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
                                                    ("tag", "<answer> B </answer>", "B")])
def test_ways_to_read_an_answer(folder, extract, value, answer):
    assert read_examples(write(folder, dict(prompt="q", answer=value)),
                         columns=Columns(extract=extract))[0].answer == answer


@pytest.mark.parametrize("written, answer", [
    ("9007199254740993", "9007199254740993"), ("9007199254740993.0", "9007199254740993.0"),
    ("0.12345678901234567890123", "0.12345678901234567890123"), ("12.50", "12.5"), ("1e400", "1" + "0" * 400),
    ("1e-400", f"0.{'0' * 399}1"), ("1E2", "100"),
])
def test_numbers_of_json_are_what_is_written(folder, written, answer):
    assert read_examples(write(folder, f'{{"prompt": "q", "answer": {written}}}'),
        columns=Columns(extract="number"))[0].answer == answer


@pytest.mark.parametrize("written", ["1e999999999", "-1e-999999999", "1e9999999999999999999999", "Infinity", "1e1001"])
def test_numbers_without_end_are_named_with_their_row(folder, written):
    path = write(folder, '{"prompt": "p", "answer": 1}', f'{{"prompt": "q", "answer": {written}}}')
    with pytest.raises(ValueError, match="row 2 of .*(at most 1000 digits|out of range)"):
        read_examples(path, columns=Columns(extract="number"))


def test_numbers_of_parquet_are_what_is_written(folder):
    columns = dict(whole=pa.array([2 ** 53 + 1, None, 7], pa.int64()),
        unsigned=pa.array([2 ** 64 - 1, None, 0], pa.uint64()),
        price=pa.array([Decimal("12.50"), None, Decimal("-0.10")], pa.decimal128(10, 2)),
                   wide=pa.array([Decimal(10) ** 60, None, Decimal(1)], pa.decimal256(70, 0)),
                   double=[0.1, None, 1e22], narrow=pa.array([0.1, None, 123456792.0], pa.float32()),
                   half=pa.array(np.array([0.1, 2, 65504], np.float16)))
    wanted = dict(whole=["9007199254740993", "", "7"], unsigned=["18446744073709551615", "", "0"],
        price=["12.50", "", "-0.10"], wide=["1" + "0" * 60, "", "1"], double=["0.1", "", "1" + "0" * 22],
                  narrow=["0.1", "", "123456792"], half=["0.1", "2", "65504"])
    pq.write_table(table := pa.table(dict(prompt=["a", "b", "c"], **columns)), folder / "n.parquet")
    datasets.Dataset(table).save_to_disk(folder / "saved")
    for path in (folder / "n.parquet", folder / "saved"):
        assert {name: [e.answer for e in read_examples(path,
            columns=Columns(answer=name, extract="number"))] for name in columns} == wanted


@pytest.mark.parametrize("reward, bad, message",
    [("numeric", "1.234,56", "two ways"), ("numeric", "8.124,12.852", "two ways"),
    ("numeric", "50%", "`strip` names units"), ("math_verify", "???", "math-verify can read"),
    ("choice", "b", "none of the letters")])
def test_answers_that_a_reward_can_not_read_are_listed_with_their_rows(folder, reward, bad, message):
    good = "B" if reward == "choice" else "7"
    path = write(folder, *(dict(prompt=f"q{i}", answer=bad if i in (3, 5) else good) for i in range(1, 21)))
    found = problems(path, reward=reward)
    assert list(found.row) == [3, 5] and all(message in text and repr(bad) in text for text in found.problem)
    with pytest.raises(ValueError, match=r"row [35] of prompts.jsonl: the reference answer"):
        capability_from(path, "c", reward)


@pytest.mark.parametrize("columns, row, message", [
    (dict(extract="number"), dict(answer=True), "'True': a number or text"),
    (dict(extract="number"), dict(answer=[4]), r"'\[4\]': a number or text"),
    (dict(extract="hashes"), dict(answer="so 4"), "holds no answer"),
    (dict(extract="boxed"), dict(answer=4), "holds no answer"),
    (dict(extract="tag"), dict(answer="<answer>"), "holds no answer"),
    (dict(extract="letter", options="o"), dict(answer="green", o=["red", "blue"]), "none of the 2 options"),
    (dict(extract="letter", options="o"), dict(answer=2, o=["red", "blue"]), "none of the 2 options"),
    (dict(options="o"), dict(answer="A", o="red or blue"), "are no list"),
    (dict(), dict(answer=None, prompt="  "), "is blank"), (dict(), dict(prompt=[dict(role="system", content="x")]),
                                                           "there is no message of the user: system"),
    (dict(), dict(prompt="x" * 1_000_001), "1,000,001 characters: at most 1,000,000"),
    (dict(), dict(images=["a.png"] , prompt="p"), "no file 'a.png'")])
def test_rows_that_do_not_fit_the_columns(folder, columns, row, message):
    with pytest.raises(ValueError, match=f"row 1 of prompts.jsonl: .*{message}"):
        read_examples(write(folder, dict(prompt="q") | row), columns=Columns(**columns))


def test_duplicate_ids_are_refused_or_dropped(folder):
    path = write(folder, dict(prompt="a", id=1), dict(prompt="b", id=2), dict(prompt="c", id=1))
    with pytest.raises(ValueError, match="row 3 of prompts.jsonl repeats row 1: prompts and ids"): read_examples(path)
    rows = [*sums(), *sums(10)]
    with pytest.raises(ValueError, match="row 61 of a.jsonl repeats row 1"):
        capability_from(save(folder / "a.jsonl", rows), "sums", "exact")
    made = capability_from(folder / "a.jsonl", "sums", "exact", repeats="drop")
    assert len(made.train) + len(made.test) == 60
    with pytest.raises(ValueError, match="repeats='keep': refuse or drop"):
        capability_from(path, "sums", "exact", repeats="keep")


def test_copies_that_differ_in_form_are_held_out_together(folder):
    forms = ("{} plus {}", "{}  Plus {}", "{} plus {}.", " {} plus {} ?")
    rows = [dict(prompt=f.format(a, a), answer=str(2 * a)) for a in range(40) for f in forms]
    made = capability_from(save(folder / "a.jsonl", rows), "sums", "exact")
    assert len({prompt_key(e) for e in [*made.train, *made.test]}) == 40 and not {prompt_key(e)
        for e in made.train} & {prompt_key(e) for e in made.test}
    save(folder / "b.jsonl", [dict(prompt="7 PLUS 7", answer="14"), dict(prompt="99 plus 99", answer="198")])
    with pytest.raises(ValueError, match="4 prompts of a.jsonl are held out in b.jsonl: rows 29 and 1, 30 and 1, 31 "
                                         "and 1, 32 and 1$"):
        capability_from(folder / "a.jsonl", "sums", "exact", test=folder / "b.jsonl")
    assert len(capability_from(folder / "a.jsonl", "sums", "exact", test=folder / "b.jsonl",
                               repeats="drop").train) == 156


@pytest.mark.parametrize("a, b", [("3 - 2", "3 + 2"), ("1.5", "15"), ("f'(x)", "f(x)"), ("12 3", "1 23"), ("5!", "5"),
                                  ("a/b", "a*b")])
def test_what_differs_in_meaning_has_another_key(a, b):
    assert prompt_key(Example(a, "", "c")) != prompt_key(Example(b, "", "c"))


def test_the_same_words_about_another_picture_are_another_prompt():
    a, b = (Example("what is this?", "", "c", images=(x,)) for x in (SCAN, SCAN[::-1].copy()))
    assert prompt_key(a) != prompt_key(b)
    assert prompt_key(a) == prompt_key(Example("What is this", "x", "d", images=(SCAN.copy(),)))


def test_rewards_and_answers_are_checked_before_training(folder):
    path = save(folder / "a.jsonl", [*sums(), dict(prompt="last", answer="many")])
    with pytest.raises(ValueError, match="there is no reward 'nummeric'.*numeric"):
        capability_from(path, "sums", "nummeric")
    with pytest.raises(ValueError, match="row 61 of a.jsonl: .*'many'"): capability_from(path, "sums", "numeric")
    def fussy(completions, examples): return [float(e.answer) for e in examples]
    with pytest.raises(ValueError, match="row 61 of a.jsonl: the reward raises ValueError on this row"):
        capability_from(path, "sums", fussy)
    with pytest.raises(ValueError, match="row 1 of a.jsonl: the reward returns"):
        capability_from(path, "sums", lambda c, e: [float("nan")])
    made = capability_from(path, "sums", lambda completions, examples: [1.0] * len(completions), limit=30, held_out=2)
    assert len(made.test) == 2 and len(made.train) + len(made.test) <= 30


def test_a_film_is_read_by_name_and_from_bytes(folder):
    av = pytest.importorskip("av")
    with av.open(str(folder / "film.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for v in range(12):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * v, np.uint8),
                                                                   format="rgb24")):
                out.mux(packet)
        for packet in stream.encode(): out.mux(packet)
    data = (folder / "film.mp4").read_bytes()
    named = read_examples(write(folder, dict(prompt="a", videos="film.mp4")))[0].videos[0]
    pd.DataFrame(dict(prompt=["a"], videos=[dict(bytes=data, path="film.mp4")])).to_parquet(folder / "a.parquet")
    assert named.shape[1:] == (32, 32, 3) and len(named) >= 4
    assert np.array_equal(read_examples(folder / "a.parquet")[0].videos[0], named)
    (folder / "cut.mp4").write_bytes(data[:len(data) // 3])
    with pytest.raises(ValueError, match="row 2 of prompts.jsonl: .*cut.mp4"):
        read_examples(write(folder, dict(prompt="fine"), dict(prompt="a", videos="cut.mp4")))


# All problems at once

def test_every_problem_is_reported_with_its_row(folder):
    rows = ["{", dict(prompt="fine", answer="1", id=1), dict(prompt=7, answer=[1], images=["none.png"],
                                                             videos=["none.npy"]),
                                                             dict(prompt="Fine.", answer="2", id=1),
            dict(prompt="fine", answer="many", id=3), dict(answer="3"), dict(prompt="x" * 50, answer="4"), [1]]
    found = problems(write(folder, *rows), reward="numeric", longest=40)
    said = [(r.row, r.column, r.problem) for r in found.itertuples()]
    for row, column, text in [(1, "", "is not JSON"), (3, "prompt", "'prompt' is 7"), (3, "answer", r"\[1\]"),
                              (3, "images", "no file 'none.png'"), (3, "videos", "no file 'none.npy'"),
                              (4, "prompt", "repeats row 2 with another answer"),
                              (4, "id", "'1' is the id of row 2, too"),
                              (5, "prompt", "repeats row 2 with another answer"),
                              (5, "answer", "'many'"), (6, "prompt", "None"), (7, "prompt", "50 characters"),
                              (8, "", "not an object")]:
        assert [s for s in said if s[:2] == (row, column) and re.search(text, s[2])], (row, column, text, said)
    assert len(said) == 12 and set(found.file) == {"prompts.jsonl"}


def test_a_column_that_no_row_has_is_one_line(folder):
    path = save(folder / "a.jsonl", [dict(question="a", answer="1"), dict(question="b", answer="2")])
    found = problems(path, Columns(images="picture"), "exact")
    assert found[["row", "column"]].values.tolist() == [[0, "prompt"], [0, "picture"]]
    assert "the file has question, answer" in found.problem[0]
    assert problems(path, Columns("question"), "exact").empty
    assert problems(write(folder)).problem.tolist() == ["holds no prompts"]
    with pytest.raises(ValueError, match="there is no reward"): problems(path, Columns("question"), "exakt")


def test_overlap_with_held_out_prompts_is_a_problem(folder):
    train, test = save(folder / "a.jsonl", sums(5)), save(folder / "b.jsonl",
                                                          [dict(prompt="2  + 3 =", answer="5"),
                                                           dict(prompt="new", answer=True)])
    found = problems(train, test=test)
    assert found.values.tolist() == [["b.jsonl", 2, "answer", "'True': a number or text is needed", 1],
                                     ["a.jsonl", 3, "prompt", "is held out in row 1 of b.jsonl", 1]]


def test_what_a_model_can_not_do(folder):
    from importlib.resources import files

    from copd_nb.policy.processors import load_processor
    model = files("copd_nb") / "assets" / "minis-base"
    path = write(folder, dict(prompt="2+3="), dict(prompt="9" * 600), dict(prompt="sum?", images=["pictures/scan.png"]))
    found = problems(path, model=model, room=8)
    assert found.row.tolist() == [2] and "and 8 for the completion: the context is 512" in found.problem[0]
    load_processor(model, "qwen3_vl").tokenizer.save_pretrained(folder / "text")
    settings = json.loads((folder / "text" / "tokenizer_config.json").read_text())
    (folder / "text" / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items()
                                                                       if k not in ("chat_template", "pad_token")}))
    (folder / "text" / "chat_template.jinja").unlink(missing_ok=True)
    transformers.LlamaConfig(max_position_embeddings=512).save_pretrained(folder / "text")
    found = problems(path, model=folder / "text")
    assert [r for r in found.row] == [0, 0, 2, 3]
    assert "no chat template" in found.problem[0] and "no padding token" in found.problem[1]
    assert "reads text only" in found.problem[3]
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in .*: config.json is missing"):
        problems(path, model=folder)


# Recipes

def row_of(recipe, i, folder):
    "A made-up row in a recipe's layout."
    c, row = recipe.columns, {}
    answer = {"hashes": f"{i} it is\n#### {i}", "boxed": rf"\boxed{{{i}}}", "tag": "<answer>B</answer>", "letter": "B",
              "number": i, "text": str(i)}[c.extract]
    options = ["red", "blue"] if c.options else None
    values = {c.prompt: f"Question {i}?", c.answer: answer, c.id: f"q{i}"} | ({c.options: str(options)
        if recipe.source.startswith("MMMU") else options} if options else {}) | dict(c.where)
    if recipe.branch == "image": values[c.images if isinstance(c.images, str) else c.images[0]] = f"{i % 2}.png"
    if recipe.branch == "video":
        values[c.videos if isinstance(c.videos, str) else c.videos[0]] = "7" if c.suffix else "7.webp"
    for column, value in values.items():
        place, *parts = row, *column.split(".")
        for part in parts[:-1]: place = place.setdefault(part, {})
        place[parts[-1]] = value
    return row


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_read_their_layout(folder, name):
    recipe = RECIPES[name]
    (folder / recipe.columns.folder).mkdir(exist_ok=True)
    film = folder / recipe.columns.folder / "7.webp"
    Image.fromarray(FILM[0]).save(film, save_all=True, append_images=[Image.fromarray(FILM[1])], lossless=True)
    # films need a decoder, moving pictures do not
    columns = replace(recipe.columns, suffix=".webp") if recipe.columns.suffix else recipe.columns
    path = save(folder / "set.jsonl", [row_of(recipe, i, folder) for i in range(40)])
    assert problems(path, columns, recipe.reward).empty
    made = capability_from(path, name, recipe.reward, columns)
    example = made.test[0]
    assert len(made.train) + len(made.test) == 40
    assert (len(example.images), len(example.videos)) == (recipe.branch == "image", recipe.branch == "video")
    assert ("A. red\nB. blue" in example.prompt) == bool(recipe.columns.options)
    right = {"math_verify": rf"\boxed{{{example.answer}}}"}.get(recipe.reward, f"<answer>{example.answer}</answer>")
    if name == "math-500" or recipe.reward != "math_verify":
        assert made.reward([f"So: {right}", "no idea"], [example] * 2) == [1, 0]


def test_recipes_train_and_evaluate_on_two_sets(folder):
    train = save(folder / "a.jsonl", [row_of(RECIPES["gsm8k"], i, folder) for i in range(9)] * 2)
    test = save(folder / "b.jsonl", [row_of(RECIPES["math-500"], i, folder) for i in range(7, 12)])
    made = from_recipe("gsm8k", train, test=("math-500", test))
    assert (made.name, len(made.train), len(made.test)) == ("gsm8k", 7, 5)
    with pytest.raises(ValueError, match="held out in b.jsonl: rows 8 and 1, 9 and 2"):
        from_recipe("gsm8k", save(folder / "a.jsonl", [row_of(RECIPES["gsm8k"], i, folder) for i in range(9)]),
                    ("math-500", test), repeats="refuse")
    with pytest.raises(ValueError, match="one capability has one reward"):
        from_recipe("gsm8k", train, test=("mmmu", test))
    with pytest.raises(ValueError, match="there is no recipe 'gsm': aime-2024, "): from_recipe("gsm", train)


def test_the_papers_evaluation_sets_have_recipes():
    sets = {"mmmu", "mmmu-pro", "mathvista-choice", "mathvista-free", "mathvision", "zerobench-sub", "wemath",
            "mathverse", "aime-2024", "aime-2025", "hmmt-2025", "math-500",
            "minerva-math", "video-holmes", "mvbench", "mmvu-mc", "videomathqa"}
    assert {n for n, r in RECIPES.items() if r.use == "evaluation"} == sets and {r.branch for r in RECIPES.values()
        if r.use == "training"} == {"text", "image", "video"}


TAGS, THINKS, BOXES = "exact?form=tag:answer", "format?pattern=<think>.*</think>.*", {"name": "sum",
    "parts": [[1, "math_verify?form=boxed"], [0.1, "length?budget=9"]]}

@pytest.mark.parametrize("reward, text, told", [
    (TAGS, "2+2?\n<answer>", "<answer>"), (TAGS, "2+2? <answer> \n", "<answer>"),
    (TAGS, "Answer between <answer> and </answer>.", None), (TAGS, "2+2?<think>", None),
    (THINKS, "assistant\n<think>\n", "<think>"), (THINKS, "<answer>", None), (BOXES, r"It is $\boxed{", r"\boxed{"),
    (BOXES, r"Put it in \boxed{}.", None),
    ("numeric", "<answer>", None), (lambda c, e: [0.0] * len(c), "<answer>", None)])
def test_a_form_that_the_prompt_opens_is_pointed_out(reward, text, told):
    found = opened_form(reward, text)
    assert found is None if told is None else f"ends with {told}," in found


def test_prefills_and_templates_that_open_a_form_are_listed(folder, tmp_path):
    ask = dict(role="user", content="2+2?")
    path = write(folder, dict(prompt=[ask, dict(role="assistant", content="So <answer>")], answer="4"),
                 dict(prompt="3+3?", answer="6"))
    assert list(problems(path, reward=TAGS).row) == [1] and not len(problems(path, reward="numeric"))
    policy = tiny_policy()
    plain, thinking = "assistant{{ '\\n' }}{% endif %}", "assistant{{ '\\n<think>\\n' }}{% endif %}"
    template = policy.tokenizer.chat_template.replace(plain, thinking)
    policy.tokenizer.chat_template = policy.processor.chat_template = template
    policy.save(tmp_path / "model")
    found = problems(path, reward=THINKS, model=tmp_path / "model")
    assert [r for r, text in zip(found.row, found.problem) if "<think>" in text] == [2]
    assert not [t for t in problems(path, reward=TAGS, model=tmp_path / "model").problem if "<think>" in t]
