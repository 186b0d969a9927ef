"""In which order the driver's loop does things: what workers wait for comes first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from rayrl import grpo, saving
from rayrl.actors.pool import TooFewWorkers, TooManyLost
from rayrl.config import Config
from rayrl.metrics import Phases
from rayrl.types import StepReport

STEPS, EVERY = 4, 2


class Recorded:
    """A run whose parts only say what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, staleness: int) -> None:
        self.said: list[str] = []
        self.version = 0
        self.run = MagicMock()
        self.run.config = Config.model_validate(
            {"train": {"steps": STEPS, "max_staleness": staleness, "checkpoint_every": EVERY}}
        )
        self.run.phases = Phases()
        self.run.stop = SimpleNamespace(requested=False)
        self.run.saved_step = -1
        self.run.fleet.submit.side_effect = self._submit
        self.run.fleet.gauges.side_effect = lambda pending: {"waiting": float(len(pending))}
        self.run.fleet.reward_seconds.return_value = {}
        self.run.learner.update.side_effect = self._update
        results = SimpleNamespace(outline=None)
        drawn = SimpleNamespace(results=results, num_captions=1, metrics=lambda: {})
        monkeypatch.setattr(grpo, "_all_rounds", lambda run, batch, version: drawn)
        monkeypatch.setattr(grpo, "group_metrics", lambda outline, version: {})
        monkeypatch.setattr(grpo, "publish", lambda run, version: self._say("publish", version))
        monkeypatch.setattr(grpo, "save", self._save)
        monkeypatch.setattr(grpo, "_log", self._log)
        self.stop_at = STEPS + 1

    def _say(self, what: str, number: int) -> None:
        self.said.append(f"{what} {number}")

    def _submit(self, step: int, version: int, requests: object) -> SimpleNamespace:
        self.said.append(f"send {step} for {version}")
        return SimpleNamespace(step=step)

    def _update(self, results: object) -> StepReport:
        self.version += 1
        return MagicMock(weight_version=self.version)

    def _save(self, run: MagicMock, *, last: bool) -> None:
        self._say("save the last," if last else "save", self.version)
        run.saved_step = self.version

    def _log(self, run: MagicMock, report: StepReport, *_: object, last: bool) -> None:
        self._say("log", report.weight_version)
        run.stop.requested = self.version == self.stop_at


def test_the_next_batch_is_sent_before_the_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, staleness=0)
    assert grpo.train(recorded.run, 0) == STEPS
    assert recorded.said == [
        *("send 0 for 0", "publish 1", "log 1"),
        *("send 1 for 1", "publish 2", "log 2"),
        *("send 2 for 2", "save 2", "publish 3", "log 3"),
        *("send 3 for 3", "publish 4", "log 4", "save the last, 4"),
    ]


def test_with_staleness_as_many_more_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, staleness=2)
    assert grpo.train(recorded.run, 0) == STEPS
    sent = [what for what in recorded.said if what.startswith("send")]
    assert sent == ["send 0 for 0", "send 1 for 0", "send 2 for 0", "send 3 for 1"]
    assert recorded.said.index("send 3 for 1") < recorded.said.index("publish 2")


@pytest.mark.parametrize("staleness", [0, 2])
def test_after_a_request_to_stop_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, staleness: int
) -> None:
    recorded = Recorded(monkeypatch, staleness=staleness)
    recorded.stop_at = 1
    assert grpo.train(recorded.run, 0) == 1
    assert recorded.said[-3:] == ["publish 1", "log 1", "save the last, 1"]


class Failed(Recorded):
    """A run at step 3 whose loop raises ``error``."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        *,
        saved: int = 2,
        lost: bool = False,
        midway: bool = False,
    ) -> None:
        super().__init__(monkeypatch, staleness=0)
        self.version = 3
        self.run.saved_step, self.run.unlogged = saved, None
        self.run.learner.step, self.run.learner.lost, self.run.learner.midway = 3, lost, midway
        monkeypatch.setattr(grpo, "train", MagicMock(side_effect=error))
        monkeypatch.setattr(saving, "save", self._save)


@pytest.mark.parametrize(
    ("saved", "lost", "midway", "writes", "says"),
    [
        (2, False, False, 1, True),
        (3, False, False, 0, True),
        (3, True, False, 0, True),
        (2, True, False, 0, False),
        (2, False, True, 0, False),
    ],
)
@pytest.mark.parametrize("error", [TooFewWorkers("none came back"), ValueError("prompt a/0")])
def test_a_run_that_fails_is_saved_once(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    saved: int,
    lost: bool,
    midway: bool,
    writes: int,
    says: bool,
) -> None:
    failed = Failed(monkeypatch, error, saved=saved, lost=lost, midway=midway)
    with pytest.raises(type(error)):
        grpo.train_or_save(failed.run, 0)
    assert failed.said == ["save the last, 3"] * writes
    said = [call.args[0] for call in failed.run.log.message.call_args_list]
    assert said == ["saved step 3: go on with --resume"] * says


def test_a_run_that_is_interrupted_twice_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Failed(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        grpo.train_or_save(failed.run, 0)
    assert failed.said == []


def test_a_run_that_is_asked_to_stop_while_it_waits_ends_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = Failed(monkeypatch, TooFewWorkers("0 are ready; asked to stop meanwhile"))
    failed.run.stop.requested = True
    assert grpo.train_or_save(failed.run, 0) == 3
    assert failed.said == ["save the last, 3"]


def test_a_step_that_was_trained_is_logged_whatever_fails_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded(monkeypatch, staleness=0)
    recorded.run.log.last_step = 0
    monkeypatch.setattr(saving, "save", recorded._save)
    monkeypatch.setattr(grpo, "_log", MagicMock(side_effect=TooManyLost("in the evaluation")))
    with pytest.raises(TooManyLost):
        grpo.train_or_save(recorded.run, 0)
    ((step, metrics),) = [call.args for call in recorded.run.log.step.call_args_list]
    assert (step, metrics["waiting"]) == (1, 0.0)


def test_a_step_whose_logging_failed_is_saved_and_not_logged_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded(monkeypatch, staleness=0)
    recorded.run.learner.lost = recorded.run.learner.midway = False
    saved: list[bool] = []
    monkeypatch.setattr(saving, "save", lambda run, *, last: saved.append(last))

    def log(run: Any, *_: object, **options: object) -> None:
        run.log.last_step = 1
        raise RuntimeError("something that hears of steps")

    monkeypatch.setattr(grpo, "_log", log)
    with pytest.raises(RuntimeError, match="something that hears"):
        grpo.train_or_save(recorded.run, 0)
    assert saved == [True]
    recorded.run.log.step.assert_not_called()


def test_what_ends_badly_keeps_no_other_part_from_its_end() -> None:
    run = MagicMock()
    run.log.attempt.side_effect = TooManyLost("who asks workers for a trace")
    run.fleet.shutdown.side_effect = RuntimeError("first")
    with pytest.raises(RuntimeError, match="first"):
        saving.close(run)
    run.learner.shutdown.assert_called_once_with()
    run.backup.close.assert_called_once_with()
    run.log.close.assert_called_once_with()
