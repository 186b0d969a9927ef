"""What the fleet puts into the object store, without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from rayrl.actors import fleet, workers
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


def test_an_engine_that_slept_is_sent_what_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forgets its weights only where all of them train."""
    sent: list[bool] = []
    pool = SimpleNamespace(constructed=[], wait=lambda: None)
    monkeypatch.setattr(fleet.ray, "put", lambda value: value)
    monkeypatch.setattr(fleet, "rollout_pool", lambda *arguments, **options: pool)
    monkeypatch.setattr(fleet, "reward_pool", lambda *arguments, **options: pool)
    learner = {"gpus": 0.5}
    rollout = {"colocate": True, "gpus": 0.5, "num_workers": 1, "max_workers": 1}
    config = Config.model_validate({"learner": learner, "rollout": rollout, "xe": {"steps": 0}})
    assert config.sleep_level == 2
    subject = fleet.Fleet(config, {}, Statistics(), RestartBudget(0), greedy_baseline=False)
    monkeypatch.setattr(
        subject._versions, "publish", lambda *_, whole, **options: sent.append(whole)
    )
    subject.sleep()
    subject.publish(3, "trained")
    assert sent == [False]


def test_reward_workers_are_beside_the_learner_where_its_place_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a rollout worker's machine they would keep it from leaving."""
    node, places = "ab" * 28, {"there": "ab" * 28, "waiting": ""}
    table = lambda place: {"bundles_to_node_id": {0: places[place]}}  # noqa: E731
    monkeypatch.setattr(workers, "placement_group_table", table)
    options: list[Any] = []
    actor = SimpleNamespace(remote=lambda *_: SimpleNamespace(started=MagicMock()))
    fake = SimpleNamespace(options=lambda **given: options.append(given) or actor)
    monkeypatch.setattr(workers, "RewardActor", fake)
    config = Config.model_validate({"train": {"reward_workers": 1}})
    for place in ("there", "waiting", None):
        workers.reward_pool(config, (None,), RestartBudget(0), place)
    first, *others = (given["scheduling_strategy"] for given in options)
    assert (first.node_id, first.soft) == (node, True)
    assert others == ["DEFAULT", "DEFAULT"]
