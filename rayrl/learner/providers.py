"""What an objective needs beyond rewards and the policy's own log-probs, and who computes it.

A provider looks at some of a step's groups (a :class:`MicroBatch`) and returns tensors by the
names of ``OPTIONAL_FIELDS`` (before the first update of a step, without gradient) or of
``GRAPH_FIELDS`` (in every update, with gradient).  A learner has those that its objective needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.learner.forward import Forward
from rayrl.learner.inputs import StepInputs
from rayrl.learner.logprobs import LogprobOutput
from rayrl.learner.parallel import SOLO, Ranks, whole_head
from rayrl.objectives.batch import GroupBatch


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Groups that go through the model at once.

    groups: P of the step's groups; rows: which ones; inputs: those of all prompts of the step
    """

    groups: GroupBatch
    rows: Sequence[int]
    inputs: StepInputs
    forward: Forward
    model: Any
    with_entropy: bool = False
    with_states: bool = False

    @cached_property
    def prompts(self) -> Any:
        """The processor's output for the P prompts."""
        return self.inputs.select(self.rows)

    @cached_property
    def policy(self) -> LogprobOutput:
        """The policy's pass, made when first asked for."""
        return self.forward(
            self.model,
            self.groups,
            self.prompts,
            with_entropy=self.with_entropy,
            with_states=self.with_states,
        )


class Provider:
    """Brings some of an objective's needs; ``reads_states`` is whether it reads hidden states."""

    reads_states = False

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        """Fields of the batch, first axis P, as they are before the step's first update."""
        return {}

    def in_update(self, part: MicroBatch) -> dict[str, Tensor]:
        """Tensors for the loss, with gradient."""
        return {}

    def before_update(self) -> None:
        """Forget gradients."""

    def after_update(self) -> dict[str, float]:
        """Train what the provider has of its own; returns metrics."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps; names start with one that no other provider uses."""
        return {}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`arrays`; ValueError where they do not fit."""


class OldLogprobs(Provider):
    """The policy's log-probs at the start of the step."""

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        return {"old_logprobs": part.policy.logprobs}


class OtherModels(Provider):
    """Log-probs of the captions under models that do not train: [P,G,T,K] for K of them, or
    [P,G,T] for the only one where there can be no more."""

    def __init__(self, name: str, models: Sequence[Any], forward: Forward, *, single: bool) -> None:
        self._name = name
        self._models = [(model, forward.for_another(model)) for model in models]
        self._single = single

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        each = [
            forward(model, part.groups, part.prompts).logprobs for model, forward in self._models
        ]
        return {self._name: each[0] if self._single else torch.stack(each, -1)}


class Collisions(Provider):
    """The probability that two draws of a token agree, for variance-minimising baselines."""

    reads_states = True

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        states = part.policy.states
        assert states is not None
        return {"collision": replace(states, head=whole_head(states.head)).collisions()}


class Providers:
    """Several providers as one."""

    def __init__(self, members: Iterable[Provider], ranks: Ranks = SOLO) -> None:
        self._members = tuple(members)
        self._ranks = ranks

    @property
    def reads_states(self) -> bool:
        return any(member.reads_states for member in self._members)

    @torch.no_grad()
    def at_start(self, images: int, parts: Iterable[tuple[MicroBatch, bool]]) -> dict[str, Any]:
        """Fields of the whole batch of ``images``, from this rank's parts of it, each with whether
        it counts; ranks share the work."""
        whole: dict[str, Tensor] = {}
        for part, counts in parts if self._members else ():
            for name, mine in _merged(m.at_start(part) for m in self._members).items():
                if name not in whole:
                    whole[name] = mine.new_zeros(images, *mine.shape[1:])
                if counts:
                    whole[name][list(part.rows)] = mine
        return {name: self._ranks.total(value) for name, value in whole.items()}

    def in_update(self, part: MicroBatch) -> dict[str, Any]:
        """Tensors for the loss of these groups, with gradient."""
        return _merged(member.in_update(part) for member in self._members)

    def before_update(self) -> None:
        for member in self._members:
            member.before_update()

    def after_update(self) -> dict[str, float]:
        return {k: v for member in self._members for k, v in member.after_update().items()}

    def arrays(self) -> dict[str, np.ndarray]:
        return {k: v for member in self._members for k, v in member.arrays().items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for member in self._members:
            member.restore(arrays)


def _merged(fields: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for some in fields for name, value in some.items()}
