"""The references of images as compact tf-idf vectors, computed once per image."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrl.rewards.document_frequency import EOS, DocumentFrequency
from rayrl.rewards.ngrams import (
    ORDER,
    WORD_BITS,
    Caption,
    Int64,
    encode,
    find,
    levels,
    split,
)


class Column:
    """An array that grows at its end; ``values`` is what it holds so far."""

    def __init__(self, dtype: npt.DTypeLike, *shape: int) -> None:
        self._buffer = np.zeros((64, *shape), dtype=dtype)
        self._size = 0

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._buffer[: self._size]

    def append(self, rows: npt.NDArray[Any]) -> None:
        end = self._size + len(rows)
        if end > len(self._buffer):
            grown = np.empty((2 * end, *self._buffer.shape[1:]), dtype=self._buffer.dtype)
            grown[: self._size] = self.values
            self._buffer = grown
        self._buffer[self._size : end] = rows
        self._size = end


class ReferenceIndex:
    """A forest with one root per image over the n-grams of its references, and for every n-gram
    the references that hold it with their counts (its postings).

    Images are recognised by the content of their references and added when first seen; beyond
    ``max_images`` the index starts afresh, so its memory is bounded.
    """

    def __init__(self, df: DocumentFrequency, max_images: int) -> None:
        if max_images < 1:
            raise ValueError(f"max_images {max_images}, want at least 1")
        self.df = df
        self.max_images = max_images
        self.clear()

    def clear(self) -> None:
        """Forget every image."""
        self._keys = Column(np.int64)
        self._first_posting = Column(np.int64)
        self._first_posting.append(np.zeros(1))
        self._posting_reference = Column(np.uint16)
        self._posting_tf = Column(np.uint16)
        self._root = Column(np.int64)
        self._first_reference = Column(np.int64)
        self._first_reference.append(np.zeros(1))
        self._norms = Column(np.float64, ORDER)
        self._lengths = Column(np.int64)
        self._image_of: dict[bytes, int] = {}
        self.word_ids = dict(self.df.word_ids)

    @property
    def keys(self) -> Int64:
        return self._keys.values

    @property
    def roots(self) -> Int64:
        """The root of each image, [images]."""
        return self._root.values

    @property
    def first_reference(self) -> Int64:
        """Where the references of each image begin, [images + 1]."""
        return self._first_reference.values

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """The norm of each reference per n, [references, 4]."""
        return self._norms.values

    @property
    def lengths(self) -> Int64:
        """The number of words of each reference, [references]."""
        return self._lengths.values

    @property
    def posting_reference(self) -> npt.NDArray[np.uint16]:
        """Which of its image's references a posting is of, [postings]."""
        return self._posting_reference.values

    @property
    def posting_tf(self) -> npt.NDArray[np.uint16]:
        """How often the n-gram of a posting occurs in its reference, [postings]."""
        return self._posting_tf.values

    def postings(self, nodes: Int64) -> tuple[Int64, Int64]:
        """The postings of ``nodes`` [Q], end to end, with for each the index 0..Q-1 of its node."""
        starts = self._first_posting.values[nodes]
        sizes = self._first_posting.values[nodes + 1] - starts
        which = np.repeat(np.arange(len(nodes)), sizes)
        shift = starts - (np.cumsum(sizes) - sizes)
        return which, np.arange(len(which)) + shift[which]

    def images(self, references: Sequence[Sequence[Caption]]) -> Int64:
        """The image [N] of each item's references, adding those that are new."""
        seen: dict[int, bytes] = {}
        digests = []
        for i, item in enumerate(references):
            if id(item) not in seen:
                if not len(item):
                    raise ValueError(f"item {i}: no reference caption, want at least one")
                if isinstance(item, str):
                    raise ValueError(f"item {i}: references are one str, want a list of captions")
                seen[id(item)] = _digest(item)
            digests.append(seen[id(item)])
        new = {
            digest: item
            for digest, item in zip(digests, references, strict=True)
            if digest not in self._image_of
        }
        if new:
            if len(self._image_of) + len(new) > self.max_images:
                self.clear()
                new = dict(zip(digests, references, strict=True))
            self._add(list(new), list(new.values()))
        return np.array([self._image_of[digest] for digest in digests], dtype=np.int64)

    def _add(self, digests: list[bytes], references: list[Sequence[Caption]]) -> None:
        suffix = [EOS] if self.df.eos else []
        captions = [[*split(caption), *suffix] for item in references for caption in item]
        for caption in captions:
            for word in caption:
                self.word_ids.setdefault(word, len(self.word_ids) + 1)
        tokens = encode(captions, self.word_ids)
        counts = np.array([len(item) for item in references])
        image_of = np.repeat(np.arange(len(references)), counts)
        nth = np.arange(len(captions)) - np.repeat(np.cumsum(counts) - counts, counts)

        base = len(self.keys)
        forest = [np.zeros(len(references), dtype=np.int64)]
        df_nodes = np.zeros(len(references), dtype=np.int64)
        below, here = 0, len(references)
        norms = np.zeros((len(captions), ORDER))
        self._first_posting.append(np.full(here, self._first_posting.values[-1]))
        for k, level in enumerate(levels(tokens, image_of)):
            forest.append(level.keys + (below << WORD_BITS))
            below, here = here, here + len(level.keys)
            df_nodes = find(self.df.keys, df_nodes[level.parents], level.words)
            idf = self.df.idf(df_nodes)
            pairs, tf = np.unique(
                level.nodes * len(captions) + tokens.captions[level.positions], return_counts=True
            )
            node, caption = np.divmod(pairs, max(1, len(captions)))
            norms[:, k] = np.sqrt(
                np.bincount(caption, (tf * idf[node]) ** 2, minlength=len(captions))
            )
            sizes = np.bincount(node, minlength=len(level.keys))
            self._first_posting.append(self._first_posting.values[-1] + np.cumsum(sizes))
            self._posting_reference.append(nth[caption])
            self._posting_tf.append(tf)
        # A last node that is nobody's child keeps the key order across additions.
        forest.append(np.array([here << WORD_BITS]))
        self._first_posting.append(self._first_posting.values[-1:])
        self._keys.append(np.concatenate(forest) + (base << WORD_BITS))
        self._image_of.update(
            zip(digests, range(len(self.roots), len(self.roots) + len(digests)), strict=True)
        )
        self._root.append(base + np.arange(len(references)))
        self._first_reference.append(self.first_reference[-1] + np.cumsum(counts))
        self._norms.append(norms)
        self._lengths.append(tokens.lengths)


def _digest(references: Sequence[Caption]) -> bytes:
    joined = "\n".join(item if isinstance(item, str) else " ".join(item) for item in references)
    return blake2b(joined.encode(), digest_size=16).digest()
