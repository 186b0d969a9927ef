"""The schedule's values, and an optimizer that continues where it was saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrl.config import LearnerConfig
from rayrl.learner.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_arrays,
    restore_optimizer,
)
from rayrl.learner.xe import choose_captions, xe_learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.146447]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    config = LearnerConfig(lr=1.0, schedule=schedule, warmup_steps=2)
    got = [learning_rate(step, 6, config) for step in (0, 1, 2, 3, 5)]
    assert got == pytest.approx(expected, abs=1e-6)


def test_the_cross_entropy_rate_peaks_after_a_tenth_and_ends_at_a_tenth():
    assert xe_learning_rate(0.05, 2.0) == pytest.approx(1.0)
    assert xe_learning_rate(0.1, 2.0) == pytest.approx(2.0)
    assert xe_learning_rate(0.55, 2.0) == pytest.approx(2.0 * 0.55)
    assert xe_learning_rate(1.0, 2.0) == pytest.approx(0.2)
    assert xe_learning_rate(7.0, 2.0) == pytest.approx(0.2)


def test_captions_are_chosen_evenly():
    rng = np.random.default_rng(0)
    assert sorted(choose_captions(["a", "b"], 5, rng).count(c) for c in "ab") == [2, 3]
    assert sorted(choose_captions(list("abcde"), 5, rng)) == list("abcde")
    assert len(set(choose_captions(list("abcdefg"), 5, rng))) == 5


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def steps(net, optimizer, count):
    for i in range(count):
        optimizer.zero_grad()
        (net(torch.full((1, 3), float(i + 1))) ** 2).sum().backward()
        optimizer.step()


def test_a_restored_optimizer_continues_bit_for_bit():
    config = LearnerConfig(lr=0.1, weight_decay=0.1)
    straight = model()
    named = dict(straight.named_parameters())
    optimizer = make_optimizer(named, config)
    steps(straight, optimizer, 2)
    arrays = optimizer_arrays(optimizer, named)
    resumed = model()
    resumed.load_state_dict(straight.state_dict())
    again = dict(resumed.named_parameters())
    second = make_optimizer(again, config)
    restore_optimizer(second, again, arrays)
    steps(straight, optimizer, 3)
    steps(resumed, second, 3)
    for name, parameter in named.items():
        assert torch.equal(again[name], parameter)


def test_decay_spares_vectors():
    groups = make_optimizer(dict(model().named_parameters()), LearnerConfig(weight_decay=0.3))
    decays = {g["params"][0].ndim: g["weight_decay"] for g in groups.param_groups}
    assert decays == {2: 0.3, 1: 0.0}


def test_the_state_of_another_model_is_refused_by_name():
    config, net = LearnerConfig(), model()
    named = dict(net.named_parameters())
    optimizer = make_optimizer(named, config)
    steps(net, optimizer, 1)
    arrays = optimizer_arrays(optimizer, named)
    wrong = {**arrays, "optimizer/bias/exp_avg": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"bias of shape \(5,\), want \(2,\)"):
        restore_optimizer(optimizer, named, wrong)
    missing = {k: v for k, v in arrays.items() if "/bias/" not in k}
    with pytest.raises(ValueError, match="parameter bias is not in the checkpoint"):
        restore_optimizer(optimizer, named, missing)
