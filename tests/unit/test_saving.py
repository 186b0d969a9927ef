"""Saving a run: what a full disk costs, and what a run is put back from."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import numpy as np
import pytest

from rayrl import saving
from rayrl.checkpoint import Checkpoint, list_checkpoints
from rayrl.config import Config
from rayrl.metrics import RunLog
from rayrl.reference_rewards import ReferenceRewards


class Learner:
    """Records what it is told to be rebuilt from."""

    def __init__(self) -> None:
        self.step = 0
        self.origins: list[str] = []

    def checkpoint(self, use):
        files = {"config.json": np.frombuffer(b"{}", np.uint8)}
        return use(Checkpoint(step=self.step, model_files=files, arrays={}, meta={}))

    def rebuild_from(self, place) -> None:
        self.origins.append(place.name)

    def restore(self, checkpoint, place) -> int:
        self.origins.append(place.name)
        return checkpoint.step


class Backup:
    def __init__(self) -> None:
        self.copied: list[int] = []

    def copying(self) -> list[int]:
        return []

    def checkpoint(self, step: int, *, last: bool, scores) -> None:
        self.copied.append(step)
        self.scores = scores


@pytest.fixture
def job(tmp_path):
    """The parts of a run that are saved; ``restored`` is what its rounds go on from."""
    restored: list[object] = []
    rounds = SimpleNamespace(state=lambda: {"next": 7}, restore=restored.append)
    return SimpleNamespace(
        config=Config(),
        folder=tmp_path,
        base=tmp_path,
        train_data=SimpleNamespace(fingerprint=lambda: "data"),
        rounds=rounds,
        reference=ReferenceRewards(),
        restored=restored,
        learner=Learner(),
        log=RunLog(tmp_path, total_steps=9, tensorboard=False),
        backup=Backup(),
        signatures={},
        saved_step=-1,
    )


@pytest.fixture
def full(monkeypatch):
    """Fills and frees the disk under checkpoints."""
    real = saving.save_checkpoint

    def refused(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda now: monkeypatch.setattr(saving, "save_checkpoint", refused if now else real)


def test_a_full_disk_costs_a_checkpoint_in_the_course_of_a_run(job, full, capsys):
    job.learner.step = 2
    saving.save(job, last=False)
    full(True)
    job.learner.step = 4
    saving.save(job, last=False)
    assert (job.saved_step, job.learner.origins, job.backup.copied) == (2, ["step_2"], [2])
    said = capsys.readouterr().out
    assert "checkpoint of step 4 failed: [Errno 28]" in said
    assert "the newest is of step 2; going on" in said
    full(False)
    job.learner.step = 6
    saving.save(job, last=False)
    assert list_checkpoints(job.folder / "checkpoints") == [2, 6]
    assert job.learner.origins == ["step_2", "step_6"]


def test_a_run_whose_last_checkpoint_has_no_room_does_not_end_well(job, full):
    job.learner.step = 2
    saving.save(job, last=True)
    full(True)
    job.learner.step = 4
    with pytest.raises(OSError, match=r"newest is of step 2; make room and --resume"):
        saving.save(job, last=True)
    assert job.saved_step == 2
    job.saved_step = -1
    assert saving.restore(job) == 2
    assert job.saved_step == 2
    assert job.restored == [{"next": 7}]


def test_no_checkpoint_is_ahead_of_the_log(job, monkeypatch):
    def refused() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job.log, "flush", refused)
    saving.save(job, last=False)
    assert list_checkpoints(job.folder / "checkpoints") == []
    assert job.learner.origins == []


def evaluated(job, step: int, score: float) -> bool:
    """A step with a held-out score, saved where it is due; returns whether it was."""
    job.learner.step = step
    job.log.step(step, {"eval/cider_d": score})
    if due := saving.is_due(job, step):
        saving.save(job, last=False)
    return due


def best(job) -> str:
    return (job.folder / "checkpoints" / "best").resolve().name


def test_a_step_with_the_best_score_so_far_is_saved_and_stays(job):
    # The model that the run started from is no checkpoint of it, however good.
    job.log.step(0, {"eval/cider_d": 90.0})
    due = [evaluated(job, step, score) for step, score in [(1, 50.0), (2, 60.0), (3, 55.0)]]
    assert due == [True, True, False]
    assert best(job) == "step_2"
    # Those that are due by their number push out all others.
    for step in (30, 60, 90):
        assert evaluated(job, step, 40.0)
    assert list_checkpoints(job.folder / "checkpoints") == [2, 60, 90]
    assert best(job) == "step_2"
    assert job.backup.scores == {1: 50.0, 2: 60.0, 3: 55.0, 30: 40.0, 60: 40.0, 90: 40.0}
    assert evaluated(job, 91, 61.0)
    assert list_checkpoints(job.folder / "checkpoints") == [90, 91]
    assert best(job) == "step_91"


def test_a_run_that_goes_on_knows_what_was_best(job):
    evaluated(job, 1, 50.0)
    evaluated(job, 30, 40.0)
    # As a driver leaves it that was killed before it moved the link.
    (job.folder / "checkpoints" / "best").unlink()
    job.log = RunLog(job.folder, total_steps=9, tensorboard=False, resume_from=30)
    assert saving.restore(job) == 30
    assert best(job) == "step_1"
    assert not evaluated(job, 31, 45.0)
    assert evaluated(job, 32, 50.5)
    assert best(job) == "step_32"


def test_the_best_of_one_held_out_set_is_not_compared_with_another(job):
    job.signatures = {"eval/cider_d": "Cider-D+df:corpus[9]#aa+tok:ptb+rayrl:0.1.0"}
    evaluated(job, 1, 50.0)
    evaluated(job, 30, 40.0)
    # By the checkpoint: the log is of a version that did not say.
    job.log = RunLog(
        job.folder, total_steps=9, tensorboard=False, resume_from=30, heldout="corpus[5]#bb"
    )
    assert saving.restore(job) == 30
    assert best(job) == "step_1", "until there is one of the new set"
    assert evaluated(job, 31, 20.0)
    assert best(job) == "step_31"
    assert not evaluated(job, 32, 19.0)


def test_a_newer_rayrl_has_the_same_held_out_set(job):
    job.signatures = {"eval/cider_d": "Cider-D+df:corpus[9]#aa+tok:ptb+rayrl:0.1.0"}
    evaluated(job, 30, 40.0)
    job.log = RunLog(
        job.folder, total_steps=9, tensorboard=False, resume_from=30, heldout="corpus[9]#aa"
    )
    saving.restore(job)
    assert not evaluated(job, 31, 20.0)


def test_a_best_score_without_room_on_the_disk_is_not_pointed_at(job, full, capsys):
    evaluated(job, 1, 50.0)
    full(True)
    assert evaluated(job, 2, 60.0)
    assert "checkpoint of step 2 failed" in capsys.readouterr().out
    full(False)
    assert not evaluated(job, 3, 55.0), "step 2 was better, if nobody has it"
    assert evaluated(job, 30, 55.0)
    assert best(job) == "step_30", "of those that there are"


def test_a_run_may_do_without_a_best_checkpoint(job):
    job.config = Config.model_validate({"train": {"keep_best": False}})
    assert not evaluated(job, 1, 50.0)
    assert evaluated(job, 30, 40.0)
    assert {f.name for f in (job.folder / "checkpoints").iterdir()} == {"step_30", "latest"}
