"""BLEU-1..4 (Papineni et al. 2002) as the COCO evaluation computes it.

Clipped n-gram precisions against the closest reference length; 1e-15 and 1e-9 are added to the
counts so that a small corpus scores tiny rather than 0.  sacrebleu tokenizes differently: its
numbers are not these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayrl.rewards.ngrams import ORDER, Caption, split

Scores = npt.NDArray[np.float64]

_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True, slots=True)
class Bleu:
    """``corpus`` [4]: BLEU-1..4 of all captions together; ``captions`` [N, 4]: of each alone."""

    corpus: Scores
    captions: Scores


def bleu(captions: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Bleu:
    """BLEU of tokenized captions, where ``references[i]`` are those of ``captions[i]``."""
    counts = bleu_counts(captions, references)
    return Bleu(corpus=bleu_of_counts(counts.sum(0)), captions=bleu_of_counts(counts))


def bleu_counts(captions: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    """What BLEU is made of, [N, 10]: for n = 1..4 the matching n-grams, for n = 1..4 all n-grams,
    and the lengths of the caption and of its closest reference.  The corpus has their sums."""
    cooked: dict[int, tuple[list[int], Counter[tuple[str, ...]]]] = {}
    # An array makes its rows as they are asked for: what is let go leaves its id to another one.
    held = []
    matches = np.zeros((len(captions), ORDER))
    lengths = np.zeros((len(captions), 2))
    for i, (caption, some) in enumerate(zip(captions, references, strict=True)):
        if id(some) not in cooked:
            cooked[id(some)] = _largest_counts(i, some)
            held.append(some)
        reference_lengths, largest = cooked[id(some)]
        words = split(caption)
        closest = min(reference_lengths, key=lambda length: (abs(length - len(words)), length))
        lengths[i] = len(words), closest
        for ngram, count in _count(words).items():
            matches[i, len(ngram) - 1] += min(count, largest[ngram])
    guesses = np.maximum(0, lengths[:, :1] - np.arange(ORDER))
    return np.concatenate([matches, guesses, lengths], axis=1)


def bleu_of_counts(counts: Scores) -> Scores:
    """BLEU-1..4 [..., 4] from ``bleu_counts`` or sums of them [..., 10]."""
    matches, guesses, lengths = np.split(counts, (ORDER, 2 * ORDER), axis=-1)
    precisions = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=-1)
    scores: Scores = precisions ** (1.0 / np.arange(1, ORDER + 1))
    ratio = (lengths[..., :1] + _TINY) / (lengths[..., 1:] + _SMALL)
    return scores * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _count(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1)
    )


def _largest_counts(
    i: int, references: Sequence[Caption]
) -> tuple[list[int], Counter[tuple[str, ...]]]:
    """The lengths of references, and of each n-gram its largest count in one of them."""
    if not len(references):
        raise ValueError(f"item {i}: no reference caption, want at least one")
    split_references = [split(reference) for reference in references]
    largest: Counter[tuple[str, ...]] = Counter()
    for words in split_references:
        largest |= _count(words)
    return [len(words) for words in split_references], largest
