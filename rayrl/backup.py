"""A run's checkpoints in remote storage, for a machine that does not come back.

    <uri>/run/      config.yaml, stage1/…                     what the run started from
    <uri>/step_40/  checkpoints/step_40/…, metrics.jsonl, …   a checkpoint and the history until it
    <uri>/report/   report.html, summary.json, …              how it ended

The first two tell the run that they are of (run.json), so that no other goes on from them.  The
paths inside a copy are those of the run folder, so an empty one that fetches ``run`` and the newest
step is the run folder again.  Copies are made in the background: a slow or failing storage costs
copies, never steps.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread

from rayrl.checkpoint import LATEST, best_of, list_checkpoints, point_at
from rayrl.jsonl import read_jsonl
from rayrl.metrics import scores_of
from rayrl.receipt import RUN, read_run_id
from rayrl.remote import STORAGE_ERRORS, RemoteCopies

FETCHED = ".fetched.partial"
"""Where in the run folder what is fetched lies until it is whole and known to be of the run."""
_BASE = "run"
_FINAL, _RECEIPT = "stage1/final/", "stage1/stage1.json"
_MADE_OF = ("config.yaml", _RECEIPT)
_BASE_FILES = (RUN, *_MADE_OF, f"{_FINAL}**/*")
_HISTORY_FILES = (RUN, "metrics.jsonl", "samples.jsonl", "eval_captions.json", "xe/metrics.jsonl")
_IN_A_COPY = {"checkpoints", *(file.partition("/")[0] for file in _HISTORY_FILES)}
_REPORT_FILES = ("report.html", "summary.json", "config.yaml", "metrics.jsonl")
_STEP = re.compile(r"step_(\d+)")

CLOSE_S = 1800.0
"""How long the end of a run waits for copies that are still being made."""
_SAY_AFTER_S = 30.0

Say = Callable[[str], None]
Check = Callable[[Path], None]
"""Raises ValueError unless a folder, as it was fetched, may become a part of the run folder."""
_Job = tuple[Future[None], Callable[[], None]]


class Backup:
    """Copies a run folder's checkpoints to ``copies``, one at a time, in the background; nowhere
    where that is None.

    ``keep`` checkpoints stay there.  A copy that fails is said through ``say`` and left out.
    """

    def __init__(self, copies: RemoteCopies | None, folder: Path, *, keep: int, say: Say) -> None:
        self._copies, self._folder, self._keep, self._say = copies, folder, keep, say
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._given: dict[str, Future[None]] = {}
        self._resumed, self._base_is_there = True, False
        if copies is not None:
            # A process can end without this thread, whatever a copy hangs on.
            Thread(target=_work, args=[self._queue], name="backup", daemon=True).start()

    def base(self, *, resumed: bool) -> None:
        """Copy what the run started from, unless the run that was resumed did: stage 1 is never
        trained twice for one run.  Where that fails, the next checkpoint's copy begins with it."""
        self._resumed = resumed
        self._submit(_BASE, self._copy_base)

    def checkpoint(self, step: int, *, last: bool, scores: Mapping[int, float]) -> None:
        """Copy the local checkpoint of ``step``.  Training does not wait for a slow storage: while
        another copy is being made this one is left out, unless it is the run's ``last``.  Of the
        older copies the one with the highest of ``scores``, by step, stays, and is made again if it
        was left out."""
        name, unfinished = f"step_{step}", self._unfinished()
        if unfinished and not last:
            self._say(f"no remote copy of {name}: that of {unfinished[0]} is still being made")
            return
        for best in best_of(scores, list_checkpoints(self._folder / "checkpoints")):
            # There may have been no time for it then.
            if best not in {step, *self.copying()}:
                self._submit(f"step_{best}", partial(self._copy_best, step=best, scores=scores))
        self._submit(name, partial(self._copy_step, step=step, scores=scores))

    def report(self) -> None:
        """Copy what a person reads of a run that has ended."""
        self._submit(
            "report",
            lambda copies: copies.put("report", self._folder, _files(self._folder, _REPORT_FILES)),
        )

    def copying(self) -> list[int]:
        """The steps whose local checkpoints are being copied: nobody may remove them now."""
        return [int(match[1]) for name in self._unfinished() if (match := _STEP.fullmatch(name))]

    def wait(self, limit_s: float) -> bool:
        """Wait for all copies; returns whether they were made, or failed, within ``limit_s``."""
        wait(self._given.values(), timeout=limit_s)
        return not self._unfinished()

    def close(self) -> None:
        """Wait for all copies, but no longer than half an hour, after which what is not there is
        said and given up.  A second call does nothing."""
        if not self.wait(_SAY_AFTER_S):
            names = ", ".join(self._unfinished())
            self._say(f"waiting up to {CLOSE_S:.0f} s for the remote copy of {names}")
            if not self.wait(CLOSE_S - _SAY_AFTER_S):
                self._say(f"gave up the remote copy of {', '.join(self._unfinished())}")
        self._given.clear()
        self._queue.put(None)

    def _unfinished(self) -> list[str]:
        """The copies that are being made or wait for it, in order; says which have failed."""
        for name, future in list(self._given.items()):
            if future.done():
                del self._given[name]
                try:
                    future.result()
                except STORAGE_ERRORS as error:
                    self._say(f"the remote copy of {name} failed: {error}; going on")
        return list(self._given)

    def _submit(self, name: str, job: Callable[[RemoteCopies], None]) -> None:
        if self._copies is not None:
            self._given[name] = Future()
            self._queue.put((self._given[name], partial(job, self._copies)))

    def _copy_base(self, copies: RemoteCopies) -> None:
        if self._base_is_there:
            return
        if not (self._resumed and self._own_base(copies)):
            copies.put(_BASE, self._folder, _files(self._folder, _BASE_FILES))
        self._base_is_there = True

    def _own_base(self, copies: RemoteCopies) -> bool:
        """Whether what this run started from is there, and not that of an attempt before it."""
        return _BASE in copies.names() and _id_in(copies, _BASE) == read_run_id(self._folder)

    def _copy_best(self, copies: RemoteCopies, step: int, scores: Mapping[int, float]) -> None:
        if f"step_{step}" not in copies.names():
            self._copy_step(copies, step, scores)

    def _copy_step(self, copies: RemoteCopies, step: int, scores: Mapping[int, float]) -> None:
        # Nobody could go on from a checkpoint without it.
        self._copy_base(copies)
        patterns = (f"checkpoints/step_{step}/**/*", *_HISTORY_FILES)
        copies.put(f"step_{step}", self._folder, _files(self._folder, patterns))
        steps = remote_steps(copies)
        for old in set(steps[: -self._keep]) - set(best_of(scores, steps)):
            copies.remove(f"step_{old}")
        # Of a driver that was killed: this thread alone writes here, and now none of them.  Only
        # what has the form of a copy: somebody may keep checkpoints here by hand.
        with suppress(*STORAGE_ERRORS):
            for name, parts in copies.unfinished().items():
                if _STEP.fullmatch(name) and parts <= _IN_A_COPY:
                    copies.remove(name)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    """Make copies one after the other, as an executor's thread would.  Whatever one raises belongs
    to who asks for its result; this thread has to live for the next."""
    while (job := jobs.get()) is not None:
        future, copy = job
        try:
            future.set_result(copy())
        except Exception as error:
            future.set_exception(error)


def remote_steps(copies: RemoteCopies) -> list[int]:
    """Steps whose checkpoints are whole there, ascending."""
    return sorted(int(match[1]) for name in copies.names() if (match := _STEP.fullmatch(name)))


def run_of(copies: RemoteCopies) -> str:
    """The id of the run whose checkpoints these are; "" where none tells."""
    ids = (_id_in(copies, f"step_{step}") for step in reversed(remote_steps(copies)))
    return next((found for found in ids if found), "")


def _id_in(copies: RemoteCopies, name: str) -> str:
    """The id of the run that a copy is of; "" where it does not tell, or is damaged, which is said
    when it is fetched."""
    with TemporaryDirectory() as place:
        try:
            copies.fetch(name, Path(place), only=[RUN])
            return read_run_id(Path(place))
        except ValueError:
            return ""


def fetch_newest(
    copies: RemoteCopies, folder: Path, *, check: Check, say: Say, after: int = -1
) -> int | None:
    """Make ``folder`` the run folder of the newest whole checkpoint later than step ``after``.

    Returns its step, or None where there is none.  One whose files are not what was written is
    said and passed over for the one before.  ValueError where what the run started from is neither
    here nor whole there.  Nothing is written to the run then, or where ``check`` raises.
    """
    for step in reversed(remote_steps(copies)):
        if step <= after:
            break
        with _partial(folder) as partial:
            files = _fetched(copies, step, partial, say)
            if not files:
                continue
            files += _base_for(copies, folder, partial, say, begun=after >= 0)
            check(partial)
            _move(partial, folder, files, step)
        point_at(folder / "checkpoints" / f"step_{step}", LATEST)
        return step
    return None


def fetch_best(copies: RemoteCopies, folder: Path, *, check: Check, say: Say) -> None:
    """Bring the checkpoint with the highest held-out score to a run folder that has a later one
    and the history until then, unless it is here; one that is damaged, or for which ``check``
    raises, is said and left."""
    here = list_checkpoints(folder / "checkpoints")
    there = [step for step in remote_steps(copies) if here and step < here[-1]]
    scores = scores_of(read_jsonl(folder / "metrics.jsonl"))
    for step in best_of(scores, {*here, *there}):
        if step in here:
            continue
        with _partial(folder) as partial:
            files = _fetched(copies, step, partial, say)
            if not files:
                continue
            try:
                check(partial)
            except (FileNotFoundError, ValueError) as error:
                say(f"the remote copy of step {step}, the best, is left there: {error}")
                continue
            own = [file for file in files if file.startswith(f"checkpoints/step_{step}/")]
            _move(partial, folder, own, step)


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Where what is fetched for ``folder`` lies until it is moved there."""
    partial = folder / FETCHED
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetched(copies: RemoteCopies, step: int, partial: Path, say: Say) -> list[str]:
    """Fetch the copy of a step; returns its files, or none where it is damaged, which is said."""
    try:
        files = copies.fetch(f"step_{step}", partial)
        if not any(file.startswith(f"checkpoints/step_{step}/") for file in files):
            raise ValueError(f"it holds no file of checkpoints/step_{step}/")
    except ValueError as error:
        say(f"the remote copy of step {step} is damaged and passed over: {error}")
        return []
    return files


def _base_for(
    copies: RemoteCopies, folder: Path, partial: Path, say: Say, *, begun: bool
) -> list[str]:
    """Fetch what the run of the copies started from, unless ``folder`` has it; of that only what it
    was made of, to be compared.  Returns the files that the run folder needs.

    A folder in which no run has ``begun``, which has no checkpoint, can hold another's stage 1.
    ValueError where it is needed, and not whole there."""
    same = begun or read_run_id(folder) == read_run_id(partial)
    if _BASE not in copies.names():
        if same and (folder / _FINAL).is_dir():
            return []
        raise ValueError(
            f"--resume: there is no remote copy {_BASE}/ of what the run started from, and "
            f"{folder} holds no {_FINAL} of it: put its own stage1 and {RUN} there, for another "
            "one would make it another run"
        )
    if same and (folder / _RECEIPT).is_file() and (folder / _FINAL).is_dir():
        try:
            copies.fetch(_BASE, partial, only=_MADE_OF)
        except ValueError as error:
            say(f"the remote copy {_BASE}/ of what the run started from is damaged: {error}")
            for file in _MADE_OF:
                (partial / file).unlink(missing_ok=True)
        return []
    of_step = read_run_id(partial)
    try:
        files = copies.fetch(_BASE, partial)
    except ValueError as error:
        raise ValueError(
            f"--resume: the remote copy {_BASE}/ of what the run started from is damaged ({error}) "
            f"and no step goes on without it: put the run's own stage1 and {RUN} into {folder}"
        ) from None
    if (found := read_run_id(partial)) != of_step:
        raise ValueError(
            f"--resume: the remote copy {_BASE}/ is of the run {found or 'of an older version'}, "
            f"the steps are of {of_step or 'one of an older version'}: put the stage1 and {RUN} of "
            f"the steps' run into {folder}"
        )
    return files


def _move(source: Path, target: Path, files: list[str], step: int) -> None:
    """Move fetched files into the run folder, the checkpoint of ``step`` last; it and the model of
    stage 1 whole."""
    checkpoint = f"checkpoints/step_{step}/"
    if _RECEIPT in files:
        # It is never that of another model, whenever this ends.
        (target / _RECEIPT).unlink(missing_ok=True)
        # Nor does the run go by the id of an attempt whose stage 1 was here.
        (target / RUN).unlink(missing_ok=True)
    if any(file.startswith(_FINAL) for file in files):
        _move_whole(source / _FINAL, target / _FINAL)
    # What tells of the run comes with both.
    for file in dict.fromkeys(files):
        if not file.startswith((_FINAL, checkpoint)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / file, target / file)
    _move_whole(source / checkpoint, target / checkpoint)


def _move_whole(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        for file in folder.glob(pattern):
            if file.is_file():
                yield file.relative_to(folder).as_posix()
