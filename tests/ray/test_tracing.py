"""What workers did, collected for the trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from rayrl.actors.tracing import Tracer
from rayrl.trace import Traced, traced

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Worker(Traced):
    @traced
    def answer(self) -> None: ...

    @traced
    def wait_for(self, file: Path) -> None:
        while not file.exists():
            pass


@pytest.mark.parametrize("last", ["collect", "close"])
def test_a_worker_that_is_ended_leaves_its_last_calls(local_ray, tmp_path, last):
    worker, opened = Worker.remote(), tmp_path / "opened"
    tracer = Tracer(tmp_path, lambda: {"learner 0": worker})
    busy = worker.wait_for.remote(opened)
    tracer.phase("learner", 0.0, 1.0)
    tracer.step(1, {})  # asks the worker, which answers that before the call that comes now
    after = worker.answer.remote()
    opened.touch()
    getattr(tracer, last)()
    ray.get([busy, after])
    ray.kill(worker)
    tracer.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert sorted(names) == ["answer", "learner", "step 1", "wait_for"]
