"""The part of an objective that needs no gradient: weights, rewards, advantages, pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayrl.objectives import stats
from rayrl.objectives.batch import GroupBatch, listed
from rayrl.objectives.compile import Compiled
from rayrl.objectives.inject import BoundPart
from rayrl.objectives.results import checked, with_state

OWN_STATE = ("step", "coefficients")
"""Names in an objective's state that are no part's."""


class NotFiniteError(ValueError):
    """Advantages that nothing can be learned from, of fields that were finite: an overflow."""


class Preparation:
    """One step's run through the slots select to pairs; ``state`` is the new state afterwards."""

    def __init__(self, compiled: Compiled, state: dict[str, Any], batch: GroupBatch) -> None:
        self.state = state
        self._slots = compiled.slots
        self._batch = batch
        rewards, terms = _of_valid(batch)
        self._values: dict[str, Any] = {
            **vars(batch),
            "rewards": rewards,
            "raw_rewards": rewards,
            "terms": terms,
            "lengths": batch.mask.sum(-1),
            "step": state["step"],
            # A function of the step alone, so that a resumed run draws the same captions.
            "generator": torch.Generator().manual_seed(1_000_003 * (int(state["step"]) + 1)),
        }

    def fields(self, statistics_of: str) -> dict[str, Tensor]:
        """By name, tensors whose first axis is P; see :class:`Prepared`."""
        keep = self._keep()
        seen = {"all": self._batch.valid, "kept": keep > 0}[statistics_of]
        self._values.update(valid=seen, caption_weights=keep)
        fields = {"caption_weights": keep, "rewards": self._values["rewards"]}
        for slot, name in (
            ("labels", "labels"),
            ("segments", "segments"),
            ("aggregate", "rewards"),
        ):
            for part in self._slots[slot]:
                fields[name] = self._set(name, part)
        if self._slots["advantage"]:
            for part in self._slots["advantage"]:
                self._set("advantages", part)
            fields["advantages"] = self._laid_out(self._values["advantages"])
        self._values["valid"] = keep > 0
        fields["active"] = (keep > 0).any(1).to(keep.dtype)
        for part in self._slots["pairs"]:
            weights = self._set("pair_weights", part)
            fields["pair_weights"] = weights
            fields["active"] = (weights.flatten(1) != 0).any(1).to(keep.dtype)
        fields["token_weights"] = self._token_weights()
        if self._batch.values is not None:
            fields["mean_return"] = self._mean_return()
        return fields

    def _mean_return(self) -> Tensor:
        """The mean return of the step's tokens, the same for every image [P]."""
        mask = self._batch.mask
        returns = stats.undiscounted_returns(self._values["rewards"]).expand_as(mask)
        mean = stats.masked_sum(returns, mask).sum() / mask.sum().clamp(min=1)
        return mean.expand(len(mask))

    def _keep(self) -> Tensor:
        keep = self._batch.valid.to(self._batch.rewards.dtype)
        for part in self._slots["select"]:
            self._values["caption_weights"] = keep
            keep = keep * self._call(part)
        return keep

    def _token_weights(self) -> Tensor:
        weights = self._batch.mask.to(self._batch.rewards.dtype)
        for part in self._slots["mask"]:
            weights = weights * self._call(part)
        return weights

    def _set(self, name: str, part: BoundPart) -> Tensor:
        self._values[name] = self._call(part)
        return self._values[name]

    def _call(self, part: BoundPart) -> Tensor:
        if not part.stateful:
            return checked(part, part(self._values), self._batch.mask)
        returned = part({**self._values, "state": self._memory(part)})
        result, self.state[part.memory] = with_state(part, returned)
        return checked(part, result, self._batch.mask)

    def _memory(self, part: BoundPart) -> Mapping[str, Any]:
        """What the part remembers; checkpoints used to have it under the part's name alone."""
        before = self.state.pop(part.name, {}) if part.name not in OWN_STATE else {}
        return self.state.get(part.memory, before)  # type: ignore[no-any-return]

    def _laid_out(self, advantages: Tensor) -> Tensor:
        """[P,N,G,T or 1] from [P,G], [P,G,T] or [N,P,G,T or 1]; NotFiniteError, naming the prompts,
        on a NaN."""
        if advantages.ndim == 2:
            laid = advantages[:, None, :, None]
        elif advantages.ndim == 3:
            laid = advantages[:, None]
        else:
            laid = advantages.transpose(0, 1)
        bad = ~torch.isfinite(laid).flatten(1).all(1)
        if bool(bad.any()):
            prompts = listed([self._batch.image_ids[i] for i in bad.nonzero()[:, 0].tolist()])
            raise NotFiniteError(
                f"advantages of step {self.state['step']} are not finite for {prompts}"
            )
        return laid


def _of_valid(batch: GroupBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards and terms with 0 for captions that do not exist, whose rewards may be anything."""
    zeroed = {name: torch.where(batch.valid, term, 0.0) for name, term in batch.terms.items()}
    return torch.where(batch.valid, batch.rewards, 0.0), zeroed
