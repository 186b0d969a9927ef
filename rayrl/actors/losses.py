"""What Ray raises when an actor, or something that it made, is gone: the one list that pools, the
learner and rewards go by."""

from __future__ import annotations

from typing import Any

from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RuntimeEnvSetupError,
)

DIED = (RayActorError, OutOfMemoryError, RuntimeEnvSetupError)
"""What a call raises whose actor is gone: it or its node died, Ray's memory monitor killed it, or
its node could not bring its files and variables there.  That may be an environment that nothing can
set up, so whoever starts another one must have a limit."""


class OtherVersion(ValueError):
    """A worker was asked for captions of a weight version that it does not hold."""


class GpuFailed(RuntimeError):
    """A worker's GPU failed it, so that it can do nothing on it any more."""


FAILURES = (OSError, ValueError, RuntimeError, RayError)
"""What ends a job with a reason, and no stack, as its last line."""

LOST = (*DIED, GetTimeoutError, ObjectLostError, OtherVersion, GpuFailed)
"""What asking for a result raises when its worker died or does not answer, or can no longer do
anything, when the node that held the result is gone, or when one that held the weights is, so that
they did not reach the worker."""


def lost_its_gpu(error: BaseException | None) -> bool:
    """Whether its GPU failed a process, which can do nothing on it any more.  A memory too small is
    no such failure: it would be so for another process too."""
    text = str(error)
    failed = "CUDA error" in text or "Triton Error [CUDA]" in text
    too_small = any(s in text for s in ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED"))
    return isinstance(error, RuntimeError) and failed and not too_small


def wants_another(error: BaseException | None) -> bool:
    """Whether a process failed because another one that takes part in its steps is gone or does not
    answer.  Too little memory on its own GPU is not that: any process in its place would fail."""
    import torch  # a driver need not load it before

    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection", "timed out")
    )


def construction_failed(error: Exception) -> bool:
    """Whether an actor's constructor raised, as that of another one in its place may."""
    return isinstance(error, RayActorError) and bool(error.actor_init_failed)


def raise_unless_lost(actor: Any, error: Exception, *, one_could: bool) -> None:
    """Raise what replacing ``actor`` would not mend: the loss of another actor whose result it was
    waiting for, or an error in its construction, where not even one was ever constructed
    (``one_could``).  Later it is the node that is to blame: its GPU, its memory, its disk."""
    other = (
        isinstance(error, RayActorError)
        and error.actor_id is not None
        and error.actor_id != actor._actor_id.hex()
    )
    if other or (construction_failed(error) and not one_could):
        raise error
