"""Annotated image folders.  Every image is converted once at the start, to know that it can be.

That costs milliseconds an image on every start; for a large data set write shards once instead
(``jobs/prepare_coco.py``).
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from rayrl.data.annotations import Record, read_coco, read_karpathy
from rayrl.data.config import DataConfig, Split
from rayrl.data.dataset import Dataset
from rayrl.data.images import Bounds, read_file, square_jpeg
from rayrl.data.rejections import Rejections
from rayrl.data.screening import ByteCache, screen

logger = logging.getLogger(__name__)
CACHE_BYTES = 512 * 1024**2
MANY = 20_000


def load_coco(config: DataConfig, split: Split) -> Dataset:
    """A COCO captions file and its image folder."""
    return _load(config, split, *coco_records(config, split))


def load_karpathy(config: DataConfig, split: Split) -> Dataset:
    """One split of a Karpathy file and the image folder that its ``filepath``s start in."""
    return _load(config, split, *karpathy_records(config, split))


def coco_records(config: DataConfig, split: Split) -> tuple[list[Record], Rejections]:
    """The annotated images of a split, and the annotations that cannot be used."""
    rejections = Rejections()
    return read_coco(Path(config.path_of(split)), rejections), rejections


def karpathy_records(config: DataConfig, split: Split) -> tuple[list[Record], Rejections]:
    """The annotated images of a split, and the annotations that cannot be used."""
    rejections = Rejections()
    return read_karpathy(Path(config.path_of(split)), split, rejections), rejections


def image_folder(config: DataConfig, split: Split) -> Path:
    """The folder of the split's images.  Raises FileNotFoundError."""
    folder = Path(config.images_of(split))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such image folder")
    return folder


def _load(
    config: DataConfig, split: Split, records: list[Record], rejections: Rejections
) -> Dataset:
    if not records:
        raise rejections.nothing_left(config.path_of(split))
    folder = image_folder(config, split)
    limit = config.limit(split)
    if min(len(records), limit or len(records)) > MANY:
        logger.info("checking %d images; jobs/prepare_coco.py does it once", len(records))
    images = FolderImages(folder, config)
    digest = hashlib.blake2b(digest_size=16)
    kept: list[Record] = []
    named = screen(records, images.convert, lambda record: record.image_id, rejections, limit)
    for record, data in named:
        images.add(record, data)
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
        kept.append(record)
    if not kept:
        raise rejections.nothing_left(f"{folder}")
    return Dataset(
        ids=[record.image_id for record in kept],
        captions=[record.captions for record in kept],
        instruction=config.instruction,
        read_image=images,
        read_original=images.original,
        image_digest=digest.hexdigest(),
        rejected=rejections.counts(),
        rejected_names=rejections.names(),
    )


class FolderImages:
    """Reads the image of an index as a square JPEG; keeps what fits in ``CACHE_BYTES``."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self._folder, self._size = folder, config.image_size
        self._bounds = Bounds(config.max_image_bytes, config.max_image_pixels)
        self._records: list[Record] = []
        self._cache: ByteCache[bytes] = ByteCache(CACHE_BYTES, len)

    def __getstate__(self) -> dict[str, Any]:
        # Whoever reads images in another process keeps what he reads.
        return {**self.__dict__, "_cache": ByteCache(CACHE_BYTES, len)}

    def __call__(self, index: int) -> bytes:
        return self._cache.get(index, lambda: self.convert(self._records[index]))

    def original(self, index: int) -> bytes:
        """The file of an index as it lies there.  Raises BadImage."""
        return read_file(self._folder / self._records[index].file, self._bounds)

    def add(self, record: Record, data: bytes) -> None:
        """Make ``record`` the next index; ``data`` is its converted image."""
        self._cache.put(len(self._records), data)
        self._records.append(record)

    def convert(self, record: Record) -> bytes:
        """The image of a record at the configured size.  Raises BadImage."""
        data = read_file(self._folder / record.file, self._bounds)
        return square_jpeg(data, self._size, self._bounds)
