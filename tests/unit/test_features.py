"""Image features computed once: equality, reuse, and the bound in bytes."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, build, gradients, make_batch

from rayrl.learner.features import FeatureCache, image_key
from rayrl.learner.logprobs import prefix_shared_outputs

KEYS = [image_key(name) for name in (b"one", b"two", b"three")]


def frozen(case):
    model = build(CASES[case][0]())
    for name, parameter in model.named_parameters():
        language = "language_model" in name or "text_model" in name or "lm_head" in name
        parameter.requires_grad_(language)
    return model


@pytest.mark.parametrize("case", CASES)
def test_cached_features_give_the_same_values_and_gradients(case):
    model, batch = frozen(case), make_batch(case)
    want = prefix_shared_outputs(model, *batch, with_entropy=True)
    want_gradient = gradients(model, want)
    cache = FeatureCache(max_bytes=2**20)
    cache.features(model, batch[0], KEYS)
    forwards = []
    model.get_image_features = lambda **inputs: forwards.append(inputs)  # must not run again
    features = cache.features(model, batch[0], KEYS)
    got = prefix_shared_outputs(model, *batch, with_entropy=True, image_features=features)
    assert not forwards
    assert (cache.hits, cache.misses, len(cache)) == (3, 3, 3)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-6)
    difference = (gradients(model, got) - want_gradient).norm() / want_gradient.norm()
    assert difference < 1e-6


@pytest.mark.parametrize("case", ["llava", "qwen3-vl"])
def test_only_unseen_images_are_encoded(case):
    model, (prompts, _, _) = frozen(case), make_batch(case)
    want = FeatureCache(max_bytes=2**20).features(model, prompts, KEYS)
    cache = FeatureCache(max_bytes=2**20)
    first = {name: value[1:2] for name, value in prompts.items() if name != "pixel_values"}
    grid = prompts.get("image_grid_thw")
    pixels = prompts["pixel_values"]
    pixels = pixels.split(1) if grid is None else pixels.split(grid.prod(-1).tolist())
    cache.features(model, {**first, "pixel_values": pixels[1]}, KEYS[1:2])
    got = cache.features(model, prompts, KEYS)
    assert (cache.hits, cache.misses) == (1, 3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_equal_keys_in_a_batch_are_encoded_once():
    model, (prompts, _, _) = frozen("llava"), make_batch("llava", text_lengths=(4, 4, 4))
    cache = FeatureCache(max_bytes=2**20)
    first, second, third = cache.features(model, prompts, [KEYS[0], KEYS[1], KEYS[0]])
    assert (cache.misses, len(cache)) == (2, 2)
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_the_least_recently_used_leave_first():
    model, (prompts, _, _) = frozen("llava"), make_batch("llava")
    one = {name: value[:1] for name, value in prompts.items()}
    size = 4 * 32 * 4  # 4 features of 32 float32 numbers
    cache = FeatureCache(max_bytes=2 * size + 1)
    a, b, c = KEYS
    for key in (a, b, a, c):
        cache.features(model, one, [key])
        assert cache.nbytes == size * len(cache) <= cache.max_bytes
    assert (cache.hits, cache.misses) == (1, 3)
    cache.features(model, one, [a])  # b was the oldest
    assert cache.hits == 2
    cache.features(model, one, [b])
    assert cache.misses == 4
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    small = FeatureCache(max_bytes=size - 1)
    assert small.features(model, one, [a])[0].shape == (1, 4, 32)
    assert (len(small), small.nbytes) == (0, 0)


def test_trainable_features_are_refused():
    model, (prompts, _, _) = build(CASES["llava"][0]()), make_batch("llava")
    with pytest.raises(ValueError, match="depend on trainable parameters"):
        FeatureCache(max_bytes=2**20).features(model, prompts, KEYS)


def test_features_must_fit_the_prompts():
    model, (prompts, ids, mask) = frozen("llava"), make_batch("llava")
    cache = FeatureCache(max_bytes=2**20)
    with pytest.raises(ValueError, match="2 keys for 3 prompts"):
        cache.features(model, prompts, KEYS[:2])
    features = cache.features(model, prompts, KEYS)
    with pytest.raises(ValueError, match=r"for \[4, 4\] placeholder ids, prompts have \[4, 4, 4\]"):
        prefix_shared_outputs(model, prompts, ids, mask, image_features=features[:2])
