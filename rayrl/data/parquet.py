"""Parquet shards with columns of ids, images and captions (``data.columns``).

Ids and captions are held; images are read by row group when they are asked for, so that a data
set may be larger than memory.  A folder that :mod:`rayrl.prepare` wrote has a manifest, by which a
missing or cut-off shard is noticed; images of other shards are decoded once at the start.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress

import pyarrow.fs as pafs

from rayrl.data.config import DataConfig, Split
from rayrl.data.dataset import Dataset
from rayrl.data.images import Bounds
from rayrl.data.manifest import NAME, Manifest
from rayrl.data.rejections import Rejections
from rayrl.data.screening import screen
from rayrl.data.shards import Row, Shards, filesystem, hub_errors, line


def load_parquet(config: DataConfig, split: Split) -> Dataset:
    """The rows of a Parquet file, of a folder of shards, or of the files whose names have ``*`` for
    what differs; in the order of the names."""
    location, limit = config.path_of(split), config.limit(split)
    shards, names, manifest = _open(config, location)
    rejections = Rejections()
    if manifest:
        rows, digest = list(shards.rows(rejections, images=False)), manifest.image_digest
        rows = rows[: limit or len(rows)]
    elif shards.prepared and "*" in location:
        raise ValueError(
            f"{location}: shards that were prepared; want their folder, by whose {NAME} they are "
            "known to be whole"
        )
    elif shards.prepared and names != [filesystem(location)[1]]:
        raise ValueError(f"{location}: prepared shards without their {NAME}; copied in part?")
    else:
        rows, digest = _checked(shards, rejections, limit)
    if not rows:
        raise rejections.nothing_left(location)
    _check_unique(location, rows)
    shards.places = [row.place for row in rows]
    return Dataset(
        ids=[row.image_id for row in rows],
        captions=[row.captions for row in rows],
        instruction=config.instruction,
        read_image=shards,
        image_digest=digest,
        rejected=rejections.counts(),
        rejected_names=rejections.names(),
    )


def load_shard_captions(config: DataConfig, split: Split) -> list[tuple[str, ...]]:
    """The captions of every row of :func:`load_parquet`, also of images that cannot be used: none
    is looked at."""
    shards, _, _ = _open(config, config.path_of(split))
    rows = shards.rows(Rejections(), images=False)
    return [row.captions for row in itertools.islice(rows, config.limit(split) or None)]


def _open(config: DataConfig, location: str) -> tuple[Shards, list[str], Manifest | None]:
    """The shards of a location, their names, and their manifest, by which they are checked."""
    try:
        names, manifest = find_shards(location)
    except hub_errors() as error:
        raise ValueError(f"{location}: {line(error)}") from None
    bounds = Bounds(config.max_image_bytes, config.max_image_pixels)
    shards = Shards(location, names, bounds, config.columns)
    if manifest:
        manifest.check(location, shards.num_rows)
    return shards, names, manifest


def find_shards(location: str) -> tuple[list[str], Manifest | None]:
    """The shards of a location, sorted by name, and the manifest if it is a folder with one."""
    files, path = filesystem(location)
    kind = files.get_file_info(path).type
    if kind == pafs.FileType.NotFound and "*" in path:
        shards = sorted(_matching(files, path, pafs.FileType.File))
        if not shards:
            raise FileNotFoundError(f"{location}: no such Parquet file")
        return shards, None
    if kind == pafs.FileType.File:
        return [path], None
    if kind != pafs.FileType.Directory:
        raise FileNotFoundError(f"{location}: no such Parquet file or folder of shards")
    infos = {info.base_name: info.path for info in files.get_file_info(pafs.FileSelector(path))}
    shards = [name for name in sorted(infos) if name.endswith(".parquet") and name[0] not in "._"]
    if not shards:
        raise FileNotFoundError(f"{location}: no *.parquet file in this folder")
    manifest = None
    if NAME in infos:
        content = files.open_input_stream(infos[NAME]).readall()
        manifest = Manifest.parse(content, infos[NAME])
    return [infos[name] for name in shards], manifest


def _matching(files: pafs.FileSystem, path: str, kind: pafs.FileType) -> list[str]:
    """What there is of a kind for a path in which ``*`` stands for anything within a name; as to a
    shell, but for hidden names and for folders that cannot be read."""
    folder, _, name = path.rpartition("/")
    folders = _matching(files, folder, pafs.FileType.Directory) if "*" in folder else [folder]
    pattern = re.compile("[^/]*".join(map(re.escape, name.split("*"))))
    found = []
    for one in folders:
        begin = path[: len(path) - len(name)] if one == folder else f"{one}/"
        with suppress(PermissionError):
            if "*" not in name:
                there = files.get_file_info(f"{begin}{name}")
                found += [f"{begin}{name}"] if there.type == kind else []
                continue
            listed = pafs.FileSelector(begin or ".", allow_not_found=True)
            found += [
                f"{begin}{info.base_name}"
                for info in files.get_file_info(listed)
                if info.type == kind
                and pattern.fullmatch(info.base_name)
                and not info.base_name.startswith(".")
            ]
    return found


def _checked(shards: Shards, rejections: Rejections, limit: int) -> tuple[list[Row], str]:
    """The rows whose images decode, and a digest of those images."""
    digest = hashlib.blake2b(digest_size=16)
    rows = []
    found = shards.rows(rejections, images=True)
    for row, image_digest in screen(found, shards.check, _name, rejections, limit):
        digest.update(image_digest)
        rows.append(row._replace(image=b""))
    return rows, digest.hexdigest()


def _name(row: Row) -> str:
    return row.image_id


def _check_unique(location: str, rows: Sequence[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.image_id in seen:
            raise ValueError(f"{location}: duplicate image_id {row.image_id!r}")
        seen.add(row.image_id)
