"""COCO or Karpathy annotations and an image folder, turned into Parquet shards with Ray Data.

Images are read, turned upright, resized and re-encoded in parallel; what cannot be used is named in
``rejected.jsonl``.  A split appears under its final name only when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rayrl.data.annotations import Record
from rayrl.data.config import DataConfig, Split
from rayrl.data.folder import coco_records, image_folder, karpathy_records
from rayrl.data.images import Bounds, read_file, square_jpeg
from rayrl.data.manifest import NAME, Manifest
from rayrl.data.rejections import BadImage, Rejections
from rayrl.data.shards import PREPARED, SCHEMA
from rayrl.section import local_path

READERS: Mapping[str, Callable[[DataConfig, Split], tuple[list[Record], Rejections]]] = {
    "coco": coco_records,
    "karpathy": karpathy_records,
}
SPLITS: Mapping[str, tuple[Split, ...]] = {
    "coco": ("train", "val"),
    "karpathy": ("train", "val", "test"),
}
REJECTED = "rejected.jsonl"
ROWS_PER_SHARD = 8192
ROWS_PER_GROUP = 64
"""A random image costs reading its row group."""
BATCH = 64


@dataclass(frozen=True)
class Summary:
    """What became of a split."""

    folder: Path
    kept: int
    rejected: Mapping[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.rejected.items())
        skipped = f"; skipped: {counts} (named in {REJECTED})" if counts else ""
        return f"{self.folder}: {self.kept} images{skipped}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 and one line where the input cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        config = DataConfig(
            source=args.source,
            path=args.path,
            images=args.images,
            image_size=args.image_size,
            max_train=args.max_images,
            max_val=args.max_images,
        )
    except ValidationError as error:
        first = error.errors()[0]
        names = [{"max_train": "max_images"}.get(str(name), name) for name in first["loc"][:1]]
        option = "".join(f"--{name} ".replace("_", "-") for name in names)
        parser.error(option + str(first["msg"]).removeprefix("Value error, "))
    started = False
    try:
        work = _read_all(config, args.splits or SPLITS[args.source], args.output)
        # Imported late: a mistake is answered at once.
        import ray

        from rayrl.actors.cluster import connect

        started = connect(args.num_cpus)
        for split, records, rejections in work:
            print(prepare_split(config, split, records, rejections, args.output / split))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if started:
            ray.shutdown()


def prepare_split(
    config: DataConfig, split: Split, records: list[Record], rejections: Rejections, output: Path
) -> Summary:
    """Write the shards of one split to ``output``, which must not exist.  Needs a running Ray.

    Raises ValueError if no image can be used; nothing is left behind then, or after any error.
    """
    if output.exists():
        raise FileExistsError(f"{output}: already there; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-partial-", dir=output.parent))
    try:
        batches = _converted(config, image_folder(config, split), records)
        kept = _write(_with_progress(batches, len(records), split), partial, config, rejections)
        if not kept:
            raise rejections.nothing_left(config.path_of(split))
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Summary(output, kept, rejections.counts())


def _read_all(
    config: DataConfig, splits: Sequence[Split], output: Path
) -> list[tuple[Split, list[Record], Rejections]]:
    """All annotations first: a mistake in the last file should not cost the work on the others."""
    if config.same_for(*splits):
        raise ValueError(
            f"--path {config.path}: {' and '.join(splits)} would be the same images; want "
            "{split} in it, as in annotations/captions_{split}2014.json, or one of them alone, "
            f"as in --splits {splits[0]}"
        )
    work = []
    for split in splits:
        image_folder(config, split)
        if (output / split).exists():
            raise FileExistsError(f"{output / split}: already there; remove it first")
        records, rejections = READERS[config.source](config, split)
        if not records:
            raise rejections.nothing_left(config.path_of(split))
        work.append((split, records[: config.limit(split) or len(records)], rejections))
    return work


def _converted(config: DataConfig, folder: Path, records: list[Record]) -> Iterator[pa.Table]:
    """Batches of (image_id, image, captions, reason, detail), in the order of the records."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [record._asdict() for record in records]
    convert = partial(
        _convert,
        folder=folder,
        size=config.image_size,
        bounds=Bounds(config.max_image_bytes, config.max_image_pixels),
    )
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // BATCH)).map_batches(
        convert, batch_size=BATCH, batch_format="pyarrow"
    )
    return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def _convert(batch: pa.Table, *, folder: Path, size: int, bounds: Bounds) -> pa.Table:
    images: list[bytes | None] = []
    problems: list[tuple[str, str]] = []
    for file in batch.column("file").to_pylist():
        try:
            images.append(square_jpeg(read_file(folder / file, bounds), size, bounds))
            problems.append(("", ""))
        except BadImage as error:
            images.append(None)
            problems.append((error.reason, error.detail))
    return pa.table(
        {
            "image_id": batch.column("image_id"),
            "image": pa.array(images, pa.binary()),
            "captions": batch.column("captions"),
            "reason": pa.array([reason for reason, _ in problems], pa.string()),
            "detail": pa.array([detail for _, detail in problems], pa.string()),
        }
    )


def _with_progress(batches: Iterator[pa.Table], total: int, split: Split) -> Iterator[pa.Table]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(split, total=total)
        for batch in batches:
            yield batch
            progress.advance(task, batch.num_rows)


def _write(
    batches: Iterator[pa.Table], folder: Path, config: DataConfig, rejections: Rejections
) -> int:
    """Write shards, the list of rejections and, last, the manifest; returns the rows written."""
    digest = hashlib.blake2b(digest_size=16)
    shards: dict[str, int] = {}
    for rows in _blocks(_usable(batches, rejections), ROWS_PER_SHARD):
        for image in rows.column("image"):
            digest.update(hashlib.blake2b(image.as_py(), digest_size=16).digest())
        name = f"shard-{len(shards):05d}.parquet"
        # JPEG does not compress any further.
        pq.write_table(
            rows.replace_schema_metadata(PREPARED),
            folder / name,
            row_group_size=ROWS_PER_GROUP,
            compression={"image_id": "zstd", "captions": "zstd", "image": "none"},
            use_dictionary=False,
        )
        shards[name] = rows.num_rows
    manifest = Manifest(
        shards=shards,
        image_size=config.image_size,
        image_digest=digest.hexdigest(),
        rejected=rejections.counts(),
    )
    lines = [json.dumps(rejection._asdict(), ensure_ascii=False) for rejection in rejections]
    (folder / REJECTED).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / NAME).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    _sync(folder)
    return sum(shards.values())


def _usable(batches: Iterator[pa.Table], rejections: Rejections) -> Iterator[pa.Table]:
    for batch in batches:
        good = [not reason for reason in batch.column("reason").to_pylist()]
        for row in batch.filter(pa.array([not ok for ok in good])).to_pylist():
            rejections.add(row["image_id"], row["reason"], row["detail"])
        yield batch.filter(pa.array(good)).select(SCHEMA.names).cast(SCHEMA)


def _blocks(tables: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``num_rows``, the last one shorter."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(part.num_rows for part in held) >= num_rows:
            joined = pa.concat_tables(held)
            yield joined.slice(0, num_rows)
            held = [joined.slice(num_rows)]
    if any(part.num_rows for part in held):
        yield pa.concat_tables(held)


def _sync(folder: Path) -> None:
    """To the disk before the rename: a power cut must not leave the final name on half files."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_coco.py",
        description="Turn COCO or Karpathy annotations and an image folder into Parquet shards.",
        epilog="Example: prepare_coco.py --source karpathy --path dataset_coco.json --images coco "
        "--image-size 512 --output datasets/coco. Then train with --data.source parquet "
        "--data.path 'datasets/coco/{split}'.",
    )
    add: Any = parser.add_argument
    add("--source", choices=sorted(READERS), required=True, help="the kind of annotations")
    add(
        "--path",
        required=True,
        help="the annotation file; {split} in it stands for the split, as in "
        "annotations/captions_{split}2014.json",
    )
    add("--images", required=True, help="the image folder; {split} may be in it too")
    add(
        "--output",
        type=local_path,
        required=True,
        help="folder to write; one folder a split is made",
    )
    add(
        "--image-size",
        type=int,
        default=224,
        help="pixels a side, as the model looks at (default: %(default)s)",
    )
    add(
        "--splits",
        nargs="+",
        choices=get_args(Split),
        default=None,
        help="default: all that the source has",
    )
    add("--max-images", type=int, default=0, help="only the first so many of each split")
    add("--num-cpus", type=int, default=os.cpu_count() or 1, help="of a local Ray")
    return parser
