"""An objective: from scored groups to a loss and its gradient, and to decisions about the step.

state, prepared = objective.prepare(state, batch)         once a step, over the whole batch
minibatch = prepared.select(indices)
normalizer = minibatch.normalizer()
for rows in micro_batches:                                losses add up to the minibatch's
    out = objective.loss(prepared.select(rows), policy_logprobs, normalizer)
    out.loss.backward()
state, decisions = objective.control(state, metrics)      after every optimizer step
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rayrl.objectives import diagnostics
from rayrl.objectives.batch import GRAPH_FIELDS, GroupBatch
from rayrl.objectives.compile import POLICY_LOSS, Compiled, compile_plan, missing
from rayrl.objectives.inject import BoundPart
from rayrl.objectives.loss import LossTerms
from rayrl.objectives.plan import Plan
from rayrl.objectives.prepare import Preparation
from rayrl.objectives.reduce import Normalizer
from rayrl.objectives.results import decisions_of, with_state
from rayrl.objectives.stats import center, masked_mean

State = Mapping[str, Any]


@dataclass(frozen=True)
class LossOutput:
    """The loss, a scalar, and metrics as (sum, weight): add both up over micro-batches, then
    divide."""

    loss: Tensor
    metrics: diagnostics.Metrics

    def detach(self) -> LossOutput:
        """The same numbers without what a backward pass needs."""
        return LossOutput(self.loss.detach(), self.metrics)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch with what the objective made of its rewards, one entry a prompt.

    fields: advantages [P,N,G,T or 1], caption_weights [P,G], token_weights [P,G,T], active [P],
        rewards and, where a part reads them, labels, segments, pair_weights
    coefficients: parameters that controllers have changed
    phase: which objective of a schedule this is for
    """

    batch: GroupBatch
    fields: Mapping[str, Tensor]
    coefficients: Mapping[str, float] = field(default_factory=dict)
    phase: int = 0

    def select(self, prompt_indices: Sequence[int]) -> Prepared:
        """The groups of these prompts, for a minibatch or a micro-batch."""
        rows = list(prompt_indices)
        return replace(
            self,
            batch=self.batch.select(rows),
            fields={name: value[rows] for name, value in self.fields.items()},
        )

    def weightless(self) -> Prepared:
        """The same captions counting for nothing: loss 0, and nothing in any sum."""
        nothing = ("caption_weights", "token_weights", "active", "pair_weights")
        batch = replace(
            self.batch,
            valid=torch.zeros_like(self.batch.valid),
            mask=torch.zeros_like(self.batch.mask),
        )
        zeros = {n: torch.zeros_like(self.fields[n]) for n in nothing if n in self.fields}
        return replace(self, batch=batch, fields={**self.fields, **zeros})

    def normalizer(self) -> Normalizer:
        """The denominators of this minibatch."""
        keep, active = self.fields["caption_weights"], self.fields["active"]
        tokens = (self.fields["token_weights"].sum(-1) * keep).sum()
        # Read at once: each time a GPU must have done all that it was given before.
        return Normalizer(*torch.stack([tokens, keep.sum(), active.to(keep).sum()]).tolist())

    def caption_advantages(self) -> Tensor:
        """One number a caption [P,G] that says, for people, where the objective pushes it: its
        advantage, averaged over its tokens; without advantages its pairs, better minus worse; and
        without those its reward over the group's mean."""
        if "advantages" in self.fields:
            mask = self.batch.mask
            per_token = self.fields["advantages"].sum(1).expand_as(mask)
            return masked_mean(per_token, mask)
        if "pair_weights" in self.fields:
            weights = self.fields["pair_weights"]
            return weights.sum(2) - weights.sum(1)
        return center(self.batch.rewards, self.batch.valid)

    def with_old_logprobs(self, old_logprobs: Tensor) -> Prepared:
        """The same with other log-probs [P,G,T] for the start of the step."""
        return replace(self, batch=self.batch.with_old_logprobs(old_logprobs.detach()))


class Objective:
    """A plan whose parts are found, checked and ready to be called.

    Raises ValueError where a part or a parameter does not exist, a part reads what no slot
    provides, or a slot is filled that nothing reads.
    """

    def __init__(self, name: str, plan: Plan) -> None:
        self.name = name
        self.plan = plan
        self._compiled: Compiled = compile_plan(name, plan)

    def phases(self) -> tuple[Objective, ...]:
        """The objectives that take turns; this one alone."""
        return (self,)

    def planners(self, step: int) -> tuple[BoundPart, ...]:
        """What the driver asks, while it samples step ``step`` (from 0), for further rounds: see
        :mod:`rayrl.rounds`."""
        return self._compiled.slots["rollout"]

    @property
    def needs(self) -> frozenset[str]:
        """What the trainer must provide beyond tokens, log-probs and rewards: names of
        ``OPTIONAL_FIELDS`` and ``GRAPH_FIELDS``, and of ``SERVICES``."""
        return self._compiled.needs

    def prepare_reads(self, step: int) -> frozenset[str]:
        """Names of all that :meth:`prepare` looks at in step ``step`` (from 0), beyond rewards."""
        return self._compiled.read_before_loss

    def check(self, provides: Collection[str]) -> None:
        """Raise ValueError, in words, where ``provides`` lacks something that this needs."""
        lacking = self.needs - set(provides)
        if lacking:
            raise ValueError(missing(self.name, self._compiled, lacking))

    def initial_state(self) -> dict[str, Any]:
        """What is carried from step to step: JSON values, to be checkpointed."""
        return {"step": 0}

    def prepare(self, state: State, batch: GroupBatch) -> tuple[dict[str, Any], Prepared]:
        """Rewards, advantages and weights of a whole step [P,G,T]: called once, before the step
        is cut into minibatches, so that statistics over the batch are exact."""
        self._check_batch(batch)
        run = Preparation(self._compiled, dict(state), batch)
        with torch.no_grad():
            fields = run.fields(self.plan.statistics_of)
        run.state["step"] = int(state["step"]) + 1
        return run.state, Prepared(batch, fields, dict(state.get("coefficients", {})))

    def loss(
        self,
        prepared: Prepared,
        policy_logprobs: Tensor,
        normalizer: Normalizer,
        *,
        total: Callable[[Tensor], Tensor] | None = None,
        **graph: Tensor | None,
    ) -> LossOutput:
        """The loss of a micro-batch, a share of the minibatch that ``normalizer`` describes.

        policy_logprobs: [P,G,T], with gradient
        total: sums a tensor over the ranks of the minibatch, for objectives that need a
            ``whole_minibatch``; the identity on one rank
        graph: the tensors of ``GRAPH_FIELDS`` that the objective needs (others may be None)
        """
        absent = [n for n in sorted(self.needs & GRAPH_FIELDS.keys()) if graph.get(n) is None]
        if absent:
            raise ValueError(f"{self.name}: the loss needs {', '.join(absent)}")
        given = {
            **vars(prepared.batch),
            **prepared.fields,
            **{name: value for name, value in graph.items() if value is not None},
            # Dropped captions train nothing, so they are in no loss of a group either.
            "valid": prepared.fields["caption_weights"] > 0,
            "exists": prepared.batch.valid,
            "raw_rewards": prepared.batch.rewards,
            "policy_logprobs": policy_logprobs,
            "normalizer": normalizer,
            "total": total or (lambda x: x),
        }
        terms = LossTerms(self._compiled, given, prepared.coefficients)
        parts = {POLICY_LOSS: terms.policy(), **terms.regularizers()}
        loss = torch.stack(list(parts.values())).sum()
        metrics = diagnostics.of_loss(terms.values)
        share = self._share(prepared, normalizer)
        for name, value in parts.items():
            metrics[f"objective/loss_{name}"] = (value.detach(), share)
        return LossOutput(loss, metrics)

    @staticmethod
    def _share(prepared: Prepared, normalizer: Normalizer) -> float:
        """How much of the minibatch this is: the weight of terms that add up to the loss."""
        mine = prepared.normalizer()
        return mine.tokens / normalizer.tokens if normalizer.tokens else 0.0

    def control(
        self, state: State, metrics: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Decisions after an optimizer step, from its metrics: ``stop_epoch`` (no further minibatch
        in this step), ``scale_lr``, ``extrapolate`` (weights).

        Raises ValueError, naming the controller, on a decision or a coefficient that there is not.
        """
        new = dict(state)
        decisions: dict[str, Any] = {}
        changed = dict(new.get("coefficients", {}))
        for controller in self._compiled.slots["control"]:
            current = {**self.plan.parameters(), **self._compiled.parameters, **changed}
            given = {"metrics": metrics, "parameters": current, "extrapolate": True}
            if controller.stateful:
                given["state"] = new.get(controller.memory, {})
            decided: Any = controller(given)
            if controller.stateful:
                decided, new[controller.memory] = with_state(controller, decided)
            decided = decisions_of(controller, decided, self._compiled.coefficients)
            # Several may each change one of their own.
            changed.update(decided.pop("coefficients", {}))
            decisions.update(decided)
        if changed:
            new["coefficients"] = changed
        return new, decisions

    def _check_batch(self, batch: GroupBatch) -> None:
        for name in sorted(self.needs):
            if name not in GRAPH_FIELDS and getattr(batch, name, ...) is None:
                raise ValueError(missing(self.name, self._compiled, {name}))
        empty = batch.valid & ~batch.mask.any(-1)
        if bool(empty.any()):
            which = batch.image_ids[int(empty.any(-1).nonzero()[0, 0])]
            raise ValueError(f"image {which}: a valid caption without tokens")
        if not bool(torch.isfinite(batch.rewards[batch.valid]).all()):
            bad = ~torch.isfinite(batch.rewards) & batch.valid
            row = int(bad.any(-1).nonzero()[0, 0])
            raise ValueError(
                f"image {batch.image_ids[row]}: rewards {batch.rewards[row].tolist()}, "
                "want finite ones"
            )
