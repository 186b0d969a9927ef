"""Every preset that the trainer can feed takes five real steps on the tiny captioner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.objectives import preset, presets
from rayrl.objectives.compile import PROVIDED
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]

FEASIBLE = sorted(
    name for name in presets() if preset(name).needs <= PROVIDED | {"whole_minibatch"}
)
# They name reward terms of their own, which this batch of one term does not have.
OTHER_TERMS = {"asr_word_accuracy", "reward_model", "clip_reward_scst"}
# Its bounds are so tight that random captions all fall outside: nothing is learned, by design.
NOTHING_PASSES = {"grpo_geometric_rejection"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_most_presets_can_be_fed():
    assert len(FEASIBLE) >= 100


@pytest.mark.parametrize("name", sorted(set(FEASIBLE) - OTHER_TERMS - NOTHING_PASSES))
def test_five_steps_change_the_weights_and_report_finite_metrics(tiny_folder, batch, name):
    second = np.random.default_rng(1).random(batch.rewards.shape).astype(np.float32)
    two_terms = {"cider_d": batch.rewards - second, "length": second}
    subject = learner(tiny_folder, objective=name)
    before = parameters(subject)
    for _ in range(5):
        report = subject.update(replace(batch, terms=two_terms))
    after = parameters(subject)
    assert max(float(np.abs(before[key] - after[key]).max()) for key in before) > 0
    bad = {key: value for key, value in report.metrics.items() if not np.isfinite(value)}
    assert not bad
    assert np.isfinite(report.advantages).all()
