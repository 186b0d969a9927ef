"""Rewards of captions of the stage-1 model, for objectives that compare an image's captions with
what that model would write (A*-PO, 2505.20686; InfAlign, 2412.19792).

They are sampled once, before the first step, and kept in checkpoints: a resumed run samples those
that it lacks, and no other.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rayrl.config import Config, ModelConfig
from rayrl.engine.base import request_seed
from rayrl.objectives.config import SourcesConfig
from rayrl.outline import Here, Results
from rayrl.planning import Request
from rayrl.rewards.score import Dropped
from rayrl.types import FloatArray, Prompt, ScoredGroup

NEED = "reference_rewards"
_BEFORE = -1
"""The step that the captions belong to."""


class Sampler(Protocol):
    """What is asked of :class:`rayrl.actors.fleet.Fleet`."""

    def show(self, version: int, weights: Any) -> None: ...

    def submit(self, step: int, version: int, requests: Sequence[Request]) -> Any: ...

    def wait_rollouts(self, pending: Any) -> None: ...

    def collect(self, pending: Any) -> Results: ...


def scored_needs(needs: Collection[str], sources: SourcesConfig) -> frozenset[str]:
    """What of an objective's needs is scored beside a group's captions."""
    return frozenset(needs) - ({NEED} if sources.reference_samples else frozenset())


@dataclass
class ReferenceRewards:
    """By image the rewards [size] of captions of the stage-1 model; with a ``size`` of 0 there are
    none, and nothing is asked of anybody."""

    size: int = 0
    seed: int = 0
    _rewards: dict[str, FloatArray] = field(default_factory=dict)
    _dropped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_run(cls, config: Config, needs: Collection[str]) -> ReferenceRewards:
        """Those that an objective with these needs wants."""
        size = config.objective.sources.reference_samples if NEED in needs else 0
        return cls(size=size, seed=config.seed)

    def sample(
        self,
        fleet: Sampler,
        prompts: Iterator[Prompt],
        stage1: Path,
        config: Config,
        say: Callable[[str], None],
    ) -> None:
        """Sample and score what is missing for ``prompts`` with the model in the folder ``stage1``,
        which the fleet then holds; ``say`` tells a person what is done."""
        batches = self._batches(prompts, config)
        first = next(batches, None) if self.size else None
        if first is None:
            return
        say(f"sampling {self.size} captions of the stage-1 model for each image, to compare with")
        fleet.show(0, _weights(stage1, config.model))
        waiting: deque[Any] = deque()
        for batch in itertools.chain([first], batches):
            waiting.append(fleet.submit(_BEFORE, 0, [self.request(prompt) for prompt in batch]))
            if len(waiting) > 1:
                self._collect(fleet, waiting.popleft())
        while waiting:
            self._collect(fleet, waiting.popleft())
        say(f"sampled for {len(self._rewards)} images; {len(self._dropped)} could not be scored")

    def _batches(self, prompts: Iterator[Prompt], config: Config) -> Iterator[list[Prompt]]:
        """What is missing, as many images at a time as a step has.

        Where these are the documents of its rewards (``reward.df: batch``), few would give other
        rewards, and one none at all.  A last batch of less than half as many then goes with the
        one before, or without one takes along images whose rewards are there."""
        size = config.train.images_per_step
        documents = config.reward.df == "batch" and config.reward.counts_ngrams
        known: list[Prompt] = []
        before: list[Prompt] = []
        batch: list[Prompt] = []
        for prompt in prompts:
            if prompt.prompt_id not in self._rewards:
                batch.append(prompt)
            elif documents and len(known) < size:
                known.append(prompt)
            if len(batch) == size:
                if before:
                    yield before
                before, batch = batch, []
        if documents and batch and len(batch) < max(2, size / 2):
            batch, before = before + batch, []
            batch += known[: max(0, size - len(batch))]
        yield from filter(None, (before, batch))

    def request(self, prompt: Prompt) -> Request:
        """What is sampled for an image."""
        seed = request_seed(self.seed, _BEFORE, prompt.prompt_id)
        return Request(slot=0, prompt=prompt, size=self.size, seed=seed)

    def add(self, results: Sequence[ScoredGroup | Dropped]) -> None:
        """Remember rewards, or why there are none; those that are there stay."""
        for result in results:
            if isinstance(result, Dropped):
                self._dropped[result.prompt_id] = result.reason
            else:
                self._rewards.setdefault(result.group.prompt.prompt_id, result.rewards)

    def joined(self, results: Results) -> Results:
        """A step's groups with the rewards of their images; dropped where there are none."""
        if not self.size:
            return results
        return Here([self._with_rewards(result) for result in results.all()])

    def _with_rewards(self, result: ScoredGroup | Dropped) -> ScoredGroup | Dropped:
        if isinstance(result, Dropped):
            return result
        who = result.group.prompt.prompt_id
        if who not in self._rewards:
            reason = self._dropped.get(who, "they were not sampled")
            return Dropped(who, f"no rewards of the stage-1 model's captions: {reason}")
        return replace(result, fields={**result.fields, NEED: self._rewards[who]})

    def _collect(self, fleet: Sampler, pending: Any) -> None:
        fleet.wait_rollouts(pending)
        self.add(fleet.collect(pending).all())

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        if not self._rewards:
            return {}
        names = np.frombuffer("\n".join(self._rewards).encode(), np.uint8)
        return {f"{NEED}/images": names, f"{NEED}/rewards": np.stack([*self._rewards.values()])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`arrays`; nothing where the objective wants none, or none are kept.

        Raises ValueError for another number of captions an image."""
        if not self.size or f"{NEED}/rewards" not in arrays:
            return
        rewards = arrays[f"{NEED}/rewards"]
        if rewards.shape[1] != self.size:
            raise ValueError(
                f"objective.sources.reference_samples {self.size}: the checkpoint has the rewards "
                f"of {rewards.shape[1]} captions an image; resume with as many"
            )
        names = arrays[f"{NEED}/images"].tobytes().decode().split("\n")
        self._rewards = dict(zip(names, rewards, strict=True))


def _weights(folder: Path, model: ModelConfig) -> Any:
    # Imported late: they bring torch along.
    from rayrl.vlm import load_captioner
    from rayrl.weights import pack

    captioner = load_captioner(folder, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    return pack(captioner.model, version=0)
