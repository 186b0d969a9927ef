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
    arrays: list[Array] = [captions.ids, captions.lengths, images]
    arrays += [df.keys, df.first_child, df.counts, df.idf_of_count]
    arrays += [column.values for column in index.columns.values()]
    penalties = np.ones(1) if plain else PENALTIES
    _compiled()(*map(_read_only, (*arrays, penalties)), plain, scores)
    return scores


def _read_only(array: Array) -> Array:
    """A view that is read-only whether or not the array is (Ray's are), so that one compiled
    version serves all."""
    view = array.view()
    view.flags.writeable = False
    return view


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


def _kernel(
    all_ids: Array,
    all_lengths: Array,
    images: Array,
    df_keys: Array,
    df_first_child: Array,
    df_counts: Array,
    idf_of_count: Array,
    keys: Array,
    first_child: Array,
    first_posting: Array,
    posting_reference: Array,
    posting_tf: Array,
    roots: Array,
    first_reference: Array,
    norms: Array,
    lengths: Array,
    penalties: Array,
    plain: bool,
    scores: Array,
) -> None:
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
        begin = first_reference[image]
        num_references = first_reference[image + 1] - begin
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
            norm = np.sqrt(norm)
            total = 0.0
            for r in range(num_references):
                value = dots[r]
                scale = norm * norms[begin + r, k]
                if scale != 0.0:
                    value /= scale
                delta = abs(max(len(ids) - 1, 0) - max(lengths[begin + r] - 1, 0))
                total += value * penalties[min(delta, len(penalties) - 1)]
            scores[b, k] = total / num_references * 10.0
