"""Is one system better than another?  The paired bootstrap over images (Koehn 2004)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rayrl.rewards.bleu import bleu_counts, bleu_of_counts
from rayrl.rewards.suite import IN_WORDS, METRICS, CaptionSet, evaluate

Scores = npt.NDArray[np.float64]

_SAMPLES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of ``a`` and ``b``, that of ``b`` minus that of ``a``, its 95 % interval, and the
    share of resampled sets in which ``b`` is not higher (one-sided p)."""

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float
    num_images: int


@dataclass(frozen=True, slots=True)
class Pair:
    """What each caption of two systems adds to a score: ``a`` and ``b`` [N, K], and the ``score``
    [...] of a set of captions from the means [..., K] of theirs."""

    a: Scores
    b: Scores
    score: Callable[[Scores], Scores] = lambda means: means[..., 0]


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, num_samples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare the scores [N] of two systems on the same N images, resampling images."""
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or len(one) < 2:
        raise ValueError(f"scores of shapes {one.shape} and {other.shape}, want two of [N], N >= 2")
    return _bootstrap({"": Pair(one[:, None], other[:, None])}, num_samples, seed)[""]


def compare(
    a: CaptionSet,
    b: CaptionSet,
    metrics: Collection[str] = tuple(METRICS),
    num_samples: int = 10_000,
    seed: int = 0,
) -> tuple[dict[str, Comparison], dict[str, str]]:
    """Compare two systems' captions of the same images, by every metric that captions have one by
    one, and BLEU computed anew for each resampled set; and why metrics are missing.

    METEOR and SPICE are means over captions here, as CIDEr-D and ROUGE-L are.  Document frequencies
    stay those of all references.  ValueError as ``evaluate`` raises it, and for other references.
    """
    if list(map(list, a.references)) != list(map(list, b.references)):
        raise ValueError("the two systems have other references, want the same images in order")
    one, other = evaluate(a, metrics), evaluate(b, metrics)
    pairs = {
        name: Pair(scores[:, None], other.captions[name][:, None])
        for name, scores in one.captions.items()
        if name in other.captions
    }
    if "bleu" in metrics:
        counts_a, counts_b = (bleu_counts(data.tokens, data.reference_tokens) for data in (a, b))
        pairs |= {
            f"bleu_{n}": Pair(counts_a, counts_b, _bleu_n(n, len(a.captions))) for n in range(1, 5)
        }
    return _bootstrap(pairs, num_samples, seed), {**one.left_out, **other.left_out}


def _bleu_n(n: int, num_captions: int) -> Callable[[Scores], Scores]:
    return lambda means: bleu_of_counts(means * num_captions)[..., n - 1]


def _bootstrap(pairs: Mapping[str, Pair], num_samples: int, seed: int) -> dict[str, Comparison]:
    """All pairs on the same resampled sets of images."""
    if not pairs:
        return {}
    columns = np.concatenate([side for pair in pairs.values() for side in (pair.a, pair.b)], axis=1)
    num_images = len(columns)
    rng = np.random.default_rng(seed)
    # How often an image is drawn is all that its mean needs: N counts a sample, not N indices.
    shares = np.full(num_images, 1 / num_images)
    means = np.concatenate(
        [
            rng.multinomial(num_images, shares, min(_SAMPLES_AT_ONCE, num_samples - i)) @ columns
            for i in range(0, num_samples, _SAMPLES_AT_ONCE)
        ]
    )
    means /= num_images
    found, end = {}, 0
    for name, pair in pairs.items():
        start, middle, end = end, end + pair.a.shape[1], end + 2 * pair.a.shape[1]
        score_a, score_b = (float(pair.score(side.mean(axis=0))) for side in (pair.a, pair.b))
        differences = pair.score(means[:, middle:end]) - pair.score(means[:, start:middle])
        low, high = np.quantile(differences, (0.025, 0.975))
        found[name] = Comparison(
            mean_a=score_a,
            mean_b=score_b,
            difference=score_b - score_a,
            low=float(low),
            high=float(high),
            p_value=float(np.mean(differences <= 0)),
            num_images=num_images,
        )
    return found


def scaled(name: str, comparison: Comparison) -> Comparison:
    """A comparison as tables show it: x100, except for what counts words."""
    factor = 1.0 if name in IN_WORDS else 100.0
    scores = ("mean_a", "mean_b", "difference", "low", "high")
    return replace(comparison, **{key: factor * getattr(comparison, key) for key in scores})


def comparison_table(found: Mapping[str, Comparison], left_out: Mapping[str, str]) -> str:
    """Rows of both scores, their difference, its interval and p, x100; then what was left out."""
    width = max(map(len, found), default=0)
    lines = [f"{'':<{width}}  {'first':>9} {'second':>9} {'difference':>11}  95 % interval       p"]
    for name, comparison in found.items():
        row = scaled(name, comparison)
        interval = f"[{row.low:+.2f}, {row.high:+.2f}]"
        lines.append(
            f"{name:<{width}}  {row.mean_a:9.2f} {row.mean_b:9.2f} {row.difference:+11.2f}  "
            f"{interval:<19} {row.p_value:.4f}"
        )
    return "\n".join([*lines, *(f"{name}: left out, {why}" for name, why in left_out.items())])
