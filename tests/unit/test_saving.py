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

    def checkpoint(self, step: int, *, last: bool) -> None:
        self.copied.append(step)


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
