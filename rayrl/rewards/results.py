"""COCO results files, and their match with references: every way to get it wrong is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrl.data.annotations import caption_in
from rayrl.data.json_file import NamesTwice, read_json
from rayrl.data.rejections import whole_characters

ImageId = int | str


def read_results(path: str | Path) -> dict[ImageId, str]:
    """A results file: a JSON list of ``{"image_id": ..., "caption": ...}``, one for each image, or
    an object of image to caption, which may be in a list of one and in ``{"caption": ...}``, as
    pycocoevalcap holds it.  ValueError names the first wrong entry."""
    loaded = read_json(Path(path))
    if isinstance(loaded, dict):
        if isinstance(loaded.get("images"), list):
            raise ValueError(f"{path}: holds annotations, want results; is it for --references?")
        if isinstance(loaded, NamesTwice):
            raise ValueError(_two_captions(path, loaded.twice))
        loaded = [{"image_id": image, "caption": _only(given)} for image, given in loaded.items()]
    if not isinstance(loaded, list):
        raise ValueError(f"{path}: holds {type(loaded).__name__}, want a list of results")
    captions: dict[ImageId, str] = {}
    for i, entry in enumerate(loaded):
        if not isinstance(entry, dict) or not {"image_id", "caption"} <= set(entry):
            raise ValueError(f"{path}: entry {i} is {entry!r:.60}, want image_id and caption")
        image, caption = entry["image_id"], entry["caption"]
        if isinstance(image, float) and image.is_integer():
            image = int(image)
        if not isinstance(image, int | str) or isinstance(image, bool):
            raise ValueError(f"{path}: entry {i} has image_id {image!r:.60}, want an int or a str")
        if not isinstance(caption, str):
            raise ValueError(f"{path}: image {image} has caption {caption!r:.60}, want one str")
        if image in captions:
            raise ValueError(_two_captions(path, image))
        captions[image] = whole_characters(caption)
    return captions


def _only(given: Any) -> Any:
    """The caption of an image; what was given where it is not one."""
    one = given[0] if isinstance(given, list) and len(given) == 1 else given
    caption = caption_in(one)
    return given if caption is None else caption


def _two_captions(path: str | Path, image: ImageId) -> str:
    return f"{path}: image {image} has two captions, want one for each image"


def write_results(path: str | Path, captions: Mapping[ImageId, str]) -> None:
    """The file that the COCO server takes; ids that read back as the same number are written as
    numbers (`007` is a name)."""
    entries = [
        {"image_id": int(image) if _is_number(str(image)) else image, "caption": caption}
        for image, caption in captions.items()
    ]
    Path(path).write_text(json.dumps(entries))


def match(
    captions: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]]
) -> tuple[list[str], list[Sequence[str]]]:
    """Captions and references in the order of the references; ids 7 and "7" are the same.

    ValueError unless both have the same images, naming some that are missing or unknown.
    """
    by_text = {str(image): caption for image, caption in captions.items()}
    wanted = {str(image): some for image, some in references.items()}
    missing = [image for image in wanted if image not in by_text]
    unknown = [image for image in by_text if image not in wanted]
    if missing:
        todo = (
            f", and {len(unknown)} captions are of images without references, such as "
            f"{unknown[:3]}: are they of another --split?"
            if unknown
            else "; caption them, or score the captioned images alone with --subset"
        )
        raise ValueError(
            f"{len(missing)} of {len(wanted)} images have no caption, such as {missing[:3]}{todo}"
        )
    if unknown:
        raise ValueError(
            f"{len(unknown)} captions are of images without references, such as {unknown[:3]}; "
            "are they of another --split?"
        )
    if len(by_text) != len(captions):
        raise ValueError("an image has two captions, once by number and once by text")
    return [by_text[image] for image in wanted], list(wanted.values())


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and str(int(text)) == text
