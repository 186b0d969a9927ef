"""CIDEr-D as a reward term."""

from __future__ import annotations

from collections.abc import Sequence

from rayrl.rewards.cider import CiderD, DocumentFrequency, ReferenceIndex
from rayrl.rewards.statistics import batch_document_frequency
from rayrl.rewards.term import Failure, Item, Scores, split_scores


class CiderTerm:
    """CIDEr-D against frozen document frequencies."""

    def __init__(self, df: DocumentFrequency, index: ReferenceIndex | None = None) -> None:
        self._cider = CiderD(df, index)

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        return _score(self._cider, items)


class BatchCiderTerm:
    """CIDEr-D against the document frequencies of the images of a step: those that the items
    bring, or without any those of the items.

    The reward of a caption then depends on what else is in the batch: on Flickr8k with batches of
    32 the best caption of a group is another one in a tenth of the groups.  It is how the paper of
    GRPO for captioning (arXiv:2503.01333) and several codes do it, for comparison with them.
    """

    def __init__(self, eos: bool) -> None:
        self._eos = eos

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        """ValueError for a step of fewer than two images, whose scores would all be 0."""
        if not items:
            return []
        df = items[0].step_df
        if df is None:
            references = {item.prompt.prompt_id: item.prompt.references for item in items}
            df = batch_document_frequency(references, eos=self._eos)
        return _score(CiderD(df), items)


def _score(cider: CiderD, items: Sequence[Item]) -> list[Scores | Failure]:
    captions = [caption for item in items for caption in item.tokens]
    references = [some for item in items for some in [item.references] * len(item.captions)]
    finished = [ended for item in items for ended in item.finished]
    return split_scores(cider.score(captions, references, finished), items)
