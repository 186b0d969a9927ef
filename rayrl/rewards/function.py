"""A user's function as a reward term."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayrl.own_modules import imported
from rayrl.rewards.config import EnsembleConfig, FunctionConfig
from rayrl.rewards.deadline import UNLIMITED, Deadline
from rayrl.rewards.placed import TermConfig
from rayrl.rewards.term import Failure, Item, Judged, Scores
from rayrl.types import Prompt

RewardFunction = Callable[[list[str], Prompt], Sequence[float] | Judged]
"""Raw captions of one image [G] and its prompt (image bytes, text, references) to scores [G], or
to scores with the judge's version and wrong spans of each caption."""

_MISTAKES = (
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
    ImportError,
    SyntaxError,
)
"""What a function raises that is wrong itself: it would for every group, and ends the run."""


class FunctionTerm:
    """Scores with ``package.module:function``, an image at a time; a group for which it raises is
    tried again ``retries`` times and then dropped, as is one that is not begun at ``deadline``."""

    def __init__(self, path: str, retries: int, deadline: Deadline = UNLIMITED) -> None:
        self._path = path
        self._function = load_function(path)
        self._retries = retries
        self._deadline = deadline

    def score(self, items: Sequence[Item]) -> list[Scores | Judged | Failure]:
        return [self._score(item) for item in items]

    def _score(self, item: Item) -> Scores | Judged | Failure:
        reason = f"{self._path} had no time left of {self._deadline.limit_s:g} s for the batch"
        for _ in range(self._retries + 1):
            if not self._deadline.left:
                break
            try:
                values = self._function(list(item.captions), item.prompt)
            except _MISTAKES:
                raise
            # It is the user's code, and calls code of others: what clients of servers raise for a
            # timeout or a busy server often derives from Exception itself.
            except Exception as error:
                reason = f"{self._path} raised {type(error).__name__}: {error}"
            else:
                return self._checked(values, len(item.captions))
        return Failure(reason)

    def _checked(self, values: Any, num_captions: int) -> Scores | Judged | Failure:
        """What the function returned, as scores, or why it is none."""
        judged = values if isinstance(values, Judged) else None
        try:
            scores = np.asarray(judged.scores if judged else values, dtype=np.float64)
        # Of a tensor that is not one of numpy's.
        except (ValueError, TypeError, RuntimeError) as error:
            kind = type(values).__name__
            return Failure(f"{self._path} gave {kind} that is no row of numbers: {error}")
        if scores.shape != (num_captions,):
            return Failure(
                f"{self._path} gave scores of shape {scores.shape} for {num_captions} captions"
            )
        return replace(judged, scores=scores) if judged else scores


def check_functions(terms: Mapping[str, TermConfig]) -> None:
    """Load every function among the terms, members of ensembles too.

    Raises ValueError, naming the term, as :func:`load_function` does."""
    for name, term in terms.items():
        if isinstance(term, EnsembleConfig):
            check_functions(term.members)
        elif isinstance(term, FunctionConfig):
            try:
                load_function(term.path)
            except ValueError as error:
                raise ValueError(f"reward term {name}: {error}") from error


def load_function(path: str) -> RewardFunction:
    """The function at ``package.module:function``; ValueError says which part is wrong, or that it
    does not take captions and a prompt."""
    function = imported(path)
    try:
        signature = inspect.signature(function)
    except ValueError:  # one in C need not say what it takes
        return function
    try:
        signature.bind((), None)
    except TypeError as error:
        raise ValueError(f"function {path!r}, called with (captions, prompt): {error}") from error
    return function
