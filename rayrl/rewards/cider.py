"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726), as pycocoevalcap computes it.

For n = 1..4 an n-gram weighs tf * idf, with idf = log(N) - log(max(1, df)).  The similarity of a
caption h and a reference r is

    sim_n = sum over n-grams of min(h, r) * r / (|h|_n * |r|_n)  *  exp(-(len_h - len_r)^2 / 72)

where the norms include n-grams that the corpus has never seen, and len counts bigrams.  The score
is 10 times the mean over n and over the references: from 0 to 10 (papers print it times ten).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayrl.rewards.document_frequency import EOS, DocumentFrequency
from rayrl.rewards.ngrams import ORDER, Caption, Int64, Tokens, encode, find, levels, split
from rayrl.rewards.reference_index import ReferenceIndex

__all__ = ["CiderD", "DocumentFrequency"]

SIGMA = 6.0
"""Width of the length penalty, in words."""

Scores = npt.NDArray[np.float64]


class CiderD:
    """CIDEr-D against frozen document frequencies.

    The references of an image are turned into vectors once and kept, compactly, for at most
    ``max_images`` images.  If ``df`` was counted with ``<eos>``, every reference and every caption
    that ended by itself gets that word too.
    """

    def __init__(self, df: DocumentFrequency, *, max_images: int = 200_000) -> None:
        self.df = df
        self._index = ReferenceIndex(df, max_images)

    def score(
        self,
        captions: Sequence[Caption],
        references: Sequence[Sequence[Caption]],
        finished: Sequence[bool] | None = None,
    ) -> Scores:
        """The score of each caption, float64 [N], 0..10.

        ``captions`` are tokenized (words joined by spaces, or lists of words), and
        ``references[i]`` are those of ``captions[i]``.  ``finished[i]`` says whether a caption
        ended by itself rather than at the length limit (all, if not given); it matters only with
        ``<eos>``.  Identical captions of one image score bit-identically.
        """
        return self.components(captions, references, finished).mean(axis=1)

    def components(
        self,
        captions: Sequence[Caption],
        references: Sequence[Sequence[Caption]],
        finished: Sequence[bool] | None = None,
    ) -> Scores:
        """The scores per n, float64 [N, 4]; their mean over n is ``score``."""
        if len(captions) != len(references):
            raise ValueError(
                f"{len(captions)} captions but {len(references)} lists of references, want as many"
            )
        images = self._index.images(references)
        if self.df.eos:
            ended = finished if finished is not None else [True] * len(captions)
            captions = [
                [*split(caption), EOS] if end else caption
                for caption, end in zip(captions, ended, strict=True)
            ]
        return _components(self.df, self._index, encode(captions, self._index.word_ids), images)


def _components(
    df: DocumentFrequency, index: ReferenceIndex, captions: Tokens, images: Int64
) -> Scores:
    """The numpy path: one pass over the distinct n-grams of all captions for each n.

    A *pair* is a caption with one of its references; ``first_pair`` [B] is where those of a
    caption begin.
    """
    num = len(captions.lengths)
    num_references = np.diff(index.first_reference)[images]
    first_pair = np.cumsum(num_references) - num_references
    caption_of_pair = np.repeat(np.arange(num), num_references)
    reference_of_pair = np.arange(len(caption_of_pair)) + np.repeat(
        index.first_reference[images] - first_pair, num_references
    )
    penalty = length_penalty(captions.lengths[caption_of_pair], index.lengths[reference_of_pair])
    scores = np.zeros((num, ORDER))
    owner = np.arange(num)
    df_nodes, ref_nodes = np.zeros(num, dtype=np.int64), index.roots[images]
    for k, level in enumerate(levels(captions, np.arange(num))):
        owner = owner[level.parents]
        df_nodes = find(df.keys, df_nodes[level.parents], level.words)
        ref_nodes = find(index.keys, ref_nodes[level.parents], level.words)
        idf = df.idf(df_nodes)
        weight = level.counts * idf
        norms = np.sqrt(np.bincount(owner, weight**2, minlength=num))

        matched = np.flatnonzero(ref_nodes >= 0)
        which, postings = index.postings(ref_nodes[matched])
        which = matched[which]
        ref_weight = index.posting_tf[postings] * idf[which]
        dots = np.bincount(
            first_pair[owner[which]] + index.posting_reference[postings],
            np.minimum(weight[which], ref_weight) * ref_weight,
            minlength=len(caption_of_pair),
        ).astype(np.float64)  # bincount of nothing counts in integers, whatever the weights
        scale = norms[caption_of_pair] * index.norms[reference_of_pair, k]
        dots = np.divide(dots, scale, out=dots, where=scale != 0) * penalty
        scores[:, k] = np.bincount(caption_of_pair, dots, minlength=num)
    return scores / num_references[:, None] * 10.0


def length_penalty(words: Int64, reference_words: Int64) -> Scores:
    """exp(-delta^2 / (2 sigma^2)) with the lengths counted in bigrams, so 0 and 1 words agree."""
    delta = np.maximum(words - 1, 0) - np.maximum(reference_words - 1, 0)
    return np.e ** (-(delta.astype(np.float64) ** 2) / (2 * SIGMA**2))
