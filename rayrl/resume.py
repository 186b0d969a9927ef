"""Opening a run folder: for a new run, or to continue one, here or from its remote copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayrl import cli
from rayrl.backup import FETCHED, Say, fetch_best, fetch_newest, remote_steps, run_of
from rayrl.checkpoint import list_checkpoints, load_checkpoint, read_meta, remove_unfinished
from rayrl.config import Config
from rayrl.jsonl import write_atomically
from rayrl.receipt import other_data, other_model, read_receipt, read_run_id, write_run_id
from rayrl.remote import STORAGE_ERRORS, RemoteCopies, open_copies
from rayrl.yaml_file import read_yaml


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
    uri = config.train.checkpoint_uri
    copies = open_copies(uri)
    if resume:
        _have_newest(folder, config, fingerprint, copies, say)
    else:
        _refuse_to_mix(str(folder), list_checkpoints(folder / "checkpoints"), "--run_folder")
        if copies is not None:
            _refuse_to_mix(uri, remote_steps(copies), "--train.checkpoint_uri")
    if copies is not None:
        _check_writable(copies, uri)
    folder.mkdir(parents=True, exist_ok=True)
    # Of a driver that was killed; where another one writes here, runs are mixed already.
    remove_unfinished(folder)
    shutil.rmtree(folder / FETCHED, ignore_errors=True)
    text = cli.dump(config)
    if resume and (before := _configuration(folder)):
        for line in changes(before, yaml.safe_load(text)):
            say(f"resuming with another {line}")
    write_atomically(folder / cli.RUN_CONFIG, text)
    if not resume:
        write_run_id(folder)
    return copies


def _have_newest(
    folder: Path, config: Config, fingerprint: str, copies: RemoteCopies | None, say: Say
) -> None:
    """Have the run's newest checkpoint, and its best, in ``folder``, from the remote copies where
    they have it.  Nothing is written before it is known that what is here and what is there are of
    one run, and of the one that ``config`` goes on with."""
    uri, checkpoints = config.train.checkpoint_uri, folder / "checkpoints"
    done = list_checkpoints(checkpoints)
    # Where it has no checkpoint it may be the first attempt at a run that began elsewhere.
    own_id = read_run_id(folder) if done else ""

    def check(fetched: Path) -> None:
        _refuse_another_run(folder, own_id, uri, read_run_id(fetched))
        _check_same_run(fetched, uri, config, fingerprint)

    if done:
        _check_same_run(folder, str(folder), config, fingerprint)
    if copies is not None:
        # Also where there is nothing to fetch, for this run's copies would go there.
        if remote_steps(copies):
            _refuse_another_run(folder, own_id, uri, run_of(copies))
        newest = done[-1] if done else -1
        step = fetch_newest(copies, folder, check=check, say=say, after=newest)
        if step is not None:
            say(f"fetched step {step} from {uri}")
            own_id = read_run_id(folder)
    done = list_checkpoints(checkpoints)
    if not done:
        also = f" or {uri}" if copies is not None else ""
        raise FileNotFoundError(f"--resume: no checkpoint in {checkpoints}{also}")
    final = folder / "stage1" / "final"
    if not final.is_dir():
        raise FileNotFoundError(
            f"--resume: {final}, which the run started from, is not there: put it back, or fetch "
            "the run from its remote copies into another --run_folder, for another one would make "
            "it another run"
        )
    # One that is damaged is to be known before the work.
    load_checkpoint(checkpoints / f"step_{done[-1]}")
    if copies is not None and config.train.keep_best:
        fetch_best(copies, folder, check=check, say=say)


def _refuse_another_run(folder: Path, own_id: str, uri: str, found: str) -> None:
    if own_id and own_id != found:
        other = found or "one of an older version"
        raise ValueError(
            f"--resume: {uri} holds copies of another run than the one in {folder} ({other}, "
            f"not {own_id}): give this run its own --train.checkpoint_uri, or go on with the other "
            "one in another --run_folder"
        )


def _configuration(folder: Path) -> Mapping[str, Any]:
    """The configuration that the run in ``folder`` had, if it says so."""
    file = folder / cli.RUN_CONFIG
    found: Mapping[str, Any] = (file.is_file() and read_yaml(file)) or {}
    return found


def _check_same_run(folder: Path, name: str, config: Config, fingerprint: str) -> None:
    """ValueError where ``config`` starts from another model than the run in ``folder``, called
    ``name``, or trains on other data: what was done cannot have come from there.  Also where its
    adapters have another form, and where it has fewer steps than were done."""
    before = _configuration(folder)
    made_of = read_receipt(folder / "stage1").get("settings", before)
    if changed := other_model(made_of, config):
        raise ValueError(
            f"--resume: {name} started from another model ({'; '.join(changed)}): give it the "
            f"same settings, which without --config are those of its {cli.RUN_CONFIG}, or start "
            "another run with another --run_folder"
        )
    now = config.learner.lora
    was = {"rank": now.rank, "alpha": now.alpha} | before.get("learner", {}).get("lora", {})
    if was["rank"] != now.rank or (now.rank and was["alpha"] != now.alpha):
        raise ValueError(
            f"--resume: {name} trained with learner.lora.rank {was['rank']} and alpha "
            f"{was['alpha']}, want the same, not {now.rank} and {now.alpha}: its weights would "
            "mean something else"
        )
    newest = list_checkpoints(folder / "checkpoints")[-1]
    meta = read_meta(folder / "checkpoints" / f"step_{newest}")
    check_same_data(meta, fingerprint, other_data(made_of, config))
    if newest > config.train.steps:
        raise ValueError(
            f"--resume: {name} holds step {newest}, and train.steps is {config.train.steps}: give "
            f"it at least {newest}"
        )


def check_same_data(
    meta: Mapping[str, Any], fingerprint: str, settings: Sequence[str] = ()
) -> None:
    """ValueError where the checkpoint of ``meta`` was made with other training data; ``settings``
    that may tell why are named."""
    found = meta.get("data")
    if found != fingerprint:
        raise ValueError(
            f"the training data changed since step {meta['step']} "
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
