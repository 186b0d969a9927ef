"""What a configuration names on this machine, looked for before the work that it is for.

Of addresses of a remote store and of names of a hub nothing is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rayrl.config import Config
from rayrl.data.config import DataConfig, Split
from rayrl.data.parquet import find_shards

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_given(config: Config, *splits: Split, model: bool = True) -> None:
    """ValueError, in one line with its key, for the first of what :func:`missing` finds."""
    for line in missing(config, *splits, model=model):
        raise ValueError(line)


def missing(config: Config, *splits: Split, model: bool = True) -> Iterator[str]:
    """What is named and is not there, a line each: the data of these splits, and the ``model``,
    of which a run that goes on has a copy."""
    of_data = (line for split in splits for line in _missing_data(config.data, split))
    # Splits may be in one file.
    yield from dict.fromkeys(of_data)
    if model:
        yield from _missing_model(config.model.path)


def check_model_folder(folder: Path, given: str) -> None:
    """ValueError unless the folder of ``given`` can be a captioner: before it is copied into the
    run, for nobody would look for what is wrong there."""
    for line in _missing_in_model(folder, given):
        raise ValueError(line)


def _missing_data(data: DataConfig, split: Split) -> Iterator[str]:
    path, images = data.path_of(split), data.images_of(split)
    named = data.named(split)
    if data.source == "parquet" and "://" not in path:
        try:
            find_shards(path)
        except FileNotFoundError as error:
            yield f"{named}: {error}"
    if data.source in ("coco", "karpathy"):
        if not Path(path).is_file():
            yield f"{named}: no such file of annotations: {path}"
        if not Path(images).is_dir():
            yield f"data.images {data.images}: no such image folder: {images}"


def _missing_model(given: str) -> Iterator[str]:
    folder = Path(given)
    if given == "tiny":
        return
    if folder.is_dir():
        yield from _missing_in_model(folder, given)
    elif not _HUB_NAME.fullmatch(given):
        yield f"model.path {given}: no such folder here, and not a name of the hub"


def _missing_in_model(folder: Path, given: str) -> Iterator[str]:
    found = {file.name for file in folder.iterdir()}
    for want in (
        ("config.json", "adapter_config.json"),
        ("processor_config.json", "preprocessor_config.json"),
    ):
        if not found.intersection(want):
            yield (
                f"model.path {given}: no {' or '.join(want)} in {folder}, want a folder with a "
                "captioner and its processor, as save_pretrained writes it"
            )
