"""Terms that need a program or a model of their own: METEOR, SPICE, CLIPScore."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from rayrl.rewards.meteor import Meteor
from rayrl.rewards.spice import Spice
from rayrl.rewards.term import Failure, Item, Scores, split_scores


class MeteorTerm:
    """METEOR in one long-lived Java process, which is started again once when it fails."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    @cached_property
    def _meteor(self) -> Meteor:
        return Meteor(self._timeout_s)

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        captions, references = _flat(items)
        reason = ""
        for _ in range(2):
            try:
                return split_scores(self._meteor.score(captions, references)[1], items)
            except (TimeoutError, ChildProcessError) as error:
                reason = str(error)
                self._meteor.close()
                del self._meteor
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
