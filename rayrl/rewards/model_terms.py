"""Terms that need a program or a model of their own: METEOR, SPICE, CLIPScore."""

from __future__ import annotations

from collections.abc import Sequence

from rayrl.rewards.meteor import Meteor
from rayrl.rewards.spice import Spice
from rayrl.rewards.term import Failure, Item, Scores, split_scores


class MeteorTerm:
    """METEOR in one long-lived Java process; when it fails, another one tries once more."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # It loads for many seconds, in which the first batch can be sampled.
        self._meteor = Meteor(timeout_s)

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        captions, references = _flat(items)
        reason = ""
        for _ in range(2):
            try:
                return split_scores(self._meteor.score(captions, references)[1], items)
            except (TimeoutError, ChildProcessError) as error:
                reason = str(error)
                self._meteor.close()
                self._meteor = Meteor(self._timeout_s)
        return [Failure(reason)] * len(items)


class SpiceTerm:
    """SPICE, one Java process a batch: slow, for small batches or evaluation."""

    def __init__(self, timeout_s: float) -> None:
        self._spice = Spice(timeout_s)

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        try:
            return split_scores(self._spice.score(*_flat(items))[1], items)
        except (TimeoutError, ChildProcessError) as error:
            return [Failure(str(error))] * len(items)


class ClipScoreTerm:
    """CLIPScore, or RefCLIPScore, of raw captions."""

    def __init__(self, folder: str, device: str, references: bool) -> None:
        from rayrl.rewards.clipscore import ClipScore

        self._clip = ClipScore(folder, device)
        self._references = references

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        captions = [caption for item in items for caption in item.captions]
        images = [item.prompt.image for item in items for _ in item.captions]
        references = [item.prompt.references for item in items for _ in item.captions]
        some = references if self._references else None
        return split_scores(self._clip.score(images, captions, some), items)


def _flat(items: Sequence[Item]) -> tuple[list[str], list[list[str]]]:
    captions = [caption for item in items for caption in item.tokens]
    return captions, [item.references for item in items for _ in item.captions]
