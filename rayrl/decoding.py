"""How an evaluation decodes captions, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """The caption of an image: the arg-max tokens (``beams`` 1) or the best of ``beams``, at most
    ``max_tokens`` long; and how many ``samples`` at ``temperature`` show its diversity."""

    beams: int
    max_tokens: int
    samples: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Captions:
    """The caption of each image, in the order of the data set, and its K samples."""

    best: list[str]
    samples: list[list[str]]
