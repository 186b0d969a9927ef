"""Encoded images: bounded before they are decoded, and re-encoded to one size."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from rayrl.data.config import MAX_PIXELS
from rayrl.data.rejections import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is decoded.  Not every format of Pillow: some run other programs or embed others."""
JPEG_QUALITY = 92
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)


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


def check_decodes(data: bytes, bounds: Bounds) -> None:
    """Raise BadImage unless the image is within bounds and decodes to its last row."""
    with _opened(data, bounds) as image:
        image.draft("RGB", (1, 1))  # a JPEG at an eighth: every coefficient is still parsed
        image.load()


def square_jpeg(data: bytes, size: int, bounds: Bounds, quality: int = JPEG_QUALITY) -> bytes:
    """The image as an RGB JPEG of ``size`` x ``size`` pixels, turned the way EXIF says.

    The whole image is kept and its sides are scaled, as captioners' own processors do; cropping
    would cut away what captions speak of.  Raises BadImage.
    """
    with _opened(data, bounds) as image:
        image.draft("RGB", (2 * size, 2 * size))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        resized = upright.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def decode(data: bytes) -> Image.Image:
    """The image in RGB, as a model's processor takes it.

    The loaders have bounded it already; this is the last check before pixels are allocated, for
    images that came another way.  Raises BadImage, a ValueError."""
    with _opened(data, Bounds(sys.maxsize, MAX_PIXELS)) as image:
        return image.convert("RGB")


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
    except _DECODE_ERRORS as error:
        raise BadImage("corrupt image", " ".join(str(error).split())) from None


def _check_bytes(count: int, bounds: Bounds) -> None:
    if count > bounds.max_bytes:
        raise BadImage("image of too many bytes", f"more than {bounds.max_bytes}")
    if not count:
        raise BadImage("corrupt image", "no bytes")
