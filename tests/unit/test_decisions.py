"""What controllers decide is done to the weights and to the learning rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrl.learner.decisions import Decisions
from rayrl.learner.learner import Learner
from rayrl.objectives import preset
from rayrl.objectives.plan import part
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]


def weight(value):
    return {"w": torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))}


def test_extrapolation_goes_on_from_what_the_step_trained():
    named = weight(0.40)
    subject = Decisions(named, extrapolates=True)
    for trained, want in ((0.50, 0.53), (0.58, 0.604)):
        # 0.50 + 0.3 (0.50 - 0.40); then 0.58 + 0.3 (0.58 - 0.50): v was trained, not moved on.
        named["w"].data.fill_(trained)
        assert subject.take({"extrapolate": 0.3})
        subject.end_step()
        assert named["w"].item() == pytest.approx(want, abs=1e-12)
    named["w"].data.fill_(0.7)
    subject.end_step()  # nothing was decided in this step
    assert named["w"].item() == 0.7


def test_the_state_between_steps_is_restored():
    named, other = weight(0.4), weight(0.0)
    one, two = (Decisions(each, extrapolates=True) for each in (named, other))
    named["w"].data.fill_(0.5)
    one.take({"scale_lr": 0.25})
    one.end_step()
    other["w"].data.fill_(0.5)
    two.restore(one.arrays())
    assert two.lr_scale == 0.25
    for each, subject in ((named, one), (other, two)):
        each["w"].data.fill_(0.6)
        subject.take({"extrapolate": 1.0})
        subject.end_step()
    assert named["w"].item() == other["w"].item() == pytest.approx(0.7)


def test_a_rate_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="learning rate by 0"):
        Decisions(weight(0.0), extrapolates=False).take({"scale_lr": 0.0})


def halved(metrics):
    return {"scale_lr": 0.5} if metrics["objective/kept"] > 0 else {}


def test_a_controller_of_ones_own_scales_the_rate_of_later_updates(tiny_folder, batch):
    subject = learner(tiny_folder, minibatches=3)
    subject.objective = preset("grpo", control=[part(halved)])
    # Its first update has the scheduled rate, the two after it half of it.
    assert subject.update(batch).metrics["learner/lr"] == pytest.approx(0.5e-3)
    assert subject.update(batch).metrics["learner/lr"] == pytest.approx(0.45e-3)


def momentum_learner(tiny_folder, factor) -> Learner:
    subject = learner(tiny_folder, objective="apo_momentum", schedule="constant")
    subject.objective = preset("apo_momentum", momentum_factor=factor)
    return subject


def test_the_learner_carries_momentum_across_steps_and_resumes_it(tiny_folder, batch):
    plain, moving = momentum_learner(tiny_folder, 0.0), momentum_learner(tiny_folder, 0.3)
    start = parameters(plain)
    plain.update(batch)
    moving.update(batch)
    trained, moved = parameters(plain), parameters(moving)
    for name, value in trained.items():
        want = value + 0.3 * (value - start[name])
        np.testing.assert_allclose(moved[name], want, rtol=0, atol=1e-6)
    assert max(np.abs(moved[name] - trained[name]).max() for name in trained) > 1e-4
    resumed = momentum_learner(tiny_folder, 0.3)
    resumed.restore(moving.checkpoint())
    moving.update(batch)
    resumed.update(batch)
    for name, value in parameters(moving).items():
        assert np.array_equal(parameters(resumed)[name], value), name
