"""The update: log-probs of the sampled captions, the objective's loss, a step, a weight version.

Knows torch and nothing of Ray.  A step trains on P groups of G captions:

    inputs of the P prompts   ->  the prompt ids must be those that the engine used
    old and reference log-probs, where the objective needs them (no gradient)
    objective.prepare         ->  advantages [P, G], once, over the whole step
    inner epochs x minibatches x micro-batches of images:  log-probs, loss, backward; step
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrl.checkpoint import Checkpoint, join_state, split_state
from rayrl.config import LearnerConfig, ModelConfig
from rayrl.learner.inputs import InputCache
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from rayrl.learner.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_arrays,
    restore_optimizer,
)
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.compile import PROVIDED
from rayrl.objectives.objective import Objective, Prepared
from rayrl.types import StepReport, TrainBatch
from rayrl.vlm import choose_trainable, load_captioner
from rayrl.weights import Weights, pack, read_model_files, write_model_files


def provided(config: LearnerConfig, images_per_step: int) -> frozenset[str]:
    """What a learner of these settings can give an objective beyond tokens and rewards: losses
    over whole minibatches only where one goes through the model at once."""
    whole = images_per_step // config.minibatches <= config.micro_batch_images
    return PROVIDED | {"whole_minibatch"} if whole else frozenset(PROVIDED)


class Learner:
    """Holds the policy, its frozen reference where the objective asks for one, and the optimizer.

    ``folder`` is the stage-1 model: the policy starts there and the reference stays there.
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
    ) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._captioner = load_captioner(
            folder,
            dtype=model.dtype,
            device=self._device,
            trust_remote_code=model.trust_remote_code,
        )
        self._model = self._captioner.model
        self._config = config
        objective.check(PROVIDED | {"whole_minibatch"})
        self._objective = objective
        self._objective_state = objective.initial_state()
        self._model_config = model
        self._temperature = temperature
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
        parameters = dict(self._model.named_parameters())
        self._named = {name: parameters[name] for name in self._trainable}
        self._optimizer = make_optimizer(self._named, config)
        self._outputs = prefix_shared_outputs if config.prefix_shared else naive_outputs
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
        inputs = _Inputs(self._cache, self._model, batch, self._instruction)
        groups = self._group_batch(batch)
        groups = self._with_frozen_logprobs(groups, inputs)
        self._objective_state, prepared = self._objective.prepare(self._objective_state, groups)
        rate = learning_rate(self.step, self._total_steps, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sums = _Sums()
        for indices in self._minibatches(len(batch.images)):
            self._minibatch(prepared, inputs, indices, sums)
            self._objective_state, decisions = self._objective.control(
                self._objective_state, sums.means()
            )
            if decisions.get("stop_epoch"):
                break
        self.step += 1
        metrics = {**_named(sums.means()), "learner/lr": rate}
        advantages = prepared.caption_advantages().cpu().numpy()
        return StepReport(
            step=self.step,
            weight_version=self.weight_version,
            metrics=metrics,
            advantages=advantages.astype(np.float32),
        )

    def _group_batch(self, batch: TrainBatch) -> GroupBatch:
        def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.as_tensor(np.asarray(array), dtype=dtype, device=self._device)

        mask = tensor(batch.mask, torch.bool)
        rollout = tensor(batch.rollout_logprobs)
        return GroupBatch(
            image_ids=batch.prompt_ids,
            token_ids=tensor(batch.token_ids, torch.long),
            mask=mask,
            rollout_logprobs=rollout,
            # Replaced by the learner's own where more than one update reads them.
            old_logprobs=rollout,
            terms={name: tensor(values) for name, values in batch.terms.items()},
            rewards=tensor(batch.rewards),
            valid=torch.ones(batch.rewards.shape, dtype=torch.bool, device=self._device),
            truncated=tensor(batch.truncated, torch.bool),
            greedy_rewards=None if batch.greedy_rewards is None else tensor(batch.greedy_rewards),
        )

    @property
    def _updates_per_step(self) -> int:
        return self._config.inner_epochs * self._config.minibatches

    def _with_frozen_logprobs(self, groups: GroupBatch, inputs: _Inputs) -> GroupBatch:
        """Add the log-probs at the start of the step and under the reference model."""
        fields: dict[str, Any] = {}
        if self._updates_per_step > 1 or "old_logprobs" in self._objective.needs:
            fields["old_logprobs"] = self._frozen_logprobs(self._model, groups, inputs)
        if self._reference is not None:
            fields["ref_logprobs"] = self._frozen_logprobs(self._reference, groups, inputs)
        return replace(groups, **fields) if fields else groups

    @torch.no_grad()
    def _frozen_logprobs(self, model: Any, groups: GroupBatch, inputs: _Inputs) -> torch.Tensor:
        parts = [
            self._logprobs(model, groups.select(part), inputs.select(part)).logprobs
            for part in self._micro_batches(range(len(groups.image_ids)))
        ]
        return torch.cat(parts)

    def _logprobs(self, model: Any, groups: GroupBatch, inputs: Any, **options: Any) -> Any:
        return self._outputs(
            model,
            inputs,
            groups.token_ids,
            groups.mask,
            temperature=self._temperature,
            banned_ids=self._captioner.banned_ids,
            **options,
        )

    def _minibatches(self, images: int) -> Iterator[list[int]]:
        """Image indices of every optimizer step; the order is a function of (seed, step)."""
        order = np.random.default_rng((self._seed, self.step, 1))
        size = images // self._config.minibatches
        for _ in range(self._config.inner_epochs):
            if self._config.minibatches == 1:
                yield list(range(images))
                continue
            shuffled = order.permutation(images).tolist()
            for start in range(0, size * self._config.minibatches, size):
                yield shuffled[start : start + size]

    def _micro_batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        size = self._config.micro_batch_images
        for start in range(0, len(indices), size):
            yield list(indices[start : start + size])

    def _minibatch(
        self, prepared: Prepared, inputs: _Inputs, indices: list[int], sums: _Sums
    ) -> None:
        normalizer = prepared.select(indices).normalizer()
        self._optimizer.zero_grad(set_to_none=True)
        want_entropy = "entropy" in self._objective.needs
        total = 0.0
        for part in self._micro_batches(indices):
            micro = prepared.select(part)
            out = self._logprobs(
                self._model, micro.batch, inputs.select(part), with_entropy=want_entropy
            )
            if self._updates_per_step == 1:
                # The first and only update starts at the policy itself: no second forward pass.
                micro = micro.with_old_logprobs(out.logprobs.detach())
            loss = self._objective.loss(micro, out.logprobs, normalizer, entropy=out.entropy)
            loss.loss.backward()
            total += float(loss.loss.detach())
            sums.add(loss.metrics)
        norm = torch.nn.utils.clip_grad_norm_(
            list(self._named.values()), self._config.grad_clip, error_if_nonfinite=True
        )
        self._optimizer.step()
        sums.add({"learner/loss": (total, 1.0), "learner/grad_norm": (float(norm), 1.0)})

    def weights(self, *, trained_only: bool) -> Weights:
        """The current version: all parameters, or those that train."""
        return pack(self._model, self.weight_version, self._trainable if trained_only else None)

    def checkpoint(self) -> Checkpoint:
        """Everything a resumed run needs of the learner."""
        with tempfile.TemporaryDirectory() as folder:
            self._model.save_pretrained(folder)
            self._captioner.processor.save_pretrained(folder)
            files = read_model_files(folder)
        arrays, state = split_state(self._objective_state)
        arrays.update(optimizer_arrays(self._optimizer, self._named))
        meta = {"weight_version": self.weight_version, "objective_state": state}
        return Checkpoint(step=self.step, model_files=files, arrays=arrays, meta=meta)

    def restore(self, checkpoint: Checkpoint) -> int:
        """Continue from a checkpoint; returns its step.

        Raises ValueError naming the first parameter when it is one of another model."""
        with tempfile.TemporaryDirectory() as folder:
            write_model_files(checkpoint.model_files, Path(folder), with_weights=True)
            source = load_captioner(
                folder,
                dtype=self._model_config.dtype,
                trust_remote_code=self._model_config.trust_remote_code,
            ).model
        have, want = _shapes(source), _shapes(self._model)
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ValueError(
                    f"checkpoint of another model: {name} is {have.get(name, 'absent')} in the "
                    f"checkpoint and {want.get(name, 'absent')} in this run's model"
                )
        self._model.load_state_dict(source.state_dict())
        restore_optimizer(self._optimizer, self._named, checkpoint.arrays)
        self._objective_state = join_state(checkpoint.meta["objective_state"], checkpoint.arrays)
        self.step = checkpoint.step
        return self.step


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


_SHORT_NAMES = {
    "objective/kl_k3": "kl",
    "objective/entropy": "entropy",
    "objective/mismatch_kl": "mismatch_kl",
    "objective/clip_low": "learner/clip_low_fraction",
    "objective/clip_high": "learner/clip_high_fraction",
}


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The diagnostics that every run is read by, under the names that people look for."""
    return {_SHORT_NAMES.get(name, name): value for name, value in metrics.items()}


class _Inputs:
    """The processor's output for any of a step's P prompts, on the model's device."""

    def __init__(self, cache: InputCache, model: Any, batch: TrainBatch, instruction: str) -> None:
        self._cache = cache
        self._model = model
        self._images = batch.images
        self._instruction = instruction
        self._expected = batch.prompt_token_ids
        self._prompt_ids = batch.prompt_ids

    def select(self, indices: Sequence[int]) -> Any:
        inputs = self._cache.batch([self._images[i] for i in indices], self._instruction)
        self._check(inputs, indices)
        inputs = inputs.to(self._model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return inputs

    def _check(self, inputs: Any, indices: Sequence[int]) -> None:
        """The learner must see the very ids that the engine sampled after."""
        for row, i in enumerate(indices):
            got = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].numpy()
            if not np.array_equal(got, self._expected[i]):
                raise ValueError(
                    f"prompt {self._prompt_ids[i]}: the engine used {len(self._expected[i])} "
                    f"prompt ids, the learner has {len(got)} or other ones; both must load the "
                    "same processor"
                )


class _Sums:
    """Weighted means of metrics over micro-batches."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (total, weight) in metrics.items():
            self._totals[name] += float(total)
            self._weights[name] += float(weight)

    def means(self) -> dict[str, float]:
        return {k: v / self._weights[k] for k, v in self._totals.items() if self._weights[k]}
