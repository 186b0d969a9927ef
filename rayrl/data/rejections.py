"""What a source holds and a data set cannot use: counted by reason, never silently dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

NAMED = 3
"""So many items of a reason are named where they are counted."""


class Rejection(NamedTuple):
    """An image, or one caption of it, that was left out."""

    item: str
    reason: str
    detail: str


class BadImage(ValueError):
    """An image that cannot be used; ``reason`` is one of a few, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


class Rejections:
    """The rejections of one split, in the order in which they were found.  Empty captions are
    rejected, unless they are kept as other programs keep them that count references."""

    def __init__(self, *, keep_empty_captions: bool = False) -> None:
        self.keep_empty_captions = keep_empty_captions
        self._found: list[Rejection] = []

    def __iter__(self) -> Iterator[Rejection]:
        return iter(self._found)

    def add(self, item: str, reason: str, detail: str = "") -> None:
        self._found.append(Rejection(item, reason, detail))

    def counts(self) -> dict[str, int]:
        """How many, by reason."""
        return dict(Counter(rejection.reason for rejection in self._found))

    def names(self) -> dict[str, list[str]]:
        """The first few items of each reason, each once, and "…" where there are more."""
        found: dict[str, dict[str, None]] = {}
        for rejection in self._found:
            found.setdefault(rejection.reason, {})[rejection.item] = None
        return {
            reason: [*list(items)[:NAMED], *["…"][: len(items) > NAMED]]
            for reason, items in found.items()
        }

    def nothing_left(self, source: str) -> ValueError:
        """The error for a source of which nothing could be used; it names an item of the most
        frequent reason."""
        counts = self.counts()
        if not counts:
            return ValueError(f"{source}: no usable image")
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        most = max(counts, key=lambda reason: counts[reason])
        example = next(rejection for rejection in self._found if rejection.reason == most)
        detail = f" ({example.detail})" if example.detail else ""
        return ValueError(f"{source}: no usable image: {listed}; such as {example.item}{detail}")


def clean_captions(item: str, captions: list[str], rejections: Rejections) -> tuple[str, ...]:
    """Captions on one line each; empty ones are rejected unless ``rejections`` keeps them, and an
    image that has none left too."""
    cleaned = tuple(" ".join(whole_characters(caption).split()) for caption in captions)
    kept = tuple(caption for caption in cleaned if caption or rejections.keep_empty_captions)
    for _ in range(len(cleaned) - len(kept)):
        rejections.add(item, "empty caption")
    if not kept:
        rejections.add(item, "image without captions")
    return kept


def whole_characters(caption: str) -> str:
    """A caption without lone surrogates, the halves of a cut emoji, which no file can hold."""
    return caption.encode(errors="ignore").decode()
