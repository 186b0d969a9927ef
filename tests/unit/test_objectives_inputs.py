"""What a part can read in each slot."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objectives_toy import loss_of

from rayrl.objectives import part, preset
from rayrl.objectives.inputs import readable


@pytest.mark.parametrize(
    ("slot", "function", "message"),
    [
        ("surrogate", lambda policy_logprobs, step: policy_logprobs, "'step', which only select, "),
        ("surrogate", lambda policy_logprobs, state: policy_logprobs, "'state', which only sel"),
        ("regularizers", lambda state: state, "'state', which only select, labels, segments, "),
        ("advantage", lambda policy_logprobs: policy_logprobs, "only ratio, bounds, weights, "),
        ("advantage", lambda metrics: metrics, "'metrics', which only control can; beside its n"),
        ("select", lambda labels: labels, "'labels', which only segments, aggregate, "),
        ("ratio", lambda low: low, "'low', which only weights, "),
        ("reducer", lambda advantages: advantages, "part of reducer can read image_ids, token_ids"),
        ("surrogate", lambda whole_minibatch: 0, "'whole_minibatch', which nothing provides"),
        ("rollout", lambda drawn, rewards: [], "rollout can read drawn, take, encode"),
    ],
)
def test_a_part_reads_what_is_there_in_its_slot(slot: str, function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"objective grpo: {slot} <lambda> reads .*{message}"):
        preset("grpo", **{slot: function})


def test_what_a_slot_can_read_is_there() -> None:
    """Parts that read all that the table says, needs aside."""
    seen: dict[str, set[str]] = {}

    def reading(slot: str, result: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        names = [name for name in readable(slot) if name != "state"]

        def part_of_slot(**given: Any) -> Any:
            seen[slot] = {name for name, value in given.items() if value is not None}
            return result(given)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        part_of_slot.__signature__ = signature  # type: ignore[attr-defined]
        return part_of_slot

    results = {
        "select": lambda given: given["valid"].float(),
        "aggregate": lambda given: given["rewards"],
        "advantage": lambda given: given["advantages"],
        "mask": lambda given: given["mask"],
        "ratio": lambda given: given["policy_logprobs"] - given["old_logprobs"],
        "bounds": lambda given: (0.8, 1.2),
        "weights": lambda given: given["ratio"],
        "surrogate": lambda given: given["ratio"],
        "regularizers": lambda given: given["pair_losses"].sum(),
        "reducer": lambda given: given["losses"].sum(),
    }
    slots: dict[str, Any] = {slot: reading(slot, result) for slot, result in results.items()}
    slots["advantage"] = [part("group_center"), part(slots["advantage"])]
    others = {"labels": "levels", "segments": "fixed_length", "segment_length": 2}
    pairs = {"pairs": "best_worst", "score": "logprob", "margin": "difference", "link": "hinge"}
    assert loss_of("grpo", overrides={**others, **pairs, **slots}) != 0
    assert seen == {slot: set(readable(slot)) - {"state"} for slot in slots}


def test_the_reducer_reads_lengths() -> None:
    def per_token(losses: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return losses.sum() / lengths.sum()

    assert loss_of("nsc", overrides={"reducer": per_token}) == pytest.approx(loss_of("nsc"))
