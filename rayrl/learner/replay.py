"""A step that could not be taken, kept so that it can be looked at alone.

A replay is a checkpoint of the policy as it was, with the step's batch in place of the optimizer's
state: one folder that ``from_pretrained`` loads and that needs neither the run's data nor Ray.  A
critic and other heads are in it as in a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.checkpoint import Checkpoint, join_state, split_state
from rayrl.objectives.batch import GroupBatch
from rayrl.types import TrainBatch
from rayrl.weights import ModelFiles

_GROUP, _TERMS, _IMAGE, _PROMPT = "group/", "group/terms/", "image/", "prompt_token_ids/"


def make_replay(
    batch: TrainBatch,
    groups: GroupBatch,
    *,
    step: int,
    images: Sequence[int],
    state: Mapping[str, Any],
    problem: str,
    model_files: ModelFiles,
    heads: Mapping[str, np.ndarray],
) -> Checkpoint:
    """What a replay needs: ``groups`` as the objective saw them (log-probs of frozen models
    included), the objective's ``state`` before the step, which ``images`` went through, and what
    trains beside the policy, its ``heads``, as a checkpoint has them."""
    arrays, values = split_state(state)
    arrays |= heads
    for spec in dataclasses.fields(groups):
        value = getattr(groups, spec.name)
        if isinstance(value, Tensor):
            arrays[_GROUP + spec.name] = _array(value)
    arrays |= {_TERMS + name: _array(value) for name, value in groups.terms.items()}
    for i, (image, ids) in enumerate(zip(batch.images, batch.prompt_token_ids, strict=True)):
        arrays[f"{_IMAGE}{i}"] = np.frombuffer(image, np.uint8)
        arrays[f"{_PROMPT}{i}"] = np.array(ids)
    meta = {
        "problem": problem,
        "images": list(images),
        "prompt_ids": list(batch.prompt_ids),
        "references": [list(captions) for captions in batch.references],
        "objective_state": values,
        "reward_weights": dict(groups.reward_weights),
    }
    return Checkpoint(step=step, model_files=model_files, arrays=arrays, meta=meta)


def read_replay(replay: Checkpoint) -> tuple[TrainBatch, GroupBatch, dict[str, Any]]:
    """The batch, the groups and the objective's state of :func:`make_replay`.

    Raises ValueError for a checkpoint that is not a replay."""
    if "problem" not in replay.meta:
        raise ValueError("not a replay: this is a checkpoint of a step that was taken")
    arrays, ids = replay.arrays, tuple(replay.meta["prompt_ids"])
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items() if k.startswith(_GROUP)}
    terms = {k.removeprefix(_TERMS): v for k, v in tensors.items() if k.startswith(_TERMS)}
    fields = {k.removeprefix(_GROUP): v for k, v in tensors.items() if not k.startswith(_TERMS)}
    # A replay of before has none, and its terms counted once.
    weights = replay.meta.get("reward_weights", {})
    groups = GroupBatch(image_ids=ids, terms=terms, reward_weights=weights, **fields)
    batch = TrainBatch(
        prompt_ids=ids,
        images=tuple(arrays[f"{_IMAGE}{i}"].tobytes() for i in range(len(ids))),
        prompt_token_ids=tuple(arrays[f"{_PROMPT}{i}"] for i in range(len(ids))),
        token_ids=arrays[_GROUP + "token_ids"].astype(np.int32),
        mask=arrays[_GROUP + "mask"],
        rollout_logprobs=arrays[_GROUP + "rollout_logprobs"],
        rewards=arrays[_GROUP + "rewards"],
        weight_versions=np.zeros(arrays[_GROUP + "rewards"].shape, np.int32),
        truncated=arrays[_GROUP + "truncated"],
        references=tuple(tuple(captions) for captions in replay.meta["references"]),
    )
    return batch, groups, join_state(replay.meta["objective_state"], arrays)


def _array(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.detach().cpu().numpy())
