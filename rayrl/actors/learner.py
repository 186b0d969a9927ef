"""The learner actor: the update behind Ray.  One rank of a :class:`LearnerGroup`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from torch import Tensor

from rayrl.actors.pieces import shipped
from rayrl.adapters import AdapterWeights
from rayrl.batch import make_batch
from rayrl.buckets import Manifest
from rayrl.canary import Canary, make_canary
from rayrl.checkpoint import Checkpoint
from rayrl.config import Config
from rayrl.objectives import build
from rayrl.outline import whole
from rayrl.shares import Scored
from rayrl.trace import Traced, traced
from rayrl.transport import Meeting, Transport
from rayrl.types import FloatArray, Prompt, StepReport
from rayrl.weights import ModelFiles, Weights, write_model_files

if TYPE_CHECKING:
    from rayrl.learner.parallel import Ranks


@ray.remote
class LearnerActor(Traced):
    """Trains the policy.  ``files`` are those of the stage-1 model, the run's reference;
    ``store`` is where several ranks find each other, an address and a port.

    Every method must be called on every rank, in the same order."""

    def __init__(
        self, config: Config, files: ModelFiles, rank: int, store: tuple[str, int]
    ) -> None:
        # Here, and not in the driver, which has no use for it.
        from rayrl.learner.learner import Learner
        from rayrl.learner.turns import TakesTurns

        self._transport: Transport | None = None
        self._staged: tuple[Manifest, list[Tensor]] | None = None
        self._max_tokens = config.sampling.max_tokens
        with tempfile.TemporaryDirectory(prefix="rayrl-learner-") as folder:
            self._learner = Learner(
                write_model_files(files, Path(folder), with_weights=True),
                model=config.model,
                config=config.learner,
                objective=build(config.objective, max_tokens=config.sampling.max_tokens),
                sources=config.objective.sources,
                reward_weights=config.reward.weights,
                temperature=config.sampling.temperature,
                instruction=config.data.instruction,
                total_steps=config.train.steps,
                seed=config.seed,
                ranks=_join(config, rank, store),
            )
        self._turns: AbstractContextManager[None] = nullcontext()
        if config.rollout.colocate:
            self._turns = TakesTurns(self._learner.optimizer, self._learner.policy.masters)

    @traced
    def update(self, parts: Sequence[Scored], *prompts: Sequence[Prompt]) -> StepReport:
        """One step on the groups of these parts, in order; ``prompts`` are those of each part."""
        pairs = zip(parts, prompts, strict=True)
        results = [result for part, some in pairs for result in part.unpacked(some)]
        with self._turns:
            return self._learner.update(make_batch(whole(results)))

    @traced
    def prepare(self, *prompts: Sequence[Prompt]) -> None:
        """Decode the images of the next step, which :meth:`update` else does."""
        self._learner.prepare([prompt.image for some in prompts for prompt in some])

    def replay(self) -> Checkpoint | None:
        """What the last step skipped, if it did."""
        replay = self._learner.replay()
        return replay and shipped(replay)

    # Ray reads the number of results from the innermost function.
    @traced  # type: ignore[arg-type]
    @ray.method(num_returns=2)  # type: ignore[arg-type]
    def weights(self, *, trained_only: bool) -> tuple[int, Weights | AdapterWeights | None]:
        """The version, which tells that all went well, and the weights, which are large."""
        weights = self._learner.weights(trained_only=trained_only)
        return self._learner.weight_version, weights

    @traced
    def stage(self, *, trained_only: bool) -> None:
        """Copy the current weights into buckets, to be sent by rank 0."""
        learner = self._learner
        self._staged = learner.policy.buckets(learner.weight_version, trained_only=trained_only)

    def join_transfer(self, meeting: Meeting, rank: int) -> None:
        """Become one end of the way to the engines."""
        self._transport = meeting.join(rank, self._transport)

    def offer(self) -> Manifest:
        """What engines must know of what was staged."""
        assert self._transport is not None and self._staged is not None
        manifest, buckets = self._staged
        return manifest.with_handles(self._transport.offer(buckets))

    @traced
    def send(self) -> None:
        """Send what was staged."""
        assert self._transport is not None and self._staged is not None
        self._transport.send(self._staged[1])

    def release(self) -> None:
        """Forget what was staged: every engine has it."""
        self._staged = None
        if self._transport is not None:
            self._transport.done()

    def canary(self, prompt: Prompt) -> Canary:
        """A caption of ``prompt`` that engines and learner score alike."""
        return make_canary(self._learner.policy.processor, prompt, self._max_tokens)

    @traced
    def score(self, canary: Canary) -> FloatArray:
        """Log-probs [T] of the canary caption under the current weights."""
        return self._learner.score(canary.prompt.image, canary.token_ids)

    @traced
    def checkpoint(self) -> Checkpoint | None:
        checkpoint = self._learner.checkpoint()
        return checkpoint and shipped(checkpoint, emptied=True)

    def restore(self, checkpoint: Checkpoint) -> int:
        """Continue from a checkpoint; returns its step."""
        with self._turns:
            return self._learner.restore(checkpoint)


def _join(config: Config, rank: int, store: tuple[str, int]) -> Ranks:
    from rayrl.learner.parallel import SOLO, join

    learner = config.learner
    if learner.num_workers == 1:
        return SOLO
    return join(
        *store,
        rank=rank,
        size=learner.num_workers,
        mode=learner.parallel,
        start_timeout_s=config.rollout.start_timeout_s,
        timeout_s=learner.timeout_s,
    )
