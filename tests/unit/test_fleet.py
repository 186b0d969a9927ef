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
    node, places = "ab" * 28, {"there": "ab" * 28, "waiting": "", "later": ""}
    table = lambda place: {"bundles_to_node_id": {0: places[place]}}  # noqa: E731
    monkeypatch.setattr(workers, "placement_group_table", table)
    options: list[Any] = []
    actor = SimpleNamespace(remote=lambda *_: SimpleNamespace(started=MagicMock()))
    fake = SimpleNamespace(options=lambda **given: options.append(given) or actor)
    monkeypatch.setattr(workers, "RewardActor", fake)
    config = Config.model_validate({"train": {"reward_workers": 1}})
    for place in ("there", None):
        workers.reward_pool(config, (None,), RestartBudget(0), place)
    later = [
        workers.reward_pool(config, (None,), RestartBudget(0), p) for p in ("waiting", "later")
    ]
    assert len(options) == 2
    # Where the learner has come meanwhile, and where it still has not.
    places["later"] = node
    for pool in reversed(later):
        pool._fill()
    beside, anywhere, came, missing = (given["scheduling_strategy"] for given in options)
    assert (beside.node_id, beside.soft) == (came.node_id, came.soft) == (node, True)
    assert anywhere == missing == "DEFAULT"


ASYNCHRONOUS = {"train": {"max_staleness": 1}}
COLOCATED = {
    "learner": {"gpus": 0.5},
    "rollout": {"colocate": True, "gpus": 0.5, "num_workers": 1, "max_workers": 1},
    "xe": {"steps": 0},
}


def made(monkeypatch: pytest.MonkeyPatch, pool: Any, config: dict[str, Any]) -> fleet.Fleet:
    """A fleet on a stand-in for its pool of rollout workers."""
    monkeypatch.setattr(fleet.ray, "put", lambda value: value)
    for name in ("rollout_pool", "reward_pool"):
        monkeypatch.setattr(fleet, name, lambda *arguments, **options: pool)
    checked = Config.model_validate(config)
    return fleet.Fleet(checked, {}, Statistics(), RestartBudget(0), greedy_baseline=False)


class Clock(SimpleNamespace):
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        super().__init__(now=0.0)
        self.perf_counter = self.monotonic = lambda: self.now


def test_start_up_and_evaluations_do_not_pass_for_work_that_hides_sampling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four workers, of which the learner needs four: it takes 10 s, they 40 all together."""
    clock, wanted = Clock(), []
    monkeypatch.setattr(fleet, "time", clock)
    pool = SimpleNamespace(
        wanted=4, settled=True, longest_start_s=0.0, admit=list, resize=wanted.append
    )
    rollout = {"num_workers": 4, "min_workers": 1, "max_workers": 4}
    subject = made(monkeypatch, pool, ASYNCHRONOUS | {"rollout": rollout})
    clock.now += 300.0
    for _ in range(8):
        began = subject.begin_step()
        assert began == clock.now
        clock.now += 10.0
        subject._sampling_s += 40.0
        subject.adapt()
        clock.now += 60.0
    assert wanted == [4] * 8


def test_workers_that_do_not_come_are_wanted_no_more_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = SimpleNamespace(wanted=4, settled=False, admit=lambda: [None] * 3)
    pool.resize = lambda wanted: setattr(pool, "wanted", wanted)
    rollout = {"num_workers": 4, "min_workers": 2, "max_workers": 4, "start_timeout_s": 600.0}
    subject = made(monkeypatch, pool, ASYNCHRONOUS | {"rollout": rollout})
    for seconds, wanted in ((500.0, 4), (700.0, 3)):
        pool.longest_start_s = seconds
        subject.adapt()
        assert pool.wanted == wanted
    assert "1 of 4 rollout workers did not come within 600 s (rollout.start_timeout_s)" in (
        caplog.text
    )


def test_an_engine_that_is_lost_on_its_way_to_sleep_is_waited_for_and_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = [SimpleNamespace(actor=MagicMock(), name=name) for name in ("first", "second")]
    asleep: list[str] = []
    pool = SimpleNamespace(constructed=workers[:1], wait=lambda: None, admit=list)
    subject = made(monkeypatch, pool, COLOCATED)

    def answers(pool: Any, calls: Any) -> None:
        asleep.extend(call.worker.name for call in calls)
        pool.constructed = workers[1:]

    monkeypatch.setattr(subject._versions, "answers", answers)
    subject.sleep()
    assert asleep == ["first", "second"]


def test_the_learner_is_built_anew_without_waiting_for_an_engine_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = MagicMock()
    worker = SimpleNamespace(actor=MagicMock())
    pool = SimpleNamespace(constructed=[worker], wait=waits, admit=list)
    subject = made(monkeypatch, pool, COLOCATED)
    loads = MagicMock()
    monkeypatch.setattr(subject._versions, "answers", MagicMock())
    monkeypatch.setattr(subject._versions, "load", loads)
    subject._versions._trained[3] = "weights"
    with pytest.raises(RuntimeError, match="again"), subject._aside():
        raise RuntimeError("the learner is lost again")
    loads.assert_not_called()
    # The engine was put to sleep for that attempt, and wakes after the next.
    with subject._aside():
        loads.assert_not_called()
    loads.assert_called_once_with(worker, 3)
    subject._asleep = True  # for the update, after which it gets a new version
    with subject._aside():
        pass
    loads.assert_called_once_with(worker, 3)
    waits.assert_not_called()
