"""An engine and the learner on one GPU: in what order memory is given back and taken, against fakes
that record calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError

from rayrl.actors import cluster, rollout
from rayrl.actors.losses import LOST
from rayrl.actors.pool import RestartBudget, TooManyLost
from rayrl.actors.rollout import RolloutActor
from rayrl.buckets import fill
from rayrl.config import Config, EngineConfig
from rayrl.engine.base import EngineSetup, make_engine
from rayrl.engine.vllm import VllmEngine
from rayrl.learner import turns
from rayrl.learner.turns import TakesTurns
from rayrl.transport import TransferFailed
from rayrl.vlm import load_captioner
from rayrl.weights import pack, pack_tensors
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]

VALUES = {"a": torch.arange(4.0)}
COLOCATED = {
    "rollout": {"colocate": True, "gpus": 0.4},
    "learner": {"gpus": 0.6},
    "xe": {"control": False},
}
CLIP = {"terms": {"cider_d": 1.0, "clip": {"kind": "clip_score", "folder": "clip", "gpus": 0.25}}}
FILES = {"config.json": np.frombuffer(b"{}", np.uint8)}


class Engine:
    """Records its calls into a list that others may write to as well."""

    def __init__(self, calls):
        self.calls, self.weight_version, self.values = calls, -1, {}

    def load_weights(self, weights, *, changed):
        weights.verify()
        self.calls.append(f"load {weights.version}")
        self.weight_version = weights.version
        self.values = {name: tensor.clone() for name, tensor in weights.tensors()}

    def held(self, weights):
        self.calls.append("read back")
        return self.values

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.weight_version = -1

    def wake_weights(self):
        self.calls.append("wake weights")

    def wake_cache(self):
        self.calls.append("wake cache")


class Way:
    """A transport over which given buckets arrive, or do not."""

    def __init__(self, calls, buckets):
        self.calls, self.buckets = calls, buckets

    def receive(self, manifest):
        self.calls.append("receive")
        if self.buckets is None:
            raise TransferFailed("bucket 1 of 1 did not arrive within 1 s")
        return self.buckets

    def done(self):
        self.calls.append("done")


@pytest.fixture
def worker(monkeypatch):
    """A rollout worker outside of Ray, and its engine's calls."""
    calls: list[str] = []
    monkeypatch.setattr(rollout, "make_engine", lambda setup: Engine(calls))
    plain = RolloutActor.__ray_metadata__.modified_class
    return plain(FILES, EngineConfig(), 2, False, shares_gpu=True), calls


def version(number):
    return pack_tensors(VALUES.items(), number)


def test_weights_wake_first_then_they_are_loaded_then_the_cache_wakes(worker):
    actor, calls = worker
    assert actor.load((), version(0)) == 0
    actor.sleep(2)
    # Asleep it holds no version, so it samples nothing.
    with pytest.raises(ValueError, match="asked for captions of weight version 0, holding -1"):
        actor.greedy([], 5, 0)
    assert actor.load((), version(0), version(1)) == 1
    assert calls == [
        *("load 0", "read back", "sleep 2"),
        *("wake weights", "load 0", "read back", "load 1", "read back", "wake cache"),
    ]
    calls.clear()
    actor.load((), version(2))
    assert calls == ["load 2", "read back"]


def test_buckets_are_left_before_the_cache_takes_its_memory_back(worker):
    actor, calls = worker
    manifest, buckets = fill(VALUES.items(), 3)
    actor._transport = Way(calls, buckets)
    actor.sleep(1)
    assert actor.receive((), manifest) == 3
    assert calls == ["sleep 1", "wake weights", "receive", "load 3", "read back", "done"]
    # The driver has the learner let go of its own copy in between.
    actor.wake()
    assert calls[-1] == "wake cache"


def test_an_engine_that_was_sent_nothing_is_woken_by_the_pull_that_follows(worker):
    actor, calls = worker
    manifest, _ = fill(VALUES.items(), 3)
    actor._transport = Way(calls, None)
    actor.sleep(1)
    with pytest.raises(TransferFailed):
        actor.receive((), manifest)
    assert "wake cache" not in calls
    actor.load((), version(3))
    assert calls[-4:] == ["wake weights", "load 3", "read back", "wake cache"]


def test_a_worker_whose_gpu_fails_it_is_lost_and_no_error_of_the_run(worker):
    def failing_with(error):
        def fail(prompts, max_tokens):
            raise error

        return fail

    actor, _ = worker
    actor.load((), version(0))
    actor._engine.greedy = failing_with(torch.AcceleratorError("CUDA error: unspecified launch"))
    with pytest.raises(LOST, match="its GPU failed it: CUDA error: unspecified launch") as raised:
        actor.greedy([], 5, 0)
    # As the driver sees it.
    seen = RayTaskError("greedy", "trace", raised.value).as_instanceof_cause()
    assert isinstance(seen, LOST)
    with pytest.raises(TooManyLost, match=r"first cause: rollout worker 0 .*: its GPU failed"):
        RestartBudget(0).spend("rollout worker 0 was lost and is replaced", seen)
    # Of these the next worker would fail too.
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("size mismatch")):
        actor._engine.greedy = failing_with(error)
        with pytest.raises(type(error)):
            actor.greedy([], 5, 0)


def test_a_way_that_a_gpu_does_not_offer_is_no_failure_of_the_gpu(worker):
    """The driver has the engine pull, and counts it."""
    actor, calls = worker
    manifest, _ = fill(VALUES.items(), 3)
    actor._transport = Way(calls, None)

    def refuse(manifest):
        raise RuntimeError("CUDA error: invalid argument")

    actor._transport.receive = refuse
    with pytest.raises(RuntimeError, match="invalid argument") as raised:
        actor.receive((), manifest)
    assert not isinstance(raised.value, LOST)


class Llm:
    def __init__(self, awake):
        self.calls, self.awake = [], awake

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))
        return self.awake and tags == ["kv_cache"]


def test_vllm_is_asked_to_wake_in_two_parts():
    engine = object.__new__(VllmEngine)
    engine._llm, engine._version = Llm(awake=True), 4
    engine.sleep(2)
    assert engine.weight_version == -1
    engine.wake_weights()
    engine.wake_cache()
    assert engine._llm.calls == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("wake_up", ["kv_cache"]),
    ]
    engine._llm.awake = False
    with pytest.raises(RuntimeError, match="still asleep"):
        engine.wake_cache()


def test_the_transformers_engine_sleeps_and_goes_on_with_the_next_version(tiny_folder, prompts):
    engine = make_engine(
        EngineSetup(folder=tiny_folder, config=EngineConfig(backend="hf"), group_size=2)
    )
    weights = pack(load_captioner(tiny_folder).model, 1)
    every = ("vision", "connector", "language")
    engine.load_weights(weights, changed=every)
    before = engine.greedy(prompts[:2], 5)
    engine.sleep(1)
    assert engine.weight_version == -1
    engine.wake_weights()
    engine.load_weights(weights, changed=every)
    engine.wake_cache()
    assert [c.text for c in engine.greedy(prompts[:2], 5)] == [c.text for c in before]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_that_takes_turns_takes_the_same_steps(tiny_folder, batch, dtype):
    plain, taking = (learner(Path(tiny_folder), dtype=dtype) for _ in range(2))
    turns = TakesTurns(taking.optimizer, taking.policy.masters)
    for _ in range(2):
        plain.update(batch)
        with turns:
            taking.update(batch)
        assert all(p.grad is None for p in taking.policy.named.values())
    one, other = parameters(plain), parameters(taking)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_an_update_alone_needs_moves_and_the_model_stays(tiny_folder, batch, monkeypatch):
    subject = learner(Path(tiny_folder), dtype="bfloat16")
    turns = TakesTurns(subject.optimizer, subject.policy.masters)
    with turns:
        subject.update(batch)
    back, away = {}, {}

    # This machine may have one device only, so calls are recorded in place of copies.
    def to(self, device, non_blocking):
        return back.update({self.data_ptr(): device}) or self

    def in_host_memory(self, key, value):
        assert away.setdefault(key, value.data_ptr()) == value.data_ptr()
        return value

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(TakesTurns, "_in_host_memory", in_host_memory)
    for _ in range(2):
        with turns:
            pass
    moments = [m for state in subject.optimizer.state.values() for m in state.values() if m.dim()]
    masters = subject.policy.masters.copies
    assert len(moments) == 2 * len(masters) > 0
    assert set(back) == {tensor.data_ptr() for tensor in [*moments, *masters]}
    assert set(back.values()) == {next(subject.policy.model.parameters()).device}
    # Each has a place of its own.
    assert sorted(away.values()) == sorted(back)
    assert not set(back) & {p.data_ptr() for p in subject.policy.model.parameters()}


@pytest.mark.parametrize(("have", "refused"), [({"CPU": 2.0}, True), ({"GPU": 1.0}, False)])
def test_a_machine_without_the_gpus_that_are_asked_for_is_refused_at_once(
    monkeypatch, have, refused
):
    config = Config.model_validate(COLOCATED)
    calls = []
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **options: calls.append("init"),
        cluster_resources=lambda: have,
        shutdown=lambda: calls.append("shutdown"),
    )
    monkeypatch.setattr(cluster, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.gpus_of(config, stage1=False) == pytest.approx(1.0)
    if not refused:
        assert cluster.connect(1.0, cluster.gpus_of(config, stage1=False)) and calls == ["init"]
        return
    with pytest.raises(ValueError, match="ask for 1 GPUs together, and this machine has 0"):
        cluster.connect(1.0, cluster.gpus_of(config, stage1=False))
    assert calls == ["init", "shutdown"]


def test_vllm_for_gpus_is_not_started_where_there_is_none(monkeypatch, tiny_folder):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    config = EngineConfig(backend="vllm")
    with pytest.raises(ValueError, match=r"build is for GPUs.*want rollout\.gpus, or backend hf"):
        make_engine(EngineSetup(folder=tiny_folder, config=config, group_size=2))


@pytest.mark.parametrize(
    ("sections", "gpus"),
    [
        ({"learner": {"gpus": 1}, "rollout": {"gpus": 1}}, 2.0),
        ({"learner": {"gpus": 1}, "rollout": {"gpus": 1}, "reward": CLIP}, 2.25),
        (COLOCATED | {"reward": CLIP}, 1.25),
        ({"learner": {"gpus": 1}, "xe": {"num_workers": 4, "steps": 1}}, 4.0),
        ({"xe": {"num_workers": 4, "steps": 1}}, 0.0),
    ],
)
def test_a_run_knows_before_it_begins_what_its_terms_and_stage_1_ask_for(sections, gpus):
    config = Config.model_validate(sections)
    assert cluster.gpus_of(config, stage1=True) == pytest.approx(gpus)
    # One that is done may have had more GPUs than are here now.
    assert cluster.gpus_of(config, stage1=False) <= 2.25


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch, caplog):
    asked, cleared = [], []
    cudart = SimpleNamespace(cudaHostRegister=lambda *arguments: asked.append(arguments) or 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(turns, "_forget_error", cleared.append)
    value = torch.arange(6.0)
    place = turns._pinned_like(value)
    assert asked == [(place.data_ptr(), 24, 0)]
    assert cleared == [value.device]
    assert "24 bytes of host memory cannot be pinned" in caplog.text
    assert turns._pinned_like(torch.empty(0)).shape == (0,)
    assert len(asked) == 1
