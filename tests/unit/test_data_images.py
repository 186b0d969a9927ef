"""Encoded images: bounds, damage, orientation."""

import base64
import io
import pickle
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from rayrl.data.images import Bounds, check_bounds, check_decodes, decode, read_file, square_jpeg
from rayrl.data.rejections import BadImage
from rayrl.heldout import thumbnail

BOUNDS = Bounds(max_bytes=1_000_000, max_pixels=100_000)


def encoded(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (60, 30), left)
    picture.paste(right, (30, 0, 60, 30))
    return picture


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header promises any size: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_square_jpeg_scales_both_sides_and_keeps_the_whole_image():
    out = opened(square_jpeg(encoded(halves((200, 30, 30), (30, 30, 200))), 32, BOUNDS))
    assert out.shape == (32, 32, 3)
    assert np.abs(out[:, :14] - [200, 30, 30]).max() < 12
    assert np.abs(out[:, 18:] - [30, 30, 200]).max() < 12


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    picture = halves((255, 255, 255), (0, 0, 0)).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    out = Image.open(io.BytesIO(square_jpeg(encoded(picture, kind), 32, BOUNDS)))
    assert out.mode == "RGB"
    assert np.abs(np.asarray(out)[16, [4, 28]].astype(int) - [[255] * 3, [0] * 3]).max() < 12


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: what is left comes to the top
    data = encoded(halves((200, 30, 30), (30, 30, 200)), exif=exif)
    out = opened(square_jpeg(data, 32, BOUNDS))
    assert np.abs(out[:14] - [200, 30, 30]).max() < 12
    assert np.abs(out[18:] - [30, 30, 200]).max() < 12
    pixels = np.asarray(decode(data)).astype(int)
    assert pixels.shape == (60, 30, 3)
    assert np.abs(pixels[:28] - [200, 30, 30]).max() < 12
    small = Image.open(io.BytesIO(base64.b64decode(thumbnail(data))))
    assert small.size == (30, 60)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(20, 10), "PNG", exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(want))


def with_exif_of_a_camera() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "Maker", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    return encoded(noise(40, 30), exif=exif)


def test_damaged_exif_neither_ends_a_run_nor_costs_the_picture():
    data, rng = with_exif_of_a_camera(), random.Random(0)
    begin, end = data.index(b"Exif"), data.index(b"\xff\xdb")
    seen = set()
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(begin, end)] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen.add(decode(bytes(damaged)).size)
            assert square_jpeg(bytes(damaged), 16, BOUNDS)
    assert seen == {(40, 30), (30, 40)}


def test_what_pillow_stumbles_over_is_a_corrupt_image(monkeypatch):
    def stumbles(image: Image.Image) -> None:
        raise AttributeError("'int' object has no attribute 'encode'")

    data = encoded(noise(20, 10))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", stumbles)
    with pytest.raises(BadImage, match="corrupt image: 'int' object has no attribute"):
        decode(data)


def test_greys_of_16_bits_keep_their_shades():
    levels = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, 0)
    data = encoded(Image.fromarray(levels), "PNG")
    assert np.array_equal(np.asarray(decode(data))[..., 1], levels >> 8)
    assert np.abs(opened(square_jpeg(data, 64, BOUNDS))[..., 1] - (levels >> 8)).max() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(mode):
    """A black bar on black that is transparent."""
    picture, options = Image.new("RGBA", (40, 30), (0, 0, 0, 0)), {}
    picture.paste((0, 0, 0, 255), (0, 0, 20, 30))
    if mode == "P":
        picture = picture.quantize()
    elif mode == "L":
        picture, options = Image.new("L", (40, 30), 7), {"transparency": 7}
        picture.paste(0, (0, 0, 20, 30))
    else:
        picture = picture.convert(mode)
    data = encoded(picture, "PNG", **options)
    assert np.asarray(decode(data))[15, [5, 35]].tolist() == [[0] * 3, [255] * 3]
    assert opened(square_jpeg(data, 40, BOUNDS))[15, [5, 35]].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt image"),
        (b"not an image at all", "image of another format"),
        (b"\xff\xd8\xff nor is this", "corrupt image"),
        (encoded(noise(80, 80))[:2000], "corrupt image"),
        (encoded(noise(80, 80), "PNG")[:2000], "corrupt image"),
        (png_that_claims(50, 50)[:-30], "corrupt image"),
        (encoded(noise(80, 80), "TIFF"), "image of another format"),
        (encoded(noise(80, 80), "JPEG2000"), "image of another format"),
        (png_that_claims(400, 251), "image of too many pixels"),
        (png_that_claims(60_000, 60_000), "image of too many pixels"),
        (bytes(1_000_001), "image of too many bytes"),
    ],
    ids=[
        "empty",
        "text",
        "jpeg-head",
        "jpeg",
        "png",
        "png-end",
        "tiff",
        "jp2",
        "wide",
        "bomb",
        "bytes",
    ],
)
def test_bad_images_are_refused_with_a_reason(data, reason):
    for use in (check_decodes, lambda d, b: square_jpeg(d, 32, b)):
        with pytest.raises(BadImage) as caught:
            use(data, BOUNDS)
        assert caught.value.reason == reason
        assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header_alone():
    with pytest.raises(BadImage, match="400 x 251, more than 100000"):
        check_bounds(png_that_claims(400, 251), BOUNDS)
    check_bounds(png_that_claims(400, 250), BOUNDS)


def test_good_images_pass():
    refused = {}
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        try:
            check_decodes(encoded(noise(80, 80), kind), BOUNDS)
        except BadImage as error:
            refused[kind] = str(error)
    assert refused == {}


def test_files_are_bounded_before_they_are_read_whole(tmp_path):
    (tmp_path / "large.jpg").write_bytes(bytes(1_000_001))
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in {
        "large.jpg": "image of too many bytes",
        "folder.jpg": "missing image",
        "absent.jpg": "missing image",
    }.items():
        with pytest.raises(BadImage) as caught:
            read_file(tmp_path / name, BOUNDS)
        assert caught.value.reason == reason


def test_a_reason_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(BadImage("corrupt image", "no bytes")))
    assert (error.reason, error.detail, str(error)) == (
        "corrupt image",
        "no bytes",
        "corrupt image: no bytes",
    )
