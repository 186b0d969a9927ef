"""Log-probs of a step's groups: which computation, at which temperature, in which parts."""

from __future__ import annotations

from typing import Any

import torch

from rayrl.config import LearnerConfig
from rayrl.learner.batches import rank_micro_batches
from rayrl.learner.flops import FlopCounter
from rayrl.learner.inputs import StepInputs
from rayrl.learner.logprobs import LogprobOutput, naive_outputs, prefix_shared_outputs
from rayrl.learner.parallel import SOLO, Ranks, compute_sharded
from rayrl.objectives.batch import GroupBatch


class Forward:
    """Computes log-probs the way the captions were sampled: ``temperature`` divides the logits,
    ``banned_ids`` are never sampled.  The model is an argument: policy and reference share all
    else.  ``flops`` adds up the useful operations, backward passes included."""

    def __init__(
        self,
        config: LearnerConfig,
        flops: FlopCounter,
        *,
        temperature: float,
        banned_ids: tuple[int, ...],
        ranks: Ranks = SOLO,
    ) -> None:
        self._config = config
        self._counter = flops
        self._temperature = temperature
        self._banned_ids = banned_ids
        self._ranks = ranks
        self.compute = prefix_shared_outputs if config.prefix_shared else naive_outputs
        self._outputs = compute_sharded if ranks.sharded else self.compute
        self.flops = 0.0

    def __call__(
        self, model: Any, groups: GroupBatch, inputs: Any, *, with_entropy: bool = False
    ) -> LogprobOutput:
        """Log-probs [P, G, T] of one micro-batch, with gradient; ``inputs`` are the processor's
        for its P prompts."""
        backward = torch.is_grad_enabled()
        self.flops += self._counter.count(inputs, groups.mask, backward=backward)
        return self._outputs(
            model,
            inputs,
            groups.token_ids,
            groups.mask,
            temperature=self._temperature,
            banned_ids=self._banned_ids,
            with_entropy=with_entropy,
        )

    @torch.no_grad()
    def frozen(self, model: Any, groups: GroupBatch, inputs: StepInputs) -> torch.Tensor:
        """Log-probs [P, G, T] of a whole step, without gradient; ranks share the work."""
        logprobs = torch.zeros_like(groups.rollout_logprobs)
        everyone = range(len(groups.image_ids))
        for part, counts in rank_micro_batches(everyone, self._config, self._ranks):
            mine = self(model, groups.select(part), inputs.select(part)).logprobs
            if counts:
                logprobs[part] = mine
        return self._ranks.total(logprobs)
