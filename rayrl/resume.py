"""Opening a run folder: for a new run, or to continue one, here or from its remote copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayrl import cli
from rayrl.backup import Say, fetch_best, fetch_newest, remote_steps
from rayrl.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from rayrl.config import Config
from rayrl.jsonl import write_atomically
from rayrl.receipt import other_data, other_model, read_receipt
from rayrl.remote import STORAGE_ERRORS, RemoteCopies, open_copies


def goes_on(config: Config, resume: cli.Resume) -> bool:
    """Whether a run continues: as it was asked to, or under "auto" where a checkpoint of it is here
    or at its remote place."""
    if resume != "auto":
        return resume == "always"
    copies = open_copies(config.train.checkpoint_uri)
    here = list_checkpoints(Path(config.run_folder) / "checkpoints")
    return bool(here or (copies is not None and remote_steps(copies)))


def open_run_folder(
    folder: Path, config: Config, fingerprint: str, *, resume: bool, say: Say
) -> RemoteCopies | None:
    """Refuse to mix runs in one folder, or at one remote place, and to go on as another run, with
    other training data (``fingerprint``) or from another model; fetch the newest remote checkpoint
    if it is later than what is here; save the resolved configuration.  Returns the remote place.

    FileNotFoundError where there is nothing to resume, ValueError where a run would be
    overwritten or become another, OSError where nothing can be written to the remote place.
    """
    check_folder(folder)
    copies = open_copies(config.train.checkpoint_uri)
    checkpoints = folder / "checkpoints"
    done = list_checkpoints(checkpoints)
    if not resume:
        _refuse_to_mix(str(folder), done, "--run_folder")
        if copies is not None:
            _refuse_to_mix(
                config.train.checkpoint_uri, remote_steps(copies), "--train.checkpoint_uri"
            )
    elif copies is not None:
        newest = done[-1] if done else -1
        step = fetch_newest(copies, folder, say=say, after=newest)
        if step is not None:
            say(f"fetched step {step} from {config.train.checkpoint_uri}")
        if config.train.keep_best:
            fetch_best(copies, folder, say=say)
    if resume and not list_checkpoints(checkpoints):
        also = f" or {config.train.checkpoint_uri}" if copies is not None else ""
        raise FileNotFoundError(f"--resume: no checkpoint in {checkpoints}{also}")
    before = _check_same_run(folder, config, fingerprint) if resume else {}
    if copies is not None:
        _check_writable(copies, config.train.checkpoint_uri)
    folder.mkdir(parents=True, exist_ok=True)
    text = cli.dump(config)
    if before:
        for line in changes(before, yaml.safe_load(text)):
            say(f"resuming with another {line}")
    write_atomically(folder / cli.RUN_CONFIG, text)
    return copies


def _check_same_run(folder: Path, config: Config, fingerprint: str) -> Mapping[str, Any]:
    """The configuration that the run in ``folder`` had, if it says so.

    ValueError where ``config`` starts from another model or trains on other data: what was done
    cannot have come from there."""
    file = folder / cli.RUN_CONFIG
    before: Mapping[str, Any] = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    made_of = read_receipt(folder / "stage1").get("settings", before)
    if changed := other_model(made_of, config):
        raise ValueError(
            f"--resume: {folder} started from another model ({'; '.join(changed)}): give it the "
            f"same settings, which without --config are those of its {cli.RUN_CONFIG}, or start "
            "another run with another --run_folder"
        )
    newest = list_checkpoints(folder / "checkpoints")[-1]
    checkpoint = load_checkpoint(folder / "checkpoints" / f"step_{newest}")
    check_same_data(checkpoint, fingerprint, other_data(made_of, config))
    return before


def check_same_data(checkpoint: Checkpoint, fingerprint: str, settings: Sequence[str] = ()) -> None:
    """ValueError where a checkpoint was made with other training data; ``settings`` that may tell
    why are named."""
    found = checkpoint.meta.get("data")
    if found != fingerprint:
        raise ValueError(
            f"the training data changed since step {checkpoint.step} "
            f"({'; '.join([*settings, f'fingerprint {fingerprint}, was {found}'])}): resume with "
            "the same data or start a new run folder"
        )


def refuse_begun(folder: Path) -> None:
    """ValueError where a run in ``folder`` has checkpoints: its stage 1 is no longer to be had by
    another, for it is its reference and the base of its adapters."""
    check_folder(folder)
    if steps := list_checkpoints(folder / "checkpoints"):
        raise ValueError(
            f"{folder} holds the checkpoints of a run ({', '.join(f'step_{n}' for n in steps)}), "
            "which started from its stage1/final: choose another --run_folder"
        )


def check_folder(folder: Path) -> None:
    """ValueError where a run folder cannot be one."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--run_folder {folder}: {place} is a file, want a folder or nothing")


def _refuse_to_mix(place: str, done: list[int], flag: str) -> None:
    if done:
        raise ValueError(
            f"{place} holds a run of {done[-1]} steps: continue it with --resume, or choose "
            f"another {flag}"
        )


def _check_writable(copies: RemoteCopies, uri: str) -> None:
    try:
        copies.check()
    except STORAGE_ERRORS as error:
        raise OSError(f"--train.checkpoint_uri {uri}: nothing can be written: {error}") from error


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``learner.lr: 0.001, was 0.002`` for every leaf in which two configurations differ."""
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}: {new}, was {old}"
