"""Attention in windows, against transformers' one call for each."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_families import CASES, build, make_batch
from torch.nn.functional import scaled_dot_product_attention

from rayrl import windows
from rayrl.config import EngineConfig
from rayrl.engine.base import EngineSetup
from rayrl.engine.hf import HfEngine
from rayrl.vlm import load_captioner
from rayrl.windows import NAME, use_windowed_attention, windowed_attention
from tests.captioners import qwen_without_video, write_captioner

LENGTHS = [4, 2, 4, 4, 1, 2, 4]


def one_by_one(query, key, value, lengths, scale):
    parts = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("lengths", [LENGTHS, [3, 3, 3], [5]])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_equal_one_window_at_a_time(lengths, scale):
    torch.manual_seed(0)
    given = [torch.randn(1, 2, sum(lengths), 8, requires_grad=True) for _ in range(3)]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    seed = torch.randn(1, sum(lengths), 2, 8)
    results = []
    for compute in (
        lambda: windowed_attention(
            None, *given, None, cu_seq_lens_q=boundaries, scaling=scale, is_causal=False
        )[0],
        lambda: one_by_one(*given, lengths, scale),
    ):
        output = compute()
        results.append([output, *torch.autograd.grad((output * seed).sum(), given)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("qwen")])
def test_a_tower_computes_the_same_with_a_call_for_each_length(case, monkeypatch):
    plain = build(CASES[case][0]())
    model = copy.deepcopy(plain)
    use_windowed_attention(model)
    tower = plain.config.vision_config
    assert model.config.vision_config._attn_implementation == NAME
    assert tower._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    prompts, _, _ = make_batch(case)
    pixels, grid = prompts["pixel_values"], prompts["image_grid_thw"]
    assert len({tuple(size) for size in grid.tolist()}) > 1
    results = []
    calls = SimpleNamespace(shapes=[])

    def counted(query, *args, **options):
        calls.shapes.append(query.shape)
        return scaled_dot_product_attention(query, *args, **options)

    monkeypatch.setattr(windows, "scaled_dot_product_attention", counted)
    for each in (plain, model):
        visual = each.model.visual
        output = visual(pixels, grid_thw=grid).pooler_output
        output.square().sum().backward()
        gradients = [p.grad for p in visual.parameters() if p.grad is not None]
        results.append([output.detach(), *gradients])
    assert len(results[0]) > 10
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # No two calls of a layer are for windows of one length.
    layers = tower.depth
    assert 0 < len(calls.shapes) <= layers * len({shape[2] for shape in calls.shapes})


@pytest.mark.parametrize("load", ["captioner", "engine"])
def test_models_that_are_loaded_attend_so(tmp_path, load):
    folder = write_captioner("qwen2.5-vl", ["a red square", "a blue circle"], tmp_path / "model")
    with qwen_without_video():
        if load == "captioner":
            model = load_captioner(folder).model
        else:
            setup = EngineSetup(folder=folder, config=EngineConfig(backend="hf"), group_size=2)
            model = HfEngine(setup)._model
    assert model.config.vision_config._attn_implementation == NAME
    assert model.config.text_config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "again")
    assert NAME not in (tmp_path / "again" / "config.json").read_text()
