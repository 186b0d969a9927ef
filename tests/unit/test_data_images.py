"""Encoded images: bounds, damage, orientation."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rayrl.data.images import Bounds, check_bounds, check_decodes, read_file, square_jpeg
from rayrl.data.rejections import BadImage

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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt image"),
        (b"not an image at all", "corrupt image"),
        (encoded(noise(80, 80))[:2000], "corrupt image"),
        (encoded(noise(80, 80), "PNG")[:2000], "corrupt image"),
        (png_that_claims(50, 50)[:-30], "corrupt image"),
        (encoded(noise(80, 80), "TIFF"), "corrupt image"),
        (png_that_claims(400, 251), "image of too many pixels"),
        (png_that_claims(60_000, 60_000), "image of too many pixels"),
        (bytes(1_000_001), "image of too many bytes"),
    ],
    ids=["empty", "text", "jpeg", "png", "png-end", "tiff", "wide", "bomb", "bytes"],
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
