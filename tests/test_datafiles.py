"Data files: what is read, and what is refused with the row's number."
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from copd_nb import datafiles
from copd_nb.datafiles import read_examples

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
    path = write(folder, dict(prompt="1+1=", answer="2", capability="text"), "", dict(prompt="what?", images="pictures/scan.png", capability="image"),
                 dict(prompt="then?", videos=["film.npy", frames], capability="video"), dict(prompt="plain", answer=None, images=None))
    text, image, video, plain = read_examples(path)
    assert (text.prompt, text.answer, text.capability, text.images, text.videos) == ("1+1=", "2", "text", (), ())
    assert np.array_equal(image.images[0], SCAN) and len(image.images) == 1
    assert len(video.videos) == 2 and all(np.array_equal(v, FILM) for v in video.videos)
    assert (plain.capability, plain.answer) == ("prompts", "")
    assert [e.prompt for e in read_examples(path, limit=2)] == ["1+1=", "what?"]


def test_parquet_equals_jsonl(folder):
    rows = [dict(prompt="a", answer="1", images=["pictures/scan.png"], capability="image"), dict(prompt="b", answer=None, images=None, capability=None)]
    pd.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    kept = [{k: v for k, v in r.items() if v is not None} for r in rows]
    assert [e.id for e in read_examples(folder / "prompts.parquet")] == [e.id for e in read_examples(write(folder, *kept))]


def test_pictures_as_bytes_as_datasets_stores_them(folder):
    buffer = io.BytesIO()
    Image.fromarray(SCAN).save(buffer, "PNG")
    pd.DataFrame(dict(prompt=["a"], images=[[dict(bytes=buffer.getvalue(), path=None)]])).to_parquet(folder / "prompts.parquet")
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
    assert read_examples(write(folder, dict(prompt="a", images=["pictures/scan.png"])).parent.parent / "also" / "prompts.jsonl")


BAD = [("{", "is no JSON"), ('[1]', "no object with a prompt"), ({"question": "a"}, "'prompt' is None: text is needed"), ({"prompt": 3}, "'prompt' is 3"),
       ({"prompt": "a", "answer": 3}, "'answer' is 3"), ({"prompt": "a", "capability": "a/b"}, "'a/b' is not allowed"),
       ({"prompt": "a", "images": ["none.png"]}, "there is no file 'none.png'"), ({"prompt": "a", "images": ["film.npy"]}, "is no picture that can be read"),
       ({"prompt": "a", "images": [7]}, "'7' is no picture"), ({"prompt": "a", "images": 7}, "int"), ({"prompt": "a", "images": ["a\0b"]}, "null"),
       ({"prompt": "a", "videos": [["0.png", "pictures/scan.png"]]}, "frames of one size"), ({"prompt": "a", "videos": [[]]}, "frames of one size"),
       ({"prompt": "a", "videos": ["flat.npy"]}, r"a video is uint8 \(T, H, W, 3\)"), ({"prompt": "a", "videos": ["broken.npy"]}, "is no array"),
       ({"prompt": "a", "images": ["cut.png"]}, "damaged|can be read"), ({"prompt": "fine"}, "repeats row 1")]


@pytest.mark.parametrize("row, message", BAD, ids=[m for _, m in BAD])
def test_a_bad_row_is_named(folder, row, message):
    np.save(folder / "flat.npy", FILM[0])
    (folder / "broken.npy").write_bytes(b"\x93NUMPY broken")
    (folder / "cut.png").write_bytes((folder / "pictures" / "scan.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=f"row 2 of prompts.jsonl.*({message})"): read_examples(write(folder, dict(prompt="fine"), row))


def test_nothing_is_unpickled(folder):
    np.save(folder / "objects.npy", np.array([[[[{}]]]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="row 1.*is no array"): read_examples(write(folder, dict(prompt="a", videos=["objects.npy"])))


def test_pictures_that_are_too_large_are_refused_before_they_are_decoded(folder, monkeypatch):
    monkeypatch.setattr(datafiles, "PIXELS", 16 * 32 - 1)
    monkeypatch.setattr(datafiles, "_pixels", None)
    for row in (dict(prompt="a", images=["pictures/scan.png"]), dict(prompt="a", videos=["film.npy"]), dict(prompt="a", videos=["pictures/scan.png"])):
        with pytest.raises(ValueError, match="row 1.*at most 511 are read"): read_examples(write(folder, row))


def test_files_that_are_none(folder):
    with pytest.raises(FileNotFoundError, match="there is no data file"): read_examples(folder / "none.jsonl")
    with pytest.raises(ValueError, match="holds no prompts"): read_examples(write(folder))
    (folder / "prompts.csv").write_text("prompt\na")
    with pytest.raises(ValueError, match="unknown ending"): read_examples(folder / "prompts.csv")
    (folder / "prompts.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="can't be read as Parquet"): read_examples(folder / "prompts.parquet")
