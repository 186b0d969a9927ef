"""Saving a run, and putting it back where it was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayrl.adapters import with_base
from rayrl.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from rayrl.resume import check_same_data

if TYPE_CHECKING:
    from rayrl.grpo import Run


def save(run: Run, *, last: bool) -> None:
    """Write a checkpoint, and before it the log of the steps until then.

    A full disk costs this checkpoint and not the run, unless it is the ``last``: then OSError, for
    a run without its end has not ended well."""
    checkpoint = run.learner.checkpoint()
    place = run.folder / "checkpoints"
    meta = {**checkpoint.meta, "data": run.train_data.fingerprint(), "seed": run.config.seed}
    meta["signatures"] = dict(run.signatures)
    meta["rounds"] = run.rounds.state()
    whole = Checkpoint(
        step=checkpoint.step,
        model_files=with_base(checkpoint.model_files, run.base),
        arrays={**checkpoint.arrays, **run.reference.arrays()},
        meta=meta,
    )
    try:
        run.log.flush()
        keep, copying = run.config.train.keep_checkpoints, run.backup.copying()
        saved = save_checkpoint(place, whole, keep=keep, spare=copying)
    except OSError as error:
        steps = list_checkpoints(place)
        hint = f"the newest is of step {steps[-1]}" if steps else "there is none yet"
        then = "make room and --resume" if last else "going on"
        text = f"checkpoint of step {checkpoint.step} failed: {error}; {hint}; {then}"
        if last:
            raise OSError(text) from error
        run.log.message(text)
        return
    run.saved_step = checkpoint.step
    run.learner.rebuild_from(saved)
    run.backup.checkpoint(checkpoint.step, last=last)


def restore(run: Run) -> int:
    """Put the learner where the newest checkpoint was; returns its step, which is saved."""
    place = newest_checkpoint(run.folder / "checkpoints").resolve()
    checkpoint = load_checkpoint(place)
    check_same_data(checkpoint, run.train_data.fingerprint())
    run.rounds.restore(checkpoint.meta["rounds"])
    run.reference.restore(checkpoint.arrays)
    run.saved_step = run.learner.restore(checkpoint, place)
    return run.saved_step
