"""Reference captions without images: all that scoring a results file needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayrl.data.annotations import (
    Record,
    caption_in,
    encodable,
    holds_textcaps,
    parse_coco,
    parse_karpathy,
)
from rayrl.data.config import DataConfig, Split
from rayrl.data.dataset import Dataset
from rayrl.data.folder import coco_records, karpathy_records
from rayrl.data.json_file import NamesTwice, read_json
from rayrl.data.load import load_split
from rayrl.data.parquet import load_shard_captions
from rayrl.data.rejections import Rejections, clean_captions


def load_references(path: Path, split: Split) -> Dataset:
    """The references of a COCO captions or TextCaps file, of one split of a Karpathy file, or of an
    object of image to captions; empty ones count, as in pycocoevalcap.  Reading an image of this
    data set raises ValueError.

    Raises FileNotFoundError or ValueError, naming the place, for anything else.
    """
    rejections = Rejections(keep_empty_captions=True)
    content = _read(path)
    if "annotations" in content or holds_textcaps(content):
        records = parse_coco(content, path, rejections, with_files=False)
    elif "images" in content:
        records = parse_karpathy(content, path, split, rejections)
    else:
        records = _plain(path, content, rejections)
    if not records:
        raise rejections.nothing_left(str(path))

    def no_image(index: int) -> bytes:
        raise ValueError(f"{path} holds the references of {records[index].image_id}, not its image")

    return Dataset(
        ids=[record.image_id for record in records],
        captions=[record.captions for record in records],
        instruction="",
        read_image=no_image,
        image_digest="",
        rejected=rejections.counts(),
        rejected_names=rejections.names(),
    )


def only(data: Dataset, images: Collection[object]) -> Dataset:
    """The part of a data set whose ids, as text, are among ``images``; in its order."""
    wanted = {str(image) for image in images}
    kept = [i for i, image in enumerate(data.ids) if image in wanted]
    original = data.read_original
    return replace(
        data,
        ids=[data.ids[i] for i in kept],
        captions=[data.captions[i] for i in kept],
        read_image=lambda index: data.read_image(kept[index]),
        read_original=None if original is None else lambda index: original(kept[index]),
    )


def load_captions(config: DataConfig, split: Split) -> list[str]:
    """The captions of the images that a split has, or of the first ones where it is limited; of
    those that cannot be used too, for none is looked at."""
    readers = {"coco": coco_records, "karpathy": karpathy_records}
    if config.source in readers:
        records, _ = readers[config.source](config, split)
        captions = [record.captions for record in records[: config.limit(split) or None]]
    elif config.source == "parquet":
        captions = load_shard_captions(config, split)
    else:
        captions = list(load_split(config, split).captions)
    return [caption for some in captions for caption in some]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of references")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, want the references: a COCO captions file, "
            'a Karpathy file, or {"image id": ["caption", ...], ...}'
        )
    return content


def _plain(path: Path, content: dict[str, Any], rejections: Rejections) -> list[Record]:
    """An object of image to captions, each a text or, as pycocoevalcap holds them, in a mapping."""
    if isinstance(content, NamesTwice):
        raise ValueError(f"{path}: image {content.twice} is there twice")
    records = []
    for image, found in content.items():
        captions = [caption_in(one) for one in found] if isinstance(found, list) else [None]
        texts = [caption for caption in captions if caption is not None]
        if len(texts) < len(captions):
            raise ValueError(f"{path}: image {image} has {found!r:.60}, want a list of captions")
        if kept := clean_captions(encodable(image, f"{path}: image"), texts, rejections):
            records.append(Record(image, "", kept))
    return records
