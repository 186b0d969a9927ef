"""CIDEr-D as a reward term."""

from __future__ import annotations

from collections.abc import Sequence

from rayrl.rewards.cider import CiderD, DocumentFrequency, ReferenceIndex
from rayrl.rewards.term import Failure, Item, Scores, split_scores


class CiderTerm:
    """CIDEr-D against frozen document frequencies."""

    def __init__(self, df: DocumentFrequency, index: ReferenceIndex | None = None) -> None:
        self._cider = CiderD(df, index)

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        return _score(self._cider, items)


class BatchCiderTerm:
    """CIDEr-D against the document frequencies of the images of a step, which the items bring.

    The reward of a caption then depends on what else is in the batch: on Flickr8k with batches of
    32 the best caption of a group is another one in a tenth of the groups.  It is how the paper of
    GRPO for captioning (arXiv:2503.01333) and several codes do it, for comparison with them.
    """

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        if not items:
            return []
        df = items[0].step_df
        assert df is not None, "df: batch without the frequencies of the step"
        return _score(CiderD(df), items)


def _score(cider: CiderD, items: Sequence[Item]) -> list[Scores | Failure]:
    captions = [caption for item in items for caption in item.tokens]
    references = [some for item in items for some in [item.references] * len(item.captions)]
    finished = [ended for item in items for ended in item.finished]
    return split_scores(cider.score(captions, references, finished), items)
