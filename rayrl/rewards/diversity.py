"""Diversity of the K captions sampled for an image, and the health of captions.

Div-1, Div-2 and mBLEU-4 are those of self-critical.pytorch; Self-CIDEr is that of Wang and Chan
2019 (arXiv:1903.12020).  Captions are tokenized.  RL makes captions alike and unlike people's; no
CIDEr shows it, these do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from rayrl.rewards.bleu import bleu
from rayrl.rewards.cider import Cider, CiderD
from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.rewards.ngrams import Caption, split

Groups = Sequence[Sequence[Caption]]

_ARTICLES = ("a", "an", "the")
_PREPOSITIONS = ("in", "for", "at", "of", "with", "before", "after", "on", "upon", "near", "to")
BAD_ENDINGS = frozenset((*_ARTICLES, *_PREPOSITIONS, "is", "are", "am"))
"""Words that no English caption ends with; those of self-critical.pytorch's ``bad_count_rate``."""


def div_n(groups: Groups, n: int) -> float:
    """Distinct n-grams of an image's captions over their words, averaged over images: 0..1."""
    shares = []
    for captions in groups:
        words = [split(caption) for caption in captions]
        distinct = {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}
        shares.append(len(distinct) / max(1, sum(map(len, words))))
    return float(np.mean(shares))


def mbleu4(groups: Groups) -> float:
    """BLEU-4 of each of the K captions against the other K - 1, over the corpus, averaged over
    the K: 0..1, low is diverse.  ValueError unless every image has the same K >= 2."""
    k = _samples(groups)
    others = [[[c for j, c in enumerate(group) if j != i] for group in groups] for i in range(k)]
    return float(
        np.mean([bleu([group[i] for group in groups], others[i]).corpus[3] for i in range(k)])
    )


def similarity(groups: Groups, df: DocumentFrequency) -> npt.NDArray[np.float64]:
    """CIDEr / 10 between the K captions of each image, [N, K, K], symmetric: 1 for captions that
    say the same, 0 where they have no word in common."""
    k = _samples(groups)
    captions = [caption for group in groups for caption in group for _ in group]
    references = [[other] for group in groups for _ in group for other in group]
    kernel = Cider(df).score(captions, references).reshape(-1, k, k) / 10.0
    return (kernel + kernel.transpose(0, 2, 1)) / 2  # type: ignore[no-any-return]


def self_cider(groups: Groups, df: DocumentFrequency) -> npt.NDArray[np.float64]:
    """Self-CIDEr of each image, 0 (K times the same) to 1 (nothing in common).

    With the eigenvalues l of the K x K matrix of CIDEr / 10 between an image's captions:
    -log(sqrt(l_1) / sum sqrt(l)) / log K, where l_1 is the largest.
    """
    return diversity_of(similarity(groups, df))


def diversity_of(kernels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Self-CIDEr [N] of images with kernels [N, K, K] between their captions."""
    k = kernels.shape[-1]
    roots = np.sqrt(np.maximum(0.0, np.linalg.eigvalsh(kernels.astype(np.float64))))
    total = roots.sum(axis=1)
    share = np.divide(roots[:, -1], total, out=np.ones(len(total)), where=total > 0)
    # Adding 0 turns the -0.0 of equal captions into 0.0.
    return np.maximum(0.0, -np.log(share) / np.log(k)) + 0.0


def oracle_and_mean(
    groups: Groups, references: Sequence[Sequence[Caption]], df: DocumentFrequency
) -> tuple[float, float]:
    """CIDEr-D (0..10) of the best of each image's captions, and of all of them."""
    k = _samples(groups)
    flat = [caption for group in groups for caption in group]
    scores = CiderD(df).score(flat, [some for some in references for _ in range(k)]).reshape(-1, k)
    return float(scores.max(axis=1).mean()), float(scores.mean())


def vocabulary_size(captions: Sequence[Caption]) -> int:
    """Distinct words."""
    return len({word for caption in captions for word in split(caption)})


def novel_share(captions: Sequence[Caption], training: Collection[str]) -> float:
    """Share of captions that are not among ``training`` (words joined by spaces)."""
    return float(np.mean([" ".join(split(caption)) not in training for caption in captions]))


def bad_ending(captions: Sequence[Caption]) -> npt.NDArray[np.float64]:
    """1 for captions [N] that end in a word such as "a" or "with" (or are empty), else 0."""
    return np.array([1.0 * (not (w := split(c)) or w[-1] in BAD_ENDINGS) for c in captions])


def repetition(captions: Sequence[Caption], n: int = 2) -> npt.NDArray[np.float64]:
    """The share [N] of a caption's n-grams that it has already said."""
    shares = np.zeros(len(captions))
    for i, caption in enumerate(captions):
        words = split(caption)
        ngrams = [tuple(words[j : j + n]) for j in range(len(words) - n + 1)]
        shares[i] = 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return shares


def _samples(groups: Groups) -> int:
    sizes = sorted({len(group) for group in groups})
    if len(sizes) != 1 or sizes[0] < 2:
        raise ValueError(f"images with {sizes} captions, want the same number, at least 2, for all")
    return sizes[0]
