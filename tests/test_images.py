"""Every kind of image file, every way it can be bad, and where each pixel of a crop comes from."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cytodiffusion.data.images import MAX_PIXELS, Preprocess, decode, to_pixels, to_tensor
from cytodiffusion.errors import UnreadableImage

RGB = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_rgb_comes_back_as_it_was(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(stored(Image.fromarray(RGB), kind, **options)), RGB)


def test_grey_is_three_equal_colours():
    found = pixels(stored(Image.fromarray(RGB[..., 0])))
    np.testing.assert_array_equal(found, np.repeat(RGB[..., :1], 3, 2))


def test_one_bit_is_black_and_white():
    found = pixels(stored(Image.fromarray(RGB[..., 0] > 127)))
    np.testing.assert_array_equal(found, np.where(RGB[..., :1] > 127, 255, 0).repeat(3, 2))


@pytest.mark.parametrize(
    ("top", "full"), [(65535, 65535), (4095, 4095), (40000, 65535), (255, 255)]
)
def test_16_bits_are_scaled_by_their_own_range(top, full):
    """8, 12 or 16 bits: the smallest that holds the brightest pixel."""
    grey = np.array([[0, top // 2, top]], dtype=np.uint16)
    want = np.round(grey / full * 255).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        found = pixels(stored(Image.fromarray(grey), kind))
        np.testing.assert_array_equal(found, want[..., None].repeat(3, 2))


@pytest.mark.parametrize("scale", [1.0, 255.0, 65535.0])
def test_float_tiff(scale):
    grey = np.array([[0.0, 0.25, 1.0]], dtype=np.float32) * scale
    found = pixels(stored(Image.fromarray(grey), "TIFF"))
    np.testing.assert_array_equal(found[0, :, 0], [0, 64, 255])


def test_float_tiff_with_what_is_no_number():
    grey = np.array([[np.nan, -3.0, 0.5, 1.0]], dtype=np.float32)
    assert pixels(stored(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == [0, 0, 128, 255]


def test_transparency_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    found = pixels(stored(Image.fromarray(rgba)))[0]
    assert found[0].tolist() == [10, 20, 30]
    assert found[1].tolist() == [255, 255, 255]
    np.testing.assert_allclose(found[2], 127, atol=1)


def test_palette_with_and_without_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putpixel((1, 0), 1)
    assert pixels(stored(image))[0].tolist() == [[200, 10, 20], [30, 40, 50]]
    clear = pixels(stored(image, transparency=1))[0]
    assert clear.tolist() == [[200, 10, 20], [255, 255, 255]]


def test_cmyk():
    """No ink is white, all black ink is black, full cyan has no red."""
    cmyk = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0]]], dtype=np.uint8)
    data = stored(Image.fromarray(cmyk, "CMYK"), "TIFF")
    assert pixels(data)[0].tolist() == [[255, 255, 255], [0, 0, 0], [0, 255, 255]]


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_turned_by_exif(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(stored(Image.fromarray(RGB), "PNG", exif=exif))
    np.testing.assert_array_equal(found, turned(RGB))


def test_one_image_of_several():
    """A smaller page is a preview; pages of one size are images, and one would hide the others."""
    first, preview, second = (
        Image.new("RGB", (side, side), colour)
        for side, colour in ((4, "red"), (2, "blue"), (4, "blue"))
    )
    for kind, other in (("TIFF", preview), ("PNG", second)):
        data = stored(first, kind, save_all=True, append_images=[other])
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]
    for kind in ("GIF", "TIFF"):
        data = stored(first, kind, save_all=True, append_images=[second, first])
        with pytest.raises(UnreadableImage, match=r"^3 images in one file"):
            decode(data)


def deep_png(colours):
    """A PNG file with 16 bits a colour, which Pillow cannot write."""
    height, width, _ = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_colours_of_16_bits():
    np.testing.assert_array_equal(pixels(deep_png(RGB.astype(int) * 257)), RGB)
    with pytest.raises(UnreadableImage, match=r"16-bit values reach [\d,]+ of 65,535"):
        decode(deep_png(RGB.astype(int) * 16))  # 12 bits


# --- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(kind, share):
    big = np.random.default_rng(2).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    data = stored(Image.fromarray(big), kind)
    with pytest.raises(UnreadableImage):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "known format"),
        (b"\x89PNG\r\n\x1a\n", "known format|damaged"),
        (b"\x00" * 1000, "known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
    ],
)
def test_what_is_not_an_image(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_one_changed_byte_of_a_png_is_noticed():
    data = bytearray(stored(Image.fromarray(RGB)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnreadableImage):
        decode(bytes(data))


def test_a_kind_that_the_decoder_does_not_know():
    """A DDS file whose pixel format has no name: Pillow says NotImplementedError."""
    header = struct.pack("<7I44x", 124, 0x1007, 8, 8, 0, 0, 0)
    data = b"DDS " + header + struct.pack("<8I20x", 32, 4, 0x31415926, 0, 0, 0, 0, 0) + b"\0" * 99
    with pytest.raises(NotImplementedError):
        Image.open(io.BytesIO(data))
    with pytest.raises(UnreadableImage, match="damaged"):
        decode(data)


@pytest.mark.parametrize("error", [RuntimeError("no AV1"), struct.error("short"), KeyError(1)])
def test_whatever_a_decoder_raises_is_an_unreadable_image(monkeypatch, error):
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr("cytodiffusion.data.images._to_rgb", fails)
    with pytest.raises(UnreadableImage, match="damaged"):
        decode(stored(Image.fromarray(RGB)))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_not_the_fault_of_the_image_is_not_put_on_it(monkeypatch, error):
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr("cytodiffusion.data.images._to_rgb", fails)
    with pytest.raises(error):
        decode(stored(Image.fromarray(RGB)))


def bomb(side: int) -> bytes:
    """A PNG that says it is `side` pixels square, with next to nothing in it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\x00" * 10_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(bomb(side))


# --- the crop ------------------------------------------------------------------------------------


def ramp(width: int, height: int, step: int = 1) -> Image.Image:
    """Red says the column, green the row, in units of `step`."""
    y, x = step * np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def test_what_is_done_with_a_frame_is_said_whole():
    plain = Preprocess(crop=0.5)
    assert plain.describe() == "the centre square with a side of 0.5 times the image's shorter side"
    light = plain.model_copy(update={"match": "light"}).describe()
    assert "empty field becomes (254, 228, 203)" in light
    assert light.endswith(plain.describe())
    assert "nuclei" in plain.model_copy(update={"match": "stain"}).describe()
    assert "around the cell" in plain.model_copy(update={"each": True}).describe()


@pytest.mark.parametrize(("width", "height"), [(40, 40), (60, 40), (40, 72)])
def test_the_crop_is_central_and_exact(width, height):
    """Side 20 of the shorter 40, at size 20: pixels as they are."""
    found = Preprocess(size=20, crop=0.5).canvas(ramp(width, height))
    left, top = (width - 20) // 2, (height - 20) // 2
    assert found.shape == (3, 20, 20)
    np.testing.assert_array_equal(found[0], np.arange(left, left + 20) + np.zeros((20, 1)))
    np.testing.assert_array_equal(found[1], (np.arange(top, top + 20) + np.zeros((20, 1))).T)


def test_enlarged_and_reduced_crops_keep_their_place():
    """Pixel j of the crop lies at left + (j + 1/2) side / size - 1/2 of the image."""
    for size, crop in ((40, 0.5), (10, 0.5), (25, 0.4)):
        found = Preprocess(size=size, crop=crop).canvas(ramp(40, 40, step=5))[0, size // 2] / 5
        side = crop * 40
        want = (40 - side) / 2 + (np.arange(size) + 0.5) * side / size - 0.5
        np.testing.assert_allclose(found[2:-2], want[2:-2], atol=0.11)


def test_a_wider_canvas_has_the_crop_at_its_centre():
    """Margin 1.5 at the same pixels per cell."""
    preprocess, image = Preprocess(size=20, crop=0.5), ramp(60, 60)
    narrow, wide = preprocess.canvas(image), preprocess.canvas(image, margin=1.5)
    assert wide.shape == (3, 30, 30)
    np.testing.assert_allclose(wide[:, 5:25, 5:25].astype(int), narrow, atol=1)


def test_a_crop_wider_than_the_image_repeats_the_edges():
    found = Preprocess(size=24, crop=2.0).canvas(ramp(12, 12))
    columns = np.clip(np.arange(-6, 18), 0, 11)
    np.testing.assert_array_equal(found[0], columns + np.zeros((24, 1)))
    np.testing.assert_array_equal(found[1], (columns + np.zeros((24, 1))).T)


def test_a_crop_may_reach_over_one_pair_of_edges_alone():
    found = Preprocess(size=18, crop=1.5).canvas(ramp(30, 12))
    np.testing.assert_array_equal(found[0, 9], np.arange(6, 24))
    np.testing.assert_array_equal(found[1, :, 9], np.clip(np.arange(-3, 15), 0, 11))


def test_the_same_cell_gives_the_same_input_from_any_file():
    """Exact formats, byte for byte; a crop saved apart, too, where the box falls on whole pixels."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    preprocess = Preprocess(size=16, crop=0.5)
    inputs = [preprocess.canvas(decode(stored(image, kind))) for kind in ("PNG", "BMP", "TIFF")]
    assert all((one == inputs[0]).all() for one in inputs)


def test_a_tiny_image_becomes_an_input():
    found = Preprocess(size=16).canvas(Image.new("RGB", (1, 1), (9, 8, 7)))
    assert found.shape == (3, 16, 16)
    assert found.reshape(3, -1).T.tolist() == [[9, 8, 7]] * 256


# --- numbers -------------------------------------------------------------------------------------


def test_pixels_and_numbers():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    numbers = to_tensor(every)
    assert (numbers.min().item(), numbers.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(numbers), every)
    assert to_pixels(torch.tensor([-7.0, 0.0, 3.0])).tolist() == [0, 128, 255]
