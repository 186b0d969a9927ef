"""Log-probs of a step's groups: which computation, at which temperature, in which parts."""

from __future__ import annotations

from typing import Any

import torch

from rayrl.config import LearnerConfig
from rayrl.learner.batches import rank_micro_batches
from rayrl.learner.families import bare_model, refusal
from rayrl.learner.features import FeatureCache
from rayrl.learner.flops import FlopCounter
from rayrl.learner.inputs import PromptBatch, StepInputs
from rayrl.learner.logprobs import LogprobOutput, naive_outputs, prefix_shared_outputs
from rayrl.learner.parallel import SOLO, Ranks, compute_sharded
from rayrl.objectives.batch import GroupBatch
from rayrl.parts import part_of


def feature_cache(model: Any, config: LearnerConfig) -> FeatureCache | None:
    """A cache for the model's image features, where nothing that trains is in them and the
    prefix-shared computation, which takes them, runs."""
    frozen = not any(
        parameter.requires_grad and part_of(name) != "language"
        for name, parameter in model.named_parameters()
    )
    usable = config.prefix_shared and refusal(bare_model(model)) is None
    if not (config.feature_cache_mb and frozen and usable):
        return None
    return FeatureCache(config.feature_cache_mb * 2**20)


class Forward:
    """Computes log-probs the way the captions were sampled: ``temperature`` divides the logits,
    ``banned_ids`` are never sampled.  The model is an argument: policy and reference share all
    else, the cached ``features`` of a frozen vision tower too."""

    def __init__(
        self,
        config: LearnerConfig,
        flops: FlopCounter,
        *,
        temperature: float,
        banned_ids: tuple[int, ...],
        ranks: Ranks = SOLO,
        features: FeatureCache | None = None,
    ) -> None:
        self._config = config
        self._counter = flops
        self._temperature = temperature
        self._banned_ids = banned_ids
        self._ranks = ranks
        self.compute = prefix_shared_outputs if config.prefix_shared else naive_outputs
        self._outputs = compute_sharded if ranks.sharded else self.compute
        self._features = features
        self._tally = [0.0]

    @property
    def flops(self) -> float:
        """Useful operations so far, of this and of those :meth:`for_another`."""
        return self._tally[0]

    def for_another(self, model: Any) -> Forward:
        """The same for a model of its own, with other image features, whole on every rank."""
        other = Forward(
            self._config,
            FlopCounter(model),
            temperature=self._temperature,
            banned_ids=self._banned_ids,
        )
        other._tally = self._tally
        return other

    def __call__(
        self,
        model: Any,
        groups: GroupBatch,
        prompts: PromptBatch,
        *,
        with_entropy: bool = False,
        with_states: bool = False,
    ) -> LogprobOutput:
        """Log-probs [P, G, T] of the micro-batch of ``prompts``, with gradient."""
        return self.captions(
            model,
            groups.token_ids,
            groups.mask,
            prompts,
            with_entropy=with_entropy,
            with_states=with_states,
        )

    def captions(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor,
        prompts: PromptBatch,
        *,
        temperature: float | None = None,
        with_entropy: bool = False,
        with_states: bool = False,
    ) -> LogprobOutput:
        """The same of any captions [P, N, L], at the sampling's temperature or another."""
        encoded, given = 1.0, {}
        if self._features is None:
            inputs = prompts.inputs
        else:
            keys = prompts.image_keys
            missing = {key: i for i, key in enumerate(keys) if key not in self._features}
            # Pixels of which all features are kept are not needed.
            inputs = prompts.inputs if missing else prompts.text
            given["image_features"] = self._features.features(model, inputs, keys)
            encoded = self._counter.share(inputs, list(missing.values()))
        backward = torch.is_grad_enabled()
        self._tally[0] += self._counter.count(inputs, mask, backward=backward, encoded=encoded)
        return self._outputs(
            model,
            inputs,
            ids,
            mask,
            temperature=temperature or self._temperature,
            banned_ids=self._banned_ids,
            with_entropy=with_entropy,
            with_states=with_states,
            **given,
        )

    def plain(self, model: Any, inputs: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probs [P, G, T] of captions without padding as the bare model has them: at
        temperature 1, nothing banned."""
        mask = torch.ones_like(token_ids, dtype=torch.bool)
        return self._outputs(model, inputs, token_ids, mask).logprobs

    @torch.no_grad()
    def frozen(self, model: Any, groups: GroupBatch, inputs: StepInputs) -> torch.Tensor:
        """Log-probs [P, G, T] of a whole step, without gradient; ranks share the work."""
        logprobs = torch.zeros_like(groups.rollout_logprobs)
        everyone = range(len(groups.image_ids))
        for part, counts in rank_micro_batches(everyone, inputs.tokens, self._config, self._ranks):
            mine = self(model, groups.select(part), inputs.select(part)).logprobs
            if counts:
                logprobs[part] = mine
        return self._ranks.total(logprobs)
