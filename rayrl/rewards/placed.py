"""What the configurations of all reward terms have: a weight, and where the term runs."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field, FiniteFloat, field_validator

from rayrl.section import Section


class Asks(NamedTuple):
    """What an actor asks Ray for."""

    cpus: float
    gpus: float


class TermConfig(Section):
    """One reward term."""

    weight: FiniteFloat = 1.0
    """Its factor in the sum; 0 only logs it."""

    @property
    def counts_ngrams(self) -> bool:
        """Whether it scores against document frequencies."""
        return False

    @property
    def asks(self) -> Asks | None:
        """What an actor of its own asks Ray for; None if it runs in the reward worker."""
        return None

    @property
    def longest_wait_s(self) -> float:
        """How long it waits for one answer that never comes, all attempts together."""
        return 0.0


class PlacedConfig(TermConfig):
    """A term that can have an actor of its own."""

    cpus: float = Field(default=0.0, ge=0)
    """CPUs that its own actor asks Ray for; fractions are allowed."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of its own actor: a fraction shares one, above 1 it is a whole number."""

    _whole = field_validator("gpus")(lambda gpus: whole_or_fraction(gpus))

    @property
    def asks(self) -> Asks | None:
        return Asks(self.cpus, self.gpus) if self.cpus or self.gpus else None


def whole_or_fraction(gpus: float) -> float:
    """A number of GPUs as Ray takes it; ValueError for one such as 1.5."""
    if gpus > 1 and gpus % 1:
        raise ValueError(f"{gpus:g} GPUs, want a fraction of one or a whole number")
    return gpus
