"""The rollout workers' section of the configuration."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

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
    """After so long below `min_workers` the run saves a checkpoint and stops."""
    cpus: PositiveFloat = 2.0
    """CPUs of a worker, and its threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of a worker."""
    timeout_s: PositiveFloat = 600.0
    """A worker that has not answered for this long counts as dead."""
    max_restarts: NonNegativeInt = 3
    """Workers that may be replaced in a run before it fails with the first cause."""
    canary_every: PositiveInt = 10
    """Weight versions between checks that every engine gives a fixed caption the learner's
    log-probs; the first version is always checked."""
    canary_tolerance: PositiveFloat = 0.01
    """Largest mean difference of those log-probs, in nats; ten times as much where learner or
    engine computes in bfloat16."""

    @model_validator(mode="after")
    def _bounds_enclose(self) -> RolloutConfig:
        if not self.min_workers <= self.num_workers <= self.max_workers:
            raise ValueError(
                f"min_workers {self.min_workers}, num_workers {self.num_workers}, max_workers "
                f"{self.max_workers}: want them in this order"
            )
        return self
