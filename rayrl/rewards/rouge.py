"""ROUGE-L (Lin 2004) as the COCO evaluation computes it.

The F-score with beta = 1.2 of the longest common subsequence, taking the largest precision and the
largest recall over the references separately.  The rouge_score package computes something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayrl.rewards.ngrams import Caption

BETA = 1.2


def rouge_l(
    captions: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> npt.NDArray[np.float64]:
    """ROUGE-L [N] of tokenized captions, where ``references[i]`` are those of ``captions[i]``."""
    scores = np.zeros(len(captions))
    for i, (caption, some) in enumerate(zip(captions, references, strict=True)):
        if not len(some):
            raise ValueError(f"item {i}: no reference caption, want at least one")
        words = _words(caption)
        precision = recall = 0.0
        for reference in some:
            reference_words = _words(reference)
            common = longest_common_subsequence(words, reference_words)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(reference_words))
        if precision:
            scores[i] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, with a row of the usual table in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    everything = row = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & everything
    return len(one) - row.bit_count()


def _words(caption: Caption) -> Sequence[str]:
    """Split at single spaces; an empty caption is one empty word, as in the COCO evaluation."""
    return caption.split(" ") if isinstance(caption, str) else caption or [""]
