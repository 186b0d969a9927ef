"""How buckets of weights get from the learner's process into those of the engines.

A transport is made at both ends; the learner is rank 0 and engine i is rank i + 1.

    learner                                        every engine
    handles = transport.offer(buckets)             (the manifest and the handles come with the call)
    transport.send(buckets)                        buckets = transport.receive(manifest)
                                                   ... load ...
                                                   transport.done()
    transport.done()

:class:`Collective` broadcasts over a process group: NCCL between GPUs, gloo between CPUs.
:class:`SharedMemory` hands over CUDA IPC handles where learner and engine share one GPU.  Whatever
goes wrong is a :class:`TransferFailed` within the time limit, and the engine is as it was.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rayrl.buckets import Manifest

_POLL_S = 0.0005
_ABORT_S = 5.0


class TransferFailed(RuntimeError):
    """Weights did not arrive; nothing was applied."""


class Transport(Protocol):
    """One end of the way from the learner to the engines."""

    def offer(self, buckets: Sequence[Tensor]) -> Any:
        """What engines need to find these buckets, to travel with the manifest."""

    def send(self, buckets: Sequence[Tensor]) -> None:
        """Give the buckets to every engine; returns when they have left."""

    def receive(self, manifest: Manifest) -> list[Tensor]:
        """The learner's buckets, to be read until :meth:`done`."""

    def done(self) -> None:
        """The buckets have been read, and this end holds none of them any longer."""

    def close(self) -> None:
        """Leave; whoever waits for this end fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ends find each other: an open store at ``address`` and ``port``.  ``kind`` is one
    of the ways of ``rollout.sync``; nothing may take longer than ``timeout_s``."""

    kind: str
    address: str
    port: int
    size: int
    timeout_s: float

    def join(self, rank: int, before: Transport | None = None) -> Transport:
        """Become one end, where there was another ``before`` after closing that.

        Raises ValueError where this process lacks the device that it takes, and TransferFailed
        where not everybody comes."""
        if before is not None:
            before.close()
        device, make = _KINDS[self.kind]
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"rollout.sync {self.kind} needs CUDA, and this process sees no GPU")
        try:
            return make(self, rank)
        except RuntimeError as error:
            raise TransferFailed(f"rank {rank} of {self.size} could not join: {error}") from error


class Collective:
    """Rank 0 broadcasts over ``group``, a process group of torch.distributed, from and to memory
    of ``device``.  Buckets that rank 0 has elsewhere come there one at a time."""

    def __init__(self, group: Any, device: torch.device, *, timeout_s: float) -> None:
        self._group, self._device, self._timeout_s = group, device, timeout_s
        self._connected = False

    def offer(self, buckets: Sequence[Tensor]) -> Any:
        return None

    def send(self, buckets: Sequence[Tensor]) -> None:
        self._broadcast(buckets)

    def receive(self, manifest: Manifest) -> list[Tensor]:
        buckets = [
            torch.empty(size, dtype=torch.uint8, device=self._device) for size in manifest.sizes
        ]
        self._broadcast(buckets)
        return buckets

    def done(self) -> None:
        pass

    def close(self) -> None:
        # Beside what is stuck in connecting, whose locks it may want.
        abort = threading.Thread(target=self._group.abort, daemon=True)
        abort.start()
        abort.join(_ABORT_S)

    def _broadcast(self, buckets: Sequence[Tensor]) -> None:
        deadline = time.monotonic() + self._timeout_s
        for i, bucket in enumerate(buckets):
            late = f"bucket {i + 1} of {len(buckets)} did not arrive within {self._timeout_s:g} s"
            try:
                work = self._begun(bucket.to(self._device), deadline, late)
                # Not wait(timeout): with NCCL that only enqueues.
                while not work.is_completed():
                    if time.monotonic() > deadline:
                        raise TransferFailed(late)
                    time.sleep(_POLL_S)
                work.wait()
            except RuntimeError as error:
                self.close()
                raise (
                    error
                    if isinstance(error, TransferFailed)
                    else TransferFailed(f"bucket {i + 1} of {len(buckets)}: {error}")
                ) from error

    def _begun(self, bucket: Tensor, deadline: float, late: str) -> Any:
        """The broadcast of a bucket on its way.  NCCL connects with the first one, for as long as
        an end is missing, so that one is begun in a thread that can be left behind."""
        if self._connected:
            return self._group.broadcast([bucket], _FROM_LEARNER)
        begun: Future[Any] = Future()
        if self._device.type == "cuda":
            # NCCL waits for what is queued on the stream of the thread that calls it, no other.
            torch.cuda.synchronize(self._device)

        def begin() -> None:
            try:
                begun.set_result(self._group.broadcast([bucket], _FROM_LEARNER))
            except RuntimeError as error:
                begun.set_exception(error)

        threading.Thread(target=begin, daemon=True).start()
        try:
            work = begun.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise TransferFailed(f"{late}: the ends did not connect") from None
        self._connected = True
        return work


def _from_learner() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


_FROM_LEARNER = _from_learner()


class SharedMemory:
    """Buckets stay where they are, and the other process on the GPU opens the same memory.

    gpu: what tells GPUs apart, the same in every process
    export: from a bucket to what can be sent; attach: from that to the bucket
    finish: wait for the GPU, and give it back what nobody holds
    """

    def __init__(
        self,
        gpu: str,
        export: Callable[[Tensor], Any],
        attach: Callable[[Any], Tensor],
        finish: Callable[[], None],
    ) -> None:
        self._gpu, self._export, self._attach, self._finish = gpu, export, attach, finish

    def offer(self, buckets: Sequence[Tensor]) -> Any:
        # What was copied into the buckets must be there when another process reads them.
        self._finish()
        return self._gpu, [self._export(bucket) for bucket in buckets]

    def send(self, buckets: Sequence[Tensor]) -> None:
        pass

    def receive(self, manifest: Manifest) -> list[Tensor]:
        gpu, handles = manifest.handles
        if gpu != self._gpu:
            raise TransferFailed(
                f"the learner is on GPU {gpu} and the engine on {self._gpu}: rollout.sync ipc "
                "wants them on one"
            )
        return [self._attach(handle) for handle in handles]

    def done(self) -> None:
        self._finish()

    def close(self) -> None:
        pass


def _gloo(meeting: Meeting, rank: int) -> Transport:
    store = _met(meeting, rank)
    limit = timedelta(seconds=meeting.timeout_s)
    group = dist.ProcessGroupGloo(store, rank, meeting.size, limit)
    return Collective(group, torch.device("cpu"), timeout_s=meeting.timeout_s)


def _nccl(meeting: Meeting, rank: int) -> Transport:
    store = _met(meeting, rank)
    device = torch.device("cuda", torch.cuda.current_device())
    options = dist.ProcessGroupNCCL.Options()
    # Well past our own limit: torch's answer to a timeout is to end the process.
    options._timeout = timedelta(seconds=10 * meeting.timeout_s + 600)
    with _no_watchdog():
        group = dist.ProcessGroupNCCL(store, rank, meeting.size, options)
    return Collective(group, device, timeout_s=meeting.timeout_s)


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """While entered, a process group that is made does not end the process when a peer is lost."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _met(meeting: Meeting, rank: int) -> Any:
    """The store, once everybody has come to it: who is missing is missed here and not in the
    middle of something that cannot be interrupted."""
    limit = timedelta(seconds=meeting.timeout_s)
    store = dist.TCPStore(
        meeting.address, meeting.port, meeting.size, timeout=limit, wait_for_workers=False
    )
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(meeting.size)], limit)
    return store


def _ipc(meeting: Meeting, rank: int) -> Transport:
    from torch.multiprocessing import reductions

    device = torch.cuda.current_device()

    def attach(arguments: tuple[Any, ...]) -> Tensor:
        # The seventh says which device, by the number that it has in the sending process.
        here = (*arguments[:6], device, *arguments[7:])
        opened: Tensor = reductions.rebuild_cuda_tensor(*here)
        return opened

    def finish() -> None:
        torch.cuda.synchronize()
        # Buckets that both sides have let go of are the GPU's again, for the engine's cache.
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    return SharedMemory(
        gpu=str(torch.cuda.get_device_properties(device).uuid),
        export=lambda bucket: reductions.reduce_tensor(bucket)[1],
        attach=attach,
        finish=finish,
    )


_KINDS: dict[str, tuple[str, Callable[[Meeting, int], Transport]]] = {
    "gloo": ("cpu", _gloo),
    "nccl": ("cuda", _nccl),
    "ipc": ("cuda", _ipc),
}
