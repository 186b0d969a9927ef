"""N-gram tries as sorted numpy arrays: exact, compact, and shared between processes for free.

A *forest* holds the n-grams (n = 1..4) of one or more documents.  Nodes 0..num_roots-1 are the
roots; every other node is an n-gram, whose key is ``parent << 32 | word`` with word ids from 1.
Nodes are laid out level by level and sorted by key, so ``keys`` is sorted as a whole: a node's
number is its position in ``keys``, its children are contiguous, and a look-up is a binary search.
There is no hashing, hence no collision, and no limit on the vocabulary below 2**31 words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Caption = str | Sequence[str]
"""A tokenized caption: words joined by spaces, or a list of words."""

ORDER = 4
"""The largest n of the n-grams of CIDEr and BLEU."""

WORD_BITS = 32
WORD_MASK = (1 << WORD_BITS) - 1
FIRST_TEMPORARY_WORD = 1 << 31


@dataclass(frozen=True, slots=True)
class Tokens:
    """Captions as word ids, end to end: ``ids`` [sum of lengths], ``lengths`` [captions]."""

    ids: Int64
    lengths: Int64

    @property
    def captions(self) -> Int64:
        """The caption of every word [sum of lengths]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@dataclass(frozen=True, slots=True)
class Level:
    """The distinct n-grams of one n: ``keys`` [U], how often each occurs [U], its ``parent`` [U] in
    the level below (the root for n = 1), and for each occurrence its start among the words
    (``positions`` [O]) and its n-gram (``nodes`` [O], 0..U-1)."""

    keys: Int64
    counts: Int64
    parents: Int64
    positions: Int64
    nodes: Int64

    @property
    def words(self) -> Int64:
        return self.keys & WORD_MASK


def split(caption: Caption) -> Sequence[str]:
    """The words of a tokenized caption; ValueError for something else."""
    if isinstance(caption, str):
        return caption.split()
    if isinstance(caption, list | tuple):
        return caption
    raise ValueError(f"caption {caption!r:.80}, want a str or a list of words")


def check_words(words: Iterable[object], caption: object) -> None:
    """ValueError for what is no word, such as a whole caption in a list, or a number."""
    for word in words:
        if not isinstance(word, str) or " " in word:
            raise ValueError(
                f"caption {caption!r:.80} has the word {word!r:.80}, want a caption as one str or "
                "as a list of its words"
            )


def check_listed(i: int, captions: object) -> None:
    """ValueError unless item ``i`` has a list of captions rather than one caption or none."""
    if isinstance(captions, str | bytes) or not hasattr(captions, "__len__"):
        raise ValueError(
            f"item {i}: references {captions!r:.80}, want a list of captions; of a dict of image "
            "to captions pass the values"
        )


def encode(captions: Iterable[Caption], ids: Mapping[str, int]) -> Tokens:
    """Word ids of captions.  A word without an id gets a temporary one, which is the same for its
    repetitions inside the caption and means nothing outside it."""
    return _encode(captions, ids, lambda words: _temporary_ids(words, ids))


def encode_growing(captions: Iterable[Caption], ids: dict[str, int]) -> Tokens:
    """Word ids of captions; words without one are added to ``ids`` with the next."""

    def grow(words: Sequence[str]) -> list[int]:
        check_words(words, words)
        return [ids.setdefault(word, len(ids) + 1) for word in words]

    return _encode(captions, ids, grow)


def _encode(
    captions: Iterable[Caption],
    ids: Mapping[str, int],
    with_unknown: Callable[[Sequence[str]], list[int]],
) -> Tokens:
    flat: list[int] = []
    lengths: list[int] = []
    lookup = ids.__getitem__
    for caption in captions:
        words = split(caption)
        try:
            row = list(map(lookup, words))
        except (KeyError, TypeError):  # what is no word need not be hashable
            row = with_unknown(words)
        flat += row
        lengths.append(len(row))
    return Tokens(np.array(flat, dtype=np.int64), np.array(lengths, dtype=np.int64))


def _temporary_ids(words: Sequence[str], ids: Mapping[str, int]) -> list[int]:
    check_words(words, words)
    temporary: dict[str, int] = {}
    return [
        ids[word]
        if word in ids
        else FIRST_TEMPORARY_WORD + temporary.setdefault(word, len(temporary))
        for word in words
    ]


def levels(tokens: Tokens, roots: Int64) -> Iterator[Level]:
    """The n-grams of captions, for n = 1, 2, 3, 4; ``roots`` [captions] is the root of each.

    Keys refer to the level below by its position there, as in ``Level.parents``.
    """
    ends = np.repeat(np.cumsum(tokens.lengths), tokens.lengths)
    remaining = ends - np.arange(len(tokens.ids))
    parent_of = np.repeat(roots, tokens.lengths)
    positions = np.arange(len(tokens.ids))
    for k in range(ORDER):
        positions = positions[remaining[positions] > k]
        keys = parent_of[positions] << WORD_BITS | tokens.ids[positions + k]
        unique, nodes, counts = np.unique(keys, return_inverse=True, return_counts=True)
        yield Level(unique, counts, unique >> WORD_BITS, positions, nodes)
        parent_of[positions] = nodes


def find(keys: Int64, parents: Int64, words: Int64) -> Int64:
    """The nodes [Q] that continue ``parents`` [Q] by ``words`` [Q]; -1 where there is none (or
    where the parent is itself -1)."""
    wanted = parents << WORD_BITS | words
    at = np.searchsorted(keys, wanted)
    at[at == len(keys)] = 0
    return np.where((keys[at] == wanted) & (parents >= 0), at, -1)


def first_children(keys: Int64) -> npt.NDArray[np.int32]:
    """Where the children of each node begin, [nodes + 1]: those of p are
    ``first[p] : first[p + 1]``."""
    nodes = np.arange(len(keys) + 1, dtype=np.int64)
    return np.searchsorted(keys, nodes << WORD_BITS, side="right").astype(np.int32)
