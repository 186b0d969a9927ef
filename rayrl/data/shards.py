"""Parquet shards, open for reading: their rows, and any image by its place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrl.data.images import Bounds, check_bounds, check_decodes
from rayrl.data.rejections import BadImage, Rejections, clean_captions
from rayrl.data.screening import ByteCache

SCHEMA = pa.schema(
    {"image_id": pa.string(), "image": pa.binary(), "captions": pa.list_(pa.string())}
)
PREPARED = {b"rayrl": b"prepared"}
"""Marks a shard as part of a folder with a manifest."""
CACHE_BYTES = 256 * 1024**2


class Row(NamedTuple):
    """An image's place in the shards; ``image`` only while it is being checked."""

    image_id: str
    captions: tuple[str, ...]
    place: tuple[int, int, int]
    """Shard, row group, row."""
    image: bytes = b""


def filesystem(location: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.  Raises ValueError."""
    if "://" not in location:
        return pafs.LocalFileSystem(use_mmap=True), location
    try:
        return pafs.FileSystem.from_uri(location)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{location}: {error}") from None


class Shards:
    """Open shards; called with an index, gives the image at ``places[index]``."""

    def __init__(self, location: str, names: Sequence[str], bounds: Bounds) -> None:
        self._location, self._names, self._bounds = location, list(names), bounds
        self.places: list[tuple[int, int, int]] = []
        files, _ = filesystem(location)
        self._open = [_open(files, name) for name in names]
        self._images: ByteCache[pa.ChunkedArray] = ByteCache(CACHE_BYTES, lambda a: a.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._location, self._names, self._bounds, self.places)

    def __call__(self, index: int) -> bytes:
        shard, group, row = self.places[index]
        images = self._images.get((shard, group), lambda: self._read(shard, group, "image"))
        data: bytes = images[row].as_py() or b""
        try:
            check_bounds(data, self._bounds)
        except BadImage as error:
            raise ValueError(f"{self._where(shard, group, row)}: {error}") from None
        return data

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each shard, by file name."""
        return {
            name.rpartition("/")[2]: file.metadata.num_rows
            for name, file in zip(self._names, self._open, strict=True)
        }

    @property
    def prepared(self) -> bool:
        """Whether any shard was written as part of a folder with a manifest."""
        return any(
            (file.schema_arrow.metadata or {}).get(key) == value
            for file in self._open
            for key, value in PREPARED.items()
        )

    def check(self, row: Row) -> bytes:
        """The digest of a row's image.  Raises BadImage if it cannot be decoded."""
        check_decodes(row.image, self._bounds)
        return hashlib.blake2b(row.image, digest_size=16).digest()

    def rows(self, rejections: Rejections, *, images: bool) -> Iterator[Row]:
        """All rows that have captions, with or without their images."""
        for shard, file in enumerate(self._open):
            for group in range(file.metadata.num_row_groups):
                yield from self._group_rows(shard, group, rejections, images=images)

    def _group_rows(
        self, shard: int, group: int, rejections: Rejections, *, images: bool
    ) -> Iterator[Row]:
        ids = self._read(shard, group, "image_id").to_pylist()
        captions = self._read(shard, group, "captions").to_pylist()
        column = self._read(shard, group, "image") if images else None
        for i, (image_id, texts) in enumerate(zip(ids, captions, strict=True)):
            if not image_id:
                raise ValueError(f"{self._where(shard, group, i)}: no image_id")
            kept = clean_captions(image_id, [text or "" for text in texts or []], rejections)
            if kept:
                image = (column[i].as_py() or b"") if column is not None else b""
                yield Row(image_id, kept, (shard, group, i), image)

    def _read(self, shard: int, group: int, column: str) -> pa.ChunkedArray:
        try:
            values = self._open[shard].read_row_group(group, columns=[column]).column(column)
            values.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            where = f"{self._names[shard]}: row group {group}, column {column}"
            raise ValueError(f"{where}: {_line(error)}") from None
        return values

    def _where(self, shard: int, group: int, row: int) -> str:
        return f"{self._names[shard]}: row {row} of row group {group}"


def _reopen(
    location: str, names: list[str], bounds: Bounds, places: list[tuple[int, int, int]]
) -> Shards:
    shards = Shards(location, names, bounds)
    shards.places = places
    return shards


def _open(files: pafs.FileSystem, name: str) -> pq.ParquetFile:
    try:
        opened = pq.ParquetFile(files.open_input_file(name))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a Parquet file: {_line(error)}") from None
    schema = opened.schema_arrow
    for want in SCHEMA:
        if want.name not in schema.names:
            raise ValueError(f"{name}: no column {want.name}; it has {', '.join(schema.names)}")
        got = schema.field(want.name).type
        if not _KINDS[want.name](got):
            raise ValueError(f"{name}: column {want.name} is {got}, want {want.type}")
    return opened


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


_KINDS: Mapping[str, Callable[[pa.DataType], bool]] = {
    "image_id": _is_text,
    "image": lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
    "captions": lambda kind: (
        (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type)
    ),
}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
