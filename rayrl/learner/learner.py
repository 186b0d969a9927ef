"""The update: log-probs of the sampled captions, the objective's loss, a step, a weight version.

Knows torch and nothing of Ray.  A step trains on P groups of G captions:

    inputs of the P prompts   ->  the prompt ids must be those that the engine used
    old and reference log-probs, where the objective needs them (no gradient)
    objective.prepare         ->  advantages [P, G], once, over the whole step
    inner epochs x minibatches x micro-batches of images:  log-probs, loss, backward; step
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rayrl.adapters import AdapterWeights
from rayrl.checkpoint import Checkpoint, join_state, split_state
from rayrl.config import LearnerConfig, ModelConfig
from rayrl.learner.batches import group_batch, minibatches
from rayrl.learner.decisions import Decisions
from rayrl.learner.earlier import EarlierCaptions
from rayrl.learner.finite import Part, bad_fields, problem
from rayrl.learner.inputs import StepInputs
from rayrl.learner.losses import Losses, updates_per_step
from rayrl.learner.means import Means, short_names
from rayrl.learner.measure import StepMeter
from rayrl.learner.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_arrays,
    restore_optimizer,
)
from rayrl.learner.parallel import SOLO, Ranks
from rayrl.learner.policy import Policy
from rayrl.learner.replay import make_replay
from rayrl.learner.sources import FROM_REFERENCE, make_providers
from rayrl.learner.spans import with_token_fields
from rayrl.learner.streak import Streak
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.compile import CONFIGURED, PROVIDED
from rayrl.objectives.config import NO_SOURCES, SourcesConfig
from rayrl.objectives.objective import Objective, Prepared, State
from rayrl.objectives.prepare import NotFiniteError
from rayrl.types import FloatArray, StepReport, TrainBatch
from rayrl.weights import Weights

ONE_TERM: Mapping[str, float] = {"cider_d": 1.0}


class Learner:
    """Holds the policy, its frozen reference where the objective asks for one, and the optimizer.

    ``folder`` is the stage-1 model: the policy starts there and the reference stays there.
    ``ranks``: this process's place among those that take the same steps; each is given every
    group and each returns the same report.  ``reward_weights``: those of the terms by name.
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
        sources: SourcesConfig = NO_SOURCES,
        reward_weights: Mapping[str, float] = ONE_TERM,
    ) -> None:
        self._ranks = ranks
        self._config = config
        objective.check({*PROVIDED, *CONFIGURED, "whole_minibatch"})
        self.objective = objective
        self._objective_state = objective.initial_state()
        self._total_steps = total_steps
        self._seed = seed
        self._reward_weights = dict(reward_weights)
        self.policy = Policy(
            folder,
            model=model,
            config=config,
            with_reference=bool(objective.needs & FROM_REFERENCE),
            temperature=temperature,
            instruction=instruction,
            ranks=ranks,
            seed=seed,
        )
        self._named = self.policy.named
        self.optimizer = make_optimizer(self._named, config)
        self._decisions = Decisions(self._named, extrapolates="extrapolate" in objective.needs)
        self.providers = make_providers(
            objective.needs,
            sources,
            self.policy,
            updates_per_step=updates_per_step(config),
            # Terms that are only logged have no head; see rayrl.objectives.terms.counted.
            num_terms=sum(weight != 0 for weight in reward_weights.values()),
            ranks=ranks,
        )
        self.losses = Losses(self.policy, self.providers, config, ranks)
        self._earlier = EarlierCaptions() if "earlier" in objective.needs else None
        self._replay: Checkpoint | None = None
        self._streak = Streak()
        self.step = 0

    @property
    def weight_version(self) -> int:
        """Versions count steps: the stage-1 model is version 0."""
        return self.step

    def update(self, batch: TrainBatch) -> StepReport:
        """Train on one step's groups and move to the next weight version.

        An optimizer step whose loss or gradient is not finite is not taken: weights and moments
        stay, the report says why, and :meth:`replay` has what it takes to look at it."""
        policy = self.policy
        meter = StepMeter(policy.device, policy.model.dtype, self._named, self._ranks)
        flops, sums = policy.forward.flops, Means()
        self._replay = None
        self._streak.begin_step()
        group_size = batch.shape[1]
        batch = self._completed(batch)
        inputs = policy.inputs(batch)
        given = group_batch(batch, policy.device, self._reward_weights)
        groups = self.losses.with_start_fields(given, inputs)
        before = self._objective_state
        self._set_rate()
        prepared, problem = self._prepared(given, groups)
        if prepared is None:
            # There is nothing to take any update with: the step skips one for all.
            self._skip(batch, groups, list(range(len(batch.images))), before, problem)
            advantages = torch.zeros(batch.shape[:2])
        else:
            self._updates(batch, prepared, inputs, before, sums)
            advantages = prepared.caption_advantages().cpu()
        if not sums.means():
            # Nothing was learned, so nothing of what was not finite may stay behind.
            self._objective_state = {**before, "step": int(before["step"]) + 1}
        self._decisions.end_step()
        self.policy.masters.publish()
        self.step += 1
        return StepReport(
            step=self.step,
            weight_version=self.weight_version,
            metrics={
                **short_names(sums.means()),
                "learner/lr": self.optimizer.param_groups[0]["lr"],
                "learner/skipped": float(self._streak.skipped),
                "learner/skipped_in_a_row": float(self._streak.longest),
                **meter.metrics(policy.forward.flops - flops),
            },
            advantages=advantages.numpy().astype(np.float32)[:, :group_size],
            problem=self._streak.first,
            first_problem=self._streak.cause,
        )

    def _updates(
        self, batch: TrainBatch, prepared: Prepared, inputs: StepInputs, before: State, sums: Means
    ) -> None:
        """Take the step's optimizer steps, whose metrics go into ``sums``.  ``before``: the
        objective's state before the step."""
        # The order is a function of (seed, step), so that a resumed run continues.
        order = np.random.default_rng((self._seed, self.step, 1))
        for indices in minibatches(len(batch.images), self._config, order):
            self._set_rate()
            update = Means()
            problem = self._minibatch(prepared, inputs, indices, update)
            if problem:
                self._skip(batch, prepared.batch, indices, before, problem)
                continue
            self._streak.end()
            sums.add(update.pairs())
            # Of this update, and what it has no captions for of those before.
            metrics = {**sums.means(), **update.means()}
            self._objective_state, decisions = self.objective.control(
                self._objective_state, metrics
            )
            if not self._decisions.take(decisions):
                break

    def _prepared(self, given: GroupBatch, groups: GroupBatch) -> tuple[Prepared | None, str]:
        """What the objective makes of the groups; or nothing, and why, where models brought to it
        what is not finite, or its advantages are not.  ``given``: the groups before models saw
        them.  Every rank holds all groups, so all decide alike."""
        state = self._objective_state
        if problem := bad_fields(given, groups, self.objective.prepare_reads(int(state["step"]))):
            return None, problem
        try:
            self._objective_state, prepared = self.objective.prepare(state, groups)
        except NotFiniteError as error:
            return None, str(error)
        return prepared, ""

    def _set_rate(self) -> None:
        rate = learning_rate(self.step, self._total_steps, self._config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self._decisions.lr_scale

    def _completed(self, batch: TrainBatch) -> TrainBatch:
        """The batch with what becomes of it here: characters as tokens, captions of before."""
        batch = with_token_fields(batch, self.policy.processor.tokenizer)
        return batch if self._earlier is None else self._earlier.joined(batch)

    def _skip(
        self,
        batch: TrainBatch,
        groups: GroupBatch,
        images: list[int],
        state: State,
        problem: str,
    ) -> None:
        """Count an update that is not taken, and keep the first of a step."""
        self._streak.skip(problem)
        if self._replay is None:
            self._replay = make_replay(
                batch,
                groups,
                step=self.step,
                images=images,
                state=state,
                problem=problem,
                model_files=self.policy.files(whole=True),
                heads=self.providers.arrays(),
            )

    def replay(self) -> Checkpoint | None:
        """The first minibatch that the last step skipped, with the policy as it was then; on
        rank 0."""
        return self._replay if self._ranks.rank == 0 else None

    def prepare(self, images: Sequence[bytes]) -> None:
        """Decode this rank's share of the next step's images, before their captions are there."""
        self.policy.prepare(images)

    def _minibatch(
        self, prepared: Prepared, inputs: StepInputs, indices: list[int], sums: Means
    ) -> str:
        """Take one optimizer step; returns why it was skipped, if it was."""
        normalizer = prepared.select(indices).normalizer()
        self.optimizer.zero_grad(set_to_none=True)
        self.providers.before_update()
        parts, mine = [], Means()
        for images, counts in self.losses.parts(indices, inputs):
            loss = self.losses(self.objective, prepared, images, inputs, normalizer, counts=counts)
            loss.loss.backward()
            self.policy.masters.collect()
            names = tuple(prepared.batch.image_ids[i] for i in images)
            parts.append(Part(names, loss.detach()))
            mine.add(loss.metrics)
            mine.add({"learner/loss": (loss.loss.detach(), 0.0)})
        pairs = self._ranks.total_metrics(mine.pairs())
        norm = clip_gradients(self._named.values(), self._config.grad_clip, self._ranks)
        if not math.isfinite(pairs["learner/loss"][0] + norm):
            return problem(parts, self._named, norm, self._ranks)
        # Where nothing was selected, momentum alone would move the weights.
        if norm > 0.0:
            self.optimizer.step()
        self.policy.masters.publish()
        sums.add(pairs)
        sums.add({name: (value, 1.0) for name, value in self.providers.after_update().items()})
        sums.add({"learner/loss": (0.0, 1.0), "learner/grad_norm": (norm, 1.0)})
        return ""

    def score(self, image: bytes, token_ids: Sequence[int]) -> FloatArray:
        """Log-probs [T] of a caption under the current weights, at temperature 1 with nothing
        banned: what engines must agree with.  Every rank must call it."""
        return self.policy.score(image, token_ids)

    def weights(self, *, trained_only: bool) -> Weights | AdapterWeights | None:
        """The current version: all parameters, or those that train.  On rank 0; the others, on
        which it must be called too, return None."""
        return self.policy.weights(self.weight_version, trained_only=trained_only)

    def checkpoint(self) -> Checkpoint | None:
        """Everything a resumed run needs of the learner, whatever the number of its ranks.  On
        rank 0; the others, on which it must be called too, return None."""
        arrays, state = split_state(self._objective_state)
        arrays.update(optimizer_arrays(self.optimizer, self._named, self._ranks))
        arrays.update(self._decisions.arrays(self._ranks))
        arrays.update(self.providers.arrays())
        if self._earlier is not None:
            arrays.update(self._earlier.arrays())
        arrays.update(self.policy.masters.arrays(self._ranks))
        files = self.policy.files()
        if self._ranks.rank > 0:
            return None
        return Checkpoint(
            step=self.step,
            model_files=files,
            arrays=arrays,
            meta={
                "weight_version": self.weight_version,
                "objective_state": state,
                **self._streak.meta(),
                **self.policy.meta(),
            },
        )

    def restore(self, checkpoint: Checkpoint) -> int:
        """Continue from a checkpoint; returns its step.

        Raises ValueError naming the first parameter when it is one of another model."""
        self.policy.restore(checkpoint)
        restore_optimizer(self.optimizer, self._named, checkpoint.arrays)
        self._decisions.restore(checkpoint.arrays)
        self.providers.restore(checkpoint.arrays)
        if self._earlier is not None:
            self._earlier.restore(checkpoint.arrays)
        self._objective_state = join_state(checkpoint.meta["objective_state"], checkpoint.arrays)
        self._streak.restore(checkpoint.meta)
        self.step = checkpoint.step
        return self.step
