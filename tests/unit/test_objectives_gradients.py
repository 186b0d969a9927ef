"""Gradients of every loss against finite differences, in double precision, away from kinks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from objectives_toy import F64, LABELS, MASK, OLD, POLICY, REF, REWARDS, VALID, assert_close, tensor

from rayrl.objectives import group_loss, links, pairs, parts, regularize, scores, surrogate
from rayrl.objectives.reduce import Normalizer
from rayrl.objectives.stats import masked_sum, safe_exp

A = (REWARDS - 0.7)[..., None]
PAIRS = pairs.all_pairs(REWARDS, VALID, min_gap=0.0)
COUNTS = Normalizer(11, 4, 1)
Loss = Callable[[torch.Tensor], torch.Tensor]


def of_ratio(function: Callable[..., torch.Tensor], **more: Any) -> Loss:
    """A loss of log-probs from one of the ratio."""
    return lambda x: function(ratio=safe_exp(x - OLD), **more)


def of_log_ratio(function: Callable[..., torch.Tensor], **more: Any) -> Loss:
    return lambda x: function(log_ratio=x - OLD, **more)


BOUNDS = {"low": 0.8, "high": 1.2}
TOKENS: dict[str, Loss] = {
    "reinforce": partial(surrogate.reinforce, advantages=A),
    "nll": surrogate.nll,
    # The ratio is held constant by design, so it is constant here.
    "importance_weighted": partial(surrogate.importance_weighted, ratio=OLD.exp(), advantages=A),
    "clipped_weight": partial(
        surrogate.clipped_weight, ratio=(POLICY - OLD).exp(), advantages=A, **BOUNDS
    ),
    "unclipped": of_ratio(surrogate.unclipped, advantages=A),
    "min_clip": of_ratio(surrogate.min_clip, advantages=A, **BOUNDS, dual_clip=3.0),
    # Of a caption: single tokens have its value and their own part of its gradient.
    "geometric_mean": lambda x: masked_sum(
        surrogate.geometric_mean(x - OLD, A, MASK, log_clip=0.22), MASK
    ),
    "soft_gate": of_ratio(surrogate.soft_gate, advantages=A, gate_positive=1.0, gate_negative=1.05),
    "linear_bound": lambda x: surrogate.linear_bound(safe_exp(x - OLD), x - OLD, A, **BOUNDS),
    "proximal": of_log_ratio(surrogate.proximal, advantages=A, step_size=0.5),
    "squared_penalty": lambda x: surrogate.squared_penalty(x, x - OLD, A, penalty=0.1),
    "ratio_variance": of_ratio(surrogate.ratio_variance, advantages=A, penalty=0.04),
    "opmd": partial(surrogate.opmd, advantages=A, opmd_temperature=1.0),
    "constrained_actor": partial(
        surrogate.constrained_actor,
        old_logprobs=OLD,
        auxiliary_logprobs=REF[..., None],
        advantages=A,
        auxiliary_weight=0.5,
        actor_temperature=1.0,
    ),
}
GROUPS: dict[str, Loss] = {
    "pair_mean": lambda x: group_loss.pair_mean(
        links.logistic(x.sum(-1)[:, :, None] - x.sum(-1)[:, None]), PAIRS
    ),
    "contrastive": lambda x: group_loss.contrastive(x.sum(-1), PAIRS, contrast_temperature=0.7),
    "leave_one_out_bce": lambda x: group_loss.leave_one_out_bce(x.sum(-1), LABELS, VALID, beta=0.5),
    "standardized_regression": lambda x: group_loss.standardized_regression(
        x.sum(-1), A[..., 0], VALID, spread_floor=0.1
    ),
    "regression": lambda x: group_loss.regression(x.sum(-1), A[..., 0], score_factor=0.1),
    "kimi": lambda x: group_loss.kimi(x, OLD, MASK, A[..., 0], score_factor=0.1),
    "reward_difference": lambda x: group_loss.reward_difference(
        x, OLD, REF, MASK, REWARDS, PAIRS, beta=0.1, token_clip=0.22
    ),
    "posterior_matching": lambda x: group_loss.posterior_matching(
        x, OLD, REF, MASK, REWARDS, VALID, posterior_temperature=1.0
    ),
    "changed_image": lambda x: group_loss.changed_image(x, REF, 2 * x, REF, MASK, PAIRS, beta=0.1),
    "heads": lambda x: group_loss.heads(
        torch.stack([x, 2 * x], -1), REF, MASK, {"a": REWARDS, "b": -REWARDS}, VALID, beta=0.1
    ),
}
LINKS: dict[str, Loss] = {
    "logistic": links.logistic,
    "sigmoid": links.sigmoid,
    "linear": links.linear,
    "squared": partial(links.squared, beta=0.3),
    "hinge": links.hinge,
    "robust": partial(links.robust, label_noise=0.1),
    "soft_label": partial(links.soft_label, rewards=REWARDS, label_slope=2.0),
}
SCORES: dict[str, Loss] = {
    "logprob": partial(scores.logprob, mask=MASK),
    "mean_logprob": partial(scores.mean_logprob, mask=MASK),
    "over_reference": partial(scores.over_reference, ref_logprobs=REF, mask=MASK),
    "mean_over_reference": partial(scores.mean_over_reference, ref_logprobs=REF, mask=MASK),
    "over_old": partial(scores.over_old, old_logprobs=OLD, mask=MASK),
    "sampled_over_old": partial(
        scores.sampled_over_old, old_logprobs=OLD, mask=MASK, forced=MASK & (MASK.cumsum(-1) == 1)
    ),
    "mean_ratio": lambda x: scores.mean_ratio(safe_exp(x - OLD), MASK),
    "chi_squared": partial(scores.chi_squared, ref_logprobs=REF, mask=MASK),
    "forward_kl": partial(scores.forward_kl, ref_logprobs=REF, mask=MASK),
    "jensen_shannon": partial(scores.jensen_shannon, ref_logprobs=REF, mask=MASK),
}
REGULARIZERS: dict[str, Loss] = {
    "kl_k1": partial(regularize.kl_k1, ref_logprobs=REF, kl_coef=0.5),
    "kl_k2": partial(regularize.kl_k2, ref_logprobs=REF, kl_coef=0.5),
    "kl_k3": partial(regularize.kl_k3, ref_logprobs=REF, kl_coef=0.5),
    "kl_k3_weighted": partial(
        regularize.kl_k3_weighted, old_logprobs=OLD, ref_logprobs=REF, kl_coef=0.5
    ),
    "entropy_bonus": partial(regularize.entropy_bonus, entropy_coef=0.01),
    "nll_behaviour": partial(regularize.nll_behaviour, nll_coef=0.1),
    "nll_better": partial(regularize.nll_better, mask=MASK, pair_weights=PAIRS, nll_coef=0.1),
    "nll_references": partial(regularize.nll_references, anchor_mask=MASK, nll_coef=0.1),
    "chi_squared": partial(
        regularize.chi_squared,
        ref_logprobs=REF,
        mask=MASK,
        caption_weights=VALID.double(),
        normalizer=COUNTS,
        total=lambda x: x,
        chi_coef=1.0,
        chi_floor=1e-4,
        chi_limit=10.0,
    ),
    "value_error": partial(
        regularize.value_error,
        values=OLD,
        rewards=REWARDS,
        truncated=~VALID,
        value_coef=0.5,
        value_clip=0.22,
        finished_only=False,
    ),
}
# Losses that hold a factor constant: the factor times the gradient of the rest, in tests below
# and in those of the worked numbers.
CONSTANT_FACTOR = {
    "pairwise_policy_gradient",
    "focal",
    "trust_region",
    "kl_k3_straight",
    "kl_high_covariance",
}


def cases() -> list[tuple[str, Loss, torch.Tensor]]:
    margins = tensor([[[0.3, -0.4, 0.2, 0.1]] * 4])
    tables = (TOKENS, GROUPS, SCORES, REGULARIZERS)
    at_policy = [(name, loss, POLICY) for table in tables for name, loss in table.items()]
    return at_policy + [(name, loss, margins) for name, loss in LINKS.items()]


@pytest.mark.parametrize(("name", "loss", "at"), cases(), ids=[case[0] for case in cases()])
def test_gradient_is_that_of_finite_differences(name: str, loss: Loss, at: torch.Tensor) -> None:
    x = at.clone().requires_grad_()

    def real(values: torch.Tensor) -> torch.Tensor:
        """Padding out of the way: whatever a loss says there is masked later."""
        result = loss(values)
        return torch.where(MASK, result, 0.0) if result.shape == MASK.shape else result

    if not any(real(x).detach().flatten().tolist()):
        pytest.fail(f"{name} is 0 everywhere, so its gradient says nothing")
    assert torch.autograd.gradcheck(real, (x,), eps=1e-6, atol=1e-6)


def test_every_loss_is_checked() -> None:
    known = {*TOKENS, *GROUPS, *LINKS, *SCORES, *REGULARIZERS, *CONSTANT_FACTOR}
    for slot in ("surrogate", "link", "score", "regularizers"):
        assert parts.functions(slot).keys() <= known


def test_focal_weight_is_constant() -> None:
    h = tensor([[[0.5, -1.0]]]).requires_grad_()
    links.focal(h, hardness=2.0).sum().backward()
    wrong = torch.sigmoid(-h.detach())
    assert_close(h.grad, -(wrong**2) * wrong, 1e-12)


def test_pairwise_policy_gradient_holds_its_weights() -> None:
    x = POLICY.clone().requires_grad_()
    one = torch.zeros(1, 4, 4, dtype=F64)
    one[0, 3, 0] = 1.0
    group_loss.pairwise_policy_gradient(x, OLD, MASK, REWARDS, one, pair_clip=0.9).sum().backward()
    weight = torch.exp(tensor(0.35 + 0.15)) * (1.2 - 0.2) / 2
    assert_close(x.grad[0, 3], (-weight).expand(3), 1e-12)
    assert_close(x.grad[0, 0], weight.expand(3), 1e-12)
    assert x.grad[0, 1:3].abs().max() == 0.0


def test_trust_region_pulls_with_its_excess() -> None:
    x = (OLD - 0.2).requires_grad_()
    weights = MASK.double()
    loss = regularize.trust_region(
        x,
        OLD,
        weights,
        VALID.double(),
        COUNTS,
        lambda value: value,
        kl_limit=0.05,
        kl_penalty=10.0,
    )
    loss.backward()
    assert_close(x.grad, -1.5 / 11 * weights, 1e-12)


def test_k3_straight_has_the_gradient_of_k2() -> None:
    x = POLICY.clone().requires_grad_()
    regularize.kl_k3_straight(x, REF, kl_coef=1.0).sum().backward()
    assert_close(x.grad, POLICY - REF, 1e-12)


def test_safe_exp_is_finite_and_never_loses_its_gradient() -> None:
    x = tensor([-800.0, 0.0, 20.0, 50.0, 1e6]).requires_grad_()
    y = safe_exp(x)
    y.sum().backward()
    top = torch.exp(tensor(20.0))
    assert_close(
        y / top, torch.stack([0 * top, 1 / top, top / top, 31 * top / top, 1 + 999980 * top / top])
    )
    assert_close(x.grad / top, torch.stack([0 * top, 1 / top, top / top, top / top, top / top]))
