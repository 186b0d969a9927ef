"""Who is late: workers serve their calls one after the other, and the limit is for each."""

from __future__ import annotations

import pytest

from rayrl.actors import pending
from rayrl.actors.pending import Calls

NEVER = float("inf")


class World:
    """A clock, and calls that are answered when their time has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answered: dict[str, float]) -> None:
        self.now, self.answered = 100.0, {ref: 100.0 + at for ref, at in answered.items()}
        monkeypatch.setattr(pending.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(pending.ray, "wait", self._wait)

    def _wait(self, refs, *, timeout, num_returns=1, fetch_local):
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
