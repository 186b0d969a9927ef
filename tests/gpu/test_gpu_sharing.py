"""Learner and engine on one GPU, and transfers from GPU to GPU.  Skipped where there is none."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from rayrl.buckets import Manifest, Received, fill
from rayrl.config import EngineConfig
from rayrl.engine.base import EngineSetup, Sampling, make_engine, request_seed
from rayrl.learner.parallel import open_store
from rayrl.learner.turns import TakesTurns
from rayrl.readback import ReadBack
from rayrl.transport import Meeting
from rayrl.vlm import load_captioner
from rayrl.weights import pack
from tests.ray.conftest import environment, metrics, run_script, small_job, spoken_folder
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch", "environment", "small_job", "spoken_folder"]

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device")]

ALL = ("vision", "connector", "language")
VALUES = {"a": torch.arange(4.0), "b": torch.full((300, 200), 2.5), "c": torch.ones(9).bfloat16()}


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.vllm
@pytest.mark.parametrize("level", [1, 2])
def test_vllm_gives_its_memory_back_and_samples_the_next_version(tiny_folder, prompts, level):
    pytest.importorskip("vllm")
    cache_mb = 512
    config = EngineConfig(backend="vllm", kv_cache_mb=cache_mb, max_concurrency=32)
    engine = make_engine(
        EngineSetup(folder=tiny_folder, config=config, group_size=4, shares_gpu=True)
    )
    model = load_captioner(tiny_folder).model
    sampling = Sampling(group_size=4, temperature=0.7, max_tokens=8)
    seeds = [request_seed(0, 0, prompt.prompt_id) for prompt in prompts]
    engine.load_weights(pack(model, 0), changed=ALL)
    before = engine.generate(prompts, sampling, seeds)
    awake = free_bytes()
    engine.sleep(level)
    assert free_bytes() - awake >= 0.9 * cache_mb * 2**20
    engine.wake_weights()
    weights = pack(model, 1)
    engine.load_weights(weights, changed=ALL)
    # On a GPU nothing is packed, so all can be read.
    assert ReadBack().check(engine.held(weights), weights) == len(dict(weights.tensors()))
    engine.wake_cache()
    for one, other in zip(before, engine.generate(prompts, sampling, seeds), strict=True):
        assert [c.token_ids.tolist() for c in one.completions] == [
            c.token_ids.tolist() for c in other.completions
        ]


def receiving(meeting: Meeting, rank: int, device: int, inbox, outbox) -> None:
    """An engine's end in a process of its own."""
    torch.cuda.set_device(device)
    transport = meeting.join(rank)
    outbox.put("joined")
    manifest: Manifest = inbox.get(timeout=120)
    received = Received(manifest=manifest, buckets=transport.receive(manifest))
    received.verify()
    sums = {name: float(tensor.double().sum()) for name, tensor in received.tensors()}
    devices = {tensor.device.type for _, tensor in received.tensors()}
    del received
    transport.done()
    outbox.put((sums, devices))


@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_buckets_reach_another_process_on_its_gpu(kind):
    if kind == "nccl" and GPUS < 2:
        pytest.skip("NCCL wants a GPU for every end")
    store = open_store("127.0.0.1", 2, timeout_s=60)
    meeting = Meeting(kind=kind, address="127.0.0.1", port=store.port, size=2, timeout_s=60.0)
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    device = 1 if kind == "nccl" else 0
    engine = context.Process(target=receiving, args=(meeting, 1, device, inbox, outbox))
    engine.start()
    try:
        torch.cuda.set_device(0)
        transport = meeting.join(0)
        assert outbox.get(timeout=120) == "joined"
        values = {name: tensor.cuda() for name, tensor in VALUES.items()}
        manifest, buckets = fill(values.items(), 5, bucket_bytes=1024)
        inbox.put(manifest.with_handles(transport.offer(buckets)))
        transport.send(buckets)
        sums, devices = outbox.get(timeout=120)
        assert sums == {name: float(tensor.double().sum()) for name, tensor in VALUES.items()}
        assert devices == {"cuda"}
    finally:
        engine.join(30)
        engine.kill()


def test_a_learner_between_its_turns_holds_the_model_alone(tiny_folder, batch):
    plain, taking = (learner(tiny_folder, dtype="bfloat16") for _ in range(2))
    turns = TakesTurns(taking.optimizer, taking.policy.masters)
    for _ in range(2):
        plain.update(batch)
        with turns:
            taking.update(batch)
        # The number of steps is where a fused optimizer reads it.
        state = [s for each in taking.optimizer.state.values() for s in each.values() if s.dim()]
        away = [*state, *taking.policy.masters.copies]
        assert {tensor.device.type for tensor in away} == {"cpu"}
    one, other = parameters(plain), parameters(taking)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-2, err_msg=name)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.parametrize("sync", ["pull", "ipc"])
def test_a_run_on_one_gpu_never_falls_back_and_its_engine_agrees(
    small_job, environment, tmp_path, sync
):
    pytest.importorskip("vllm")
    flags = {"rollout__colocate": True, "rollout__sync": sync, "xe__control": False}
    shares = {"rollout__gpus": 0.4, "learner__gpus": 0.6, "engine__backend": "vllm"}
    checks = {"rollout__canary_every": 1}
    done = run_script("grpo_coco.py", small_job(**flags, **shares, **checks), environment)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")[1:]
    assert len(rows) == 4
    assert all(row["mismatch_kl"] < 1e-4 for row in rows)
    if sync == "ipc":
        assert all(row["sync/fallbacks"] == 0 for row in rows)
