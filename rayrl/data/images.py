"""Encoded images: bounded before they are decoded, and re-encoded to one size."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from rayrl.data.config import MAX_PIXELS
from rayrl.data.rejections import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is decoded.  Not every format of Pillow: some run other programs or embed others."""
_BEGINNINGS = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"GIF8": "image/gif",
}
"""How files in these formats begin, and their media types."""
JPEG_QUALITY = 92
_DECODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for damaged files, by what its parsers make of them."""
_TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by the orientation that EXIF gives it."""


class Bounds(NamedTuple):
    """The largest image that is read, and the largest that is decoded."""

    max_bytes: int
    max_pixels: int


def read_file(path: Path, bounds: Bounds) -> bytes:
    """The bytes of an image file.  Raises BadImage if it is missing, unreadable or too large."""
    try:
        if not path.is_file():
            raise BadImage("missing image", f"{path}: no such file")
        with path.open("rb") as file:
            data = file.read(bounds.max_bytes + 1)
    except OSError as error:
        raise BadImage("unreadable image", f"{path}: {error.strerror}") from None
    _check_bytes(len(data), bounds)
    return data


def check_bounds(data: bytes, bounds: Bounds) -> None:
    """Raise BadImage if the image is too large in bytes or, by its header, in pixels."""
    with _opened(data, bounds):
        pass


def media_type(data: bytes) -> str:
    """That of an encoded image, by how it begins; "" for another format."""
    return next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), "")


def check_decodes(data: bytes, bounds: Bounds) -> None:
    """Raise BadImage unless the image is within bounds and decodes to its last row."""
    with _opened(data, bounds) as image:
        image.draft("RGB", (1, 1))  # a JPEG at an eighth: every coefficient is still parsed
        image.load()


def square_jpeg(data: bytes, size: int, bounds: Bounds, quality: int = JPEG_QUALITY) -> bytes:
    """The image as an RGB JPEG of ``size`` x ``size`` pixels, upright and on white as of
    :func:`decode`.

    The whole image is kept and its sides are scaled, as captioners' own processors do; cropping
    would cut away what captions speak of.  Raises BadImage.
    """
    with _opened(data, bounds) as image:
        image.draft("RGB", (2 * size, 2 * size))
        resized = _upright_rgb(image).resize(
            (size, size), Image.Resampling.BICUBIC, reducing_gap=3.0
        )
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def decode(data: bytes) -> Image.Image:
    """The image in RGB, as a model's processor takes it: turned the way EXIF says, on white where
    it is transparent, and 16-bit greys by their upper 8 bits.

    The loaders have bounded it already; this is the last check before pixels are allocated, for
    images that came another way.  Raises BadImage, a ValueError."""
    with _opened(data, Bounds(sys.maxsize, MAX_PIXELS)) as image:
        return _upright_rgb(image)


def _upright_rgb(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I"):  # 16-bit greys, which convert() cuts off at 255
        image = image.point(lambda level: level / 256).convert("L")
        image.info.pop("transparency", None)  # a level of 16 bits
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> object:
    """The orientation by EXIF; None where there is none, or none that can be read."""
    image.load()  # what follows the pixels of a file is known then
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        return None


@contextmanager
def _opened(data: bytes, bounds: Bounds) -> Iterator[Image.Image]:
    """The image, header read; what goes wrong in the block is reported as a corrupt image."""
    _check_bytes(len(data), bounds)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > bounds.max_pixels:
                raise BadImage(
                    "image of too many pixels",
                    f"{width} x {height}, more than {bounds.max_pixels}",
                )
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("image of too many pixels", str(error)) from None
    except UnidentifiedImageError:
        if media_type(data):
            raise BadImage("corrupt image", "no header that can be read") from None
        raise BadImage("image of another format", "want JPEG, PNG, WebP, BMP or GIF") from None
    except _DECODE_ERRORS as error:
        detail = " ".join(str(error).split())
        raise BadImage("corrupt image", detail or type(error).__name__) from None


def _check_bytes(count: int, bounds: Bounds) -> None:
    if count > bounds.max_bytes:
        raise BadImage("image of too many bytes", f"more than {bounds.max_bytes}")
    if not count:
        raise BadImage("corrupt image", "no bytes")
