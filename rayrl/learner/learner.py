"""The update: log-probs of the sampled captions, the objective's loss, a step, a weight version.

Knows torch and nothing of Ray.  A step trains on P groups of G captions:

    inputs of the P prompts   ->  the prompt ids must be those that the engine used
    old and reference log-probs, where the objective needs them (no gradient)
    objective.prepare         ->  advantages [P, G], once, over the whole step
    inner epochs x minibatches x micro-batches of images:  log-probs, loss, backward; step
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrl.checkpoint import Checkpoint, join_state, split_state
from rayrl.config import LearnerConfig, ModelConfig
from rayrl.learner.batches import group_batch, minibatches, rank_micro_batches
from rayrl.learner.decisions import Decisions
from rayrl.learner.forward import Forward
from rayrl.learner.inputs import InputCache, StepInputs
from rayrl.learner.means import Means, short_names
from rayrl.learner.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_arrays,
    restore_optimizer,
)
from rayrl.learner.parallel import SOLO, Ranks, shard
from rayrl.learner.state import load_model_files, model_files
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.compile import PROVIDED
from rayrl.objectives.objective import Objective, Prepared
from rayrl.types import StepReport, TrainBatch
from rayrl.vlm import choose_trainable, load_captioner
from rayrl.weights import Weights, pack


def provided(config: LearnerConfig, images_per_step: int) -> frozenset[str]:
    """What a learner of these settings can give an objective beyond tokens and rewards: losses
    over whole minibatches only where a rank's share of one goes through the model at once."""
    largest = -(-(images_per_step // config.minibatches) // config.num_workers)
    whole = largest <= config.micro_batch_images
    return PROVIDED | {"whole_minibatch"} if whole else frozenset(PROVIDED)


class Learner:
    """Holds the policy, its frozen reference where the objective asks for one, and the optimizer.

    ``folder`` is the stage-1 model: the policy starts there and the reference stays there.
    ``ranks``: this process's place among those that take the same steps; each is given every
    group and each returns the same report.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: ModelConfig,
        config: LearnerConfig,
        objective: Objective,
        temperature: float,
        instruction: str,
        total_steps: int,
        seed: int,
        ranks: Ranks = SOLO,
    ) -> None:
        self._ranks = ranks
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._captioner = load_captioner(
            folder,
            dtype=model.dtype,
            device="cpu" if ranks.sharded else self._device,
            trust_remote_code=model.trust_remote_code,
        )
        self._model = self._captioner.model
        self._config = config
        objective.check(PROVIDED | {"whole_minibatch"})
        self._objective = objective
        self._objective_state = objective.initial_state()
        self._model_config = model
        self._instruction = instruction
        self._cache = InputCache(self._captioner.processor)
        self._total_steps = total_steps
        self._seed = seed
        self._reference = (
            copy.deepcopy(self._model).requires_grad_(False)
            if "ref_logprobs" in objective.needs
            else None
        )
        self._trainable = choose_trainable(self._model, model.trainable)
        self._forward = Forward(
            config, temperature=temperature, banned_ids=self._captioner.banned_ids, ranks=ranks
        )
        if ranks.sharded:
            for each in (self._model, self._reference):
                if each is not None:
                    shard(each, self._forward.compute, self._device)
        parameters = dict(self._model.named_parameters())
        self._named = {name: parameters[name] for name in self._trainable}
        self._optimizer = make_optimizer(self._named, config)
        self._decisions = Decisions(self._named, extrapolates="extrapolate" in objective.needs)
        self.step = 0

    @property
    def weight_version(self) -> int:
        """Versions count steps: the stage-1 model is version 0."""
        return self.step

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self._model.parameters())

    def update(self, batch: TrainBatch) -> StepReport:
        """Train on one step's groups and move to the next weight version."""
        inputs = StepInputs(self._cache, self._model, batch, self._instruction)
        groups = group_batch(batch, self._device)
        groups = self._with_frozen_logprobs(groups, inputs)
        self._objective_state, prepared = self._objective.prepare(self._objective_state, groups)
        rate = learning_rate(self.step, self._total_steps, self._config)
        sums = Means()
        # The order is a function of (seed, step), so that a resumed run continues.
        order = np.random.default_rng((self._seed, self.step, 1))
        for indices in minibatches(len(batch.images), self._config, order):
            for group in self._optimizer.param_groups:
                group["lr"] = rate * self._decisions.lr_scale
            self._minibatch(prepared, inputs, indices, sums)
            self._objective_state, decisions = self._objective.control(
                self._objective_state, sums.means()
            )
            if not self._decisions.take(decisions):
                break
        self._decisions.end_step()
        self.step += 1
        metrics = {**short_names(sums.means()), "learner/lr": self._optimizer.param_groups[0]["lr"]}
        advantages = prepared.caption_advantages().cpu().numpy()
        return StepReport(
            step=self.step,
            weight_version=self.weight_version,
            metrics=metrics,
            advantages=advantages.astype(np.float32),
        )

    @property
    def _updates_per_step(self) -> int:
        return self._config.inner_epochs * self._config.minibatches

    def _with_frozen_logprobs(self, groups: GroupBatch, inputs: StepInputs) -> GroupBatch:
        """Add the log-probs at the start of the step and under the reference model."""
        fields: dict[str, Any] = {}
        if self._updates_per_step > 1 or "old_logprobs" in self._objective.needs:
            fields["old_logprobs"] = self._forward.frozen(self._model, groups, inputs)
        if self._reference is not None:
            fields["ref_logprobs"] = self._forward.frozen(self._reference, groups, inputs)
        return replace(groups, **fields) if fields else groups

    def _minibatch(
        self, prepared: Prepared, inputs: StepInputs, indices: list[int], sums: Means
    ) -> None:
        normalizer = prepared.select(indices).normalizer()
        self._optimizer.zero_grad(set_to_none=True)
        want_entropy = "entropy" in self._objective.needs
        mine = Means()
        for part, counts in rank_micro_batches(indices, self._config, self._ranks):
            micro = prepared.select(part)
            out = self._forward(
                self._model, micro.batch, inputs.select(part), with_entropy=want_entropy
            )
            if self._updates_per_step == 1:
                # The first and only update starts at the policy itself: no second forward pass.
                micro = micro.with_old_logprobs(out.logprobs.detach())
            loss = self._objective.loss(
                micro if counts else micro.weightless(),
                out.logprobs,
                normalizer,
                total=self._ranks.total,
                entropy=out.entropy,
            )
            # Every parameter gets a gradient on every rank, be it 0.
            (loss.loss if counts else loss.loss + 0 * out.logprobs.sum()).backward()
            mine.add(loss.metrics if counts else dict.fromkeys(loss.metrics, (0.0, 0.0)))
            mine.add({"learner/loss": (loss.loss.detach(), 0.0)})
        sums.add(self._ranks.total_metrics(mine.pairs()))
        norm = self._clip_gradients()
        self._optimizer.step()
        sums.add({"learner/loss": (0.0, 1.0), "learner/grad_norm": (norm, 1.0)})

    def _clip_gradients(self) -> float:
        """Add the gradients up over ranks, and bound their norm; returns it as it was."""
        parameters = list(self._named.values())
        self._ranks.total_gradients(parameters)
        norm = self._ranks.gradient_norm(parameters)
        if not bool(norm.isfinite()):
            raise RuntimeError(f"step {self.step + 1}: gradient norm {float(norm)}, want a number")
        torch.nn.utils.clip_grads_with_norm_(parameters, self._config.grad_clip, norm)
        return float(norm)

    def weights(self, *, trained_only: bool) -> Weights | None:
        """The current version: all parameters, or those that train.  On rank 0; the others, on
        which it must be called too, return None."""
        names = self._trainable if trained_only else None
        weights = pack(self._model, self.weight_version, names, gather=self._ranks.gathered)
        return weights if self._ranks.rank == 0 else None

    def checkpoint(self) -> Checkpoint | None:
        """Everything a resumed run needs of the learner, whatever the number of its ranks.  On
        rank 0; the others, on which it must be called too, return None."""
        arrays, state = split_state(self._objective_state)
        arrays.update(optimizer_arrays(self._optimizer, self._named, self._ranks))
        arrays.update(self._decisions.arrays(self._ranks))
        files = model_files(self._model, self._captioner.processor, self._ranks)
        if self._ranks.rank > 0:
            return None
        return Checkpoint(
            step=self.step,
            model_files=files,
            arrays=arrays,
            meta={"weight_version": self.weight_version, "objective_state": state},
        )

    def restore(self, checkpoint: Checkpoint) -> int:
        """Continue from a checkpoint; returns its step.

        Raises ValueError naming the first parameter when it is one of another model."""
        load_model_files(self._model, checkpoint.model_files, self._model_config)
        restore_optimizer(self._optimizer, self._named, checkpoint.arrays)
        self._decisions.restore(checkpoint.arrays)
        self._objective_state = join_state(checkpoint.meta["objective_state"], checkpoint.arrays)
        self.step = checkpoint.step
        return self.step
