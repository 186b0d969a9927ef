"""What a step's groups and a whole run say of themselves: the driver's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrl.config import Config
from rayrl.metrics import scores_of
from rayrl.outline import Outline
from rayrl.types import FloatArray, ScoredGroup

SAMPLED_GROUPS = 4
"""Groups of a step that are shown in samples.jsonl."""


def group_metrics(outline: Outline, version: int) -> dict[str, float]:
    """Means over a step's captions; ``version`` is the learner's when it trained on them."""
    staleness = version - outline.weight_versions
    metrics = {
        "reward/mean": float(outline.rewards.mean()),
        "reward/std_in_group": float(outline.spreads.mean()),
        "reward/best_in_group": float(outline.bests.mean()),
        "length/mean": float(outline.lengths.mean()),
        "length/truncated": float(outline.truncated.mean()),
        "captions/unique_in_group": float(outline.unique.mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
    if forced := int(outline.forced.sum()):
        metrics["length/forced"] = forced / len(outline.forced)
    for name, values in outline.terms.items():
        missing = np.isnan(values)
        if not missing.all():
            metrics[f"reward/{name}"] = float(values[~missing].mean())
        if missing.any():
            metrics[f"reward_missing/{name}"] = int(missing.sum())
    if len(outline.greedy_rewards):
        metrics["reward/greedy"] = float(outline.greedy_rewards.mean())
    if len(outline.self_cider):
        metrics["objective/self_cider"] = float(outline.self_cider.mean())
    return metrics


def sample_records(
    groups: Sequence[ScoredGroup], advantages: FloatArray, step: int
) -> list[dict[str, Any]]:
    """The first groups of a step for samples.jsonl; ``advantages`` is [P, G], of all its groups."""
    return [
        {
            "step": step,
            "split": "train",
            "prompt_id": group.group.prompt.prompt_id,
            "references": list(group.group.prompt.references),
            "captions": [
                {
                    "text": completion.text,
                    "reward": float(group.rewards[g]),
                    "terms": {
                        name: float(values[g])
                        for name, values in {**group.terms, **group.logged}.items()
                        if np.isfinite(values[g])
                    },
                    "advantage": float(advantages[p, g]),
                    "weight_version": completion.weight_version,
                }
                for g, completion in enumerate(group.group.completions)
            ],
        }
        for p, group in enumerate(groups)
    ]


def summarize(config: Config, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The run in numbers, from its metrics: held-out scores (greedy, CIDEr-D x100), speed, time.

    Scores are of one held-out set: the start is at step 0 unless it was changed since."""
    by_step = scores_of(history)
    scores = list(by_step.values())
    phases: dict[str, float] = {}
    for row in history:
        for name, value in row.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + value
    # As many as were sampled: planners ask for more, or for fewer, than a step's groups hold.
    captions = sum(row.get("rounds/captions", 0.0) for row in history)
    seconds = sum(value for phase, value in phases.items() if phase != "eval")
    return {
        "steps": int(history[-1]["step"]),
        "objective": config.objective.preset,
        "seed": config.seed,
        "cider_d_start": scores[0],
        "cider_d_start_step": min(by_step),
        "cider_d_end": scores[-1],
        "cider_d_best": max(scores),
        "captions_per_second": captions / max(seconds, 1e-9),
        "seconds_by_phase": phases,
    }
