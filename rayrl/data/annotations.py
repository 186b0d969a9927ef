"""Annotation files: COCO captions json and Karpathy's ``dataset_*.json``.

A file that is not what it should be is an error that names the place; an image without usable
captions is rejected and counted.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

from rayrl.data.config import Split
from rayrl.data.rejections import Rejections, clean_captions

T = TypeVar("T")

KARPATHY_SPLITS: dict[Split, tuple[str, ...]] = {
    # The part of COCO's validation set that nobody evaluates on trains along.
    "train": ("train", "restval"),
    "val": ("val",),
    "test": ("test",),
}


class Record(NamedTuple):
    """An annotated image: its id, its file below the image folder, its captions."""

    image_id: str
    file: str
    captions: tuple[str, ...]


def read_coco(path: Path, rejections: Rejections, *, with_files: bool = True) -> list[Record]:
    """The records of a COCO captions file, in the order of its ``images``.  Without files they
    need no ``file_name``, as in files that are made to score captions against."""
    content = _typed(_read_json(path), dict, f"{path}")
    files: dict[str, str] = {}
    for i, image in enumerate(_field(content, "images", list, f"{path}")):
        where = f"{path}: images[{i}]"
        image_id = _identity(image, "id", where)
        if image_id in files:
            raise ValueError(f"{where}: duplicate id {image_id}")
        files[image_id] = ""
        if with_files:
            files[image_id] = _inside(_field(image, "file_name", str, where), where)
    captions: dict[str, list[str]] = {image_id: [] for image_id in files}
    for i, annotation in enumerate(_field(content, "annotations", list, f"{path}")):
        where = f"{path}: annotations[{i}]"
        image_id = _identity(annotation, "image_id", where)
        caption = _field(annotation, "caption", str, where)
        if image_id in captions:
            captions[image_id].append(caption)
        else:
            rejections.add(image_id, "caption of an unlisted image", where)
    return [
        Record(image_id, file, kept)
        for image_id, file in files.items()
        if (kept := clean_captions(image_id, captions[image_id], rejections))
    ]


def read_karpathy(path: Path, split: Split, rejections: Rejections) -> list[Record]:
    """The records of one split of a Karpathy file; ``restval`` belongs to training.

    Ids are COCO's where the file has them, else the file names without their ending.  Captions are
    the ``raw`` sentences, or the joined ``tokens`` of a sentence that has no raw form.
    """
    content = _typed(_read_json(path), dict, f"{path}")
    records: dict[str, Record] = {}
    splits: set[str] = set()
    for i, image in enumerate(_field(content, "images", list, f"{path}")):
        where = f"{path}: images[{i}]"
        name = _field(image, "filename", str, where)
        folder = _field(image, "filepath", str, where) if "filepath" in image else ""
        file = _inside(str(PurePosixPath(folder) / name), where)
        splits.add(_field(image, "split", str, where))
        if image["split"] not in KARPATHY_SPLITS[split]:
            continue
        image_id = _identity(image, "cocoid", where) if "cocoid" in image else Path(name).stem
        if image_id in records:
            raise ValueError(f"{where}: duplicate id {image_id}")
        sentences = _field(image, "sentences", list, where)
        captions = [_sentence(s, f"{where}.sentences[{j}]") for j, s in enumerate(sentences)]
        records[image_id] = Record(image_id, file, clean_captions(image_id, captions, rejections))
    if not records:
        raise ValueError(
            f"{path}: no image of split {split}; its splits are {', '.join(sorted(splits)) or '-'}"
        )
    return [record for record in records.values() if record.captions]


def _sentence(sentence: Any, where: str) -> str:
    sentence = _typed(sentence, dict, where)
    if "raw" in sentence:
        return _field(sentence, "raw", str, where)
    tokens = _field(sentence, "tokens", list, where)
    return " ".join(_typed(token, str, f"{where}.tokens[{k}]") for k, token in enumerate(tokens))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: not UTF-8: byte 0x{byte:02x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not annotations: nested too deeply") from None


def _inside(name: str, where: str) -> str:
    """``name`` if it stays below the image folder.  Judged by its text: links that the owner of
    the folder has put there are the owner's business, names in a downloaded file are not."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    escapes = posix.is_absolute() or windows.anchor or ".." in posix.parts + windows.parts
    if not name or escapes or "\0" in name:
        raise ValueError(f"{where}: file name {name!r} is not inside the image folder")
    return name


def _identity(item: Any, name: str, where: str) -> str:
    value = _typed(item, dict, where).get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: {name} is {_shown(value)}, want a number or a text")
    return str(value)


def _field(item: Any, name: str, kind: type[T], where: str) -> T:
    item = _typed(item, dict, where)
    if name not in item:
        raise ValueError(f"{where}: no {name}; it has {', '.join(map(str, item)) or 'no fields'}")
    return _typed(item[name], kind, f"{where}.{name}")


def _typed(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {_shown(value)}, want a {_NAMES[kind]}")
    return value


_NAMES: dict[type, str] = {dict: "mapping", list: "list", str: "text"}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
