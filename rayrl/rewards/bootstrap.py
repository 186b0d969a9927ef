"""Is one system better than another?  The paired bootstrap over images (Koehn 2004)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rayrl.rewards import ptb
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.results import ImageId, match, read_results


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean of ``b`` minus that of ``a``, its 95 % interval, and the share of resampled sets in
    which ``b`` is not better (one-sided p)."""

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float
    num_images: int


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, num_samples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare the scores [N] of two systems on the same N images, resampling images."""
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or len(one) < 2:
        raise ValueError(f"scores of shapes {one.shape} and {other.shape}, want two of [N], N >= 2")
    difference = other - one
    rng = np.random.default_rng(seed)
    # How often an image is drawn is all that its mean needs: N counts a sample, not N indices.
    shares = np.full(len(one), 1 / len(one))
    counts = (rng.multinomial(len(one), shares) for _ in range(num_samples))
    means = np.array([count @ difference for count in counts]) / len(one)
    low, high = np.quantile(means, (0.025, 0.975))
    return Comparison(
        mean_a=float(one.mean()),
        mean_b=float(other.mean()),
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        p_value=float(np.mean(means <= 0)),
        num_images=len(one),
    )


def compare_results(
    a: str | Path,
    b: str | Path,
    references: Mapping[ImageId, Sequence[str]],
    num_samples: int = 10_000,
) -> Comparison:
    """Compare two COCO results files by CIDEr-D (0..10) against the same references."""
    tokens = [[ptb.tokenize(text) for text in some] for some in references.values()]
    cider = CiderD(DocumentFrequency.from_references(tokens, source="corpus"))

    def scores(path: str | Path) -> npt.NDArray[np.float64]:
        captions, _ = match(read_results(path), references)
        return cider.score([ptb.tokenize(caption) for caption in captions], tokens)

    return paired_bootstrap(scores(a), scores(b), num_samples)
