"""The arithmetic of CIDEr-D on whole arrays, with numpy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.rewards.ngrams import ORDER, Int64, Tokens, find, levels
from rayrl.rewards.reference_index import ReferenceIndex

SIGMA = 6.0
"""Width of the length penalty, in words."""

PENALTIES = np.array([np.e ** (-(float(delta) ** 2) / (2 * SIGMA**2)) for delta in range(256)])
"""exp(-delta^2 / (2 sigma^2)) by the difference of lengths; the last is 0 in float64."""


def components(
    df: DocumentFrequency, index: ReferenceIndex, captions: Tokens, images: Int64, plain: bool
) -> npt.NDArray[np.float64]:
    """CIDEr-D per n [B, 4] of ``captions`` (B) against the references of ``images`` [B]; CIDEr,
    without clipping and length penalty, if ``plain``.

    For each n there is one pass over the distinct n-grams of all captions.  A *pair* is a caption
    with one of its references; ``first_pair`` [B] is where those of a caption begin.
    """
    num = len(captions.lengths)
    num_references = np.diff(index["first_reference"])[images]
    first_pair = np.cumsum(num_references) - num_references
    caption_of_pair = np.repeat(np.arange(num), num_references)
    reference_of_pair = np.arange(len(caption_of_pair)) + np.repeat(
        index["first_reference"][images] - first_pair, num_references
    )
    delta = np.maximum(captions.lengths - 1, 0)[caption_of_pair]
    delta = np.abs(delta - np.maximum(index["lengths"] - 1, 0)[reference_of_pair])
    penalty = 1.0 if plain else PENALTIES[np.minimum(delta, len(PENALTIES) - 1)]
    scores = np.zeros((num, ORDER))
    owner = np.arange(num)
    df_nodes, ref_nodes = np.zeros(num, dtype=np.int64), index["roots"][images]
    for k, level in enumerate(levels(captions, np.arange(num))):
        owner = owner[level.parents]
        df_nodes = find(df.keys, df_nodes[level.parents], level.words)
        ref_nodes = find(index["keys"], ref_nodes[level.parents], level.words)
        idf = df.idf(df_nodes)
        weight = level.counts * idf
        norms = np.sqrt(np.bincount(owner, weight**2, minlength=num))

        matched = np.flatnonzero(ref_nodes >= 0)
        which, postings = index.postings(ref_nodes[matched])
        which = matched[which]
        ref_weight = index["posting_tf"][postings] * idf[which]
        dots = np.bincount(
            first_pair[owner[which]] + index["posting_reference"][postings],
            (weight[which] if plain else np.minimum(weight[which], ref_weight)) * ref_weight,
            minlength=len(caption_of_pair),
        ).astype(np.float64)  # bincount of nothing counts in integers, whatever the weights
        scale = norms[caption_of_pair] * index["norms"][reference_of_pair, k]
        dots = np.divide(dots, scale, out=dots, where=scale != 0) * penalty
        scores[:, k] = np.bincount(caption_of_pair, dots, minlength=num)
    return scores / num_references[:, None] * 10.0
