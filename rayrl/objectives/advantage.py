"""Advantage estimators: from rewards [P,G] to advantages [P,G] (or [P,G,T], [N,P,G,T]).

``valid`` [P,G] hides captions that do not exist, or that were dropped where the plan takes its
statistics over the kept ones.  A part that reads ``advantages`` changes those of the part before.
"""

from __future__ import annotations

from torch import Tensor

from rayrl.objectives import stats


def group_normalize(
    rewards: Tensor, valid: Tensor | None = None, *, eps: float = 1e-5, ddof: int = 0
) -> Tensor:
    """(r - mean) / (std + eps) over the group (GRPO, 2402.03300); flat groups give exactly 0.

    Sources differ in ``ddof`` and ``eps``: the captioning paper 0 and 1e-5, TRL 1 and 1e-4."""
    return stats.standardize(rewards, valid, eps, ddof)


def greedy_baseline(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """r - r(greedy caption) (SCST, 1612.00563; ReMax, 2310.10505)."""
    return rewards - greedy_rewards[:, None]


def leave_one_out(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """r minus the mean of the other captions' rewards (NSC, 2003.09971; RLOO, 2402.14740),
    which is G/(G-1) times the deviation from the group's mean."""
    deviation = stats.center(rewards, valid)
    return deviation - stats.leave_one_out_mean(deviation, valid)
