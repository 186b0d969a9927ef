"""Advantage estimators with a memory.  ``state`` is what the part returned the last time, {} at
first, and holds JSON values, so that a checkpoint resumes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rayrl.objectives import stats

State = Mapping[str, Any]


def kalman(
    rewards: Tensor,
    state: State,
    valid: Tensor | None = None,
    *,
    scope: str,
    process_noise: float,
    measurement_noise: float,
) -> tuple[Tensor, dict[str, Any]]:
    """(r - x) / sqrt(P), x and P mean and variance of a Kalman filter (KRPO, 2505.07527).

    scope: `group` runs the filter over the captions of each group in their order, starting at
        x = 0, P = 1, and compares each with the state after it was seen; `stream` runs one filter
        over the batches' mean rewards.  The first depends on the order of the captions.
    """
    if scope not in ("group", "stream"):
        raise ValueError(f"scope {scope!r}: want 'group' or 'stream'")
    noise = (process_noise, measurement_noise)
    if scope == "stream":
        seen = rewards if valid is None else rewards[valid]
        before = (state.get("x", 0.0), state.get("variance", 1.0))
        x, variance = (torch.tensor(value, dtype=torch.float64) for value in before)
        x, variance = _kalman_update(seen.double().mean().cpu(), x, variance, *noise)
        new = {"x": float(x), "variance": float(variance)}
        return (rewards - new["x"]) / (math.sqrt(new["variance"]) + 1e-8), new
    x, variance = torch.zeros_like(rewards[:, 0]), torch.ones_like(rewards[:, 0])
    columns = []
    for g in range(rewards.shape[1]):
        here = torch.ones_like(x, dtype=torch.bool) if valid is None else valid[:, g]
        next_x, next_variance = _kalman_update(rewards[:, g], x, variance, *noise)
        x, variance = torch.where(here, next_x, x), torch.where(here, next_variance, variance)
        columns.append(torch.where(here, (rewards[:, g] - x) / (variance.sqrt() + 1e-8), 0.0))
    return torch.stack(columns, 1), {}


def _kalman_update(
    measured: Tensor, x: Tensor, variance: Tensor, process_noise: float, measurement_noise: float
) -> tuple[Tensor, Tensor]:
    predicted = variance + process_noise
    gain = predicted / (predicted + measurement_noise)
    return x + gain * (measured - x), (1 - gain) * predicted


def smoothed(
    rewards: Tensor,
    image_ids: Sequence[str],
    state: State,
    valid: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
) -> tuple[Tensor, dict[str, Any]]:
    """Deviations from the group's mean and from all that was seen of the image, whichever mix of
    the two is smaller (DCPO, 2509.02333).  At an image's first visit this is ``group_normalize``.

    state: by image, [visits, mean, standard deviation]
    """
    if valid is not None:
        rewards = torch.where(valid, rewards, stats.group_mean(rewards, valid))
    memory = dict(state)
    rows = []
    means = stats.group_mean(rewards, valid)[:, 0].tolist()
    spreads = stats.group_std(rewards, valid, ddof)[:, 0].tolist()
    for image, row, mean, spread in zip(image_ids, rewards, means, spreads, strict=True):
        visits, old_mean, old_spread = memory.get(image, (0, 0.0, 0.0))
        count = visits + 1
        all_mean = (visits * old_mean + mean) / count
        shift = visits / count * (mean - old_mean) ** 2
        all_spread = math.sqrt((visits * old_spread**2 + spread**2 + shift) / count)
        memory[image] = [count, all_mean, all_spread]
        now = (row - mean) / (spread + eps) if spread > 0 else torch.zeros_like(row)
        ever = (row - all_mean) / (all_spread + eps) if all_spread > 0 else torch.zeros_like(row)
        mostly_now, mostly_ever = (
            ever / count + (1 - 1 / count) * now,
            now / count + (1 - 1 / count) * ever,
        )
        rows.append(torch.where(mostly_now.abs() < mostly_ever.abs(), mostly_now, mostly_ever))
    return torch.stack(rows), memory


def lagrangian(
    rewards: Tensor,
    truncated: Tensor,
    state: State,
    terms: Mapping[str, Tensor] | None = None,
    valid: Tensor | None = None,
    *,
    limits: Mapping[str, float],
    multiplier_start: float,
    multiplier_lr: float,
    per_component: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, dict[str, Any]]:
    """Normalised reward minus multipliers times costs (Constrained GRPO, 2602.05863).

    limits: by cost, the mean it may have; a cost is `truncated` (ran into the length limit) or a
        reward term that is 1 where the caption violates something and 0 elsewhere
    per_component: normalise reward and costs in the group and add up, or add up and normalise;
        readings of the paper, of which the abstract was read, differ
    state: by cost, its multiplier, raised while the batch's mean cost exceeds the limit
    """
    known = {"truncated": truncated.to(rewards.dtype), **(terms or {})}
    for name in limits:
        if name not in known:
            raise ValueError(f"limits: no cost {name!r}, the batch has {', '.join(sorted(known))}")
    seen = torch.ones_like(rewards) if valid is None else valid.to(rewards.dtype)
    result, combined = stats.standardize(rewards, valid, eps), rewards
    multipliers = {}
    for name, limit in limits.items():
        weight = state.get(name, multiplier_start)
        result = result - weight * stats.standardize(known[name], valid, eps)
        combined = combined - weight * known[name]
        mean = float((known[name] * seen).sum() / seen.sum().clamp(min=1))
        multipliers[name] = max(0.0, weight + multiplier_lr * (mean - limit))
    return result if per_component else stats.standardize(combined, valid, eps), multipliers
