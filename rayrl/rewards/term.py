"""What a reward term is: it scores the captions of images, whole groups at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rayrl.rewards import ptb
from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.types import Prompt

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Item:
    """The captions of one image: raw text, and whether each ended by itself rather than at the
    length limit; under ``df: batch`` the document frequencies of the step."""

    prompt: Prompt
    captions: tuple[str, ...]
    finished: tuple[bool, ...]
    step_df: DocumentFrequency | None = None

    @cached_property
    def tokens(self) -> list[str]:
        """The captions tokenized, words joined by spaces."""
        return [" ".join(ptb.tokenize(caption)) for caption in self.captions]

    @property
    def references(self) -> list[str]:
        """The references tokenized, words joined by spaces."""
        return tokenized_references(self.prompt.references)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no scores."""

    reason: str


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores [G] of an image's captions with what else a judge has to say.

    versions: for each caption, which version of the judge it was
    wrong_spans: for each caption the (start, end) characters of its text that are wrong
    """

    scores: Scores
    versions: tuple[int, ...] | None = None
    wrong_spans: tuple[tuple[tuple[int, int], ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("versions", "wrong_spans"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.scores):
                raise ValueError(f"{name} of {len(value)} captions, want {len(self.scores)}")
        for g, caption in enumerate(self.wrong_spans or ()):
            for start, end in caption:
                if not 0 <= start < end:
                    raise ValueError(f"caption {g}: wrong span {start, end}, want 0 <= start < end")


class Term(Protocol):
    """Scores items; a failure is a value, so that one item's does not take the others with it."""

    def score(self, items: Sequence[Item]) -> Sequence[Scores | Judged | Failure]:
        """For each item the scores of its captions, float64, or why there are none."""
        ...


def scores_of(answer: Scores | Judged | Failure) -> Scores | Failure:
    """The scores alone."""
    return answer.scores if isinstance(answer, Judged) else answer


class CaptionTerm:
    """A term from a function of tokenized captions [N] and each one's references."""

    def __init__(self, function: Callable[[list[str], list[list[str]]], Scores]) -> None:
        self._function = function

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        captions = [caption for item in items for caption in item.tokens]
        references = [some for item in items for some in [item.references] * len(item.captions)]
        return split_scores(self._function(captions, references), items)


def split_scores(scores: Scores, items: Sequence[Item]) -> list[Scores | Failure]:
    """Scores of all captions, end to end, as one array an item."""
    ends = np.cumsum([len(item.captions) for item in items])
    return list(np.split(scores, ends[:-1])) if len(items) else []


@lru_cache(maxsize=1 << 16)
def tokenized_references(references: tuple[str, ...]) -> list[str]:
    """References tokenized, words joined by spaces; kept, since every epoch asks again."""
    return [" ".join(ptb.tokenize(text)) for text in references]
