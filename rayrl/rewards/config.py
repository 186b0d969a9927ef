"""Configuration of the rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayrl.section import Section


class TermConfig(Section):
    """One reward term."""

    weight: float = 1.0
    """Its factor in the sum."""


class RewardConfig(Section):
    """What a caption is rewarded for: a weighted sum of terms."""

    terms: dict[str, TermConfig] = Field(default_factory=lambda: {"cider_d": TermConfig()})
    """The terms by name."""
    eos: bool = True
    """Whether CIDEr-D counts the end of the caption as a word, so that stopping in the middle of
    a sentence costs something."""
    df: Literal["train", "corpus", "batch", "captions"] = "train"
    """Where the document frequencies come from: the training references, another corpus, the
    images of the batch, or the training references with every caption a document of its own."""
