"""What stage 1 was made of, written beside its model, so that no other model is taken for it; and
which run a folder holds, so that no other run is.

The model of stage 1 is a run's reference, and the base of its adapters: it is never made twice for
one run, and a run that is resumed may not claim another one.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrl.config import Config, ModelConfig
from rayrl.config_keys import known_keys
from rayrl.jsonl import write_atomically

NAME = "stage1.json"
RUN = "run.json"

_MADE_OF = ("seed", "data.", "model.", "xe.", "sampling.max_tokens")
_FREE = {
    "data.max_val",
    "data.val_path",
    "data.scenes.num_val",
    "data.scenes.num_test",
    "model.trust_remote_code",
    "xe.control",
}
"""What lies among those settings and says nothing of the model."""
_OF_THE_WORK = {"xe.num_workers", "xe.snapshot_every"}
"""How it was trained: of no account to a run that has it, which may go on on another machine."""


def made_of(config: Config) -> dict[str, Any]:
    """What a model of stage 1 is made of: settings, and the source's fingerprint."""
    settings = config.model_dump(mode="json", include={"seed", "data", "model", "xe", "sampling"})
    return {"settings": settings, "source": source_fingerprint(config.model)}


def write_receipt(
    folder: Path, of: Mapping[str, Any], snapshots: Sequence[Mapping[str, Any]]
) -> None:
    """Say what the model in ``folder`` was made of, and name the models on the way to it."""
    content = {**of, "snapshots": snapshots}
    write_atomically(folder / NAME, json.dumps(content, indent=1))


def read_receipt(folder: Path) -> dict[str, Any]:
    """What :func:`write_receipt` wrote there; empty where nothing is."""
    return _read_object(folder / NAME)


def write_run_id(folder: Path) -> None:
    """Give the run that begins in ``folder`` an id, which no other run has."""
    write_atomically(folder / RUN, json.dumps({"id": uuid.uuid4().hex}))


def read_run_id(folder: Path) -> str:
    """What :func:`write_run_id` wrote there; "" for a run that an earlier version began."""
    return str(_read_object(folder / RUN).get("id", ""))


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file, ValueError where it is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__}, want an object")
    return content


def other_settings(found: Mapping[str, Any], config: Config) -> list[str]:
    """``xe.steps: 60, was 400`` for every setting for which stage 1 would be another model.

    One that ``found`` lacks is new in this version of rayrl, and makes no difference."""
    return list(_differences(found, config, _FREE))


def other_model(found: Mapping[str, Any], config: Config) -> list[str]:
    """Of :func:`other_settings` those that a run which goes on may not have; whether its data are
    the same, wherever they lie now, their fingerprint says."""
    changed = _differences(found, config, _FREE | _OF_THE_WORK)
    return [change for change in changed if not change.startswith("data.")]


def other_data(found: Mapping[str, Any], config: Config) -> list[str]:
    """Of :func:`other_settings` those of the training data."""
    return [change for change in other_settings(found, config) if change.startswith("data.")]


def source_fingerprint(model: ModelConfig) -> str:
    """A hash of names, sizes and times of the files of a model folder; empty for a model that is
    built or comes from the hub, whose name stands for it."""
    folder = Path(model.path)
    if model.path == "tiny" or not folder.is_dir():
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        # A clone of a repository keeps books of its own, which change when they are looked at.
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            found = file.stat()
            digest.update(f"{name.as_posix()}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _differences(found: Mapping[str, Any], config: Config, free: set[str]) -> Iterator[str]:
    now = config.model_dump(mode="json")
    for key in _leaves():
        if key in free or not key.startswith(_MADE_OF):
            continue
        try:
            old, new = _value(found, key), _value(now, key)
        except KeyError:
            continue
        if old != new:
            yield f"{key}: {new}, was {old}"


def _leaves() -> list[str]:
    keys = list(known_keys())
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def _value(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value
