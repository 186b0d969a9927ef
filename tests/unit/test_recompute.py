"""Activation checkpointing: less is kept for the backward pass, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, build, gradients, make_batch

from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from rayrl.learner.recompute import recompute_layers
from tests.unit.test_learner import batch, largest_difference, learner, parameters

__all__ = ["batch"]


@pytest.mark.parametrize("outputs", [prefix_shared_outputs, naive_outputs])
@pytest.mark.parametrize("case", ["idefics3", "paligemma2", "blip-2 opt", "qwen3-vl"])
def test_values_and_gradients_stay(case, outputs):
    model, inputs = build(CASES[case][0]()), make_batch(case)
    want = outputs(model, *inputs, with_entropy=True)
    want_gradient = gradients(model, want)
    assert recompute_layers(model) >= 2
    got = outputs(model, *inputs, with_entropy=True)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-6)
    difference = (gradients(model, got) - want_gradient).norm() / want_gradient.norm()
    assert difference < 1e-6
    assert not model.training


def bytes_kept(model, inputs):
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = prefix_shared_outputs(model, *inputs)
    del out
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass():
    model, inputs = build(CASES["llava"][0]()), make_batch("llava")
    plain = bytes_kept(model, inputs)
    recompute_layers(model)
    assert bytes_kept(model, inputs) < plain / 2


def test_steps_of_the_learner_stay(tiny_folder, batch):
    plain = learner(tiny_folder)
    frugal = learner(tiny_folder, activation_checkpointing=True)
    one, other = plain.update(batch), frugal.update(batch)
    assert one.metrics["learner/grad_norm"] == pytest.approx(
        other.metrics["learner/grad_norm"], rel=1e-6
    )
    assert largest_difference(parameters(plain), parameters(frugal)) < 1e-6
    # Neither the reference nor the files know of it.
    assert frugal.policy.reference is not None
    assert set(frugal.checkpoint().model_files) == set(plain.checkpoint().model_files)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers that recompute"):
        recompute_layers(torch.nn.Linear(1, 1))
