"Token ids and pixels against slow references, and save/load parity."
import json
import re
import sys
from importlib.util import find_spec

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processor_folders import real_folder

from copd_nb.data.media import decode_video, sample_indices
from copd_nb.policy.processors import (
    CHARACTERS, CHAT_TEMPLATE, SPECIAL, UNKNOWN, WORDS, TorchImageProcessor, TorchVideoProcessor,
    character_tokenizer, load_processor, patchify, resize_pixels, small_processor)

TOKENIZER, PROCESSOR = character_tokenizer(), small_processor()
RNG = np.random.default_rng(0)


def picture(h, w): return RNG.integers(0, 256, (h, w, 3), np.uint8)
def clip(t, h, w): return RNG.integers(0, 256, (t, h, w, 3), np.uint8)
def ids(text): return TOKENIZER(text).input_ids


def test_vocabulary():
    assert len(TOKENIZER) == len(SPECIAL) + 1 + len(CHARACTERS) + len(WORDS) == 107
    assert [ids(t) for t in SPECIAL] == [[i] for i in range(7)] and TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == SPECIAL[0]


def test_every_printable_character_is_one_token_and_comes_back():
    text = "\n" + "".join(map(chr, range(32, 127)))
    assert all(len(ids(c)) == 1 and TOKENIZER.decode(ids(c)) == c for c in text)
    assert TOKENIZER.decode(ids(text)) == text and len(set(ids(text))) == 96


@settings(deadline=None)
@given(st.text(st.sampled_from("\n" + "".join(map(chr, range(32, 127)))), max_size=60))
def test_round_trip(text): assert TOKENIZER.decode(ids(text)) == text


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_other_characters_become_the_unknown_one_and_nothing_else_changes(text):
    if any(s in text for s in (*SPECIAL, *WORDS)): return
    expected = "".join(c if c in CHARACTERS else UNKNOWN for c in text)
    assert len(ids(text)) == len(text) and TOKENIZER.decode(ids(text)) == expected


def test_chat_words_are_single_tokens_and_specials_leave_decoded_text():
    assert [len(ids(w)) for w in WORDS] == [1, 1, 1] and TOKENIZER.decode(ids("user 1 seconds>")) == "user 1 seconds>"
    assert TOKENIZER.decode(ids("7:8<|im_end|><|endoftext|>"), skip_special_tokens=True) == "7:8"


def test_padding_is_on_the_left():
    batch = TOKENIZER(["1", "123"], padding=True)
    assert batch["input_ids"][0] == [0, 0, *ids("1")] and batch["attention_mask"][0] == [0, 0, 1]


def slow_patchify(frames, patch, tps, merge):
    "Row by row in the order that Qwen3-VL merges: block row, block column, then rows and columns inside a block."
    frames = [*frames, *[frames[-1]] * (-len(frames) % tps)]
    h, w, rows = frames[0].shape[0] // patch, frames[0].shape[1] // patch, []
    for t in range(len(frames) // tps):
        for top in range(h // merge):
            for left in range(w // merge):
                for y in range(top * merge, top * merge + merge):
                    for x in range(left * merge, left * merge + merge):
                        rows.append([frames[t * tps + k][y * patch + i][x * patch + j][c] / 127.5 - 1
                                     for c in range(3) for k in range(tps) for i in range(patch) for j in range(patch)])
    return np.array(rows), [len(frames) // tps, h, w]


@settings(deadline=None, max_examples=25)
@given(t=st.integers(1, 5), h=st.integers(1, 3), w=st.integers(1, 3), patch=st.integers(1, 3), tps=st.integers(1, 3),
       merge=st.integers(1, 2))
def test_patchify_equals_a_slow_loop(t, h, w, patch, tps, merge):
    frames = clip(t, h * patch * merge, w * patch * merge)
    rows, grid = patchify(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1, patch, tps, merge)
    slow, slow_grid = slow_patchify(frames, patch, tps, merge)
    assert grid == slow_grid and rows.shape == slow.shape and rows.dtype == torch.float32
    assert np.allclose(rows, slow, atol=1e-6)


@pytest.mark.parametrize("h, w", [(15, 16), (16, 24), (8, 8)])
def test_sides_that_do_not_divide_are_refused(h, w):
    with pytest.raises(ValueError, match=f"{h}×{w} pixels.*multiples of 16"): patchify(torch.zeros(2, 3, h, w))


def encode(processor, content, **visual):
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt", **visual)


def test_image_ids_and_pixels():
    image = picture(16, 48)
    batch = encode(PROCESSOR, [{"type": "image"}, {"type": "text", "text": "sum?"}], images=[image])
    marks = "<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>"
    assert batch["input_ids"].tolist() == [ids(f"<|im_start|>user\n{marks}sum?<|im_end|>\n<|im_start|>assistant\n")]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 6]]
    # an image is a video of one frame
    assert np.allclose(batch["pixel_values"], slow_patchify([image], 8, 2, 2)[0], atol=1e-6)
    assert batch["mm_token_type_ids"].tolist() == [(batch["input_ids"][0] == 5).int().tolist()]


def test_video_ids_and_pixels():
    video = clip(5, 16, 32)
    batch = encode(PROCESSOR, [{"type": "video"}, {"type": "text", "text": "diff?"}], videos=[video])
    pads = "<|vision_start|>" + "<|video_pad|>" * 2 + "<|vision_end|>"
    # mean time of each pair at 2 frames a second; 5 frames, the last alone
    stamps = "".join(f"<{t} seconds>{pads}" for t in ("0.2", "1.2", "2.0"))
    assert batch["input_ids"].tolist() == [ids(f"<|im_start|>user\n{stamps}diff?<|im_end|>\n<|im_start|>assistant\n")]
    assert batch["video_grid_thw"].tolist() == [[3, 2, 4]]
    assert np.allclose(batch["pixel_values_videos"], slow_patchify(video, 8, 2, 2)[0], atol=1e-6)


def test_two_images_and_a_video_keep_their_order():
    images, video = [picture(16, 16), picture(32, 16)], clip(2, 16, 16)
    batch = encode(PROCESSOR, [{"type": "image"}] * 2 + [{"type": "video"}, {"type": "text", "text": "?"}],
                   images=images, videos=[video])
    rows = np.concatenate([slow_patchify([i], 8, 2, 2)[0] for i in images])
    assert np.allclose(batch["pixel_values"], rows, atol=1e-6)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 2]]
    assert np.allclose(batch["pixel_values_videos"], slow_patchify(video, 8, 2, 2)[0], atol=1e-6)


@pytest.mark.parametrize("patch", [8, 16])
def test_save_and_load_give_the_same_ids_and_pixels(tmp_path, patch):
    processor = small_processor(patch, (2 * patch, 8 * patch))
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path, "qwen3_vl")
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "a b~?\n"}]
    visual = dict(images=[picture(2 * patch, 4 * patch)], videos=[clip(3, 2 * patch, 2 * patch)])
    one, two = (encode(p, content, **visual) for p in (processor, again))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab() and again.tokenizer.padding_side == "left"


def test_a_text_only_checkpoint_loads_as_its_tokenizer(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    again = load_processor(tmp_path, "qwen3")
    assert again.get_vocab() == tokenizer.get_vocab() and again.padding_side == "left"
    assert again.decode(again("a~1").input_ids) == "a~1"


# ---- our image and video processors, without torchvision

def test_without_torchvision_ours_are_used_and_the_official_ones_are_an_error(tmp_path):
    if find_spec("torchvision"): pytest.skip("torchvision is installed")
    folder = real_folder(tmp_path)
    processor = load_processor(folder, "qwen3_vl")
    assert isinstance(processor.image_processor, TorchImageProcessor)
    assert isinstance(processor.video_processor, TorchVideoProcessor)
    with pytest.raises(ImportError, match="torchvision"): load_processor(folder, "qwen3_vl", official=True)


@pytest.mark.parametrize("template", ["chat_template.json", "chat_template.jinja", None])
def test_a_folder_laid_out_as_the_published_checkpoints(tmp_path, template):
    processor = load_processor(real_folder(tmp_path, template), "qwen3_vl", official=False)
    assert processor.chat_template == processor.tokenizer.chat_template == CHAT_TEMPLATE
    assert processor.tokenizer.padding_side == "left"
    images, videos = processor.image_processor, processor.video_processor
    assert (images.patch_size, images.size.shortest_edge, images.size.longest_edge) == (16, 65536, 16777216)
    assert (videos.patch_size, videos.size.shortest_edge, videos.size.longest_edge) == (16, 4096, 25165824)
    assert (videos.fps, videos.do_resize) == (2, True)
    batch = encode(processor, [{"type": "image"}, {"type": "video"}], images=[picture(256, 320)],
                   videos=[clip(4, 64, 96)])
    assert batch["image_grid_thw"].tolist() == [[1, 16, 20]] and batch["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert (batch["input_ids"] == 5).sum() == 16 * 20 // 4 and (batch["input_ids"] == 6).sum() == 2 * 4 * 6 // 4


def test_settings_of_the_files_are_obeyed(tmp_path):
    folder = real_folder(tmp_path)
    colours = dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .8])
    images = dict(min_pixels=56 * 56, max_pixels=112 * 112, patch_size=14, size=None, **colours)
    videos = dict(fps=4, rescale_factor=1 / 51, **colours)
    for name, new in (("preprocessor_config.json", images), ("video_preprocessor_config.json", videos)):
        settings = json.loads((folder / name).read_text()) | new
        (folder / name).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    processor = load_processor(folder, "qwen3_vl", official=False)
    white, grey = np.full((112, 112, 3), 255, np.uint8), np.full((2, 32, 32, 3), 51, np.uint8)
    batch = encode(processor, [{"type": "image"}, {"type": "image"}, {"type": "video"}],
                   images=[white, picture(900, 700)], videos=[grey.repeat(2, 0)])
    assert batch["image_grid_thw"][0].tolist() == [1, 8, 8]
    assert 3136 <= batch["image_grid_thw"][1].prod() * 196 <= 112 ** 2
    expected = (1 - torch.tensor([.1, .2, .3])) / torch.tensor([.4, .5, .8])
    for pixels in (batch["pixel_values"][:64].reshape(64, 3, -1), batch["pixel_values_videos"].reshape(-1, 3, 2 * 256)):
        assert torch.allclose(pixels, expected[None, :, None].expand_as(pixels), atol=1e-6)
    assert "<0.1 seconds>" in processor.tokenizer.decode(batch["input_ids"][0])  # frames 0 and 1 at 4 a second


def test_checkpoints_of_the_first_version_never_resize(tmp_path):
    small_processor().save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    assert saved["processor_class"] == "Qwen3VLProcessor"
    assert saved["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
    assert saved["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"
    assert saved["video_processor"]["do_resize"] is False
    saved["video_processor"] = dict(fps=2, merge_size=2, patch_size=8, temporal_patch_size=2,
                                    video_processor_type="PatchVideoProcessor")
    file.write_text(json.dumps(saved))
    old, video = load_processor(tmp_path, "qwen3_vl", official=False), clip(5, 16, 32)
    one, two = (encode(p, [{"type": "video"}], videos=[video]) for p in (PROCESSOR, old))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(ValueError, match="20×16 pixels.*multiples of 16"):
        encode(old, [{"type": "video"}], videos=[clip(2, 20, 16)])


@settings(deadline=None, max_examples=50)
@given(h=st.integers(1, 400), w=st.integers(1, 400))
def test_images_keep_their_shape_and_the_bounds_of_pixels(h, w):
    if max(h, w) / min(h, w) > 200: return
    images = TorchImageProcessor(patch_size=8, size=dict(shortest_edge=32 ** 2, longest_edge=96 ** 2))
    out = images([np.zeros((h, w, 3), np.uint8)], input_data_format="channels_last", return_tensors="pt")
    _, rows, columns = out["image_grid_thw"][0].tolist()
    assert rows % 2 == columns % 2 == 0 and out["pixel_values"].shape == (rows * columns, 3 * 2 * 64)
    if max(h, w) / min(h, w) < 4: assert 32 ** 2 <= rows * columns * 64 <= 96 ** 2
    assert abs(rows * 8 - columns * 8 * h / w) <= 16 * max(1, h / w) + 16  # each side is at most one block off


def by_hand(row, n):
    "Antialiased bicubic resizing of one row, by definition: Keys' kernel (a = −1/2), stretched if the row shrinks."
    def kernel(x):
        x = abs(x)
        return 1.5 * x ** 3 - 2.5 * x ** 2 + 1 if x < 1 else -.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 if x < 2 else 0
    scale = len(row) / n
    wide, new = max(scale, 1), []
    for i in range(n):
        weights = [kernel((j + .5 - (i + .5) * scale) / wide) for j in range(len(row))]
        new.append(sum(w * v for w, v in zip(weights, row)) / sum(weights))
    return np.array(new)


@pytest.mark.parametrize("old, new", [(16, 40), (40, 16), (9, 10), (30, 7)])
def test_resizing_equals_the_definition(old, new):
    row = RNG.integers(40, 216, old).astype(np.uint8)
    for pixels in (np.tile(row, (3, 5, 1)), np.tile(row[:, None], (3, 1, 5))):
        size = tuple(new if s == old else s for s in pixels.shape[1:])
        got = resize_pixels(torch.from_numpy(pixels), *size).numpy()
        line = got[0, 0] if size[1] == new else got[0, :, 0]
        assert got.dtype == np.uint8 and (got == got[:1]).all()
        assert abs(line - by_hand(row, new).clip(0, 255)).max() <= .51


def test_one_frame_is_resized_as_in_a_clip_and_strange_pixels_are_refused():
    frames = torch.from_numpy(clip(3, 20, 30)).permute(0, 3, 1, 2)
    assert torch.equal(resize_pixels(frames, 16, 48)[1], resize_pixels(frames[1], 16, 48))
    with pytest.raises(ValueError, match="int64"): resize_pixels(frames.long(), 16, 48)
    with pytest.raises(ValueError, match="resample is 0"): resize_pixels(frames, 16, 48, 0)


@pytest.mark.parametrize("shape, message",
                         [((0, 5, 3), "empty"), ((1, 201, 3), "aspect ratio"), ((5, 6, 7), "channel")])
def test_pictures_that_are_none(shape, message):
    with pytest.raises(ValueError, match=message):
        encode(PROCESSOR, [{"type": "image"}], images=[np.zeros(shape, np.uint8)])


def test_videos_that_are_none(tmp_path):
    processor = load_processor(real_folder(tmp_path), "qwen3_vl", official=False)
    for shape, message in (((1, 32, 32, 3), "1 frames: at least 2"), ((4, 0, 32, 3), "empty"),
                           ((4, 2, 600, 3), "aspect ratio"), ((4, 32, 32, 2), "channel")):
        with pytest.raises(ValueError, match=message):
            encode(processor, [{"type": "video"}], videos=[np.zeros(shape, np.uint8)])


@pytest.mark.parametrize("h, w", [(3, 40), (1, 30), (40, 3)])
def test_arrays_are_channels_last_even_if_three_pixels_high(tmp_path, h, w):
    processor = load_processor(real_folder(tmp_path), "qwen3_vl", official=False)
    batch = encode(processor, [{"type": "image"}, {"type": "video"}], images=[picture(h, w)], videos=[clip(2, h, w)])
    for grid in (batch["image_grid_thw"], batch["video_grid_thw"]):
        assert (grid[0, 1] < grid[0, 2]) == (h < w) and grid[0, 1] != grid[0, 2]


def stamps(processor, video, **kwargs):
    batch = encode(processor, [{"type": "video"}], videos=[video], **kwargs)
    shown = processor.tokenizer.decode(batch["input_ids"][0])
    return re.findall(r"<([\d.]+) seconds>", shown), batch["video_grid_thw"][0, 0].item()


def test_frames_with_metadata_get_the_times_they_say():
    given = dict(total_num_frames=300, fps=30., frames_indices=[0, 60, 120, 240])
    # means of 0 and 2, of 4 and 8 seconds
    assert stamps(PROCESSOR, clip(4, 16, 16), video_metadata=[given]) == (["1.0", "6.0"], 2)
    assert stamps(PROCESSOR, clip(4, 16, 16)) == (["0.2", "1.2"], 2)  # 2 frames a second
    raw = dict(total_num_frames=60, fps=30., frames_indices=None)
    # 4 of 60 frames: 0, 20, 39, 59
    assert stamps(PROCESSOR, clip(60, 16, 16), video_metadata=[raw], do_sample_frames=True) == (["0.3", "1.6"], 2)


def test_a_chat_can_be_tokenized_at_once_with_its_pictures():
    image, video = picture(16, 16), clip(4, 16, 16)
    chat = [
        {"role": "user",
         "content": [dict(type="image", image=image), dict(type="video", video=video), dict(type="text", text="a?")]}]
    got = PROCESSOR.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                        return_tensors="pt")
    expected = encode(PROCESSOR, [dict(type="image"), dict(type="video"), dict(type="text", text="a?")], images=[image],
                      videos=[video])
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("model_type, name",
                         [("qwen2_vl", "Qwen2VLProcessor"), ("qwen2_5_vl", "Qwen2_5_VLProcessor"),
                          ("internvl", "InternVLProcessor")])
def test_a_processor_that_needs_torchvision_is_named(tmp_path, model_type, name):
    if find_spec("torchvision"): pytest.skip("torchvision is installed")
    folder = real_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps(dict(model_type=model_type)))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(processor_class=name)))
    with pytest.raises(ValueError, match=f"'{model_type}' models, {name}, can't be loaded.*torchvision"):
        load_processor(folder, model_type)


def test_a_bare_tokenizer_is_no_processor_of_a_vision_model(tmp_path, monkeypatch):
    monkeypatch.setattr("copd_nb.policy.processors.AutoProcessor.from_pretrained",
                        lambda path, trust_remote_code: character_tokenizer())
    with pytest.raises(ValueError, match="'llava' models, LlavaProcessor.*only a tokenizer"):
        load_processor(tmp_path, "llava")
    assert load_processor(tmp_path, "qwen3").padding_side == "left"


# ---- video files

def write_clip(path, frames, rate=8, codec="mpeg4", **options):
    "Frames as a video file; the container is that of the name."
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 4, 8_000_000
        for f in frames: file.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        file.mux(stream.encode())
    return path


def fade(t, h=32, w=48):
    return np.linspace(0, 255, t).astype(np.uint8)[:, None, None, None] * np.ones((1, h, w, 3), np.uint8)


FILES = [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("webm", "vp8"), ("avi", "msmpeg4v3"), ("ts", "mpeg2video"),
         ("mp4", "libx264")]
FILMS = [(24, 24, 2.), (40, 25, 2.), (40, 25, 100.), (3, 25, 1.), (1, 24, 2.)]


# FFmpeg needs longer ts files
@pytest.mark.parametrize("ending, codec, t, rate, fps",
                         [(*file, *film) for file in FILES for film in FILMS if file[0] != "ts" or film[0] > 10])
def test_frames_are_those_that_qwen_samples(tmp_path, ending, codec, t, rate, fps):
    frames = decode_video(write_clip(tmp_path / f"fade.{ending}", fade(t), rate, codec), fps)
    wanted = np.linspace(0, t - 1, min(max(int(t / rate * fps), 4), t)).round().astype(int)
    assert frames.shape == (len(wanted), 32, 48, 3) and frames.dtype == np.uint8
    grey = fade(t)[:, 0, 0, 0].astype(float)
    # the nearest grey tells which frame it is
    assert [abs(grey - f.mean()).argmin() for f in frames] == wanted.tolist()


@settings(deadline=None)
@given(total=st.integers(1, 10 ** 5), rate=st.floats(1, 240), fps=st.floats(.01, 60))
def test_sampled_indices_spread_over_the_video(total, rate, fps):
    indices = sample_indices(total, rate, fps)
    assert min(4, total) <= len(indices) <= min(768, total) and indices[0] == 0
    assert len(set(indices.tolist())) == len(indices)
    if len(indices) > 1: assert indices[-1] == total - 1 and np.ptp(np.diff(indices)) <= 1


@pytest.mark.parametrize("ending, options",
                         [("mp4", {}), ("mp4", dict(movflags="faststart")), ("mkv", {}), ("avi", {})])
@pytest.mark.parametrize("part", [.9, .5, .1])
def test_truncated_videos_are_refused(tmp_path, ending, options, part):
    path = write_clip(tmp_path / f"clip.{ending}", clip(40, 64, 64), 8, **options)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * part)])
    with pytest.raises(ValueError, match=f"'clip.{ending}' can't be"): decode_video(path)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_bytes_after_the_end_do_no_harm(tmp_path, ending):
    path = write_clip(tmp_path / f"clip.{ending}", clip(16, 32, 32))
    expected = decode_video(path)
    path.write_bytes(path.read_bytes() + b"what is left over" * 100)
    assert np.array_equal(decode_video(path), expected)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.mp4"): decode_video(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError): decode_video(tmp_path)
    for name, data in (("empty.mp4", b""), ("text.mp4", b"This is no video. " * 99),
                       ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n"),
                       ("list.mp4", b"ffconcat version 1.0\nfile clip.ts\n")):
        write_clip(tmp_path / "clip.ts", fade(8), codec="mpeg2video")
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"'{name}' can't be"): decode_video(tmp_path / name)


def test_a_file_with_sound_only(tmp_path):
    with av.open(str(tmp_path / "song.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match="'song.mkv' has no video stream"): decode_video(tmp_path / "song.mkv")


def test_large_videos_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", fade(40), 8)
    assert decode_video(path, pixels=10 * 32 * 48).shape[0] == 10
    monkeypatch.setattr("copd_nb.data.media._decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"'clip.mp4' has 10 × 48 × 32 pixels at 2 frames a second: at most 15359"):
        decode_video(path, pixels=10 * 32 * 48 - 1)
    for fps in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="fps"): decode_video(path, fps)


def test_a_film_taken_with_the_camera_turned_is_shown_upright(tmp_path):
    top = np.zeros((8, 32, 48, 3), np.uint8)
    top[:, :8] = 255  # the first rows are white
    path = write_clip(tmp_path / "turned.mp4", top)
    data, one = path.read_bytes(), (1 << 16).to_bytes(4, "big")
    # a b u, c d: a quarter turn clockwise
    minus = (2 ** 32 - (1 << 16)).to_bytes(4, "big")
    upright, right = one + bytes(12) + one, bytes(4) + one + bytes(4) + minus + bytes(4)
    start = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:start] + right + data[start + 20:])
    seen = decode_video(path)
    # white is on the right
    assert seen.shape == (4, 48, 32, 3) and seen[:, :, -6:].mean() > 240 and seen[:, :, :-10].mean() < 15


def test_without_av_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install copd_nb\[real\]"): decode_video(tmp_path / "clip.mp4")
