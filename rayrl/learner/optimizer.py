"""AdamW over named parameters, its schedule, and its state as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from rayrl.learner.parallel import SOLO, Ranks, like

if TYPE_CHECKING:  # a benchmark takes steps where there is no pydantic
    from rayrl.config import LearnerConfig


def make_optimizer(
    named: Mapping[str, torch.nn.Parameter], config: LearnerConfig
) -> torch.optim.AdamW:
    """AdamW; weight decay spares vectors (norms, biases), as is usual for transformers."""
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # By itself torch steps tensor by tensor on a CPU, and on a GPU it takes as much memory again as
    # the parameters have.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def clip_gradients(
    gradients_of: Iterable[torch.nn.Parameter], limit: float, ranks: Ranks = SOLO
) -> float:
    """Add the gradients up over ranks, and bound their norm; returns it as it was."""
    parameters = list(gradients_of)
    ranks.total_gradients(parameters)
    norm = ranks.gradient_norm(parameters)
    # Else one value that is not a number would make all of them so, and nobody could tell which.
    if torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def learning_rate(step: int, total: int, config: LearnerConfig) -> float:
    """The rate of ``step`` (from 0) of ``total``: linear warm-up, then the schedule to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    course = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }
    return config.lr * course[config.schedule]


def optimizer_arrays(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    ranks: Ranks = SOLO,
    prefix: str = "optimizer",
) -> dict[str, np.ndarray]:
    """The state of every parameter as ``<prefix>/<name>/<field>`` arrays, on rank 0; of one that
    never had a gradient (as the last layer of a vision tower of which another is read), a ``step``
    of 0."""
    arrays = {}
    for name, parameter in named.items():
        state = optimizer.state.get(parameter) or {"step": 0.0}
        for field, value in state.items():
            tensor = ranks.gathered(torch.as_tensor(value))
            arrays[f"{prefix}/{name}/{field}"] = np.array(tensor.float().numpy())
    return arrays


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    arrays: Mapping[str, np.ndarray],
    prefix: str = "optimizer",
) -> None:
    """Inverse of :func:`optimizer_arrays`.

    Raises ValueError naming the first parameter that the arrays do not fit."""
    stored = {key.split("/")[1] for key in arrays if key.startswith(f"{prefix}/")}
    if stored and stored != set(named):
        odd = sorted(stored ^ set(named))[0]
        raise ValueError(
            f"checkpoint of another model: parameter {odd} is "
            + ("not in this model" if odd in stored else "not in the checkpoint")
        )
    for name, parameter in named.items():
        state = {}
        for field in ("step", "exp_avg", "exp_avg_sq"):
            array = arrays.get(f"{prefix}/{name}/{field}")
            if array is None:
                continue
            tensor = torch.from_numpy(np.array(array))
            if field == "step":
                # A fused optimizer counts where the parameter is.
                state[field] = tensor.reshape(()).to(parameter.device)
            elif tensor.shape == parameter.shape:
                state[field] = like(tensor, parameter)
            else:
                raise ValueError(
                    f"checkpoint of another model: {name} of shape {tuple(tensor.shape)}, "
                    f"want {tuple(parameter.shape)}"
                )
        if "exp_avg" in state:
            optimizer.state[parameter] = state
