"""Checkpoints: a model folder that ``from_pretrained`` loads, plus what a resumed run needs.

    checkpoints/step_40/           config.json, model.safetensors …           the captioner
    checkpoints/step_40/trainer/   meta.json, arrays-1.safetensors …         optimizer, positions
    checkpoints/latest             a link to the newest whole one
    checkpoints/best               a link to the one with the highest held-out score

What is not the captioner lies apart, for engines load every tensor file that they find beside it.
A checkpoint is written beside its place and renamed into it, so a crash or a full disk leaves the
previous one whole.  Neither writing nor reading holds all of it in memory: with the optimizer's
moments it is several times the model.  No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rayrl.weights import ModelFiles, read_model_files

LATEST, BEST = "latest", "best"
_TRAINER, _META = "trainer", "meta.json"
_FILE_BYTES = 2**30
"""About how many bytes of arrays one file holds."""
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
    folder: Path,
    checkpoint: Checkpoint,
    *,
    keep: int,
    spare: Collection[int] = (),
    scores: Mapping[int, float] = MappingProxyType({}),
) -> Path:
    """Write ``folder/step_N``, point ``folder/latest`` at it, and ``folder/best`` at the one with
    the highest of ``scores``, by step; then remove all but the ``keep`` newest, the best, and those
    of the steps in ``spare``.  On OSError (a full disk), or what reading the checkpoint raises,
    nothing half-written stays and ``latest`` is untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step_{checkpoint.step}"
    partial = folder / f".step_{checkpoint.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        trainer = partial / _TRAINER
        trainer.mkdir(parents=True)
        for name, content in checkpoint.model_files.items():
            _write(partial / name, content.data)
        count = 0
        for count, arrays in enumerate(split(checkpoint.arrays, _FILE_BYTES), start=1):
            _write(_arrays_file(trainer, count), arrays)
        meta = {**checkpoint.meta, "step": checkpoint.step, "array_files": count}
        _write(trainer / _META, json.dumps(meta, indent=1).encode())
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    finally:
        # Nothing is there once it has its place.
        shutil.rmtree(partial, ignore_errors=True)
    point_at(place, LATEST)
    point_at_best(folder, scores)
    steps = list_checkpoints(folder)
    for old in set(steps[:-keep]) - {*spare, *best_of(scores, steps)}:
        shutil.rmtree(folder / f"step_{old}", ignore_errors=True)
    if not (folder / BEST).exists():
        (folder / BEST).unlink(missing_ok=True)
    return place


def remove_unfinished(folder: Path) -> None:
    """Remove the checkpoints below ``folder`` that a lost process left half-written.  Only where
    nobody writes one: they look the same."""
    for partial in list(folder.rglob(".step_*.partial")):
        shutil.rmtree(partial, ignore_errors=True)


def split(arrays: Mapping[str, np.ndarray], most: int) -> Iterator[dict[str, np.ndarray]]:
    """The arrays in their order, at a time as many as have at most so many bytes together, or one
    that has more.  Each is asked for once."""
    part: dict[str, np.ndarray] = {}
    size = 0
    for name in list(arrays):
        array = arrays[name]
        if part and size + array.nbytes > most:
            yield part
            part, size = {}, 0
        part[name] = array
        size += array.nbytes
    if part:
        yield part


def _arrays_file(trainer: Path, number: int) -> Path:
    return trainer / f"arrays-{number}.safetensors"


def point_at(place: Path, name: str) -> None:
    """Let the link ``name`` beside ``place`` lead to it, in one move."""
    link = place.parent / f".{name}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(place.name)
    os.replace(link, place.parent / name)


def best_of(scores: Mapping[int, float], steps: Collection[int]) -> list[int]:
    """Of ``steps`` the one with the highest score, the earliest where several have it; none where
    none has one."""
    scored = sorted(step for step in steps if step in scores)
    return [max(scored, key=lambda step: scores[step])] if scored else []


def point_at_best(folder: Path, scores: Mapping[int, float]) -> None:
    """Let ``folder/best`` lead to the checkpoint with the highest score; where none has one it
    stays as it is."""
    for step in best_of(scores, list_checkpoints(folder)):
        point_at(folder / f"step_{step}", BEST)


def _write(file: Path, content: bytes | memoryview | Mapping[str, np.ndarray]) -> None:
    """Write bytes, or arrays as safetensors, without a copy of them, through to the disk."""
    if isinstance(content, Mapping):
        # What it puts in the place of this file only its owner could read.
        file.touch()
        mode = file.stat().st_mode
        try:
            # It writes memory as it lies, whatever the order of the axes.
            save_file({name: np.asarray(a, order="C") for name, a in content.items()}, file)
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
    if (folder / LATEST).resolve() != place.resolve():
        point_at(place, LATEST)
    return place


class StoredArrays(Mapping[str, np.ndarray]):
    """Arrays in safetensors files, each read when it is asked for, in the order of their names.

    Raises ValueError naming the file that is damaged."""

    def __init__(self, files: Collection[Path]) -> None:
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                # What it keeps open can be read to the end, whoever removes the file.
                opened = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: damaged: {error}") from None
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> np.ndarray:
        array: np.ndarray = self._where[name].get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def load_checkpoint(folder: Path) -> Checkpoint:
    """``step_N`` or ``latest``, of which files and arrays are read when they are asked for.

    Raises FileNotFoundError when there is none, ValueError when it is damaged."""
    meta = read_meta(folder)
    files = [_arrays_file(folder / _TRAINER, n + 1) for n in range(meta["array_files"])]
    return Checkpoint(
        step=meta["step"],
        model_files=read_model_files(folder),
        arrays=StoredArrays(files),
        meta=meta,
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Of a checkpoint its ``meta`` alone, of which "step" and "array_files" are numbers.

    Raises as :func:`load_checkpoint` does."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no checkpoint to resume from")
    trainer = folder / _TRAINER
    if (folder / "trainer.json").is_file():
        raise ValueError(
            f"{folder}: an earlier version of rayrl wrote it, which must go on from it"
        )
    if not (trainer / _META).is_file():
        raise FileNotFoundError(f"{folder}: no {_TRAINER}/{_META}, so it is not a run's checkpoint")
    try:
        meta = json.loads((trainer / _META).read_text())
        return {**meta, "step": int(meta["step"]), "array_files": int(meta["array_files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{trainer / _META}: damaged: {error!r}") from None


def forget_trainer(folder: Path) -> None:
    """Leave of a checkpoint its captioner alone: nobody goes on from it."""
    shutil.rmtree(folder / _TRAINER, ignore_errors=True)


def split_state(
    state: Mapping[str, Any], prefix: str = "objective/"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An objective's state as arrays, by names that begin with ``prefix``, and JSON values;
    mappings within it likewise.

    Raises ValueError, with the name, for what is neither an array or tensor, nor a JSON value, nor
    a mapping of those by text; and for an array whose name has a "/", which separates names."""
    arrays: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"state {prefix}{name!r}: a key of {type(name).__name__}, want str")
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
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(
                    f"state {prefix}{name}: {error}; want JSON values, arrays or tensors"
                ) from None
            values[name] = value
    return arrays, values


def join_state(
    values: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str = "objective/"
) -> dict[str, Any]:
    """Inverse of :func:`split_state`; tensors come back as arrays."""
    mine = {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}
    own = {name: value for name, value in mine.items() if "/" not in name}
    within = {
        name: join_state(value, arrays, f"{prefix}{name}/")
        for name, value in values.items()
        if isinstance(value, Mapping)
    }
    return {**values, **own, **within}
