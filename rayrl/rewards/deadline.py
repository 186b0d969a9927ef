"""By when reward terms are to answer: what is late is dropped, and what is there by then is kept.

A term that has an actor of its own gets two attempts within ``train.reward_timeout_s``, each with
its deadline, after which the actor is ended with all that it holds.  So a call of the term ends
before that by itself.
"""

from __future__ import annotations

import time

ATTEMPTS = 2
FIRST_PAUSE_S = 0.5
"""Before a request is sent again; it doubles with each further time."""
_SHARE = 0.8
"""Of a time for what is done in it: the rest is for the way and the start of an actor."""
_FOREVER_S = 1e9


class Deadline:
    """When the call of the terms of a scorer ends that was last begun with ``start``."""

    def __init__(self, limit_s: float = _FOREVER_S) -> None:
        self.limit_s = limit_s
        self.start()

    def start(self) -> None:
        self.due = time.monotonic() + self.limit_s

    @property
    def left(self) -> float:
        """Seconds, not below 0."""
        return max(0.0, self.due - time.monotonic())


UNLIMITED = Deadline()
"""For terms that nobody waits for."""


def near_limit_s(reward_timeout_s: float) -> float:
    """How long all terms in a reward worker together have for a batch."""
    return _SHARE * reward_timeout_s


def attempt_limit_s(reward_timeout_s: float) -> float:
    """How long an actor of a term has to answer, from when it is asked."""
    return _SHARE * reward_timeout_s / ATTEMPTS


def call_limit_s(reward_timeout_s: float) -> float:
    """How long a term in an actor of its own has for a batch."""
    return _SHARE * attempt_limit_s(reward_timeout_s)


def longest_wait_s(timeout_s: float, retries: int) -> float:
    """What a request takes that always times out."""
    return timeout_s * (retries + 1) + FIRST_PAUSE_S * (2**retries - 1)
