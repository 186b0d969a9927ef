"""Updates on what several rounds bring: groups of unequal size, tokens that were forced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_learner import batch, largest_difference, learner, parameters

__all__ = ["batch"]


def padded(batch, rows: int):
    """The batch with ``rows`` more captions an image that do not exist."""

    def wider(array, value=0):
        widths = [(0, 0), (0, rows), *[(0, 0)] * (array.ndim - 2)]
        return np.pad(array, widths, constant_values=value)

    names = ("token_ids", "mask", "rollout_logprobs", "rewards", "weight_versions", "truncated")
    return replace(batch, **{name: wider(getattr(batch, name)) for name in names})


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "nsc", "dapo", "xrpo_novelty"])
def test_captions_that_do_not_exist_train_nothing(tiny_folder, batch, objective):
    plain, wide = (learner(tiny_folder, objective=objective) for _ in range(2))
    one, other = plain.update(batch), wide.update(padded(batch, 2))
    # AdamW's first step divides each gradient by its own size; see the test of micro-batches.
    assert largest_difference(parameters(plain), parameters(wide)) < 1e-5
    assert one.metrics["learner/loss"] == pytest.approx(other.metrics["learner/loss"], abs=1e-6)
    assert other.advantages.shape == (6, 6)
    assert np.abs(other.advantages[:, 4:]).max() == 0


def forced_first(batch):
    """The batch with the first token of every longer caption forced."""
    forced = np.zeros_like(batch.mask)
    forced[..., 0] = batch.mask[..., 1]
    rollout = np.where(forced, 0.0, batch.rollout_logprobs).astype(np.float32)
    return replace(batch, forced=forced, rollout_logprobs=rollout)


@pytest.mark.parametrize("epochs", [1, 2])
def test_engine_and_learner_do_not_disagree_about_forced_tokens(tiny_folder, batch, epochs):
    """Their log-prob of 0 is certainty, not the policy's; the correction must not see it."""
    hinted = forced_first(batch)
    far = np.where(hinted.forced, -9.0, hinted.rollout_logprobs).astype(np.float32)
    got = []
    for one in (hinted, replace(hinted, rollout_logprobs=far), replace(hinted, forced=None)):
        subject = learner(tiny_folder, objective="grpo", inner_epochs=epochs, lr=1e-9)
        got.append(subject.update(one).metrics["mismatch_kl"])
    assert got[0] == got[1]
    # Taken for the engine's log-probs, zeros would be far from the policy's.
    assert abs(got[2] - got[0]) > 0.5


def test_tokens_of_a_hint_have_no_gradient(tiny_folder, batch):
    """What stands for their log-probs changes nothing; without the mask they would train."""
    hinted = forced_first(batch)
    one = learner(tiny_folder, objective="ghpo_reference_hints")
    other = learner(tiny_folder, objective="ghpo_reference_hints")
    one.update(hinted)
    far = np.where(hinted.forced, -9.0, hinted.rollout_logprobs).astype(np.float32)
    other.update(replace(hinted, rollout_logprobs=far))
    assert largest_difference(parameters(one), parameters(other)) == 0
    all_tokens = learner(tiny_folder, objective="grpo")
    all_tokens.update(hinted)
    assert largest_difference(parameters(one), parameters(all_tokens)) > 1e-4
