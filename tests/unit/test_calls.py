"""Who is late: workers serve their calls one after the other, and the limit is for each."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from rayrl.actors import batches, pending
from rayrl.actors.batches import Batches
from rayrl.actors.pending import Calls, Pending, Share
from rayrl.config import Config

NEVER = float("inf")


class World:
    """A clock, and calls that are answered when their time has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answered: dict[str, float]) -> None:
        self.now, self.answered = 100.0, {ref: 100.0 + at for ref, at in answered.items()}
        monkeypatch.setattr(pending.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(pending.ray, "wait", self._wait)

    def _wait(self, refs, *, timeout, num_returns=1, fetch_local=True):
        assert refs and num_returns <= len(refs) and timeout >= 0.0
        self.now += 1e-5
        timeout = int(timeout * 1000) / 1000  # as Ray has it
        times = sorted(self.answered[ref] for ref in refs)
        self.now = max(self.now, min(times[num_returns - 1], self.now + timeout))
        there = [ref for ref in refs if self.answered[ref] <= self.now][:num_returns]
        return there, [ref for ref in refs if ref not in there]


def calls(of: dict[str, int], limit_s: float = 4.0) -> Calls:
    made = Calls(limit_s)
    for ref, worker in of.items():
        made.add(ref, worker)
    return made


def test_a_long_line_is_no_reason_to_take_a_worker_for_hung(monkeypatch):
    line = {f"part {i}": 3.0 * (i + 1) for i in range(7)}
    world = World(monkeypatch, line)
    heard: list[float] = []
    late = calls(dict.fromkeys(line, 0)).late(list(line), lambda: heard.append(world.now - 100.0))
    assert late == []
    assert heard == pytest.approx(list(line.values()), abs=1e-3)


def test_a_call_waits_behind_those_that_nobody_waits_for(monkeypatch):
    World(monkeypatch, {"next step": 3.0, "wanted": 6.0})
    assert calls({"next step": 0, "wanted": 0}).late(["wanted"]) == []
    # Of another worker it says nothing.
    World(monkeypatch, {"next step": 3.0, "wanted": 6.0})
    assert calls({"next step": 1, "wanted": 0}).late(["wanted"]) == [0]


def test_a_worker_is_late_when_it_has_answered_nothing_for_the_limit(monkeypatch):
    answered = {"a": 1.0, "b": 2.0, "c": NEVER, "d": 3.0, "e": NEVER, "f": 5.5}
    of = {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1, "f": 0}
    world = World(monkeypatch, answered)
    assert calls(of).late(list(answered)) == [2, 4]
    assert world.now == pytest.approx(106.0, abs=1e-2)  # the limit after b, its last answer


def test_workers_that_were_silent_from_the_beginning_are_late_together(monkeypatch):
    World(monkeypatch, {"a": NEVER, "b": NEVER, "c": 1.0})
    assert calls({"a": 0, "b": 1, "c": 2}).late(["a", "b", "c"]) == [0, 1]


def test_what_is_forgotten_is_not_waited_for(monkeypatch):
    World(monkeypatch, {"old": NEVER, "new": 3.0})
    made = calls({"old": 0, "new": 0})
    made.forget("old")
    assert made.late(["new"]) == []


def test_parts_that_one_reward_worker_scores_in_turn_have_the_limit_each(monkeypatch):
    limit_s = Config().train.reward_timeout_s
    parts = [f"part {i}" for i in range(4)]
    scored = {part: 0.8 * limit_s * (i + 1) for i, part in enumerate(parts)}
    world = World(monkeypatch, scored)
    monkeypatch.setattr(batches.ray, "get", lambda refs, timeout=None: refs)
    reward = SimpleNamespace(lost=MagicMock())
    subject = Batches(Config(), None, reward, None, greedy_baseline=False)
    shares = [Share(index=i, first=i, requests=[], prompts=None) for i in range(4)]
    for share, part in zip(shares, parts, strict=True):
        share.scored = part
        subject._scoring.add(part, 0)
    results = subject.collect(Pending(step=0, version=0, shares=shares))
    assert results == parts
    assert world.now == pytest.approx(100.0 + 3.2 * limit_s, abs=1e-2)
    reward.lost.assert_not_called()


def test_a_reward_worker_that_answers_nothing_is_lost_for_a_limit_that_is_named(monkeypatch):
    limit_s = Config().train.reward_timeout_s
    world = World(monkeypatch, {"hung": NEVER, "again": 2 * limit_s})

    def get(ref, timeout=None):
        if isinstance(ref, list):
            return [get(one) for one in ref]
        if ref != "groups" and world.answered[ref] > world.now:
            raise GetTimeoutError("Get timed out: some object(s) not ready.")
        return ref

    monkeypatch.setattr(batches.ray, "get", get)
    reward = SimpleNamespace(lost=MagicMock())
    subject = Batches(Config(), None, reward, None, greedy_baseline=False)
    share = Share(index=0, first=0, requests=[], prompts=None, rollout="groups", scored="hung")
    subject._scoring.add("hung", 0)

    def send(share, pending):
        world.now += 2 * limit_s
        share.scored = "again"
        subject._scoring.add("again", 0)

    monkeypatch.setattr(subject, "_send_to_score", send)
    monkeypatch.setattr(subject, "_wait_sampled", lambda *arguments: None)
    assert subject.collect(Pending(step=0, version=0, shares=[share])) == ["again"]
    (_, cause), _ = reward.lost.call_args
    assert str(cause) == f"no answer within {limit_s:g} s (train.reward_timeout_s)"


def test_all_parts_of_a_worker_that_died_are_sampled_again_at_the_same_time(monkeypatch):
    """Two workers have two parts each, and one of them dies: the other one's line holds both."""
    parts = ["a", "b", "c", "d"]
    world = World(monkeypatch, dict.fromkeys(parts, 1.0))
    died = {"b", "d"}

    def get(ref, timeout=None):
        if isinstance(ref, list):
            return [get(one) for one in ref]
        if ref in died:
            raise ActorDiedError()
        assert world.answered[ref] <= world.now
        return ref

    monkeypatch.setattr(batches.ray, "get", get)
    subject = Batches(Config(), None, None, None, greedy_baseline=False)
    shares = [
        Share(index=i, first=i, requests=[], prompts=None, rollout=part, scored=part)
        for i, part in enumerate(parts)
    ]
    for share in shares:
        subject.calls.add(share.rollout, share.index % 2)
        subject._scoring.add(share.scored, 0)
    sent: list[tuple[str, float]] = []

    def sample_again(share, pending, cause):
        assert isinstance(cause, ActorDiedError)
        share.rollout = share.scored = f"{share.rollout} again"
        # A part takes 3 s, in a line.
        world.answered[share.rollout] = world.now + 3.0 * (1 + len(sent))
        sent.append((share.rollout, world.now))
        subject.calls.add(share.rollout, 0)
        subject._scoring.add(share.scored, 0)

    monkeypatch.setattr(subject, "_sample_again", sample_again)
    results = subject.collect(Pending(step=0, version=0, shares=shares))
    assert results == ["a", "b again", "c", "d again"]
    (first, began), (second, then) = sent
    assert (first, second) == ("b again", "d again")
    assert then == pytest.approx(began, abs=1e-3)
    assert world.now == pytest.approx(107.0, abs=1e-2)
