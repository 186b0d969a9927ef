"""What is not finite in an update that was skipped, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rayrl.objectives.objective import LossOutput

_TERM = "objective/loss_"
_SHOWN = 3


class Part(NamedTuple):
    """A micro-batch that went through the model: its prompts and its share of the loss."""

    prompt_ids: Sequence[str]
    loss: LossOutput


def problem(parts: Sequence[Part], gradients: Mapping[str, Tensor | None], norm: float) -> str:
    """The first thing that is not finite: a loss term with its prompts, else the gradient of a
    parameter (after the sum over ranks), else the norm of all gradients, which overflowed."""
    for part in parts:
        if not math.isfinite(float(part.loss.loss.detach())):
            return f"{bad_terms(part.loss)} for {_listed(part.prompt_ids)}"
    for name, gradient in gradients.items():
        if gradient is not None and not torch.isfinite(gradient).all():
            return f"the loss is finite here, the gradient of {name} is not ({count(gradient)})"
    return f"loss and gradients are finite, their norm is {norm}"


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
    """``3 of 64 values nan, 1 infinite``."""
    nan = int(torch.isnan(tensor).sum())
    infinite = int(torch.isinf(tensor).sum())
    parts = [f"{n} {word}" for n, word in ((nan, "nan"), (infinite, "infinite")) if n]
    return f"of {tensor.numel()} values {', '.join(parts) or 'all finite'}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN])
    return f"prompts {shown}, and {more} more" if more > 0 else f"prompts {shown}"
