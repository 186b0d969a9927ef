"""Checkpoints: a model folder that ``from_pretrained`` loads, plus what a resumed run needs.

    checkpoints/step_40/   config.json, model.safetensors, tokenizer …   the captioner
                           trainer.safetensors, trainer.json             optimizer, positions
    checkpoints/latest     a link to the newest whole one

A checkpoint is written beside its place and renamed into it, so a crash or a full disk leaves the
previous one whole.  No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rayrl.weights import ModelFiles, read_model_files

_TENSORS, _META = "trainer.safetensors", "trainer.json"
_STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A run after ``step`` steps: the model's files, the trainer's arrays (optimizer moments, …)
    and ``meta`` (JSON: weight version, fingerprints, the objective's state, …)."""

    step: int
    model_files: ModelFiles
    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep: int, spare: Collection[int] = ()
) -> Path:
    """Write ``folder/step_N``, point ``folder/latest`` at it, and remove all but the ``keep``
    newest and those of the steps in ``spare``.  On OSError (a full disk) nothing half-written stays
    and ``latest`` is untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step_{checkpoint.step}"
    partial = folder / f".step_{checkpoint.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, content in checkpoint.model_files.items():
            _write(partial / name, content.data)
        _write(partial / _TENSORS, checkpoint.arrays)
        meta = {"step": checkpoint.step, **checkpoint.meta}
        _write(partial / _META, json.dumps(meta, indent=1).encode())
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    point_latest_at(place)
    for old in set(list_checkpoints(folder)[:-keep]) - set(spare):
        shutil.rmtree(folder / f"step_{old}", ignore_errors=True)
    return place


def point_latest_at(place: Path) -> None:
    """Let the link ``latest`` beside ``place`` name it, in one move."""
    link = place.parent / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(place.name)
    os.replace(link, place.parent / "latest")


def _write(file: Path, content: bytes | memoryview | Mapping[str, np.ndarray]) -> None:
    """Write bytes, or arrays as safetensors, without a copy of them, through to the disk."""
    if isinstance(content, Mapping):
        # What it puts in the place of this file only its owner could read.
        file.touch()
        mode = file.stat().st_mode
        try:
            save_file(dict(content), file)
        except SafetensorError as error:
            if "I/O error" in str(error):
                raise OSError(f"{file}: {error}") from error
            raise
        file.chmod(mode)
    else:
        file.write_bytes(content)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def list_checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in ``folder``, in ascending order."""
    if not folder.is_dir():
        return []
    found = (_STEP_FOLDER.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def newest_checkpoint(folder: Path) -> Path:
    """The newest whole one in ``folder``, with ``latest`` put right where a run ended between the
    move of a checkpoint into its place and that of the link.

    FileNotFoundError where there is none."""
    steps = list_checkpoints(folder)
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint to resume from")
    place = folder / f"step_{steps[-1]}"
    if (folder / "latest").resolve() != place.resolve():
        point_latest_at(place)
    return place


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read ``step_N`` or ``latest``.

    Raises FileNotFoundError when there is none, ValueError when it is not a checkpoint."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no checkpoint to resume from")
    meta_file, tensors = folder / _META, folder / _TENSORS
    for file in (meta_file, tensors):
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no {file.name}, so it is not a run's checkpoint")
    try:
        meta = json.loads(meta_file.read_text())
        arrays = load_file(tensors)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: damaged checkpoint: {error}") from None
    files = {k: v for k, v in read_model_files(folder).items() if k not in (_META, _TENSORS)}
    return Checkpoint(step=int(meta["step"]), model_files=files, arrays=arrays, meta=meta)


def split_state(
    state: Mapping[str, Any], prefix: str = "objective/"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An objective's state as arrays, by names that begin with ``prefix``, and JSON values;
    mappings within it likewise.

    Raises ValueError for an array whose name has a "/", which separates names."""
    arrays: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            inner, values[name] = split_state(value, f"{prefix}{name}/")
            arrays |= inner
        elif isinstance(value, np.ndarray) or hasattr(value, "numpy"):
            if "/" in name:
                raise ValueError(f"state: an array of the name {name!r}, want one without a '/'")
            arrays[prefix + name] = (
                value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
            )
        else:
            values[name] = value
    return arrays, values


def join_state(
    values: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str = "objective/"
) -> dict[str, Any]:
    """Inverse of :func:`split_state`; tensors come back as arrays."""
    mine = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    own = {name: value for name, value in mine.items() if "/" not in name}
    within = {
        name: join_state(value, arrays, f"{prefix}{name}/")
        for name, value in values.items()
        if isinstance(value, Mapping)
    }
    return {**values, **own, **within}
