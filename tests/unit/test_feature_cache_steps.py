"""Cached image features leave every step as it is, and the vision tower idle."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.test_learner import (
    batch,
    largest_difference,
    learner,
    parameters,
    same_numbers,
)

__all__ = ["batch"]

EPOCHS = {"inner_epochs": 2, "minibatches": 3}


def frozen(folder, **config):
    return learner(folder, trainable=("language",), **{**EPOCHS, **config})


def count_images(model):
    """Images that go through the vision tower, as a list that grows."""
    seen = []
    encode = model.get_image_features

    def counted(pixel_values, *args, **options):
        seen.append(len(pixel_values))
        return encode(pixel_values, *args, **options)

    model.get_image_features = counted
    return seen


def test_steps_are_the_same_with_and_without_the_cache(tiny_folder, batch):
    cached, plain = frozen(tiny_folder), frozen(tiny_folder, feature_cache_mb=0)
    for _ in range(2):
        one, other = cached.update(batch), plain.update(batch)
        assert one.metrics["kl"] == pytest.approx(other.metrics["kl"], abs=1e-6)
        assert one.metrics["learner/grad_norm"] == pytest.approx(
            other.metrics["learner/grad_norm"], rel=1e-5
        )
    # Twelve updates of 1e-3 an element moved them by up to 1e-2.
    assert largest_difference(parameters(cached), parameters(plain)) < 1e-4


def test_an_image_is_encoded_once_for_policy_reference_and_all_epochs(tiny_folder, batch):
    cached, plain = frozen(tiny_folder), frozen(tiny_folder, feature_cache_mb=0)
    seen = {
        name: (count_images(subject.policy.model), count_images(subject.policy.reference))
        for name, subject in (("cached", cached), ("plain", plain))
    }
    speeds = [subject.update(batch).metrics for subject in (cached, plain)]
    cached.update(batch)
    assert sum(sum(images) for images in seen["cached"]) == 6
    # The start of the step and two epochs of the policy, and the reference.
    assert [sum(images) for images in seen["plain"]] == [18, 6]
    assert all(np.isfinite(row["learner/tflops_per_second"]) for row in speeds)


def test_a_vision_tower_that_trains_is_not_cached(tiny_folder):
    assert learner(tiny_folder).policy.features is None
    assert learner(tiny_folder, trainable=("connector", "language")).policy.features is None
    assert frozen(tiny_folder, prefix_shared=False).policy.features is None


def test_a_resumed_run_with_an_empty_cache_repeats_bit_for_bit(tiny_folder, batch):
    straight, resumed = frozen(tiny_folder), frozen(tiny_folder)
    straight.update(batch)
    resumed.restore(straight.checkpoint())
    assert len(straight.policy.features) == 6 and len(resumed.policy.features) == 0
    assert same_numbers(straight.update(batch), resumed.update(batch))
    assert largest_difference(parameters(straight), parameters(resumed)) == 0.0


@pytest.mark.parametrize("objective", ["grpo", "pami_changed_image"])
def test_no_picture_is_processed_again_whose_features_are_kept(tiny_folder, batch, objective):
    # No room for pixels between passes; that for text is a part of it.
    subject = frozen(tiny_folder, objective=objective, input_cache_mb=1)
    subject.policy._inputs._max_bytes = 50_000
    plain = frozen(tiny_folder, objective=objective, feature_cache_mb=0)
    processed, own = [], subject.policy._inputs._processed
    subject.policy._inputs._processed = lambda one: processed.append(one) or own(one)
    for step in range(3):
        assert same_numbers(plain.update(batch), subject.update(batch))
        assert bool(processed) == (step == 0)
        processed.clear()
        subject.prepare(batch.images)
        assert not processed
