"""The model that the objective starts from: found, or trained with cross-entropy."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayrl.checkpoint import forget_trainer, list_checkpoints, load_checkpoint, newest_checkpoint
from rayrl.config import Config, ModelConfig
from rayrl.data import Dataset, load_split
from rayrl.given import check_model_folder
from rayrl.prompt_length import check_first_prompt
from rayrl.receipt import NAME, made_of, other_settings, read_receipt, write_receipt
from rayrl.vlm import build_tiny_captioner, load_processor

_TRAINING, _TRAINED = "training", "xe"
"""Where snapshots are until the end, and then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A model folder after ``seconds`` of training and ``steps`` steps."""

    steps: int
    seconds: float
    folder: Path


def start_folder(config: Config, folder: Path, captions: Sequence[str]) -> Path:
    """The model that stage 1 starts from: the tiny captioner, built here, or a folder or hub
    name that was given."""
    if config.model.path == "tiny":
        return build_tiny_captioner(
            config.model.tiny, captions, config.data.instruction, folder, seed=config.seed
        )
    path = Path(config.model.path)
    if not path.is_dir():
        path = _from_hub(config.model.path)
    check_model_folder(path, config.model.path)
    if not config.model.image_processor:
        return path
    return _with_image_processor(config.model, path, folder)


def _from_hub(name: str) -> Path:
    """The folder of a hub's model.  ValueError, with the key that named it, where it is not had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model.path {name}: no such folder here, and not to be had from the hub: {reason}"
        ) from error


def _with_image_processor(model: ModelConfig, source: Path, folder: Path) -> Path:
    """The model of ``source``, by links, with these settings of its image processor."""
    processor = load_processor(source, trust_remote_code=model.trust_remote_code)
    images = processor.image_processor
    known = {*images.to_dict(), *getattr(images.valid_kwargs, "__annotations__", ())}
    if strange := sorted(set(model.image_processor) - known):
        raise ValueError(
            f"model.image_processor: {type(images).__name__} has no setting {strange[0]!r}, want "
            f"some of {', '.join(sorted(known))}"
        )
    processor.image_processor = type(images).from_dict(images.to_dict(), **model.image_processor)
    shutil.rmtree(folder, ignore_errors=True)
    processor.save_pretrained(folder)
    written = {file.name for file in folder.iterdir()}
    # What it replaces; older folders keep the image processor's settings in a file of its own.
    for file in source.iterdir():
        if file.name not in {*written, "preprocessor_config.json"}:
            (folder / file.name).symlink_to(file.resolve())
    return folder


def run_stage1(
    config: Config,
    run_folder: Path,
    data: Dataset | None = None,
    *,
    resume: bool = False,
    sampled: bool = True,
) -> list[Snapshot]:
    """Build or find the starting model, train it, and return the snapshots, the last one under
    ``stage1/final``.  ``data`` is the training split, for who has loaded it.  ValueError where
    engines will sample from the model (``sampled``) and have no room for its captions: before it is
    trained.

    A finished stage 1 of the same settings and source is used again, and an unfinished one goes on;
    the finished one of a run which goes on (``resume``) is used whatever the settings:
    :func:`rayrl.resume.open_run_folder` has compared them, and refused to go on without it."""
    folder = run_folder / "stage1"
    final, found, made = folder / "final", read_receipt(folder), made_of(config)
    begun = _unfinished(folder / _TRAINING)
    go_on = bool(begun) and not _reasons_to_do_it_again(begun, config, made)
    if final.is_dir():
        reasons = [] if resume else _reasons_to_do_it_again(found, config, made)
        if not reasons:
            _settle(folder, ended=go_on and begun["step"] == config.xe.steps)
            return _snapshots(found, folder) or [Snapshot(steps=0, seconds=0.0, folder=final)]
        if not go_on:
            print(f"stage 1 is done again: another {', '.join(reasons)}", flush=True)
    data = load_split(config.data, "train") if data is None else data
    captions = [text for texts in data.references() for text in texts]
    start = start_folder(config, folder / "start", captions)
    if sampled:
        check_first_prompt(config, start, data[0])
    snapshots = [Snapshot(steps=0, seconds=0.0, folder=start)]
    if config.xe.steps:
        # Imported late: Ray Train is not for runs without stage 1.
        from rayrl.xe import train_xe

        if go_on:
            print(f"stage 1 goes on after step {begun['step']}", flush=True)
        trained = train_xe(config, data, start, folder, name=_TRAINING, made_of=made, go_on=go_on)
        snapshots += [replace(s, folder=folder / _TRAINED / s.folder.name) for s in trained]
        _replace(final, trained[-1].folder, receipt=folder / NAME)
    else:
        _replace(final, start, receipt=folder / NAME)
    snapshots[-1] = replace(snapshots[-1], folder=final)
    record = [
        {"steps": s.steps, "seconds": s.seconds, "folder": _relative(s.folder, folder)}
        for s in snapshots
    ]
    write_receipt(folder, made, record)
    _settle(folder, ended=bool(config.xe.steps))
    return snapshots


def _settle(folder: Path, *, ended: bool) -> None:
    """Leave of a stage 1 whose receipt is written its models; ``ended``: it is the training that
    lies here, and not one of other settings that was begun after it."""
    training, trained = folder / _TRAINING, folder / _TRAINED
    if ended and training.is_dir():
        shutil.rmtree(trained, ignore_errors=True)
        training.rename(trained)
    for step in list_checkpoints(trained):
        forget_trainer(trained / f"step_{step}")


def _unfinished(place: Path) -> Mapping[str, Any]:
    """What is known of a training in ``place`` that did not come to its end; empty where there is
    none from which it could go on."""
    try:
        return load_checkpoint(newest_checkpoint(place)).meta
    except (FileNotFoundError, ValueError):
        return {}


def _reasons_to_do_it_again(
    found: Mapping[str, Any], config: Config, made: Mapping[str, Any]
) -> list[str]:
    """In what stage 1 would be another than the one that ``found`` tells of."""
    if "settings" not in found:
        return ["one, of which nothing is known"]
    changed = other_settings(found["settings"], config)
    if not changed and found.get("source", "") != made["source"]:
        changed = [f"content of model.path {config.model.path}"]
    return changed


def _snapshots(found: Mapping[str, Any], folder: Path) -> list[Snapshot]:
    return [
        Snapshot(steps=s["steps"], seconds=s["seconds"], folder=folder / s["folder"])
        for s in found.get("snapshots", [])
    ]


def _replace(final: Path, model: Path, *, receipt: Path) -> None:
    """Put a copy of ``model`` in the place of ``final``, which is whole whenever it is there and
    never that of another's ``receipt``."""
    partial = final.with_name(".final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # Without what a checkpoint holds beside its captioner.
        shutil.copytree(model, partial, ignore=shutil.ignore_patterns("trainer"))
        receipt.unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        # Nothing is there once it has its place.
        shutil.rmtree(partial, ignore_errors=True)


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path.resolve())
