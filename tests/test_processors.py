"Token ids and pixels against slow references, and save/load parity."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.processors import CHARACTERS, SPECIAL, UNKNOWN, WORDS, character_tokenizer, load_processor, patchify, small_processor

TOKENIZER, PROCESSOR = character_tokenizer(), small_processor()
RNG = np.random.default_rng(0)


def picture(h, w): return RNG.integers(0, 256, (h, w, 3), np.uint8)
def clip(t, h, w): return RNG.integers(0, 256, (t, h, w, 3), np.uint8)
def ids(text): return TOKENIZER(text).input_ids


def test_vocabulary():
    assert len(TOKENIZER) == len(SPECIAL) + 1 + len(CHARACTERS) + len(WORDS) == 107
    assert [ids(t) for t in SPECIAL] == [[i] for i in range(7)] and TOKENIZER.eos_token == "<|im_end|>" and TOKENIZER.pad_token == SPECIAL[0]


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
@given(t=st.integers(1, 5), h=st.integers(1, 3), w=st.integers(1, 3), patch=st.integers(1, 3), tps=st.integers(1, 3), merge=st.integers(1, 2))
def test_patchify_equals_a_slow_loop(t, h, w, patch, tps, merge):
    frames = clip(t, h * patch * merge, w * patch * merge)
    rows, grid = patchify(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1, patch, tps, merge)
    slow, slow_grid = slow_patchify(frames, patch, tps, merge)
    assert grid == slow_grid and rows.shape == slow.shape and rows.dtype == torch.float32 and np.allclose(rows, slow, atol=1e-6)


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
    assert np.allclose(batch["pixel_values"], slow_patchify([image], 8, 2, 2)[0], atol=1e-6)  # an image is a video of one frame
    assert batch["mm_token_type_ids"].tolist() == [(batch["input_ids"][0] == 5).int().tolist()]


def test_video_ids_and_pixels():
    video = clip(5, 16, 32)
    batch = encode(PROCESSOR, [{"type": "video"}, {"type": "text", "text": "diff?"}], videos=[video])
    pads = "<|vision_start|>" + "<|video_pad|>" * 2 + "<|vision_end|>"
    stamps = "".join(f"<{t} seconds>{pads}" for t in ("0.2", "1.2", "2.0"))  # mean time of each pair at 2 frames a second; 5 frames, the last alone
    assert batch["input_ids"].tolist() == [ids(f"<|im_start|>user\n{stamps}diff?<|im_end|>\n<|im_start|>assistant\n")]
    assert batch["video_grid_thw"].tolist() == [[3, 2, 4]]
    assert np.allclose(batch["pixel_values_videos"], slow_patchify(video, 8, 2, 2)[0], atol=1e-6)


def test_two_images_and_a_video_keep_their_order():
    images, video = [picture(16, 16), picture(32, 16)], clip(2, 16, 16)
    batch = encode(PROCESSOR, [{"type": "image"}] * 2 + [{"type": "video"}, {"type": "text", "text": "?"}], images=images, videos=[video])
    rows = np.concatenate([slow_patchify([i], 8, 2, 2)[0] for i in images])
    assert np.allclose(batch["pixel_values"], rows, atol=1e-6) and batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 2]]
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
    assert again.get_vocab() == tokenizer.get_vocab() and again.padding_side == "left" and again.decode(again("a~1").input_ids) == "a~1"
