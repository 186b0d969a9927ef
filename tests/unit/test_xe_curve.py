"""The control is beside the run, not part of it."""

from __future__ import annotations

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
    def train_xe(config: Config, start: Path, out: Path, **_: Any) -> list[Snapshot]:
        (out / "xe" / "step_1").mkdir(parents=True)
        raise error

    monkeypatch.setattr(xe, "train_xe", train_xe)
    said: list[str] = []
    nobody: Any = SimpleNamespace()
    curve = XeCurve(Config(), tmp_path, nobody, nobody, said.append)
    stage1 = Snapshot(steps=5, seconds=1.0, folder=tmp_path)
    (tmp_path / "xe_baseline.jsonl").write_text("of an earlier control")
    assert curve.control(stage1, 30.0, StopRequest()) == {}
    assert list(tmp_path.iterdir()) == []
    assert said == ["control: cross-entropy for 30 s more", f"there is no control: {error}"]
