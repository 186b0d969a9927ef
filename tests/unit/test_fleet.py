"""What the fleet puts into the object store, without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayrl.actors import fleet
from rayrl.actors.pool import RestartBudget
from rayrl.config import Config
from rayrl.rewards.statistics import Statistics


def test_engines_are_not_sent_the_weights_that_they_will_pull(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put: list[Any] = []
    monkeypatch.setattr(fleet.ray, "put", put.append)
    for pool in ("rollout_pool", "reward_pool"):
        monkeypatch.setattr(fleet, pool, lambda *arguments, **options: None)
    names = ["config.json", "model.safetensors", "model-2.safetensors", "tokenizer.json"]
    files = {name: np.zeros(3, np.uint8) for name in names}
    fleet.Fleet(Config(), files, Statistics(), RestartBudget(0), greedy_baseline=False)
    small = put[0]
    assert list(small) == ["config.json", "tokenizer.json"]
    assert all(small[name] is files[name] for name in small)
