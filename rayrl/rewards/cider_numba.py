"""The CIDEr-D kernel in machine code; ``cider_numpy`` says what it computes.

Importing this module imports numba.  The compiled kernel is kept on disk where numba can write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from rayrl.rewards.cider_numpy import PENALTIES
from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.rewards.ngrams import ORDER, WORD_BITS, Int64, Tokens
from rayrl.rewards.reference_index import ReferenceIndex

Array = npt.NDArray[Any]


def components(
    df: DocumentFrequency, index: ReferenceIndex, captions: Tokens, images: Int64, plain: bool
) -> npt.NDArray[np.float64]:
    """CIDEr-D per n [B, 4] of ``captions`` (B) against the references of ``images`` [B]; CIDEr if
    ``plain``."""
    scores = np.zeros((len(images), ORDER))
    _compiled()(
        _read_only(captions.ids, captions.lengths, images),
        _read_only(df.keys, df.first_child, df.counts, df.idf_of_count),
        _read_only(*(column.values for column in index.columns.values())),
        np.ones(1) if plain else PENALTIES,
        plain,
        scores,
    )
    return scores


def _read_only(*arrays: Array) -> tuple[Array, ...]:
    """Views that are read-only whether or not the arrays are (Ray's are), so that one compiled
    version serves all."""
    views = tuple(array.view() for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views


@cache
def _compiled() -> Callable[..., None]:
    try:
        return numba.njit(cache=True, nogil=True)(_kernel)
    except RuntimeError:  # numba found no folder that it may write
        return numba.njit(nogil=True)(_kernel)


@numba.extending.register_jitable
def _child(keys: Array, first_child: Array, parent: int, word: int) -> int:
    """The node that continues ``parent`` by ``word``, or -1."""
    if parent < 0:
        return -1
    low, high = first_child[parent], first_child[parent + 1]
    wanted = parent << WORD_BITS | word
    while low < high:
        middle = (low + high) >> 1
        if keys[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    if low < first_child[parent + 1] and keys[low] == wanted:
        return low
    return -1


@numba.extending.register_jitable
def _first_occurrence(ids: Array, below: Array, here: Array, i: int, k: int) -> int:
    """Where the n-gram of k + 1 words at ``i`` first occurs, given that for k words (``below``)
    and for the positions before (``here``)."""
    if k == 0:
        for j in range(i):
            if ids[j] == ids[i]:
                return j
        return i
    start = below[i]
    if start == i:
        return i
    for j in range(start, i):
        if below[j] == start and ids[j + k] == ids[i + k]:
            return here[j]
    return i


@numba.extending.register_jitable
def _mean_similarity(
    dots: Array, norm: float, norms: Array, num_words: int, lengths: Array, penalties: Array
) -> float:
    """The penalized cosines with the references, averaged."""
    total = 0.0
    for r in range(len(norms)):
        scale = norm * norms[r]
        cosine = dots[r] / scale if scale != 0.0 else dots[r]
        delta = abs(max(num_words - 1, 0) - max(lengths[r] - 1, 0))
        total += cosine * penalties[min(delta, len(penalties) - 1)]
    return total / len(norms)


def _kernel(
    captions: tuple[Array, ...],
    df: tuple[Array, ...],
    index: tuple[Array, ...],
    penalties: Array,
    plain: bool,
    scores: Array,
) -> None:
    all_ids, all_lengths, images = captions
    df_keys, df_first_child, df_counts, idf_of_count = df
    keys, first_child, first_posting, posting_reference, posting_tf = index[:5]
    roots, first_reference, norms, lengths = index[5:]
    longest = max(1, all_lengths.max()) if len(all_lengths) else 1
    first = np.zeros((2, longest), dtype=np.int64)
    tf = np.zeros(longest, dtype=np.int64)
    df_nodes = np.zeros(longest, dtype=np.int64)
    ref_nodes = np.zeros(longest, dtype=np.int64)
    dots = np.zeros(256)
    end = 0
    for b in range(len(images)):
        start, end = end, end + all_lengths[b]
        ids = all_ids[start:end]
        image = images[b]
        num_references = first_reference[image + 1] - first_reference[image]
        if num_references > len(dots):
            dots = np.zeros(num_references)
        for k in range(min(ORDER, len(ids))):
            below, here = first[(k + 1) % 2], first[k % 2]
            norm = 0.0
            dots[:num_references] = 0.0
            for i in range(len(ids) - k):
                tf[i] = 0
                here[i] = _first_occurrence(ids, below, here, i, k)
                tf[here[i]] += 1
            # From the right: a node still holds that of the shorter n-gram, which starts at or
            # before this one.
            for i in range(len(ids) - k - 1, -1, -1):
                if here[i] != i:
                    continue
                word = ids[i + k]
                df_parent = df_nodes[below[i]] if k else 0
                ref_parent = ref_nodes[below[i]] if k else roots[image]
                df_node = _child(df_keys, df_first_child, df_parent, word)
                ref_node = _child(keys, first_child, ref_parent, word)
                df_nodes[i], ref_nodes[i] = df_node, ref_node
                idf = idf_of_count[df_counts[df_node] if df_node >= 0 else 0]
                weight = tf[i] * idf
                norm += weight * weight
                if ref_node >= 0:
                    for p in range(first_posting[ref_node], first_posting[ref_node + 1]):
                        ref_weight = posting_tf[p] * idf
                        clipped = weight if plain else min(weight, ref_weight)
                        dots[posting_reference[p]] += clipped * ref_weight
            rows = slice(first_reference[image], first_reference[image + 1])
            scores[b, k] = 10.0 * _mean_similarity(
                dots, np.sqrt(norm), norms[rows, k], len(ids), lengths[rows], penalties
            )
