"""Controllers: decisions after an optimizer step, from the metrics of its minibatch.

They return ``coefficients`` (by name, parameters of the loss from the next step on), ``stop_epoch``
(no further update in this step), ``scale_lr`` (the scheduled learning rate is multiplied by this
until another decision) or ``extrapolate`` (weights move on by this factor of the step's change).
``parameters`` holds the plan's, as controllers have changed them; one that reads ``state`` returns
it anew beside its decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, Any]


def stop_on_ratio(metrics: Numbers, *, max_ratio_deviation: float) -> dict[str, Any]:
    """Stop once a minibatch's mean of |ratio - 1| exceeds ``max_ratio_deviation`` (ESPO,
    2202.00079)."""
    return {"stop_epoch": _metric(metrics, "objective/ratio_deviation") > max_ratio_deviation}


def adaptive_kl(
    metrics: Numbers, parameters: Numbers, *, kl_target: float, kl_horizon: float
) -> dict[str, Any]:
    """coef (1 + clip(KL / target - 1, +-0.2) / horizon), horizon in updates (1909.08593)."""
    error = _metric(metrics, "objective/kl_k3") / kl_target - 1
    factor = 1 + max(-0.2, min(0.2, error)) / kl_horizon
    return {"coefficients": {"kl_coef": parameters["kl_coef"] * factor}}


def adaptive_entropy(
    metrics: Numbers,
    parameters: Numbers,
    state: Numbers,
    *,
    entropy_target: float,
    entropy_step: float,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Raise the coefficient by a step while the entropy is at or below its target, lower it
    otherwise, and apply it only while it is below (Skywork-OR1, 2505.22312).

    state: the coefficient that is `held` while it is not applied; checkpoints used to have it among
        the coefficients
    """
    low = _metric(metrics, "objective/entropy") <= entropy_target
    before = parameters.get("entropy_coef_held", parameters["entropy_coef"])
    held = state.get("held", before) + (entropy_step if low else -entropy_step)
    held = max(0.0, held)
    return {"coefficients": {"entropy_coef": held if low else 0.0}}, {"held": held}


def momentum(extrapolate: bool, *, momentum_factor: float) -> dict[str, Any]:
    """Continue from w + a (w - v), v what the step before trained (accelerated preference
    optimization, 2410.06293, read in its abstract), for a learner that can ``extrapolate``."""
    return {"extrapolate": momentum_factor} if extrapolate else {}


def _metric(metrics: Numbers, name: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"a controller reads the metric {name}, which this objective does not report"
        )
    return float(metrics[name])
