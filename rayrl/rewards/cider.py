"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726), as pycocoevalcap computes it.

For n = 1..4 an n-gram weighs tf * idf, with idf = log(N) - log(max(1, df)).  The similarity of a
caption h and a reference r is

    sim_n = sum over n-grams of min(h, r) * r / (|h|_n * |r|_n)  *  exp(-(len_h - len_r)^2 / 72)

where the norms include n-grams that the corpus has never seen, and len counts bigrams.  The score
is 10 times the mean over n and over the references: from 0 to 10 (papers print it times ten).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from rayrl.rewards import cider_numpy
from rayrl.rewards.document_frequency import EOS, DocumentFrequency
from rayrl.rewards.ngrams import ORDER, Caption, Int64, Tokens, encode, split
from rayrl.rewards.reference_index import ReferenceIndex, digests_of

__all__ = ["Cider", "CiderD", "DocumentFrequency", "ReferenceIndex"]

Scores = npt.NDArray[np.float64]
Components = Callable[[DocumentFrequency, ReferenceIndex, Tokens, Int64, bool], Scores]


class CiderD:
    """CIDEr-D against frozen document frequencies.

    References become vectors once per image.  ``index`` holds those of images known beforehand
    (shared between processes, and never changed here); further ones are added as they come.  If
    ``df`` was counted with ``<eos>``, every reference and every caption that ended by itself gets
    that word too.
    """

    _plain = False

    def __init__(self, df: DocumentFrequency, index: ReferenceIndex | None = None) -> None:
        if index is not None and index.df.content_hash != df.content_hash:
            raise ValueError(
                f"the index was built for document frequencies {index.df.content_hash}, "
                f"these are {df.content_hash}; build it again with ReferenceIndex.build(df, ...)"
            )
        self.df = df
        self._shared = index
        self._own = ReferenceIndex(df, index.word_ids if index is not None else None)
        self._compute = _components()

    def score(
        self,
        captions: Sequence[Caption],
        references: Sequence[Sequence[Caption]],
        finished: Sequence[bool] | None = None,
    ) -> Scores:
        """The score of each caption, float64 [N], 0..10.

        ``captions`` are tokenized (words joined by spaces, or lists of words; see
        ``rayrl.rewards.ptb``), and ``references[i]`` are those of ``captions[i]``.
        ``finished[i]`` says whether a caption ended by itself rather than at the length limit
        (all, if not given); it matters only with ``<eos>``.  Identical captions of one image score
        bit-identically.
        """
        return self.components(captions, references, finished).mean(axis=1)

    def components(
        self,
        captions: Sequence[Caption],
        references: Sequence[Sequence[Caption]],
        finished: Sequence[bool] | None = None,
    ) -> Scores:
        """The scores per n, float64 [N, 4]; their mean over n is ``score``."""
        if not isinstance(captions, list | tuple):
            raise ValueError(
                f"captions are a {type(captions).__name__}, want a list; from the dicts of "
                "pycocoevalcap: score([res[i][0] for i in res], [gts[i] for i in res])"
            )
        if len(captions) != len(references):
            raise ValueError(
                f"{len(captions)} captions but {len(references)} lists of references, want as many"
            )
        if self.df.eos:
            ended = finished if finished is not None else [True] * len(captions)
            captions = [
                [*split(caption), EOS] if end else caption
                for caption, end in zip(captions, ended, strict=True)
            ]
        if self._shared is None:
            return self._score(self._own, captions, references)
        known = self._shared.find(digests_of(references)) >= 0
        scores = np.zeros((len(captions), ORDER))
        for index, which in ((self._shared, known), (self._own, ~known)):
            at = np.flatnonzero(which)
            scores[at] = self._score(index, [captions[i] for i in at], [references[i] for i in at])
        return scores

    def _score(
        self,
        index: ReferenceIndex,
        captions: Sequence[Caption],
        references: Sequence[Sequence[Caption]],
    ) -> Scores:
        images = index.images(references)
        tokens = encode(captions, index.word_ids)
        return self._compute(self.df, index, tokens, images, self._plain)


class Cider(CiderD):
    """CIDEr as first defined: the cosine, without clipping and without length penalty, times 10.

    It is not what papers call CIDEr: those report CIDEr-D."""

    _plain = True


@cache
def _components() -> Components:
    """The compiled kernel where numba is installed, else numpy; they agree to rounding."""
    if find_spec("numba") is None:
        return cider_numpy.components
    from rayrl.rewards import cider_numba

    return cider_numba.components
