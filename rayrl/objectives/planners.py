"""The arithmetic of planners for sampling (:mod:`rayrl.objectives.sampling`).

numpy alone, for a process without torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def needs_hint(rewards: npt.ArrayLike, *, hint_floor: float) -> npt.NDArray[np.bool_]:
    """Images [P] of which all captions' rewards [P,G] are at or below ``hint_floor``: to be sampled
    again with a hint (GHPO, 2507.10628; Guide, 2506.13923, read in its abstract)."""
    return np.asarray(rewards, np.float64).max(1) <= hint_floor


def reference_prefix(
    reference_ids: Sequence[int], stage: int, *, hint_shares: tuple[float, ...]
) -> list[int]:
    """The first tokens of a reference caption, to be given as a forced prefix (GHPO); the share
    grows with the ``stage`` of the run and stays at the last one.  A hinted group must be hinted
    as a whole: a copied prefix raises CIDEr by itself."""
    share = hint_shares[min(stage, len(hint_shares) - 1)]
    return list(reference_ids[: math.floor(share * len(reference_ids))])


def allocate(
    counts: npt.ArrayLike,
    spreads: npt.ArrayLike,
    budget: int,
    *,
    exploration: float,
    confidence: float = 0.95,
) -> npt.NDArray[np.int64]:
    """How many of ``budget`` further captions each image [P] gets (XRPO, 2510.06672): one at a
    time, to the image with the highest :func:`priority` given what it already got.

    counts: captions so far, at least 2 each; spreads: standard deviations of their rewards
    """
    have = np.asarray(counts, np.int64).copy()
    spreads = np.asarray(spreads, np.float64)
    if (have < 2).any():
        raise ValueError(f"image {int(np.argmin(have))}: {have.min()} captions, want at least 2")
    given = np.zeros_like(have)
    for _ in range(budget):
        first = int(np.argmax(priority(have, spreads, exploration, confidence)))
        have[first] += 1
        given[first] += 1
    return given


def priority(
    counts: npt.ArrayLike, spreads: npt.ArrayLike, exploration: float, confidence: float = 0.95
) -> Floats:
    """h(n) - h(n + 1) + exploration sqrt(log(1 + N) / n) of each image, h(n) the half-width of the
    confidence interval of its mean reward and N the captions so far."""
    n = np.asarray(counts, np.int64)
    spreads = np.asarray(spreads, np.float64)
    shrink = half_width(n, spreads, confidence) - half_width(n + 1, spreads, confidence)
    return shrink + exploration * np.sqrt(np.log1p(n.sum()) / n)


def half_width(counts: npt.ArrayLike, spreads: npt.ArrayLike, confidence: float = 0.95) -> Floats:
    """t s / sqrt(n), t the two-sided quantile of Student's distribution with n - 1 degrees."""
    n = np.asarray(counts, np.int64)
    quantiles = {k: _student_quantile(int(k) - 1, (1 + confidence) / 2) for k in np.unique(n)}
    return np.vectorize(quantiles.get)(n) * np.asarray(spreads, np.float64) / np.sqrt(n)


def change_strength(rewards: npt.ArrayLike, running_mean: float) -> Floats:
    """How much to change each image [P]: mean reward of its captions [P,G] minus the running mean;
    above 0 perturb the picture this much, below 0 give hints (DeepVideo-R1, 2506.07464)."""
    return np.asarray(rewards, np.float64).mean(1) - running_mean


def replace_worst(
    rewards: npt.ArrayLike, hinted_rewards: npt.ArrayLike, *, injected: int
) -> list[tuple[int, int]]:
    """Pairs (position in the group, hinted caption) by which the best ``injected`` hinted captions
    replace the group's worst, where they are better (IGPO, 2509.10396, read in its
    abstract)."""
    own, hinted = np.asarray(rewards, np.float64), np.asarray(hinted_rewards, np.float64)
    worst, best = own.argsort(kind="stable"), (-hinted).argsort(kind="stable")
    pairs = zip(worst[:injected], best[:injected], strict=False)
    return [(int(i), int(j)) for i, j in pairs if hinted[j] > own[i]]


def optimal_multipliers(
    rewards: npt.ArrayLike,
    constraints: npt.ArrayLike,
    thresholds: npt.ArrayLike,
    *,
    temperature: float,
    lr: float = 1.0,
    tolerance: float = 1e-5,
    max_steps: int = 200,
    restarts: int = 5,
) -> Floats:
    """Multipliers [K] >= 0 that minimise the dual of max E[r] - temperature KL subject to
    E[g_k] >= threshold_k, by projected gradient (one-shot dualization, MoCAN, 2405.19544).

    rewards: [N,M] of M captions of the reference model for N images; constraints: g [N,M,K]

    Raises ValueError where the iteration does not settle, as for constraints that cannot be met.
    """
    r = np.asarray(rewards, np.float64)
    h = np.asarray(constraints, np.float64) - np.asarray(thresholds, np.float64)
    for attempt in range(restarts):
        multipliers = np.ones(h.shape[-1])
        for _ in range(max_steps * 2**attempt):
            logits = (r + h @ multipliers) / temperature
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            gradient = np.einsum("nm,nmk->nk", weights, h).mean(0)
            new = np.maximum(multipliers - lr / 2**attempt * gradient, 0.0)
            if np.abs(new - multipliers).max() < tolerance * lr / 2**attempt:
                return new
            multipliers = new
    raise ValueError(
        f"multipliers did not settle, last {multipliers.round(3).tolist()}: "
        f"can the constraints be met? highest means {h.max(1).mean(0).round(3).tolist()} over 0"
    )


@functools.cache
def _student_quantile(degrees: int, probability: float) -> float:
    """Quantile of Student's t distribution, by bisection on its exact distribution function."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range((degrees - odd) // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inner = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + inner) / 2
