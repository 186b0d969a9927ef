"""Why an attempt of Ray Train failed: a loss, that another attempt would mend, or not."""

from __future__ import annotations

from collections.abc import Sequence

import ray.train
from ray.exceptions import RayTaskError

from rayrl.actors.losses import construction_failed, lost_its_gpu, wants_another


def failures_of(error: Exception) -> list[Exception]:
    """Why an attempt failed: what Ray Train says of each of its workers, by rank, or of itself
    where they could not begin; empty where a machine was taken away."""
    if isinstance(error, ray.train.ControllerError):
        return [error.controller_failure]
    return list(getattr(error, "worker_failures", {}).values())


def own_failure(failures: Sequence[Exception]) -> Exception | None:
    """What a worker raised of which the next one would fail as well; None where one was lost, for
    which others then fail, or its GPU was."""
    if any(_is_lost(error) for error in failures):
        return None
    own = (error for error in failures if not (wants_another(error) or lost_its_gpu(error)))
    return next(own, None)


def first_loss(error: Exception) -> Exception:
    """The loss that an attempt failed for, and not what followed from it."""
    failures = failures_of(error)
    lost = next((one for one in failures if _is_lost(one)), next(iter(failures), error))
    # Where Ray Train only says that it has asked in vain.
    return getattr(lost, "health_check_failure", None) or lost


def _is_lost(error: Exception) -> bool:
    """Whether Ray says that a worker is gone, and not what it, or who reads its images, raised."""
    raised = isinstance(error, RayTaskError) or construction_failed(error)
    return not raised and type(error).__module__.partition(".")[0] == "ray"
