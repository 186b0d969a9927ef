"""bfloat16 with float32 masters: small updates count, and a resumed run repeats bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.config import LearnerConfig
from rayrl.learner.masters import Masters
from rayrl.learner.optimizer import make_optimizer
from tests.unit.test_learner import batch, largest_difference, learner, parameters, same_numbers

__all__ = ["batch"]


def steps(parameter, named, count, after):
    """Count updates of about 1e-4 each, against a gradient of one sign."""
    optimizer = make_optimizer(named, LearnerConfig(lr=1e-4))
    for _ in range(count):
        optimizer.zero_grad(set_to_none=True)
        (parameter.float() * 3.0).sum().backward()
        after[0]()
        optimizer.step()
        after[1]()


def test_a_hundred_updates_below_the_precision_add_up_with_masters_and_vanish_without():
    plain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    steps(plain, {"w": plain}, 100, (lambda: None, lambda: None))
    assert torch.equal(plain, torch.ones(4, dtype=torch.bfloat16))
    computing = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"w": computing})
    steps(computing, masters.named, 100, (masters.collect, masters.publish))
    # AdamW moves by the rate a step where the gradient is constant: 100 x 1e-4.
    assert masters.named["w"].tolist() == pytest.approx([0.99] * 4, abs=1e-5)
    assert computing.dtype == torch.bfloat16
    assert torch.equal(computing, masters.named["w"].bfloat16())


def test_gradients_of_micro_batches_add_up_in_float32():
    computing = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = Masters({"w": computing})
    # 256 + 1 is 256 in bfloat16.
    for scale in (256.0, 1.0, 1.0):
        (computing * scale).sum().backward()
        masters.collect()
    assert masters.named["w"].grad.item() == 258.0
    assert computing.grad is None


def test_float32_parameters_are_their_own_masters():
    parameter = nn.Parameter(torch.ones(2))
    masters = Masters({"w": parameter})
    assert masters.named["w"] is parameter
    assert masters.arrays() == {}


def test_the_policy_computes_and_publishes_in_bfloat16(tiny_folder, batch):
    subject = learner(tiny_folder, dtype="bfloat16", lr=1e-6)
    before = {name: value.clone() for name, value in subject._named.items()}
    report = subject.update(batch)
    assert np.isfinite(report.metrics["learner/loss"])
    weights = subject.weights(trained_only=False)
    assert weights.bfloat16 == frozenset(weights.arrays)
    moved = [name for name, value in subject._named.items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    assert 0 < report.metrics["learner/update_ratio"] < 1e-4
    assert all(value.dtype == torch.float32 for value in subject._named.values())


def test_bfloat16_steps_go_where_float32_steps_go(tiny_folder, batch):
    half, full = learner(tiny_folder, dtype="bfloat16"), learner(tiny_folder)
    one, other = half.update(batch), full.update(batch)
    assert one.metrics["learner/grad_norm"] == pytest.approx(
        other.metrics["learner/grad_norm"], rel=0.05
    )
    assert one.metrics["learner/loss"] == pytest.approx(other.metrics["learner/loss"], abs=0.01)


def test_a_resumed_run_in_bfloat16_continues_bit_for_bit(tiny_folder, batch, tmp_path):
    options = {"dtype": "bfloat16", "inner_epochs": 2, "minibatches": 3, "lr": 1e-5}
    straight = learner(tiny_folder, **options)
    straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed = learner(tiny_folder, **options)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    for name, master in straight._named.items():
        assert torch.equal(resumed._named[name], master), name
    for _ in range(2):
        assert same_numbers(straight.update(batch), resumed.update(batch))
    for name, master in straight._named.items():
        assert torch.equal(resumed._named[name], master), name
    assert largest_difference(parameters(straight), parameters(resumed)) == 0


def test_a_float32_checkpoint_starts_masters_from_its_weights(tiny_folder, batch):
    full, half = learner(tiny_folder), learner(tiny_folder, dtype="bfloat16")
    full.update(batch)
    half.restore(full.checkpoint())
    for name, parameter in full._named.items():
        assert torch.equal(half._named[name], parameter.bfloat16().float()), name


def test_a_run_in_float32_goes_on_from_the_masters_of_a_bfloat16_checkpoint(tiny_folder, batch):
    half, full = learner(tiny_folder, dtype="bfloat16", lr=1e-5), learner(tiny_folder)
    half.update(batch)
    full.restore(half.checkpoint())
    for name, master in half._named.items():
        assert torch.equal(full._named[name], master), name
    # What engines get is what trains.
    assert full.policy.model.get_parameter(name) is full._named[name]
    assert not any(key.startswith("master/") for key in full.checkpoint().arrays)
