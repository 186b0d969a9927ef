"""The loss of a step's groups, a micro-batch at a time: what the policy, its reference and the
providers say of them, handed to the objective.

It takes no step: that is the learner's (``learner.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayrl.config import LearnerConfig
from rayrl.learner.batches import rank_micro_batches
from rayrl.learner.inputs import StepInputs
from rayrl.learner.parallel import Ranks
from rayrl.learner.policy import Policy
from rayrl.learner.providers import MicroBatch, Providers
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.objective import LossOutput, Objective, Prepared
from rayrl.objectives.reduce import Normalizer


def updates_per_step(config: LearnerConfig) -> int:
    """Optimizer steps on the groups of a step."""
    return config.inner_epochs * config.minibatches


class Losses:
    """The losses of ``policy``, with what ``providers`` bring; each rank has those of its share."""

    def __init__(
        self, policy: Policy, providers: Providers, config: LearnerConfig, ranks: Ranks
    ) -> None:
        self._policy = policy
        self._providers = providers
        self._config = config
        self._ranks = ranks

    def parts(self, indices: Sequence[int], inputs: StepInputs) -> list[tuple[list[int], bool]]:
        """This rank's micro-batches of some images, each with whether it counts."""
        return rank_micro_batches(indices, inputs.tokens, self._config, self._ranks)

    def with_start_fields(self, groups: GroupBatch, inputs: StepInputs) -> GroupBatch:
        """Add what does not change during the step: log-probs under the reference model, and what
        the providers bring."""
        if self._policy.has_reference:
            groups = replace(groups, ref_logprobs=self._policy.ref_logprobs(groups, inputs))
        images = len(groups.image_ids)
        parts = (
            (self._micro_batch(groups.select(rows), rows, inputs), counts)
            for rows, counts in self.parts(range(images), inputs)
        )
        filled = replace(groups, **self._providers.at_start(images, parts))
        return filled.with_old_logprobs(filled.old_logprobs)

    def __call__(
        self,
        objective: Objective,
        prepared: Prepared,
        images: list[int],
        inputs: StepInputs,
        normalizer: Normalizer,
        *,
        counts: bool = True,
    ) -> LossOutput:
        """The loss of some of a step's images as one micro-batch, with gradient.  One that does
        not count (a rank had no images left) has loss and gradients of 0."""
        micro = prepared.select(images)
        with_entropy = "entropy" in objective.needs
        seen = self._micro_batch(micro.batch, images, inputs, with_entropy=with_entropy)
        out = seen.policy
        if updates_per_step(self._config) == 1:
            # The first and only update starts at the policy itself: no second forward pass.
            micro = micro.with_old_logprobs(out.logprobs.detach())
        loss = objective.loss(
            micro if counts else micro.weightless(),
            out.logprobs,
            normalizer,
            total=self._ranks.total,
            entropy=out.entropy,
            **self._providers.in_update(seen),
        )
        if counts:
            return loss
        # Every parameter gets a gradient on every rank, be it 0.
        nothing = loss.loss + 0 * out.logprobs.sum()
        return LossOutput(nothing, dict.fromkeys(loss.metrics, (nothing.detach(), 0.0)))

    def _micro_batch(
        self, groups: GroupBatch, rows: list[int], inputs: StepInputs, *, with_entropy: bool = False
    ) -> MicroBatch:
        return MicroBatch(
            groups=groups,
            rows=rows,
            inputs=inputs,
            forward=self._policy.forward,
            model=self._policy.model,
            with_entropy=with_entropy,
            with_states=self._providers.reads_states,
        )
