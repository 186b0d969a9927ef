"""Saving a run, and putting it back where it was saved."""

from __future__ import annotations

from collections import ChainMap
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rayrl.actors.pool import TooFewWorkers
from rayrl.adapters import with_base
from rayrl.checkpoint import (
    Checkpoint,
    best_of,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    point_at_best,
    save_checkpoint,
)
from rayrl.metrics import EVAL_METRIC
from rayrl.resume import check_same_data
from rayrl.rewards.signature import statistics_in

if TYPE_CHECKING:
    from rayrl.grpo import Run


def is_due(run: Run, step: int) -> bool:
    """Whether there should be a checkpoint of ``step``: by its number, or for its score."""
    scores = _scores(run)
    return step % run.config.train.checkpoint_every == 0 or best_of(scores, scores) == [step]


def save(run: Run, *, last: bool) -> None:
    """Write a checkpoint, and before it the log of the steps until then.

    A full disk costs this checkpoint and not the run, unless it is the ``last``: then OSError, for
    a run without its end has not ended well."""
    step = run.learner.step
    try:
        run.log.flush()
        saved = run.learner.checkpoint(partial(_write, run))
    except OSError as error:
        steps = list_checkpoints(run.folder / "checkpoints")
        hint = f"the newest is of step {steps[-1]}" if steps else "there is none yet"
        then = "make room and --resume" if last else "going on"
        text = f"checkpoint of step {step} failed: {error}; {hint}; {then}"
        if last:
            raise OSError(text) from error
        run.log.message(text)
        return
    run.saved_step = step
    run.learner.rebuild_from(saved)
    run.backup.checkpoint(step, last=last, scores=_scores(run))


def _scores(run: Run) -> dict[int, float]:
    """The held-out scores of the steps that the run took; none where it keeps no best one."""
    if not run.config.train.keep_best:
        return {}
    return {step: score for step, score in run.log.scores.items() if step > 0}


class SavedWhereItFails:
    """A run that fails inside is saved, whatever fails, unless it is already: there is no moment at
    which a checkpoint that is written again is whole.  So is one that is asked to stop while it
    waits for workers, which is then no failure.  A learner that was lost, or stopped in the middle
    of a step, is not saved."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        run = self._run
        if not isinstance(error, Exception):
            return False
        # Not once more where its own row was what failed.
        if run.unlogged is not None and run.unlogged[0] > run.log.last_step:
            run.log.step(*run.unlogged)
        if run.saved_step != run.learner.step and not (run.learner.lost or run.learner.midway):
            save(run, last=True)
        if run.saved_step != run.learner.step:
            return False
        run.log.message(f"saved step {run.saved_step}: go on with --resume")
        return isinstance(error, TooFewWorkers) and run.stop.requested


def close(run: Run) -> None:
    """End all parts of a run, each of them whatever becomes of those before it."""
    with ExitStack() as ends:
        # The last one first.
        ends.callback(run.log.close)
        ends.callback(run.backup.close)
        ends.callback(run.learner.shutdown)
        ends.callback(run.fleet.shutdown)
        ends.callback(run.log.attempt, "trace.json", run.tracer.close)


def _write(run: Run, checkpoint: Checkpoint) -> Path:
    """Write the learner's checkpoint with what a run must know of itself."""
    own = {
        "data": run.train_data.fingerprint(),
        "seed": run.config.seed,
        "signatures": dict(run.signatures),
        "rounds": run.rounds.state(),
    }
    arrays = ChainMap(dict(run.reference.arrays()), checkpoint.arrays)  # type: ignore[arg-type]
    whole = replace(
        checkpoint,
        model_files=with_base(checkpoint.model_files, run.base),
        arrays=arrays,
        meta={**checkpoint.meta, **own},
    )
    keep, spare = run.config.train.keep_checkpoints, run.backup.copying()
    return save_checkpoint(
        run.folder / "checkpoints", whole, keep=keep, spare=spare, scores=_scores(run)
    )


def restore(run: Run) -> int:
    """Put the learner where the newest checkpoint was; returns its step, which is saved."""
    folder = run.folder / "checkpoints"
    place = newest_checkpoint(folder).resolve()
    checkpoint = load_checkpoint(place)
    run.log.resumed(statistics_in(checkpoint.meta.get("signatures", {}).get(EVAL_METRIC, "")))
    point_at_best(folder, _scores(run))
    check_same_data(checkpoint.meta, run.train_data.fingerprint())
    run.rounds.restore(checkpoint.meta["rounds"])
    run.reference.restore(checkpoint.arrays)
    run.saved_step = run.learner.restore(checkpoint, place)
    return run.saved_step
