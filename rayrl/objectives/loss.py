"""The part of an objective that carries a gradient: the losses of a micro-batch, reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rayrl.objectives.compile import Compiled
from rayrl.objectives.inject import BoundPart, Values
from rayrl.objectives.results import checked
from rayrl.objectives.stats import safe_exp


class LossTerms:
    """Calls the parts of the loss on one micro-batch.

    given: everything that parts may read, by name; advantages as [P,N,G,T or 1]
    coefficients: parameters that controllers have changed
    """

    def __init__(
        self, compiled: Compiled, given: Mapping[str, Any], coefficients: Mapping[str, float]
    ) -> None:
        self._compiled = compiled
        self._coefficients = coefficients
        self._given = given
        channels = given["advantages"].unbind(1) if "advantages" in given else (None,)
        self._channels = [self._values(advantages) for advantages in channels]
        self.values = self._channels[0]

    def policy(self) -> Tensor:
        """The policy's loss, a scalar: the sum over the channels of the advantages."""
        (surrogate,) = self._compiled.slots["surrogate"]
        total = self.values["policy_logprobs"].new_zeros(())
        for values in self._channels:
            losses = self._call(surrogate, values)
            for part in (*self._compiled.slots["weights"], *self._compiled.slots["mismatch"]):
                if losses.ndim != 3:
                    raise ValueError(
                        f"{part.slot} {part.name} weighs tokens, but the loss {surrogate.name} is "
                        f"one of captions or groups, {tuple(losses.shape)}; empty the slot"
                    )
                losses = losses * self._call(part, values)
            total = total + self._reduced(losses)
        return total

    def regularizers(self) -> dict[str, Tensor]:
        """By name, scalars to add."""
        return {
            part.name: self._reduced(self._call(part, self.values))
            for part in self._compiled.slots["regularizers"]
        }

    def _values(self, advantages: Tensor | None) -> Values:
        return Values(
            {**self._given, **({} if advantages is None else {"advantages": advantages})},
            {
                "caption_advantages": _caption_advantages,
                "lengths": _lengths,
                "log_ratio": lambda v: torch.where(v["mask"], self._fill("ratio", v), 0.0),
                "ratio": lambda v: safe_exp(v["log_ratio"]),
                "bounds": lambda v: self._fill("bounds", v),
                "low": lambda v: v["bounds"][0],
                "high": lambda v: v["bounds"][1],
                "scores": lambda v: self._fill("score", v),
                "margins": lambda v: self._fill("margin", v),
                "pair_losses": lambda v: self._fill("link", v),
            },
        )

    def _fill(self, slot: str, values: Mapping[str, Any]) -> Any:
        (part,) = self._compiled.slots[slot]
        return self._call(part, values)

    def _call(self, part: BoundPart, values: Mapping[str, Any]) -> Any:
        changed = {k: v for k, v in self._coefficients.items() if k in part.params}
        result = (part.with_params(**changed) if changed else part)(values)
        return checked(part, result, self._given["mask"])

    def _reduced(self, losses: Tensor) -> Tensor:
        """A scalar, by what the losses are of: tokens, captions, groups, or one already."""
        values = self.values
        by_rank: dict[int, Callable[[], Tensor]] = {
            3: lambda: self._call(
                self._compiled.slots["reducer"][0],
                Values({**self._given, "losses": losses}, {"lengths": _lengths}),
            ),
            2: lambda: _mean(losses, values["caption_weights"], values["normalizer"].captions),
            1: lambda: _mean(losses, values["active"], values["normalizer"].groups),
            0: lambda: losses,
        }
        return by_rank[losses.ndim]()


def _lengths(values: Mapping[str, Any]) -> Tensor:
    return values["mask"].sum(-1)  # type: ignore[no-any-return]


def _caption_advantages(values: Mapping[str, Any]) -> Tensor:
    """[P,G]; ValueError for credit to single tokens, which a loss of captions cannot use."""
    advantages = values["advantages"]
    if advantages.shape[-1] != 1:
        raise ValueError(
            f"advantages of single tokens, {tuple(advantages.shape)}, in front of a loss of whole "
            "captions, which wants one a caption; choose another advantage or another loss"
        )
    return advantages[..., 0]


def _mean(losses: Tensor, weights: Tensor, count: float) -> Tensor:
    """Weighted mean over a minibatch that has ``count`` of them; 0 where it has none."""
    total = torch.where(weights > 0, losses * weights, 0.0).sum()
    return total / count if count > 0 else total * 0.0
