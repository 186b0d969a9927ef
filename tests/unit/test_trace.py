"""The trace: lanes, nesting, one clock, sums; readable after a kill."""

from __future__ import annotations

import json
import time

import pytest

from rayrl.metrics import Phases
from rayrl.trace import Span, Traced, TraceFile, traced


class Worker(Traced):
    @traced
    def sample(self, seconds: float, *, fail: bool = False) -> str:
        """Sleeps."""
        time.sleep(seconds)
        if fail:
            raise RuntimeError("engine failed")
        return "sampled"

    def untraced(self) -> None: ...


def complete(events: list[dict]) -> list[dict]:
    return [event for event in events if event["ph"] == "X"]


def test_a_worker_remembers_its_marked_calls_until_asked_and_failures_too():
    worker = Worker()
    assert worker.take_spans() == []
    before = time.time()
    assert worker.sample(0.01) == "sampled"
    worker.untraced()
    with pytest.raises(RuntimeError, match="engine failed"):
        worker.sample(0.0, fail=True)
    first, second = worker.take_spans()
    assert (first.name, second.name) == ("sample", "sample")
    assert first.seconds >= 0.01 > second.seconds - 1
    assert before <= first.started <= second.started <= time.time()
    assert worker.take_spans() == []
    assert Worker.sample.__doc__ == "Sleeps."


def test_only_the_latest_thousand_calls_are_kept():
    worker = Worker()
    for _ in range(1100):
        worker.sample(0.0)
    assert len(worker.take_spans()) == 1000


def test_phases_lie_within_their_step_and_sum_to_the_logged_seconds(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    phases = Phases(listener=trace.phase)
    logged = {}
    for step in (1, 2):
        for phase in ("rollout", "learner", "rollout"):
            with phases(phase):
                time.sleep(0.002)
        logged[step] = phases.take()
        trace.step(step, logged[step])
    trace.close()
    trace.close()
    events = complete(json.loads((tmp_path / "trace.json").read_text()))
    for step in (1, 2):
        (whole,) = [event for event in events if event["name"] == f"step {step}"]
        end = whole["ts"] + whole["dur"]
        inside = [e for e in events if whole["ts"] <= e["ts"] and e["ts"] + e["dur"] <= end + 1]
        assert len(inside) == 4 and {e["tid"] for e in inside} == {whole["tid"]}
        for phase in ("rollout", "learner"):
            total = sum(e["dur"] for e in inside if e["name"] == phase)
            assert total == pytest.approx(logged[step][f"seconds/{phase}"] * 1e6, rel=1e-9)


def test_every_worker_has_a_lane_of_its_own_below_its_kind(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    trace.spans("rollout worker 0", [Span("generate", 1000.0, 0.5)])
    trace.spans("rollout worker 1", [Span("generate", 1000.25, 0.5)])
    trace.spans("learner 0", [Span("update", 1000.75, 0.125)])
    trace.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    got = [(names[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in complete(events)]
    assert got == [
        ("rollout worker 0", 1000.0e6, 0.5e6),
        ("rollout worker 1", 1000.25e6, 0.5e6),
        ("learner 0", 1000.75e6, 0.125e6),
    ]
    first, second, learner = complete(events)
    assert first["pid"] == second["pid"] != learner["pid"]


def test_a_killed_run_leaves_what_viewers_read(tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    trace.phase("rollout", 1000.0, 1.0)
    trace.step(1, {})
    text = (tmp_path / "trace.json").read_text()
    # Viewers accept an array without its end.
    events = json.loads(text.rstrip().rstrip(",") + "]")
    assert [e["name"] for e in complete(events)] == ["step 1", "rollout"]
