"""The rollout workers' section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rayrl.learner.config import LearnerConfig
from rayrl.section import Section


class RolloutConfig(Section):
    """The rollout workers."""

    num_workers: PositiveInt = 1
    """Engines, one an actor, that a run starts with."""
    min_workers: PositiveInt = Field(default_factory=lambda data: data.get("num_workers", 1))
    """With fewer ready ones the run waits; by default all of `num_workers`."""
    max_workers: PositiveInt = Field(default_factory=lambda data: data.get("num_workers", 1))
    """Between `min_workers` and this the number follows what the steps measure; by default it
    stays.  A batch is cut into this many parts, whatever the number of workers."""
    start_timeout_s: PositiveFloat = 1800.0
    """After so long below `min_workers` the run saves a checkpoint and stops; the learner may take
    as long to find room, and to be built, and so may stage 1, its control, and an evaluation."""
    cpus: PositiveFloat = 2.0
    """CPUs of a worker, and its threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of a worker; with 0 it computes on CPUs, whatever the machine has."""
    timeout_s: PositiveFloat = 600.0
    """A worker that has not answered for this long counts as dead."""
    max_restarts: NonNegativeInt = 3
    """Workers that may be replaced in a run before it is saved and fails with the first cause."""
    sync: Literal["pull", "gloo", "nccl", "ipc"] = "pull"
    """How engines get the learner's weights: `pull` them from Ray's object store; by a broadcast,
    over `nccl` between GPUs or `gloo` between CPUs; or, by `ipc`, out of the learner's memory where
    both share a GPU.  A broadcast or ipc that fails is counted, and engines pull."""
    sync_timeout_s: PositiveFloat = 60.0
    """Longest wait for a broadcast, or for everybody to join one."""
    colocate: bool = False
    """The engine shares the learner's GPU, and sleeps without its memory while the learner
    updates."""
    canary_every: PositiveInt = 10
    """Weight versions between checks that every engine gives a fixed caption the learner's
    log-probs; the first version is always checked."""
    canary_tolerance: PositiveFloat = 0.01
    """Largest mean difference of those log-probs, in nats; ten times as much where learner or
    engine computes in bfloat16."""

    @model_validator(mode="after")
    def _gives_up_in_time(self) -> RolloutConfig:
        if self.sync != "pull" and self.sync_timeout_s >= self.timeout_s:
            raise ValueError(
                f"sync_timeout_s {self.sync_timeout_s:g}: want less than timeout_s "
                f"{self.timeout_s:g}, after which a worker counts as dead"
            )
        return self

    @model_validator(mode="after")
    def _bounds_enclose(self) -> RolloutConfig:
        if not self.min_workers <= self.num_workers <= self.max_workers:
            raise ValueError(
                f"min_workers {self.min_workers}, num_workers {self.num_workers}, max_workers "
                f"{self.max_workers}: want them in this order"
            )
        return self


def check_sync(rollout: RolloutConfig, learner: LearnerConfig, *, max_staleness: int) -> None:
    """ValueError where engines could not get their weights as ``rollout.sync`` says, or could not
    share the learner's GPU."""
    sync = f"rollout.sync {rollout.sync}"
    gpus = f"rollout.gpus {rollout.gpus:g}, learner.gpus {learner.gpus:g}"
    if rollout.sync != "pull":
        if max_staleness:
            raise ValueError(
                f"{sync} with train.max_staleness {max_staleness}: learner and engines take part "
                "at the same moment, but engines ahead of the learner sample then; want 0, or pull"
            )
        if learner.lora.rank and learner.lora.publish == "adapters":
            raise ValueError(f"{sync} with learner.lora.publish adapters: adapters are pulled")
    if rollout.sync == "nccl" and min(rollout.gpus, learner.gpus) < 1:
        raise ValueError(f"{sync}: want a GPU for the learner and one for every engine, got {gpus}")
    if rollout.sync == "ipc" and not rollout.colocate:
        raise ValueError(f"{sync}: want rollout.colocate, for memory is shared within a GPU")
    if not rollout.colocate:
        return
    if rollout.sync in ("nccl", "gloo"):
        raise ValueError(f"{sync} with rollout.colocate: want pull or ipc on one GPU")
    if max_staleness:
        raise ValueError(
            f"rollout.colocate with train.max_staleness {max_staleness}: what shares a GPU takes "
            "turns, so nothing runs ahead; want 0"
        )
    if rollout.max_workers > 1 or learner.num_workers > 1:
        raise ValueError(
            f"rollout.colocate: want one engine and one learner on one GPU, got "
            f"rollout.max_workers {rollout.max_workers}, learner.num_workers {learner.num_workers}"
        )
    if not (rollout.gpus and learner.gpus and rollout.gpus + learner.gpus <= 1):
        raise ValueError(f"rollout.colocate: want shares of one GPU, as 0.5 and 0.5, got {gpus}")
