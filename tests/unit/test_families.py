"""Prefix-shared log-probs on every family, against one unpadded sequence at a time and in gradient
against G full copies."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_families import CASES, IMAGE, PAD, ROPE, TEXT, VISION, build, gradients, make_batch

from rayrl.checkpoint_names import checkpoint_names
from rayrl.learner.families import family_of, grid_positions, refusal
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs


def one_by_one(model, prompts, ids, mask):
    """Log-probs [P, G, T] from one unpadded sequence at a time, as transformers documents it."""
    out = torch.zeros(ids.shape)
    grid = prompts.get("image_grid_thw")
    pixels = prompts["pixel_values"]
    pixels = pixels.split(1) if grid is None else pixels.split(grid.prod(-1).tolist())
    for p in range(len(ids)):
        real = prompts["attention_mask"][p].bool()
        prompt = prompts["input_ids"][p][real]
        for g in range(ids.shape[1]):
            caption = ids[p, g][mask[p, g]]
            row = torch.cat([prompt, caption])[None]
            inputs = {"input_ids": row, "pixel_values": pixels[p]}
            inputs["attention_mask"] = torch.ones_like(row)
            in_caption = (torch.arange(row.shape[1]) >= len(prompt)).long()[None]
            if "token_type_ids" in prompts:
                inputs["token_type_ids"] = in_caption
            if "pixel_attention_mask" in prompts:
                inputs["pixel_attention_mask"] = prompts["pixel_attention_mask"][p : p + 1]
            if grid is not None:
                inputs["image_grid_thw"] = grid[p : p + 1]
                inputs["mm_token_type_ids"] = (row == IMAGE).long()
            scores = model(**inputs).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            out[p, g, : len(caption)] = scores.gather(1, caption[:, None])[:, 0]
    return out


@pytest.mark.parametrize("case", CASES)
def test_values_equal_one_sequence_at_a_time(case):
    model = build(CASES[case][0]())
    for side in ("left", "right"):
        prompts, ids, mask = make_batch(case, side=side)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            want = one_by_one(model, prompts, ids, mask)
            got = prefix_shared_outputs(model, prompts, ids, mask).logprobs
            naive = naive_outputs(model, prompts, ids, mask).logprobs
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(naive, want, rtol=0, atol=1e-5)
        assert want[mask].std() > 0.5  # not flat, so that the comparison means something


@pytest.mark.parametrize("vision", ["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_naive(case, vision):
    model = build(CASES[case][0]())
    for name, parameter in model.named_parameters():
        if vision == "frozen" and ("vision" in name or "visual" in name):
            parameter.requires_grad_(False)
    batch = make_batch(case)
    sampling = {"temperature": 0.8, "banned_ids": (PAD, IMAGE), "with_entropy": True}
    want = naive_outputs(model, *batch, **sampling)
    want_gradient = gradients(model, want)
    got = prefix_shared_outputs(model, *batch, **sampling)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    difference = (gradients(model, got) - want_gradient).norm() / want_gradient.norm()
    assert difference < 1e-5


def test_the_image_and_the_earlier_words_matter():
    """What equality cannot show: log-probs are those of this image and this caption."""
    for case in CASES:
        model = build(CASES[case][0]())
        prompts, ids, mask = make_batch(case)
        with torch.no_grad():
            got = prefix_shared_outputs(model, prompts, ids, mask).logprobs
            prompts["pixel_values"] = prompts["pixel_values"].flip(-1)
            other_image = prefix_shared_outputs(model, prompts, ids, mask).logprobs
            prompts["pixel_values"] = prompts["pixel_values"].flip(-1)
            ids[0, 0, 0] = ids[0, 0, 0] % 40 + 7
            other_word = prefix_shared_outputs(model, prompts, ids, mask).logprobs
        assert ((got - other_image)[mask].abs() > 1e-4).float().mean() > 0.9, case
        assert ((got - other_word)[0, 0].abs() > 1e-4).all(), case
        assert torch.equal(got[1:], other_word[1:]), case


@pytest.mark.parametrize("case", ["qwen2.5-vl", "qwen3-vl"])
def test_a_grids_positions_are_computed_on_the_cpu_and_before_the_vision_tower(case, monkeypatch):
    """A GPU would wait for each value that is read, behind all that it was given before."""
    model = build(CASES[case][0]())
    batch = make_batch(case)
    prompts = {name: value for name, value in batch[0].items() if name != "pixel_values"}
    # Inputs that can do nothing but go to the CPU.
    elsewhere = {
        name: SimpleNamespace(cpu=lambda value=value: value, device="cpu")
        for name, value in prompts.items()
    }
    want, _ = model.model.get_rope_index(**prompts)
    assert torch.equal(grid_positions(model, elsewhere), want)
    calls = []
    for owner, name in ((model.model, "get_rope_index"), (model, "get_image_features")):
        own = getattr(owner, name)
        noted = functools.partial(
            lambda own, name, *args, **options: calls.append(name) or own(*args, **options),
            own,
            name,
        )
        monkeypatch.setattr(owner, name, noted)
    prefix_shared_outputs(model, *batch)
    assert calls == ["get_rope_index", "get_image_features"]


def test_another_family_is_computed_naively_with_one_warning():
    torch.manual_seed(0)
    config = transformers.InternVLConfig(
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        vision_config={**VISION, "image_size": [64, 64], "patch_size": [16, 16]},
        text_config={**TEXT, "model_type": "qwen2"},
    )
    model = build(config)
    prompts, ids, mask = make_batch("llava")
    prompts["pixel_values"] = torch.randn(3, 3, 64, 64)
    with pytest.warns(UserWarning, match="InternVL.*3 full copies") as caught:
        got = prefix_shared_outputs(model, prompts, ids, mask).logprobs
        prefix_shared_outputs(model, prompts, ids, mask)
    assert len(caught) == 1
    assert "qwen2_5_vl" in str(caught[0].message)
    torch.testing.assert_close(got, one_by_one(model, prompts, ids, mask), rtol=0, atol=1e-5)


def test_images_of_an_unknown_family_are_not_mixed_up():
    """Qwen2-VL glues the patches of all images together, of a different number each."""
    config = transformers.Qwen2VLConfig(
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=5,
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config={**TEXT, "rope_scaling": ROPE},
    )
    model = build(config)
    batch = make_batch("qwen2.5-vl")
    with torch.no_grad():
        got = naive_outputs(model, *batch).logprobs
    torch.testing.assert_close(got, one_by_one(model, *batch), rtol=0, atol=1e-5)


def test_images_that_nobody_can_tell_apart_are_refused():
    rows = {"input_ids": torch.zeros(2, 4), "pixel_values": torch.zeros(6, 3, 8, 8)}
    model = SimpleNamespace(config=SimpleNamespace(model_type="unheard_of"))
    family = family_of(model, rows)
    with pytest.raises(ValueError, match=r"6 rows for 2 prompts.*micro_batch_images 1"):
        family.take_images(rows, family.image_inputs, [0, 0, 1, 1])
    alone = {**rows, "input_ids": torch.zeros(1, 4)}
    taken = family.take_images(alone, family.image_inputs, [0, 0])
    assert taken["pixel_values"].shape == (12, 3, 8, 8)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_under_its_published_names_is_read(case, tmp_path):
    model = build(CASES[case][0]())
    model.save_pretrained(tmp_path)
    names = checkpoint_names(model.config)
    # A matrix under two names is written once.
    tensors = {names.get(name, name): p.detach().clone() for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    got = dict(again.named_parameters())
    assert all(torch.equal(got[name], p) for name, p in model.named_parameters())
    if case in ("llava", "paligemma"):
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in tensors


def test_attention_without_a_mask_is_refused_with_the_remedy():
    model = build(CASES["llava"][0]())
    assert refusal(model) is None
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    assert "load the model with attn_implementation='sdpa'" in refusal(model)


def test_an_encoder_decoder_text_part_is_an_error():
    config = transformers.Blip2Config(
        image_token_index=IMAGE,
        text_config={"model_type": "t5", "vocab_size": 50, "d_model": 32, "num_layers": 1},
        vision_config=VISION,
        qformer_config={"num_hidden_layers": 1, "encoder_hidden_size": 32, "hidden_size": 48},
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    for path in (prefix_shared_outputs, naive_outputs):
        with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
            path(model, *make_batch("blip-2 opt"))
