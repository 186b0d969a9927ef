"""Penalties on a caption's form: 0 or below, so that a positive weight punishes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayrl.rewards import diversity
from rayrl.rewards.ngrams import Caption, split

Scores = npt.NDArray[np.float64]


def length_penalty(captions: Sequence[Caption], min_words: int, max_words: int) -> Scores:
    """Minus the words [N] that a caption is shorter than ``min_words`` or longer than
    ``max_words``."""
    words = np.array([len(split(caption)) for caption in captions], dtype=np.float64)
    return -np.maximum(0.0, np.maximum(min_words - words, words - max_words))


def repetition_penalty(captions: Sequence[Caption], n: int) -> Scores:
    """Minus the share [N] of n-grams that the caption has already said."""
    return -diversity.repetition(captions, n)


def bad_ending_penalty(captions: Sequence[Caption]) -> Scores:
    """-1 for captions [N] that end in a word such as "a" or "with", or are empty; else 0."""
    return -diversity.bad_ending(captions)
