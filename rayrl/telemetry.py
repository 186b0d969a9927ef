"""What a run tells Prometheus: a table from the names of metrics.jsonl to those of its series.

Ray exports every series with its own prefix, ``ray_``; a counter's name ends in ``_total``.  The
dashboard in ``cluster/grafana.json`` draws these names and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

PREFIX = "ray_"


class Series(NamedTuple):
    """A time series.  ``source`` is its name in metrics.jsonl; one that ends in ``/`` stands for
    all that begin with it, the rest of their names being the value of the label ``label``."""

    name: str
    source: str
    description: str
    kind: Literal["gauge", "counter"] = "gauge"
    label: str = ""

    @property
    def exported(self) -> str:
        """The name that Prometheus knows."""
        return PREFIX + self.name


STEP = "step"
SERIES = (
    Series("rayrl_step", STEP, "Steps done"),
    Series("rayrl_captions_per_second", "captions_per_second", "Captions sampled and trained on"),
    Series("rayrl_reward_mean", "reward/mean", "Mean reward of a step's captions"),
    Series("rayrl_reward_std_in_group", "reward/std_in_group", "Spread of rewards in a group"),
    Series("rayrl_eval_cider_d", "eval/cider_d", "Held-out CIDEr-D (x100) of greedy captions"),
    Series("rayrl_kl", "kl", "KL divergence from the reference model, nats a token"),
    Series("rayrl_mismatch_kl", "mismatch_kl", "KL divergence between engine and learner"),
    Series("rayrl_caption_length", "length/mean", "Tokens of a caption"),
    Series("rayrl_staleness_mean", "staleness/mean", "Versions that captions lag behind"),
    Series("rayrl_staleness_max", "staleness/max", "The oldest caption's lag in versions"),
    Series(
        "rayrl_groups_dropped_total", "groups/dropped", "Groups without a reward", kind="counter"
    ),
    Series(
        "rayrl_steps_skipped_total", "learner/skipped", "Optimizer steps skipped", kind="counter"
    ),
    Series("rayrl_learner_memory_megabytes", "learner/peak_memory_mb", "Learner's peak memory"),
    Series("rayrl_learner_tflops", "learner/tflops_per_second", "Useful TFLOP/s of the learner"),
    Series("rayrl_phase_seconds", "seconds/", "Seconds of a step by phase", label="phase"),
    Series("rayrl_reward_seconds", "reward_seconds/", "Seconds of a reward term", label="term"),
    Series("rayrl_workers", "workers/", "Workers by state", label="state"),
    Series("rayrl_queue_batches", "queue/", "Batches on their way by place", label="place"),
)


class Sample(NamedTuple):
    """One value of one series."""

    series: Series
    labels: Mapping[str, str]
    value: float


def samples(step: int, metrics: Mapping[str, float]) -> Iterator[Sample]:
    """What a step's row says, series by series; a value that is not finite is left out."""
    row = {STEP: float(step), **metrics}
    for series in SERIES:
        if not series.label:
            found = {"": row[series.source]} if series.source in row else {}
        else:
            found = {
                name.removeprefix(series.source): value
                for name, value in row.items()
                if name.startswith(series.source)
            }
        for rest, value in found.items():
            if math.isfinite(value):
                yield Sample(series, {series.label: rest} if series.label else {}, value)
