"""What is not finite in an update that was skipped, in one line."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayrl.learner.parallel import Ranks
from rayrl.objectives.batch import GroupBatch, listed
from rayrl.objectives.objective import LossOutput

_TERM = "objective/loss_"


class Part(NamedTuple):
    """A micro-batch that went through the model: its prompts and its share of the loss."""

    prompt_ids: Sequence[str]
    loss: LossOutput


def problem(
    parts: Sequence[Part], parameters: Mapping[str, Tensor], norm: float, ranks: Ranks
) -> str:
    """The first thing that is not finite: a loss term with its prompts, else the gradient of a
    parameter (after the sum over ranks), else the norm of all gradients, which overflowed.  Every
    rank must call it; each speaks of its own prompts."""
    bad = _bad_gradients(parameters, ranks)
    for part in parts:
        if not math.isfinite(float(part.loss.loss.detach())):
            return f"{bad_terms(part.loss)} for {listed(part.prompt_ids)}"
    for name, (nan, infinite) in bad.items():
        if nan or infinite:
            how = _counted(parameters[name].numel(), nan, infinite)
            return f"the loss is finite here, the gradient of {name} is not ({how})"
    return f"loss and gradients are finite, their norm is {norm}"


def bad_fields(before: GroupBatch, groups: GroupBatch, names: Collection[str]) -> str:
    """Of the fields in ``names`` that models brought, those where they said of a caption what is
    not finite, with its prompts; nothing where there are none.  ``before``: the groups without
    them.  Every rank holds the fields of all prompts, so all say the same."""
    said = []
    for name in sorted(names):
        value = getattr(groups, name, None)
        if not isinstance(value, Tensor) or value is getattr(before, name):
            continue
        bad = (~torch.isfinite(value).flatten(2).all(2) & groups.valid).any(1)
        if bool(bad.any()):
            prompts = listed([groups.image_ids[i] for i in bad.nonzero()[:, 0].tolist()])
            said.append(f"{name} ({count(value)}) for {prompts}")
    return "; ".join(said)


def _bad_gradients(parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[int]]:
    """How many values of each parameter's gradient are NaN, and infinite; of all its shards."""
    counts = torch.zeros(len(parameters), 2, dtype=torch.float64)
    for row, parameter in zip(counts, parameters.values(), strict=True):
        gradient = parameter.grad
        if gradient is not None:
            own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            row[0], row[1] = torch.isnan(own).sum(), torch.isinf(own).sum()
    if ranks.sharded:
        counts = ranks.total(counts)
    return dict(zip(parameters, counts.long().tolist(), strict=True))


def bad_terms(loss: LossOutput) -> str:
    """The terms of a loss that are not finite, with their values."""
    terms = {
        name.removeprefix(_TERM): float(total)
        for name, (total, _) in loss.metrics.items()
        if name.startswith(_TERM)
    }
    bad = [f"{name} {value}" for name, value in terms.items() if not math.isfinite(value)]
    return f"loss {', '.join(bad) or float(loss.loss.detach())}"


def count(tensor: Tensor) -> str:
    """``of 64 values 3 nan, 1 infinite``."""
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return _counted(tensor.numel(), nan, infinite)


def _counted(numel: int, nan: int, infinite: int) -> str:
    parts = [f"{n} {word}" for n, word in ((nan, "nan"), (infinite, "infinite")) if n]
    return f"of {numel} values {', '.join(parts) or 'all finite'}"
