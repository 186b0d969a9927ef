"""Every preset on random groups: it trains, splits into parts exactly, and stays finite."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from objectives_toy import (
    F64,
    REWARDS,
    TinyPolicy,
    assert_close,
    loss_of,
    prepared,
    synthetic_batch,
    toy_batch,
)

from rayrl.objectives import preset, presets
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.objective import Objective, Prepared

NAMES = presets()
# Word accuracy and reward models are reward terms of their own.
NUM_TERMS = {"asr_word_accuracy": 3, "reward_model": 4}
SIZES: dict[str, Any] = {
    # Real groups have thousands of tokens; these have a few dozen.
    "clip_cov": {"covariance_share": 0.05},
    "kl_cov": {"covariance_share": 0.05},
    "high_entropy_tokens": {"entropy_share": 0.5},
    "ngrpo_virtual_best": {"good_reward": 1.5, "best_reward": 2.0},
    "veripo_schedule": {"phase_steps": (2, 1)},
    "grpo_geometric_rejection": {"is_low": 0.97, "is_high": 1.03},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few dozen numbers: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def objective_of(name: str) -> Objective:
    return preset(name, **SIZES.get(name, {}))


@functools.cache
def _start(num_terms: int) -> tuple[TinyPolicy, GroupBatch]:
    policy = TinyPolicy(4)
    return policy, synthetic_batch(policy, num_terms=num_terms)


def start_of(name: str) -> tuple[TinyPolicy, GroupBatch]:
    """A policy and groups sampled from it, with the reward terms that the preset names."""
    policy, batch = _start(NUM_TERMS.get(name, 2))
    return copy.deepcopy(policy), batch


@pytest.mark.parametrize("name", NAMES)
def test_five_steps_change_the_weights_and_report_finite_metrics(name: str) -> None:
    policy, first = start_of(name)
    objective = objective_of(name)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    state: dict[str, Any] = objective.initial_state()
    for _ in range(5):
        with torch.no_grad():
            batch = replace(first, old_logprobs=policy.logprobs(first))
        state, ready = objective.prepare(state, batch)
        graph = policy.graph(batch, objective.needs)
        out = objective.loss(ready, policy.logprobs(batch), ready.normalizer(), **graph)
        assert torch.isfinite(out.loss)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        metrics = {}
        for key, (total, weight) in out.metrics.items():
            assert torch.isfinite(torch.as_tensor(total)), key
            if float(weight):
                metrics[key] = float(total) / float(weight)
        state, _ = objective.control(state, metrics)
    assert state["step"] == 5
    changed = [
        not torch.equal(now, then) for now, then in zip(policy.parameters(), before, strict=True)
    ]
    assert any(changed)
    assert all(torch.isfinite(p).all() for p in policy.parameters())


def gradient_of_parts(
    objective: Objective,
    ready: Prepared,
    policy: TinyPolicy,
    parts: list[list[int]],
    total: Any = None,
) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    """Loss, gradients and metrics, added up over parts of the minibatch."""
    normalizer = ready.normalizer()
    policy.zero_grad()
    loss, sums, weights = 0.0, {}, {}
    for rows in parts:
        micro = ready.select(rows)
        out = objective.loss(
            micro,
            policy.logprobs(micro.batch),
            normalizer,
            total=total,
            **policy.graph(micro.batch, objective.needs),
        )
        out.loss.backward()
        loss += float(out.loss.detach())
        for key, (value, weight) in out.metrics.items():
            sums[key] = sums.get(key, 0.0) + float(value)
            weights[key] = weights.get(key, 0.0) + float(weight)
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()
    ]
    return loss, gradients, {k: v / weights[k] for k, v in sums.items() if weights[k]}


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_minibatch_add_up_to_it(name: str) -> None:
    objective = objective_of(name)
    policy, batch = start_of(name)
    ready = prepared(objective, batch)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    whole = gradient_of_parts(objective, ready, policy, [[0, 1, 2, 3]])
    if "whole_minibatch" in objective.needs:
        split = _on_two_ranks(objective, ready, policy)
    else:
        split = gradient_of_parts(objective, ready, policy, [[2], [0, 3], [1]])
    assert split[0] == pytest.approx(whole[0], abs=1e-12)
    for got, want in zip(split[1], whole[1], strict=True):
        assert_close(got, want, 1e-10)
    assert split[2] == pytest.approx(whole[2], abs=1e-9)


def _on_two_ranks(
    objective: Objective, ready: Prepared, policy: TinyPolicy
) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    """Two threads with half of the prompts each, whose ``total`` waits for the other."""
    barrier, slots = Barrier(2), [torch.zeros(0), torch.zeros(0)]
    normalizer = ready.normalizer()
    policy.zero_grad()

    def rank(number: int) -> Any:
        def total(x: torch.Tensor) -> torch.Tensor:
            slots[number] = x
            barrier.wait(timeout=30)
            result = slots[0] + slots[1]
            barrier.wait(timeout=30)
            return result

        mine = ready.select([[0, 3], [1, 2]][number])
        graph = policy.graph(mine.batch, objective.needs)
        return objective.loss(mine, policy.logprobs(mine.batch), normalizer, total=total, **graph)

    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(rank, range(2)))
    sum(out.loss for out in outs).backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()
    ]
    metrics = {}
    for key in outs[0].metrics:
        weight = sum(float(out.metrics[key][1]) for out in outs)
        if weight:
            metrics[key] = sum(float(out.metrics[key][0]) for out in outs) / weight
    return sum(float(out.loss.detach()) for out in outs), gradients, metrics


def extremes(batch: GroupBatch) -> dict[str, tuple[GroupBatch, torch.Tensor]]:
    """Groups and policy log-probs at which formulas like to break."""
    mask, old = batch.mask, batch.old_logprobs
    sign = torch.where(torch.arange(mask.shape[1])[:, None] % 2 == 0, 1.0, -1.0)
    constant = {key: torch.full_like(value, 0.5) for key, value in batch.terms.items()}
    flat = replace(batch, rewards=torch.full_like(batch.rewards, 0.3), terms=constant)
    one = torch.zeros_like(mask)
    one[..., 0] = True
    far = torch.where(mask, old - 50, 0.0)
    nobody = replace(
        batch,
        rewards=-batch.rewards,
        truncated=torch.ones_like(batch.truncated),
        judge_ok=torch.zeros_like(batch.judge_ok),
    )
    return {
        "flat groups": (flat, old),
        "one token": (_masked(batch, one), torch.where(one, old, 0.0)),
        "log-ratios of +-50": (batch, torch.where(mask, old + 50 * sign, 0.0)),
        "log-ratios of -+50, engine far off": (
            replace(batch, rollout_logprobs=far),
            torch.where(mask, old - 50 * sign, 0.0),
        ),
        "negative rewards, nothing passes": (nobody, old),
    }


def _masked(batch: GroupBatch, mask: torch.Tensor) -> GroupBatch:
    fields = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "guide_logprobs", "values")
    fields += ("augmented_ref_logprobs",)
    changes = {name: torch.where(mask, getattr(batch, name), 0.0) for name in fields}
    return replace(batch, mask=mask, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_no_extreme_makes_a_loss_or_gradient_infinite(name: str) -> None:
    policy, double = start_of(name)
    objective = objective_of(name)
    for what, (batch, logprobs) in extremes(double).items():
        ready = prepared(objective, _single(batch))
        x = logprobs.float().requires_grad_()
        graph = {
            key: value.detach() if value.dtype == torch.bool else value.detach().float()
            for key, value in policy.graph(batch, objective.needs).items()
        }
        out = objective.loss(ready, x, ready.normalizer(), **graph)
        assert torch.isfinite(out.loss), what
        if out.loss.requires_grad:
            out.loss.backward()
        if x.grad is not None:
            assert torch.isfinite(x.grad).all(), what
            assert x.grad[~batch.mask].abs().sum() == 0, f"{what}: padding has a gradient"
        for key, (total, weight) in out.metrics.items():
            assert torch.isfinite(torch.as_tensor(float(total))), f"{what}: {key}"
            assert torch.isfinite(torch.as_tensor(float(weight))), f"{what}: {key}"


def _single(batch: GroupBatch) -> GroupBatch:
    """In single precision, in which training runs."""
    floats = {
        name: value.float()
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and value.dtype == F64
    }
    terms = {name: value.float() for name, value in batch.terms.items()}
    return replace(batch, terms=terms, **floats)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str) -> None:
    """Two more columns of padding, filled with nonsense."""
    policy, batch = start_of(name)
    objective = objective_of(name)
    p, g, t = batch.mask.shape

    def wider(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        columns = 2 if x.ndim == 3 else 0
        if not columns or x.shape[:2] != (p, g) or x.shape[2] not in (t, t + 1):
            return x
        return torch.cat([x, torch.full((p, g, columns), value, dtype=x.dtype)], -1)

    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    padded = replace(batch, **{k: wider(v) for k, v in tensors.items()})
    if batch.auxiliary_logprobs is not None:
        auxiliary = wider(batch.auxiliary_logprobs[..., 0])[..., None]
        padded = replace(padded, auxiliary_logprobs=auxiliary)
    results = []
    for groups in (batch, padded):
        ready = prepared(objective, groups)
        logprobs = policy.logprobs(groups)
        loss = objective.loss(
            ready, logprobs, ready.normalizer(), **policy.graph(groups, objective.needs)
        ).loss
        results.append(float(loss.detach()))
    assert results[1] == pytest.approx(results[0], abs=1e-12)


def test_select_keeps_the_order_of_the_prompts() -> None:
    _, batch = start_of("grpo")
    chosen = batch.select([2, 0])
    assert chosen.image_ids == ("2", "0")
    assert_close(chosen.rewards, batch.rewards[[2, 0]])
    assert_close(chosen.terms["clip_score"], batch.terms["clip_score"][[2, 0]])
    ready = prepared(preset("grpo"), batch)
    both, one = ready.select([3, 1]), ready.select([3, 1]).select([1])
    assert_close(both.fields["advantages"], ready.fields["advantages"][[3, 1]])
    assert one.batch.image_ids == ("1",)


def test_other_old_logprobs() -> None:
    ready = prepared(preset("grpo"), toy_batch())
    changed = ready.with_old_logprobs(ready.batch.old_logprobs + 1)
    assert_close(changed.batch.old_logprobs, ready.batch.old_logprobs + 1)
    assert_close(changed.fields["advantages"], ready.fields["advantages"])


def test_a_step_without_any_kept_caption_has_loss_zero_and_no_gradient() -> None:
    batch = toy_batch(truncated=torch.ones(1, 4, dtype=torch.bool))
    assert loss_of("dapo", batch) == 0.0


def test_where_an_objective_pushes_a_caption() -> None:
    deviation = REWARDS - 0.7
    assert_close(prepared(preset("dr_grpo"), toy_batch()).caption_advantages(), deviation)
    # Credit of single tokens is averaged over those that are there, two in the third caption.
    ready = prepared(preset("tempo_prefix_tree"), toy_batch())
    tokens = ready.fields["advantages"][0, 0]
    assert_close(ready.caption_advantages()[0, 2], tokens[2, :2].mean())
    pairs = prepared(preset("online_dpo"), toy_batch()).caption_advantages()
    assert_close(pairs, [[-1.0, 0.0, 0.0, 1.0]])
    assert_close(prepared(preset("pacs"), toy_batch()).caption_advantages(), deviation)
