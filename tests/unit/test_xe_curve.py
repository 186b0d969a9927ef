"""The control is beside the run, not part of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rayrl import xe
from rayrl.actors.pool import TooManyLost
from rayrl.config import Config
from rayrl.interrupt import StopRequest
from rayrl.stage1 import Snapshot
from rayrl.xe_curve import XeCurve


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no room"),
        OSError("disk full"),
        TooManyLost("2"),
        ActorDiedError(),
        KeyboardInterrupt("interrupted"),
    ],
)
def test_a_control_that_fails_says_why_and_costs_nothing_else(error, monkeypatch, tmp_path):
    def train_xe(config: Config, data: Any, start: Path, out: Path, **_: Any) -> list[Snapshot]:
        (out / "xe" / "step_1").mkdir(parents=True)
        raise error

    monkeypatch.setattr(xe, "train_xe", train_xe)
    said: list[str] = []
    nobody: Any = SimpleNamespace()
    curve = XeCurve(Config(), tmp_path, nobody, nobody, nobody, said.append)
    stage1 = Snapshot(steps=5, seconds=1.0, folder=tmp_path)
    (tmp_path / "xe_baseline.jsonl").write_text("of an earlier control")
    assert curve.control(stage1, 30.0, StopRequest()) == {}
    assert list(tmp_path.iterdir()) == []
    assert said == ["control: cross-entropy for 30 s more", f"there is no control: {error}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_told_to_stop_does_without_its_control(number, monkeypatch, tmp_path):
    def train_xe(*_: Any, **options: Any) -> list[Snapshot]:
        os.kill(os.getpid(), number)
        raise AssertionError("it trains on")

    monkeypatch.setattr(xe, "train_xe", train_xe)
    nobody: Any = SimpleNamespace()
    curve, stop = XeCurve(Config(), tmp_path, nobody, nobody, nobody, lambda _: None), StopRequest()
    stage1 = Snapshot(steps=5, seconds=1.0, folder=tmp_path)
    with stop.listening(lambda _: None):
        before = signal.getsignal(number)
        assert curve.control(stage1, 30.0, stop) == {}
        assert signal.getsignal(number) is before
