"""The references of images as compact tf-idf vectors, computed once per image."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrl.rewards.columns import Column
from rayrl.rewards.document_frequency import EOS, DocumentFrequency
from rayrl.rewards.ngrams import (
    ORDER,
    WORD_BITS,
    Caption,
    Int64,
    Tokens,
    check_listed,
    encode_growing,
    find,
    first_children,
    levels,
    split,
)

References = Sequence[Caption]

MAX_IMAGES = 1_000_000
"""3 GB at five captions each; beyond it the index starts afresh."""

_IMAGES_AT_ONCE = 4096


class ReferenceIndex:
    """A forest with one root per image over the n-grams of its references; each n-gram has
    *postings*: the references that hold it, with how often they do.

    Images are recognised by the content of their references.  All is plain numpy arrays, so that
    Ray shares a pickled index between the processes of a node without a copy.
    """

    def __init__(self, df: DocumentFrequency, words: dict[str, int] | None = None) -> None:
        """An empty index.  ``words`` are the ids to start from, those of ``df`` if not given."""
        self.df = df
        self._first_words = words if words is not None else df.word_ids
        self.clear()

    @classmethod
    def build(cls, df: DocumentFrequency, references: Sequence[References]) -> ReferenceIndex:
        """The index of a whole data set, to be shared."""
        index = cls(df)
        for start in range(0, len(references), _IMAGES_AT_ONCE):
            index.images(references[start : start + _IMAGES_AT_ONCE])
        return index

    def clear(self) -> None:
        """Forget every image."""
        self.word_ids = dict(self._first_words)
        """Word to id, from 1: the words of ``df``, then those that only references have."""
        self._image_of: dict[bytes, int] = {}
        # In the order of the compiled kernel's arguments.
        self.columns: dict[str, Column] = {
            "keys": Column(np.int64),
            "first_child": Column(np.int32),
            "first_posting": Column(np.int32, [0]),
            "posting_reference": Column(np.uint8),
            "posting_tf": Column(np.uint8),
            "roots": Column(np.int64),
            "first_reference": Column(np.int64, [0]),
            "norms": Column(np.float64, np.zeros((0, ORDER))),
            "lengths": Column(np.int64),
        }

    def __len__(self) -> int:
        return len(self._image_of)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A column: ``keys`` [nodes] and ``first_child`` [nodes] (see ``ngrams``),
        ``first_posting`` [nodes + 1], ``posting_reference`` and ``posting_tf`` [postings] (which
        of its image's references, and how often), ``roots`` [images], ``first_reference``
        [images + 1], ``norms`` [references, 4] and ``lengths`` in words [references]."""
        return self.columns[name].values

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(column.values.nbytes for column in self.columns.values())

    def __getstate__(self) -> dict[str, Any]:
        return {
            "df": self.df,
            "words": "\n".join(list(self.word_ids)[len(self.df.words) :]),
            "digests": np.frombuffer(b"".join(self._image_of), dtype=np.uint8),
            "columns": {name: column.values for name, column in self.columns.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.df = state["df"]
        self.word_ids = dict(self.df.word_ids)
        for word in filter(None, state["words"].split("\n")):
            self.word_ids[word] = len(self.word_ids) + 1
        self._first_words = self.word_ids
        digests = state["digests"].tobytes()
        self._image_of = {digests[i : i + 16]: i // 16 for i in range(0, len(digests), 16)}
        self.columns = {name: Column(v.dtype, v) for name, v in state["columns"].items()}

    def images(self, references: Sequence[References]) -> Int64:
        """The image [N] of each item's references, adding those that are new.

        ValueError for an item without references.
        """
        digests = digests_of(references)
        new = {
            digest: item
            for digest, item in zip(digests, references, strict=True)
            if digest not in self._image_of
        }
        if new and len(self) and len(self) + len(new) > MAX_IMAGES:
            self.clear()
            return self.images(references)
        if new:
            self._add(list(new.values()))
            self._image_of.update((digest, len(self._image_of)) for digest in new)
        return np.array([self._image_of[digest] for digest in digests], dtype=np.int64)

    def find(self, digests: Sequence[bytes]) -> Int64:
        """The images [N] of digests, -1 where unknown."""
        return np.array([self._image_of.get(digest, -1) for digest in digests], dtype=np.int64)

    def postings(self, nodes: Int64) -> tuple[Int64, Int64]:
        """The postings of ``nodes`` [Q], end to end, with for each the index 0..Q-1 of its node."""
        starts = self["first_posting"][nodes].astype(np.int64)
        sizes = self["first_posting"][nodes + 1] - starts
        which = np.repeat(np.arange(len(nodes)), sizes)
        shift = starts - (np.cumsum(sizes) - sizes)
        return which, np.arange(len(which)) + shift[which]

    def _add(self, references: list[References]) -> None:
        captions = [caption for item in references for caption in item]
        if self.df.eos:
            captions = [[*split(caption), EOS] for caption in captions]
        tokens = encode_growing(captions, self.word_ids)
        counts = np.array([len(item) for item in references])
        base = len(self["keys"])
        keys, norms = self._add_forest(tokens, counts)
        self.columns["keys"].append(keys + (base << WORD_BITS))
        self.columns["first_child"].append(base + first_children(keys)[:-1].astype(np.int64))
        self.columns["roots"].append(base + np.arange(len(references)))
        self.columns["first_reference"].append(self["first_reference"][-1] + np.cumsum(counts))
        self.columns["norms"].append(norms)
        self.columns["lengths"].append(tokens.lengths)

    def _add_forest(self, tokens: Tokens, counts: Int64) -> tuple[Int64, npt.NDArray[np.float64]]:
        """Append the postings of images with ``counts`` references each; the keys of their forest,
        numbered from 0, and the norms [references, 4]."""
        num_captions = len(tokens.lengths)
        image_of = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(num_captions) - np.repeat(np.cumsum(counts) - counts, counts)
        norms = np.zeros((num_captions, ORDER))
        forest = [np.zeros(len(counts), dtype=np.int64)]
        sizes = [np.zeros(len(counts), dtype=np.int64)]
        df_nodes = np.zeros(len(counts), dtype=np.int64)
        below, here = 0, len(counts)
        for k, level in enumerate(levels(tokens, image_of)):
            forest.append(level.keys + (below << WORD_BITS))
            below, here = here, here + len(level.keys)
            df_nodes = find(self.df.keys, df_nodes[level.parents], level.words)
            idf = self.df.idf(df_nodes)
            pairs, tf = np.unique(
                level.nodes * num_captions + tokens.captions[level.positions], return_counts=True
            )
            node, caption = np.divmod(pairs, max(1, num_captions))
            weights = tf * idf[node]
            norms[:, k] = np.sqrt(np.bincount(caption, weights**2, minlength=num_captions))
            sizes.append(np.bincount(node, minlength=len(level.keys)))
            self.columns["posting_reference"].append(nth[caption])
            self.columns["posting_tf"].append(tf)
        # A last node that is nobody's child keeps the order of keys when more images follow.
        forest.append(np.array([here << WORD_BITS]))
        sizes.append(np.zeros(1, dtype=np.int64))
        ends = self["first_posting"][-1] + np.cumsum(np.concatenate(sizes))
        self.columns["first_posting"].append(ends)
        return np.concatenate(forest), norms


def digests_of(references: Sequence[References]) -> list[bytes]:
    """16 bytes for each item that identify its references."""
    seen: dict[int, bytes] = {}
    # An array makes its rows as they are asked for: what is let go leaves its id to another one.
    held = []
    digests = []
    for i, item in enumerate(references):
        if id(item) not in seen:
            check_listed(i, item)
            if not len(item):
                raise ValueError(f"item {i}: no reference caption, want at least one")
            joined = "\n".join(
                text if isinstance(text, str) else " ".join(map(str, split(text))) for text in item
            )
            seen[id(item)] = blake2b(joined.encode(), digest_size=16).digest()
            held.append(item)
        digests.append(seen[id(item)])
    return digests
