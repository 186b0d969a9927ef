"""Update size, and operations counted from a model's shape, against numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_families import CASES, build, make_batch
from torch.utils.flop_counter import FlopCounterMode

from rayrl.learner.flops import FlopCounter
from rayrl.learner.logprobs import prefix_shared_outputs
from rayrl.learner.measure import UpdateSize, device_peak_tflops


def test_the_update_is_measured_against_the_weights():
    named = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    size = UpdateSize(named)
    assert size.ratio() == 0.0
    named["a"][0, 1] = 0.5
    assert size.ratio() == pytest.approx(0.5 / 5.0)


def test_large_tensors_are_measured_by_a_sample_of_every_column():
    torch.manual_seed(0)
    weight = torch.randn(1024, 512)
    size = UpdateSize({"w": weight})
    assert size._before["w"].numel() < 2**17
    change = torch.zeros(1024, 512)
    change[:, 3] = 0.1
    weight += change
    want = float(change.norm() / (weight - change).norm())
    assert size.ratio() == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("case", ["idefics3", "llava"])
def test_operations_from_the_shape_are_those_that_run(case):
    model, (prompts, ids, mask) = build(CASES[case][0]()), make_batch(case)
    model.eval()
    mask = torch.ones_like(mask)
    counter = FlopCounter(model)
    useful = counter.count(prompts, mask, backward=False)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        prefix_shared_outputs(model, prompts, ids, mask)
    # What runs has filler slots, and merges equal beginnings; the rest is the same work.
    assert useful == pytest.approx(counted.get_total_flops(), rel=0.25)


def test_frozen_parts_cost_no_weight_gradients():
    model, (prompts, _, mask) = build(CASES["llava"][0]()), make_batch("llava")
    forward = FlopCounter(model).forward(prompts, mask)
    total = {part: work.matrices + work.attention for part, work in forward.items()}
    everything = FlopCounter(model).count(prompts, mask, backward=True)
    assert everything == pytest.approx(3 * sum(total.values()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    frozen = FlopCounter(model).count(prompts, mask, backward=True)
    assert frozen == pytest.approx(total["vision"] + total["connector"] + 3 * total["language"])
    kept = FlopCounter(model).count(prompts, mask, backward=True, encoded=0.0)
    assert kept == pytest.approx(3 * total["language"])
    assert all(math.isfinite(value) and value > 0 for value in total.values())


def test_tiles_that_only_fill_a_prompt_up_are_no_work():
    """Two prompts of two tiles each, and of one and two with one of zeros."""
    model, (prompts, _, mask) = build(CASES["idefics3"][0]()), make_batch("idefics3")
    pixels = prompts["pixel_values"]
    p, tiles = pixels.shape[:2]
    want = FlopCounter(model).forward(prompts, mask)["vision"]
    more = torch.cat([pixels, torch.zeros_like(pixels)], 1)
    filled = FlopCounter(model).forward({**prompts, "pixel_values": more}, mask)["vision"]
    assert filled == want
    more[0, tiles] = 1.0
    one_more = FlopCounter(model).forward({**prompts, "pixel_values": more}, mask)["vision"]
    assert one_more.matrices == pytest.approx(want.matrices * (1 + 1 / (p * tiles)))


def test_the_share_of_images_that_are_encoded_is_one_of_their_tokens():
    model, (prompts, _, _) = build(CASES["qwen2.5-vl"][0]()), make_batch("qwen2.5-vl")
    tokens = (prompts["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert len(set(tokens)) > 1
    counter = FlopCounter(model)
    assert counter.share(prompts, []) == 0.0
    assert counter.share(prompts, [1]) == pytest.approx(tokens[1] / sum(tokens))
    assert counter.share(prompts, range(len(tokens))) == 1.0


def test_layers_that_attend_within_windows_cost_less():
    # Windows of 4 x 4 patches in one of two layers, and 24 patches an image on average.
    model, (prompts, _, mask) = build(CASES["qwen2.5-vl"][0]()), make_batch("qwen2.5-vl")
    attention = FlopCounter(model).forward(prompts, mask)["vision"].attention
    assert attention == pytest.approx(4 * 32 * 3 * 24 * (24 + 16))


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(monkeypatch, name, bf16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_peak_tflops("cuda", torch.bfloat16) == bf16
    assert device_peak_tflops("cpu", torch.bfloat16) is None
