"""Annotation files: COCO captions json, TextCaps' json and Karpathy's ``dataset_*.json``.

A file that is not what it should be is an error that names the place; an image without usable
captions is rejected and counted.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

from rayrl.data.config import Split
from rayrl.data.json_file import read_json
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


def read_coco(path: Path, rejections: Rejections) -> list[Record]:
    """The records of a COCO captions file, in the order of its ``images``, or of a TextCaps one."""
    return parse_coco(_read(path), path, rejections)


def parse_coco(
    content: Any, path: Path, rejections: Rejections, *, with_files: bool = True
) -> list[Record]:
    """:func:`read_coco` of what ``path`` holds.  Without files images need no ``file_name``, as in
    files that are made to score captions against."""
    content = _typed(content, dict, f"{path}")
    if holds_textcaps(content):
        return _parse_textcaps(content, path, rejections)
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
        judged = [reason for key, reason in _JUDGED.items() if annotation.get(key) is True]
        if image_id not in captions:
            rejections.add(image_id, "caption of an unlisted image", where)
        elif judged:
            rejections.add(image_id, judged[0], where)
        else:
            captions[image_id].append(caption)
    return [
        Record(image_id, file, kept)
        for image_id, file in files.items()
        if (kept := clean_captions(image_id, captions[image_id], rejections))
    ]


_JUDGED = {"is_rejected": "rejected caption", "is_precanned": "canned caption"}
"""What VizWiz says of captions that are spam, or a set phrase for a picture that shows nothing;
its own evaluation leaves them out."""


def holds_textcaps(content: Any) -> bool:
    """Whether this is a TextCaps file, and not one as COCO writes them."""
    return isinstance(content, dict) and "data" in content and "annotations" not in content


def _parse_textcaps(content: Any, path: Path, rejections: Rejections) -> list[Record]:
    """An entry of ``data`` is one caption, with all those of its image in ``reference_strs``.
    Images lie at ``IMAGE_ID.jpg``."""
    captions: dict[str, list[str]] = {}
    for i, entry in enumerate(_field(content, "data", list, f"{path}")):
        where = f"{path}: data[{i}]"
        image_id = _identity(entry, "image_id", where)
        _inside(image_id, where)
        of_image = _texts(_field(entry, "reference_strs", list, where), f"{where}.reference_strs")
        known = captions.setdefault(image_id, of_image)
        known += [text for text in of_image if text not in known]
    return [
        Record(image_id, f"{image_id}.jpg", kept)
        for image_id, of_image in captions.items()
        if (kept := clean_captions(image_id, of_image, rejections))
    ]


def read_karpathy(path: Path, split: Split, rejections: Rejections) -> list[Record]:
    """The records of one split of a Karpathy file; ``restval`` belongs to training.

    Ids are COCO's where the file has them, else the file names without their ending.  Captions are
    the ``raw`` sentences, or the joined ``tokens`` of a sentence that has no raw form.
    """
    return parse_karpathy(_read(path), path, split, rejections)


def parse_karpathy(content: Any, path: Path, split: Split, rejections: Rejections) -> list[Record]:
    """:func:`read_karpathy` of what ``path`` holds."""
    content = _typed(content, dict, f"{path}")
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
    return " ".join(_texts(_field(sentence, "tokens", list, where), f"{where}.tokens"))


def caption_in(value: Any) -> str | None:
    """A caption that is given as a text or, as pycocoevalcap does, as ``{"caption": text}``."""
    if isinstance(value, dict):
        value = value.get("caption")
    return value if isinstance(value, str) else None


def _texts(values: list[Any], where: str) -> list[str]:
    return [_typed(value, str, f"{where}[{i}]") for i, value in enumerate(values)]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    return read_json(path)


def _inside(name: str, where: str) -> str:
    """``name`` if it stays below the image folder.  Judged by its text: links that the owner of
    the folder has put there are the owner's business, names in a downloaded file are not."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    escapes = posix.is_absolute() or windows.anchor or ".." in posix.parts + windows.parts
    if not name or escapes or "\0" in name:
        raise ValueError(f"{where}: file name {name!r} is not inside the image folder")
    return encodable(name, where)


def _identity(item: Any, name: str, where: str) -> str:
    value = _typed(item, dict, where).get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables write numbers of a column that has gaps
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: {name} is {_shown(value)}, want a whole number or a text")
    return encodable(str(value), f"{where}: {name}")


def encodable(text: str, where: str) -> str:
    """``text`` if it can be written as UTF-8, which half a surrogate pair cannot, as JSON that was
    cut may hold it.  Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {text!r} holds half a character") from None
    return text


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
