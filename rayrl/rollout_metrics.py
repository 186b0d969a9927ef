"""What a step's groups and a whole run say of themselves: the driver's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrl.config import Config
from rayrl.rewards.diversity import diversity_of
from rayrl.types import FloatArray, ScoredGroup


def group_metrics(groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """Means over a step's captions; ``version`` is the learner's when it trained on them."""
    rewards = np.concatenate([group.rewards for group in groups])
    completions = [c for group in groups for c in group.group.completions]
    lengths = np.array([len(c.token_ids) for c in completions])
    staleness = version - np.array([c.weight_version for c in completions])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std_in_group": float(np.mean([group.rewards.std() for group in groups])),
        "reward/best_in_group": float(np.mean([group.rewards.max() for group in groups])),
        "length/mean": float(lengths.mean()),
        "length/truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        "captions/unique_in_group": float(
            np.mean([len(set(g.group.captions)) / g.group.group_size for g in groups])
        ),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
    if forced := sum(c.num_forced for c in completions):
        metrics["length/forced"] = forced / len(completions)
    for name in groups[0].terms:
        metrics[f"reward/{name}"] = float(np.concatenate([g.terms[name] for g in groups]).mean())
    greedy = [group.greedy_reward for group in groups if group.greedy_reward is not None]
    if greedy:
        metrics["reward/greedy"] = float(np.mean(greedy))
    kernels = [g.fields["similarity"] for g in groups if "similarity" in g.fields]
    diversity = [diversity_of(kernel[None])[0] for kernel in kernels if len(kernel) > 1]
    if diversity:
        metrics["objective/self_cider"] = float(np.mean(diversity))
    return metrics


def sample_records(
    groups: Sequence[ScoredGroup], advantages: FloatArray, step: int, *, count: int = 4
) -> list[dict[str, Any]]:
    """The first ``count`` groups of a step for samples.jsonl; ``advantages`` is [P, G]."""
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
                    "terms": {name: float(values[g]) for name, values in group.terms.items()},
                    "advantage": float(advantages[p, g]),
                    "weight_version": completion.weight_version,
                }
                for g, completion in enumerate(group.group.completions)
            ],
        }
        for p, group in enumerate(groups[:count])
    ]


def summarize(config: Config, history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The run in numbers, from its metrics: held-out scores (greedy, CIDEr-D x100), speed, time."""
    scores = [row["eval/cider_d"] for row in history if "eval/cider_d" in row]
    phases: dict[str, float] = {}
    for row in history:
        for name, value in row.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + value
    trained = [row for row in history if row["step"] > 0]
    seconds = sum(value for phase, value in phases.items() if phase != "eval")
    return {
        "steps": int(history[-1]["step"]),
        "objective": config.objective.preset,
        "seed": config.seed,
        "cider_d_start": scores[0],
        "cider_d_end": scores[-1],
        "cider_d_best": max(scores),
        "captions_per_second": len(trained) * config.captions_per_step / max(seconds, 1e-9),
        "seconds_by_phase": phases,
    }
