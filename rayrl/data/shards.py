"""Parquet shards, open for reading: their rows, and any image by its place."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrl.data.config import ColumnsConfig
from rayrl.data.images import Bounds, check_bounds, check_decodes
from rayrl.data.rejections import BadImage, Rejections, clean_captions
from rayrl.data.screening import ByteCache

SCHEMA = pa.schema(
    {"image_id": pa.string(), "image": pa.binary(), "captions": pa.list_(pa.string())}
)
"""Of the shards that are written here; those of others may differ by :data:`_KINDS`."""
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
    except (pa.ArrowInvalid, *hub_errors()) as error:
        raise ValueError(f"{location}: {line(error)}") from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What the client of ``hf://`` raises where the hub does not answer or refuses; nothing where
    it was never called."""
    client = sys.modules.get("huggingface_hub.errors")
    return (client.HTTPError,) if client else ()


class Shards:
    """Open shards; called with an index, gives the image at ``places[index]``."""

    def __init__(
        self, location: str, names: Sequence[str], bounds: Bounds, columns: ColumnsConfig
    ) -> None:
        self._location, self._names, self._bounds = location, list(names), bounds
        self._columns = columns
        self.places: list[tuple[int, int, int]] = []
        files, _ = filesystem(location)
        self._open = [_open(files, name, columns) for name in names]
        self._images: ByteCache[pa.ChunkedArray] = ByteCache(CACHE_BYTES, lambda a: a.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._location, self._names, self._bounds, self._columns, self.places)

    def __call__(self, index: int) -> bytes:
        shard, group, row = self.places[index]
        column = self._columns.image
        images = self._images.get((shard, group), lambda: self._read(shard, group, column))
        data = _image(images[row])
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
        begin = 0
        for shard, file in enumerate(self._open):
            for group in range(file.metadata.num_row_groups):
                yield from self._group_rows(shard, group, begin, rejections, images=images)
                begin += file.metadata.row_group(group).num_rows

    def _group_rows(
        self, shard: int, group: int, begin: int, rejections: Rejections, *, images: bool
    ) -> Iterator[Row]:
        """The rows of a group, the first of which is number ``begin`` of all."""
        names = self._columns
        captions = self._read(shard, group, names.captions).to_pylist()
        places = (f"{begin + i:08d}" for i in range(len(captions)))
        ids = self._read(shard, group, names.image_id).to_pylist() if names.image_id else places
        column = self._read(shard, group, names.image) if images else None
        for i, (given, texts) in enumerate(zip(ids, captions, strict=True)):
            if given in (None, ""):
                raise ValueError(f"{self._where(shard, group, i)}: no {names.image_id}")
            image_id, texts = str(given), [texts] if isinstance(texts, str) else texts or []
            if kept := clean_captions(image_id, [text or "" for text in texts], rejections):
                image = _image(column[i]) if column is not None else b""
                yield Row(image_id, kept, (shard, group, i), image)

    def _read(self, shard: int, group: int, column: str) -> pa.ChunkedArray:
        try:
            values = self._open[shard].read_row_group(group, columns=[column]).column(column)
            values.validate(full=True)
        except (pa.ArrowException, OSError, *hub_errors()) as error:
            where = f"{self._names[shard]}: row group {group}, column {column}"
            raise ValueError(f"{where}: {line(error)}") from None
        return values

    def _where(self, shard: int, group: int, row: int) -> str:
        return f"{self._names[shard]}: row {row} of row group {group}"


def _reopen(
    location: str,
    names: list[str],
    bounds: Bounds,
    columns: ColumnsConfig,
    places: list[tuple[int, int, int]],
) -> Shards:
    shards = Shards(location, names, bounds, columns)
    shards.places = places
    return shards


def _open(files: pafs.FileSystem, name: str, columns: ColumnsConfig) -> pq.ParquetFile:
    try:
        opened = pq.ParquetFile(files.open_input_file(name))
    except (pa.ArrowException, OSError, *hub_errors()) as error:
        raise ValueError(f"{name}: not a Parquet file: {line(error)}") from None
    schema = opened.schema_arrow
    for key, (fits, want) in _KINDS.items():
        column = getattr(columns, key)
        if not column:
            continue
        if column not in schema.names:
            raise ValueError(
                f"{name}: no column {column}; it has {', '.join(schema.names)}: say which one is "
                f"meant by data.columns.{key}"
            )
        if not fits(schema.field(column).type):
            raise ValueError(f"{name}: column {column} is {schema.field(column).type}, want {want}")
    return opened


def _image(value: pa.Scalar) -> bytes:
    """The bytes of a row of the image column; none where they are null."""
    found = value.as_py()
    if isinstance(found, dict):
        found = found["bytes"]
    return found or b""


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(_plain(kind))


def _is_image(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and not types.is_struct(kind[place].type) and _is_image(kind[place].type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _are_captions(kind: pa.DataType) -> bool:
    types = pa.types
    lists = (
        *(types.is_list, types.is_large_list, types.is_fixed_size_list),
        *(types.is_list_view, types.is_large_list_view),
    )
    return _is_text(kind.value_type) if any(fits(kind) for fits in lists) else _is_text(kind)


_KINDS: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "image_id": (_is_name, "text or whole numbers"),
    "image": (_is_image, "bytes, or a struct that has them in a field bytes"),
    "captions": (_are_captions, "lists of texts, or a text"),
}
"""What each of data.columns may be, in any of the encodings that Arrow has for it."""


def line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
