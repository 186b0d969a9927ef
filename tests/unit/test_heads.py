"""The critic: its values, its gradient, that it learns, and that a run resumes with it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.learner.heads import Critic, ValueHead
from rayrl.objectives import preset
from rayrl.objectives.config import SourcesConfig
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]


def critic_of(subject) -> Critic:
    (critic,) = [m for m in subject.providers._members if isinstance(m, Critic)]
    return critic


def test_values_start_at_zero_and_do_not_shape_the_policy():
    head = ValueHead(3)
    hidden = torch.randn(5, 3, requires_grad=True)
    values = head(hidden)
    assert values.tolist() == [0.0] * 5
    (values - 1).square().sum().backward()
    assert hidden.grad is None
    # Each of the five values has error -1.
    assert head.linear.bias.grad.item() == -10.0
    torch.testing.assert_close(head.linear.weight.grad, -2 * hidden.detach().sum(0)[None])


def test_the_gradient_of_the_value_loss_is_that_of_finite_differences(tiny_folder, batch):
    subject = learner(tiny_folder, objective="ppo", grad_clip=1e9)
    critic = critic_of(subject)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.module.linear.weight, std=0.05)
    start = critic.module.linear.weight.detach().clone()
    losses = {}
    for shift in (0.0, 1e-2, -1e-2):
        with torch.no_grad():
            critic.module.linear.weight.copy_(start).select(1, 3).add_(shift)
        again = learner(tiny_folder, objective="ppo", grad_clip=1e9)
        critic_of(again).module.load_state_dict(critic.module.state_dict())
        again._objective = preset("ppo", value_coef=1.0, value_clip=math.inf)
        losses[shift] = again.update(batch).metrics["objective/loss_value_error"]
        if shift == 0.0:
            gradient = critic_of(again).module.linear.weight.grad[0, 3].item()
    # The loss is quadratic in the weight, so the central difference is exact but for rounding.
    assert gradient == pytest.approx((losses[1e-2] - losses[-1e-2]) / 2e-2, rel=1e-3)


def test_the_critic_learns_to_explain_rewards_that_the_captions_show(tiny_folder, batch):
    # What a caption is worth is decided by its first token, which every later state has seen, and
    # by its image.
    worth = (batch.token_ids[..., 0] % 5).astype(np.float32) + np.arange(6, dtype=np.float32)[
        :, None
    ]
    shown = replace(batch, rewards=worth)
    subject = learner(
        tiny_folder, objective="ppo", lr=1e-6, inner_epochs=4, sources=SourcesConfig(head_lr=0.05)
    )
    explained = [
        subject.update(shown).metrics["objective/critic_explained_variance"] for _ in range(25)
    ]
    assert explained[0] < 0  # values of 0 are worse than the mean
    assert explained[-1] > 0.5
    assert explained[-1] > explained[12] > explained[0]


def test_micro_batches_leave_the_critic_alone(tiny_folder, batch):
    whole = learner(tiny_folder, objective="ppo")
    parts = learner(tiny_folder, objective="ppo", micro_batch_images=2)
    for subject in (whole, parts):
        subject.update(batch)
    one, other = (critic_of(s).module.linear.weight for s in (whole, parts))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert one.abs().max() > 1e-3


def test_a_critic_is_resumed_bit_for_bit(tiny_folder, batch, tmp_path):
    options = {"objective": "ppo", "inner_epochs": 2, "minibatches": 3}
    straight = learner(tiny_folder, **options)
    for _ in range(2):
        straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed = learner(tiny_folder, **options)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    for _ in range(2):
        one, other = straight.update(batch), resumed.update(batch)
    assert one.metrics["learner/grad_norm_critic"] == other.metrics["learner/grad_norm_critic"]
    assert torch.equal(*(critic_of(s).module.linear.weight for s in (straight, resumed)))
    for name, value in parameters(straight).items():
        assert np.array_equal(parameters(resumed)[name], value), name


def test_a_checkpoint_without_the_critic_is_refused(tiny_folder):
    checkpoint = learner(tiny_folder, objective="grpo").checkpoint()
    with pytest.raises(ValueError, match="critic linear\\.weight is absent in the checkpoint"):
        learner(tiny_folder, objective="ppo").restore(checkpoint)
