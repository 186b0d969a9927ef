"""Buckets from one end to the others: gloo for real, CUDA IPC against fakes that record calls."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rayrl.buckets import Received, fill
from rayrl.config import Config
from rayrl.learner.parallel import open_store
from rayrl.transport import Collective, Meeting, SharedMemory, TransferFailed

VALUES = {"a": torch.arange(4.0), "b": torch.full((3, 2), 2.5), "c": torch.ones(9).bfloat16()}


def meeting(store, size, timeout_s=20.0) -> Meeting:
    return Meeting(
        kind="gloo", address="127.0.0.1", port=store.port, size=size, timeout_s=timeout_s
    )


def staged(version=1):
    return fill(VALUES.items(), version, bucket_bytes=32)


def test_every_end_of_a_broadcast_gets_the_learners_buckets():
    store = open_store("127.0.0.1", 3, timeout_s=20)
    manifest, buckets = staged()
    assert len(buckets) == 3
    meet = meeting(store, 3)

    def engine(rank):
        transport = meet.join(rank)
        seen = []
        for _ in range(2):
            received = Received(manifest=manifest, buckets=transport.receive(manifest))
            received.verify()
            seen.append(dict(received.tensors()))
            transport.done()
        return seen

    with ThreadPoolExecutor(2) as pool:
        engines = [pool.submit(engine, rank) for rank in (1, 2)]
        learner = meet.join(0)
        assert learner.offer(buckets) is None
        for _ in range(2):
            learner.send(buckets)
        for future in engines:
            for seen in future.result(timeout=30):
                assert all(torch.equal(seen[name], VALUES[name]) for name in VALUES)


def test_an_end_that_never_sends_is_given_up_in_time_and_the_group_can_be_met_anew():
    manifest, buckets = staged()
    stores = [open_store("127.0.0.1", 2, timeout_s=20) for _ in range(2)]
    meet = meeting(stores[0], 2, timeout_s=1.0)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meet.join, 1)
        learner = meet.join(0)
        engine = other.result(timeout=20)
        started = time.monotonic()
        with pytest.raises(TransferFailed, match=r"bucket 1 of 3 did not arrive within 1 s"):
            engine.receive(manifest)
        assert time.monotonic() - started < 10
        with pytest.raises(TransferFailed, match=r"bucket \d of 3"):
            learner.send(buckets)
        # Both leave the old group with joining the new one.
        again = meeting(stores[1], 2)
        other = pool.submit(again.join, 1, engine)
        learner = again.join(0, learner)
        engine = other.result(timeout=20)
        arriving = pool.submit(engine.receive, manifest)
        learner.send(buckets)
        got = Received(manifest=manifest, buckets=arriving.result(timeout=20))
        got.verify()


def test_an_end_that_nobody_comes_to_says_so():
    store = open_store("127.0.0.1", 2, timeout_s=20)
    with pytest.raises(TransferFailed, match="rank 1 of 2 could not join"):
        meeting(store, 2, timeout_s=0.3).join(1)


class Work:
    def is_completed(self):
        return False


class Done(Work):
    def is_completed(self):
        return True

    def wait(self):
        pass


class Group:
    """A process group in which nothing arrives."""

    def __init__(self):
        self.calls = []

    def broadcast(self, tensors, options):
        self.calls.append(("broadcast", len(tensors[0]), options.rootRank))
        return Work()

    def abort(self):
        self.calls.append("abort")


def test_what_does_not_arrive_is_aborted_whatever_the_process_group():
    group = Group()
    _, buckets = staged()
    transport = Collective(group, torch.device("cpu"), timeout_s=0.01)
    with pytest.raises(TransferFailed, match="within"):
        transport.send(buckets)
    assert group.calls == [("broadcast", len(buckets[0]), 0), "abort"]


def test_an_end_that_does_not_connect_keeps_the_others_no_longer_than_they_may_wait():
    """As with NCCL, whose first call waits for everybody, and whose locks others may want."""
    stuck, aborted = threading.Event(), threading.Event()

    class Stuck(Group):
        def broadcast(self, tensors, options):
            stuck.wait()
            return Work()

        def abort(self):
            aborted.set()

    transport = Collective(Stuck(), torch.device("cpu"), timeout_s=0.01)
    with pytest.raises(TransferFailed, match=r"within 0\.01 s: the ends did not connect"):
        transport.send(staged()[1])
    assert aborted.is_set()
    stuck.set()


def test_buckets_in_host_memory_are_sent_through_one_at_a_time():
    seen, alive = [], []

    class Watched(Group):
        def broadcast(self, tensors, options):
            alive.append(sum(there() is not None for there in seen))
            seen.append(weakref.ref(tensors[0]))
            assert tensors[0].device.type == "meta"
            return Done()

    manifest, buckets = staged()
    Collective(Watched(), torch.device("meta"), timeout_s=5).send(buckets)
    assert [there.nbytes for there in buckets] == list(manifest.sizes)
    # The one before goes when the next has come.
    assert len(seen) == 3 and max(alive) <= 1


class Gpu:
    """A GPU's memory as two processes see it: what one exports the other can attach."""

    def __init__(self):
        self.memory, self.calls, self.lock = {}, [], threading.Lock()

    def end(self, name):
        def export(bucket):
            self.calls.append((name, "export", len(bucket)))
            self.memory[len(self.memory)] = bucket
            return len(self.memory) - 1

        def attach(handle):
            self.calls.append((name, "attach", handle))
            return self.memory[handle]

        return SharedMemory(
            "GPU-1", export, attach, finish=lambda: self.calls.append((name, "finish"))
        )


def test_shared_memory_is_exported_after_it_was_written_and_left_after_it_was_read():
    gpu = Gpu()
    learner, engine = gpu.end("learner"), gpu.end("engine")
    manifest, buckets = staged()
    manifest = manifest.with_handles(learner.offer(buckets))
    learner.send(buckets)
    received = Received(manifest=manifest, buckets=engine.receive(manifest))
    received.verify()
    engine.done()
    sizes = [len(bucket) for bucket in buckets]
    assert gpu.calls == [
        ("learner", "finish"),
        *(("learner", "export", size) for size in sizes),
        *(("engine", "attach", handle) for handle in range(3)),
        ("engine", "finish"),
    ]
    # Nothing was copied.
    assert all(a is b for a, b in zip(received.buckets, buckets, strict=True))


def test_memory_of_another_gpu_is_refused_by_name():
    gpu = Gpu()
    manifest, _ = staged()
    manifest = manifest.with_handles(("GPU-2", [0, 1, 2]))
    with pytest.raises(TransferFailed, match="learner is on GPU GPU-2 and the engine on GPU-1"):
        gpu.end("engine").receive(manifest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_without_cuda_what_needs_it_is_refused(kind):
    meet = Meeting(kind=kind, address="127.0.0.1", port=1, size=2, timeout_s=1.0)
    with pytest.raises(ValueError, match=f"rollout.sync {kind} needs CUDA, and this process sees"):
        meet.join(0)


SHARED = {"rollout": {"sync": "ipc", "colocate": True, "gpus": 0.4}, "learner": {"gpus": 0.6}}


def configured(changes):
    return Config.model_validate({"xe": {"control": False}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"sync": "nccl"}}, r"nccl: want a GPU for the learner .* got rollout.gpus 0,"),
        ({"rollout": {"sync": "ipc"}}, "ipc: want rollout.colocate"),
        ({"rollout": {"sync": "gloo"}, "train": {"max_staleness": 1}}, "at the same moment"),
        ({"rollout": {"sync": "gloo", "timeout_s": 60}}, "sync_timeout_s 60: want less than"),
        (
            {"rollout": {"sync": "gloo"}, "learner": {"lora": {"rank": 4, "publish": "adapters"}}},
            "adapters are pulled",
        ),
        ({"rollout": {"colocate": True}}, "want shares of one GPU, as 0.5 and 0.5, got"),
        ({**SHARED, "learner": {"gpus": 0.7}}, r"got rollout.gpus 0\.4, learner.gpus 0\.7"),
        ({**SHARED, "train": {"max_staleness": 1}}, "want 0"),
        ({**SHARED, "xe": {"control": True}}, "want xe.control false"),
        (
            {**SHARED, "rollout": {**SHARED["rollout"], "num_workers": 2}},
            "want one engine and one learner on one GPU, got rollout.max_workers 2",
        ),
        (
            {"rollout": {**SHARED["rollout"], "sync": "gloo"}, "learner": {"gpus": 0.5}},
            "gloo with rollout.colocate: want pull or ipc",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_run(changes, message):
    with pytest.raises(ValueError, match=message):
        configured(changes)


def test_an_engine_sleeps_as_deep_as_the_next_version_allows():
    assert configured(SHARED).sleep_level == 2
    for kept in ({"model": {"trainable": ["language"]}}, {"learner": {"lora": {"rank": 4}}}):
        learner = {**SHARED["learner"], **kept.get("learner", {})}
        assert configured({**SHARED, **kept, "learner": learner}).sleep_level == 1
