"""A step's groups as tensors, and the order in which they go through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from rayrl.config import LearnerConfig
from rayrl.learner.parallel import Ranks
from rayrl.objectives.batch import OPTIONAL_FIELDS, GroupBatch
from rayrl.objectives.terms import NO_WEIGHTS
from rayrl.types import TrainBatch

_DTYPES = {"b": torch.bool, "i": torch.long}


def group_batch(
    batch: TrainBatch,
    device: str | torch.device,
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
) -> GroupBatch:
    """The step's groups on ``device``; all captions that exist are valid.  ``reward_weights`` are
    those of the terms by name, which the run's configuration knows and batches do not carry.

    Raises ValueError on a field that no objective knows."""
    if unknown := batch.fields.keys() - OPTIONAL_FIELDS.keys():
        raise ValueError(f"batch: unknown fields {', '.join(sorted(unknown))}")

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(np.asarray(array), dtype=dtype, device=device)

    rollout = tensor(batch.rollout_logprobs)
    fields = {"valid": tensor(batch.valid, torch.bool)}
    for name, value in batch.fields.items():
        fields[name] = tensor(value, _DTYPES.get(value.dtype.kind, torch.float32))
    return GroupBatch(
        image_ids=batch.prompt_ids,
        token_ids=tensor(batch.token_ids, torch.long),
        mask=tensor(batch.mask, torch.bool),
        rollout_logprobs=rollout,
        # Replaced by the learner's own where more than one update reads them.
        old_logprobs=rollout,
        terms={name: tensor(values) for name, values in batch.terms.items()},
        rewards=tensor(batch.rewards),
        truncated=tensor(batch.truncated, torch.bool),
        forced=tensor(
            np.zeros_like(batch.mask) if batch.forced is None else batch.forced, torch.bool
        ),
        greedy_rewards=None if batch.greedy_rewards is None else tensor(batch.greedy_rewards),
        reward_weights=reward_weights,
        **fields,
    )


def to_device(groups: GroupBatch, device: str | torch.device) -> GroupBatch:
    """The same groups with every tensor on ``device``."""
    named = {spec.name: getattr(groups, spec.name) for spec in dataclasses.fields(groups)}
    moved = {k: v.to(device) for k, v in named.items() if isinstance(v, torch.Tensor)}
    terms = {name: value.to(device) for name, value in groups.terms.items()}
    return dataclasses.replace(groups, terms=terms, **moved)  # type: ignore[arg-type]


def minibatches(
    images: int, config: LearnerConfig, order: np.random.Generator
) -> Iterator[list[int]]:
    """Image indices of every optimizer step of a step; ``order`` shuffles each epoch.

    Where groups were dropped the parts are of nearly equal size, so that every image trains, and
    there are never more parts than images."""
    parts = min(config.minibatches, images)
    for _ in range(config.inner_epochs):
        if config.minibatches == 1:
            yield list(range(images))
            continue
        shuffled = order.permutation(images).tolist()
        for part in range(parts):
            yield shuffled[images * part // parts : images * (part + 1) // parts]


class Tokens(NamedTuple):
    """How many an image brings: of its prompt, and of all its captions."""

    prompt: int
    captions: int


def micro_batches(
    indices: Sequence[int], tokens: Sequence[Tokens], config: LearnerConfig
) -> Iterator[list[int]]:
    """The images of a minibatch in the parts that go through the model at once: at most
    ``micro_batch_images`` and, where that is not 0, ``micro_batch_tokens``.

    tokens: of every image of the step.  A part's rows have room for its longest prompt and, after
    it, for the most tokens of captions, so images of similar length go together, the longest first.
    """
    most, budget = config.micro_batch_images, config.micro_batch_tokens
    if not budget:
        for start in range(0, len(indices), most):
            yield list(indices[start : start + most])
        return
    part: list[int] = []
    for image in sorted(indices, key=lambda i: -sum(tokens[i])):
        row = [max(tokens[i][k] for i in [*part, image]) for k in (0, 1)]
        if part and (len(part) == most or (len(part) + 1) * sum(row) > budget):
            yield part
            part = []
        part.append(image)
    if part:
        yield part


def rank_micro_batches(
    indices: Sequence[int], tokens: Sequence[Tokens], config: LearnerConfig, ranks: Ranks
) -> list[tuple[list[int], bool]]:
    """The micro-batches of this rank's share of a minibatch, each with whether it counts.

    They are equally many on every rank, for all take part in every collective: where a rank runs
    out of images, one goes through the model once more and counts for nothing.
    """
    shares = [
        list(micro_batches(ranks.share(indices, r), tokens, config)) for r in range(ranks.size)
    ]
    mine = [(part, True) for part in shares[ranks.rank]]
    most = max(len(share) for share in shares)
    return mine + [([indices[0]], False)] * (most - len(mine))
