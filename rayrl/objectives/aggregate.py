"""Reward aggregation: from the batch's reward terms to rewards [P,G].  ``terms`` maps K names to
[P,G], ``reward_weights`` names to the weights of reward.terms, 1 where it has none.

Terms of weight 0 are only logged: they count where a parameter names them, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayrl.objectives.plan import near
from rayrl.objectives.terms import NO_WEIGHTS, counted


def weighted_sum(
    terms: Mapping[str, Tensor],
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    term_weights: Mapping[str, float],
) -> Tensor:
    """Sum of the terms, each by its weight in ``term_weights`` or else under reward.terms;
    normalised afterwards, so that the term with the largest spread rules (MO-GRPO, 2503.21819, read
    in its abstract)."""
    _known(terms, term_weights, "term_weights")
    weights = {**reward_weights, **term_weights}
    return torch.stack([weights.get(k, 1.0) * v for k, v in terms.items()]).sum(0)


def only_term(terms: Mapping[str, Tensor], *, main_term: str) -> Tensor:
    """One term alone, the others being there to watch: GRPO on another reward (speech recognition,
    learned reward models; both papers were read in their abstracts)."""
    _known(terms, [main_term], "main_term")
    return terms[main_term]


def worst_of(
    terms: Mapping[str, Tensor], reward_weights: Mapping[str, float] = NO_WEIGHTS
) -> Tensor:
    """The smallest of K scores of the same quantity (WCO, 2310.02743)."""
    return torch.stack(list(_scores("worst_of", terms, reward_weights).values())).amin(0)


def mean_minus_variance(
    terms: Mapping[str, Tensor],
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    uncertainty: float,
) -> Tensor:
    """mean - uncertainty * variance (ddof 1) of K scores of the same quantity (UWO, 2310.02743)."""
    named = _scores("mean_minus_variance", terms, reward_weights)
    if len(named) < 2:
        raise ValueError(f"mean_minus_variance wants two terms or more, got {', '.join(named)}")
    scores = torch.stack(list(named.values()))
    return scores.mean(0) - uncertainty * scores.var(0, correction=1)


def product(
    terms: Mapping[str, Tensor],
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    main_term: str,
) -> Tensor:
    """The main term times all others, factors in [0,1] (CaRL, read in its abstract): what one
    factor takes away, a higher main reward cannot buy back.  ValueError where one is not."""
    _known(terms, [main_term], "main_term")
    result = terms[main_term]
    for name, factor in _scores("product", terms, reward_weights, main_term).items():
        if name != main_term:
            if bool(((factor < 0) | (factor > 1)).any()):
                raise ValueError(f"product: term {name} has values outside of [0, 1]")
            result = result * factor
    return result


def harmonic_mean(
    terms: Mapping[str, Tensor],
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    main_term: str,
    main_share: float,
) -> Tensor:
    """1 / (share / main + (1 - share) / other) of two terms; 0 where one is not positive."""
    _known(terms, [main_term], "main_term")
    scores = _scores("harmonic_mean", terms, reward_weights, main_term)
    if len(scores) != 2:
        raise ValueError(f"harmonic_mean wants two terms, got {', '.join(scores)}")
    a = scores[main_term]
    (b,) = (v for k, v in scores.items() if k != main_term)
    positive = (a > 0) & (b > 0)
    inverse = main_share / torch.where(positive, a, 1.0)
    inverse = inverse + (1 - main_share) / torch.where(positive, b, 1.0)
    return torch.where(positive, 1 / inverse, 0.0)


def with_multipliers(
    rewards: Tensor, terms: Mapping[str, Tensor], *, multipliers: Mapping[str, float]
) -> Tensor:
    """r plus fixed multipliers times constraint terms (MoCAN, 2405.19544); the multipliers come
    from :func:`rayrl.objectives.planners.optimal_multipliers`, once, before training."""
    _known(terms, multipliers, "multipliers")
    for name, multiplier in multipliers.items():
        rewards = rewards + multiplier * terms[name]
    return rewards


def judged(rewards: Tensor, judge_ok: Tensor) -> Tensor:
    """r, and 0 for captions that violate a constraint (CGPO, 2409.20370)."""
    return torch.where(judge_ok.bool(), rewards, 0.0)


def _scores(
    part: str, terms: Mapping[str, Tensor], weights: Mapping[str, float], *named: str
) -> dict[str, Tensor]:
    """The terms that count; ValueError for one whose weight makes it a penalty, which ``part``,
    that adds nothing up, could only take for a reward."""
    scores = counted(terms, weights, named)
    for name in scores:
        if name not in named and weights.get(name, 1.0) < 0:
            raise ValueError(
                f"{part}: reward term {name} has weight {weights[name]}, and a penalty is none of "
                "its scores; give the term another sign, or weight 0 to log it only"
            )
    return scores


def _known(
    terms: Mapping[str, Tensor], names: Sequence[str] | Mapping[str, float], parameter: str
) -> None:
    for name in names:
        if name not in terms:
            raise ValueError(f"{parameter}: no reward term {name!r}{near(name, terms)}")
