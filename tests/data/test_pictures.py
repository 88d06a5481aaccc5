"Pictures of files as models see them: on white, in 8 bits, upright; against numpy's arithmetic and files made by hand."
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from copd_nb.data import media as media_module
from copd_nb.data.capability import Example
from copd_nb.data.files import read_examples
from copd_nb.data.media import MODES, pixels
from copd_nb.policy.file_problems import problems

DICE = np.random.default_rng(0)
COLOURS = DICE.integers(0, 256, (12, 16, 4), np.uint8)


def written(image, **options):
    "A picture as the bytes of a file."
    image.save(data := io.BytesIO(), **dict(format="PNG") | options)
    return data.getvalue()


def read(folder, data, column="images", name="a.png"):
    (folder / name).write_bytes(data)
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "what?", column: [name]}))
    return getattr(read_examples(folder / "rows.jsonl")[0], column)[0]


def on_white(colours, alpha):
    "(…, 3) and (…) → (…, 3): c·α + 255·(1 − α), rounded, in whole numbers."
    c, a = colours.astype(int), alpha.astype(int)[..., None]
    return ((2 * (c * a + 255 * (255 - a)) + 255) // 510).astype(np.uint8)


def thrice(grey): return np.repeat(grey[..., None], 3, -1)


def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(shape, depth, kind, data, *extra):
    "A PNG by hand; rows are not filtered."
    rows = b"".join(b"\0" + r for r in data)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", shape[1], shape[0], depth, kind, 0, 0, 0))
    body = b"".join(chunk(*e) for e in extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def test_every_colour_at_every_alpha_is_blended_to_the_nearest_number(tmp_path):
    colour, alpha = (x.astype(np.uint8) for x in np.meshgrid(np.arange(256), np.arange(256)))
    data = np.dstack([thrice(colour), alpha])
    wanted = on_white(data[..., :3], alpha)
    assert np.array_equal(read(tmp_path, written(Image.fromarray(data))), wanted)
    assert np.array_equal(pixels(Image.fromarray(np.dstack([colour, alpha]), "LA")), wanted)
    white = Image.new("RGBA", (256, 256), "white")  # Pillow's other way to blend
    assert np.array_equal(wanted, np.array(Image.alpha_composite(white, Image.fromarray(data)))[..., :3])


def bmp(colours, alpha):
    "A BMP of 32 bits by hand, with a header that has room for a mask of alpha."
    masks = struct.pack("<4I", 0xff0000, 0xff00, 0xff, 0xff000000 if alpha else 0)
    head = struct.pack("<IiiHHIIiiII", 108, colours.shape[1], -colours.shape[0], 1, 32, 3, colours.nbytes, 0, 0, 0, 0)
    head += masks + b"BGRs" + b"\0" * 48
    start = 14 + len(head)
    head = b"BM" + struct.pack("<IHHI", start + colours.nbytes, 0, 0, start) + head
    return head + colours[..., [2, 1, 0, 3]].tobytes()


def test_alpha_channels_of_files(tmp_path):
    image, wanted = Image.fromarray(COLOURS), on_white(COLOURS[..., :3], COLOURS[..., 3])
    for data in (written(image), written(image, format="WEBP", lossless=True, exact=True), bmp(COLOURS, True)):
        assert np.array_equal(read(tmp_path, data), wanted)
    assert np.array_equal(read(tmp_path, bmp(COLOURS, False)), COLOURS[..., :3])  # the fourth byte means nothing


def test_premultiplied_colours():
    "Pillow divides by alpha and rounds down, so a colour may be off by as much as that loses."
    clear = Image.fromarray(COLOURS).convert("RGBa")
    held = np.array(clear).astype(int)
    wanted = held[..., :3] + 255 - held[..., 3:]  # what premultiplied means
    assert np.abs(pixels(clear).astype(int) - wanted).max() <= 1
    grey = np.dstack([np.minimum(COLOURS[..., 0], COLOURS[..., 3]), COLOURS[..., 3]])
    made = Image.frombytes("La", (16, 12), grey.tobytes())
    assert np.abs(pixels(made).astype(int) - thrice(grey[..., 0].astype(int) + 255 - grey[..., 1])).max() <= 1


@pytest.mark.parametrize("clear", [0, 3, bytes(range(0, 256)), bytes([0, 128]), b"\xff\x00"])
def test_palettes_with_one_clear_colour_or_alpha_for_each(clear, tmp_path):
    places, palette = DICE.integers(0, 256, (12, 16), np.uint8), DICE.integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(places)
    image.putpalette(palette.tobytes())
    alpha = np.full(256, 255, np.uint8)
    if isinstance(clear, int): alpha[clear] = 0
    else: alpha[:len(clear)] = list(clear)
    found = read(tmp_path, written(image, transparency=clear))
    assert np.array_equal(found, on_white(palette[places], alpha[places]))


def test_a_palette_whose_colours_have_alpha():
    places, palette = DICE.integers(0, 256, (12, 16), np.uint8), DICE.integers(0, 256, (256, 4), np.uint8)
    image = Image.fromarray(places)
    image.putpalette(palette.tobytes(), "RGBA")
    assert np.array_equal(pixels(image), on_white(palette[places][..., :3], palette[places][..., 3]))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_counts_as_transparent(depth, tmp_path):
    "Its number is on the file's scale, of 2 to 65,536 greys."
    top = 2 ** depth - 1
    values = DICE.integers(0, top + 1, (12, 16))
    values[0, :2] = 1, min(2, top)
    bits = [np.unpackbits(np.array([v], ">u2").view(np.uint8))[-depth:] for v in values.ravel()]
    rows = [np.packbits(np.concatenate(bits[i:i + 16])).tobytes() for i in range(0, len(bits), 16)]
    for key in (0, 1, top, int(values[3, 3])):
        found = read(tmp_path, png((12, 16), depth, 0, rows, (b"tRNS", struct.pack(">H", key))))
        grey = np.round(values * 255 / top).astype(np.uint8)
        assert np.array_equal(found, on_white(thrice(grey), np.where(values == key, 0, 255)))
    assert np.array_equal(read(tmp_path, png((12, 16), depth, 0, rows)), thrice(grey))


def test_a_colour_that_counts_as_transparent(tmp_path):
    key = tuple(map(int, COLOURS[2, 3, :3]))
    rows = [r.tobytes() for r in COLOURS[..., :3]]
    found = read(tmp_path, png((12, 16), 8, 2, rows, (b"tRNS", struct.pack(">3H", *key))))
    clear = (COLOURS[..., :3] == key).all(-1)
    assert clear.sum() == 1 and np.array_equal(found, on_white(COLOURS[..., :3], np.where(clear, 0, 255)))
    wide = [r.astype(">u2").tobytes() for r in COLOURS[..., :3]]
    with pytest.raises(ValueError, match="row 1.*16 bits with a transparent colour"):
        read(tmp_path, png((12, 16), 16, 2, wide, (b"tRNS", struct.pack(">3H", *key))))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_grey_of_16_bits_is_divided_by_257(mode, tmp_path):
    values = np.arange(2 ** 16, dtype=np.uint16).reshape(256, 256)
    image = Image.frombytes(mode, (256, 256), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    wanted = thrice(np.floor(values / 257 + .5).astype(np.uint8))
    assert np.array_equal(pixels(image), wanted)
    if mode == "I;16": assert np.array_equal(read(tmp_path, written(image)), wanted)


def test_colours_of_16_bits_keep_the_upper_8(tmp_path):
    values = DICE.integers(0, 2 ** 16, (12, 16, 4), np.uint16)
    rows = [r.astype(">u2").tobytes() for r in values[..., :3]]
    assert np.array_equal(read(tmp_path, png((12, 16), 16, 2, rows)), (values[..., :3] >> 8).astype(np.uint8))
    rows, upper = [r.astype(">u2").tobytes() for r in values], (values >> 8).astype(np.uint8)
    assert np.array_equal(read(tmp_path, png((12, 16), 16, 6, rows)), on_white(upper[..., :3], upper[..., 3]))
    rows = [r.astype(">u2").tobytes() for r in values[..., ::3]]
    assert np.array_equal(read(tmp_path, png((12, 16), 16, 4, rows)), on_white(thrice(upper[..., 0]), upper[..., 3]))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pictures_whose_range_nobody_knows_are_refused_by_mode(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}': 1, L, LA.*I;16 are read"): pixels(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_that_is_named_is_read(mode):
    found = pixels(Image.new(mode, (5, 3)))
    assert found.shape == (3, 5, 3) and found.dtype == np.uint8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_pictures_are_what_pillow_makes_of_them(mode):
    image = Image.fromarray(COLOURS[..., :3]).convert(mode)
    assert np.array_equal(pixels(image), np.array(image.convert("RGB")))


def test_an_alpha_channel_that_hides_nothing_changes_nothing(tmp_path):
    opaque = COLOURS.copy()
    opaque[..., 3] = 255
    assert np.array_equal(read(tmp_path, written(Image.fromarray(opaque))), opaque[..., :3])


def test_what_is_wholly_transparent_is_white(tmp_path):
    hidden = COLOURS.copy()
    hidden[..., 3] = 0
    assert (read(tmp_path, written(Image.fromarray(hidden))) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_pictures_stand_upright(kind, tag, tmp_path):
    "Where row 0 and column 0 of what is stored belong, by the EXIF standard."
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
              6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1)}[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    options = dict(PNG={}, JPEG=dict(quality=95, subsampling=0), WEBP=dict(lossless=True))[kind]
    data = written(Image.fromarray(np.ascontiguousarray(stored)), format=kind, exif=exif, **options)
    found = read(tmp_path, data)
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() <= (3 if kind == "JPEG" else 0)


def test_transparent_and_deep_pictures_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(on_white(COLOURS[..., :3], COLOURS[..., 3]), -1)
    assert np.array_equal(read(tmp_path, written(Image.fromarray(COLOURS), exif=exif)), turned)
    deep, wanted = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257), np.rot90(thrice(COLOURS[..., 0]), -1)
    assert np.array_equal(read(tmp_path, written(deep, exif=exif)), wanted)


def test_inks_are_not_inverted(tmp_path):
    "JPEGs with four inks say by a marker of Adobe's that they are stored inverted; Pillow knows it."
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    found = read(tmp_path, written(inks, format="JPEG", quality=95))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 3
    assert np.array_equal(found, np.array(Image.open(tmp_path / "a.png").convert("RGB")))


def test_colour_profiles_are_ignored(tmp_path):
    from PIL import ImageCms
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = written(Image.fromarray(COLOURS[..., :3]), icc_profile=profile)
    assert np.array_equal(read(tmp_path, data), COLOURS[..., :3])


def test_frames_of_moving_pictures_are_on_white(tmp_path):
    frames = [COLOURS, COLOURS[::-1].copy()]
    first, second = map(Image.fromarray, frames)
    wanted = np.stack([on_white(f[..., :3], f[..., 3]) for f in frames])
    for kind, options in (("PNG", dict(blend=0, disposal=1)), ("WEBP", dict(lossless=True, exact=True))):
        data = written(first, format=kind, save_all=True, append_images=[second], **options)
        assert np.array_equal(read(tmp_path, data, "videos"), wanted), kind


@pytest.mark.parametrize("disposal", [1, 2, 3])
def test_frames_of_gifs_are_laid_over_each_other_and_then_on_white(disposal, tmp_path):
    "1 keeps what was drawn, 2 clears it, 3 takes it back; palette index 0 is transparent."
    colours = np.array([(9, 9, 9), (255, 0, 0), (0, 0, 255)], np.uint8)
    draws, wanted, canvas = [np.zeros((4, 6), np.uint8) for _ in range(3)], [], np.zeros((4, 6), np.uint8)
    draws[0][:, :2], draws[1][:2, 1:4], draws[2][2:, 3:] = 1, 2, 1
    for drawn in draws:
        shown = np.where(drawn, drawn, canvas)
        wanted.append(on_white(colours[shown], np.where(shown, 255, 0)))
        canvas = {1: shown, 2: np.zeros_like(canvas), 3: canvas}[disposal]
    assert np.array_equal(read(tmp_path, gif(draws, colours, disposal), "videos", "a.gif"), np.stack(wanted))


def gif(frames, colours, disposal):
    "A GIF by hand, whose codes are not compressed: each row begins with a reset of the table."
    table = b"".join(c.tobytes() for c in colours).ljust(12, b"\0")
    out = b"GIF89a" + struct.pack("<HHBBB", frames[0].shape[1], frames[0].shape[0], 0x91, 0, 0) + table
    for f in frames:
        codes = [c for v in f.ravel() for c in (4, int(v))] + [5]  # clear, value; end
        bits = "".join(format(c, "03b")[::-1] for c in codes)
        data = bytes(int(bits[i:i + 8][::-1], 2) for i in range(0, len(bits), 8))
        out += b"\x21\xf9\x04" + struct.pack("<BHB", disposal << 2 | 1, 10, 0) + b"\0"
        out += b"\x2c" + struct.pack("<HHHHB", 0, 0, f.shape[1], f.shape[0], 0) + b"\x02"
        out += b"".join(bytes([len(data[i:i + 255])]) + data[i:i + 255] for i in range(0, len(data), 255)) + b"\0"
    return out + b"\x3b"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_files_that_are_cut_short_name_their_row(kind, tmp_path):
    data = written(Image.fromarray(COLOURS[..., :3]), format=kind)
    for size in (0, 1, 20, len(data) // 3, len(data) // 2, len(data) - 40):
        (tmp_path / "a.png").write_bytes(data[:size])
        (tmp_path / "rows.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "cut", "images": ["a.png"]}')
        with pytest.raises(ValueError, match="row 2.*(damaged|no picture)"): read_examples(tmp_path / "rows.jsonl")
        assert problems(tmp_path / "rows.jsonl").query("column == 'images'").row.tolist() == [2]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_pictures_without_pixels_are_refused(shape, tmp_path):
    empty_gif = b"GIF89a" + struct.pack("<HHBBB", *shape[::-1], 0, 0, 0) + b"\x3b"
    for data in (png(shape, 8, 0, [b"\0" * shape[1]] * shape[0]), empty_gif):
        with pytest.raises(ValueError, match="row 1.*(no picture|at least one)"): read(tmp_path, data)
    with pytest.raises(ValueError, match="at least one"): media_module._fits(*shape)


ODD_EXIF = b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30


@pytest.mark.parametrize("extra", [(b"tRNS", b"\0"), (b"eXIf", b"Exif\0\0MM"), (b"eXIf", ODD_EXIF), (b"iCCP", b"x")])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_odd_parts_of_files_are_harmless_or_named(extra, tmp_path):
    rows = [r.tobytes() for r in COLOURS[..., :3]]
    try: found = read(tmp_path, png((12, 16), 8, 2, rows, extra))
    except ValueError as error: assert "row 1" in str(error) and "picture" in str(error)
    else: assert np.array_equal(found, COLOURS[..., :3])


@pytest.mark.parametrize("part, value, message", [
    ("images", Image.new("RGB", (4, 4)), r"images\[0\] is Image: .*data.media.pixels"),
    ("images", [[0, 0, 0]], "list"),
    ("images", COLOURS, r"uint8 of shape \(12, 16, 4\)"), ("images", COLOURS[..., 0], r"shape \(12, 16\)"),
    ("images", COLOURS[..., :3] / 255, "float64"), ("images", COLOURS[:0, :, :3], r"shape \(0, 16, 3\)"),
    ("videos", COLOURS[..., :3], r"videos\[0\] is uint8 of shape \(12, 16, 3\): a uint8 array \(T, H, W, 3\)")])
def test_examples_hold_arrays_and_nothing_else(part, value, message):
    with pytest.raises(ValueError, match=message): Example("p", "a", "c", **{part: (value,)})
