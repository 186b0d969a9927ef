"""The tiny captioner, its prompt, its parts."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rayrl.config import TinyConfig
from rayrl.learner import inputs
from rayrl.learner.inputs import InputCache
from rayrl.types import TrainBatch
from rayrl.vlm import (
    build_tiny_captioner,
    caption_token_ids,
    choose_trainable,
    eos_ids,
    load_captioner,
    load_processor,
    part_of,
    prompt_inputs,
)
from tests.captioners import FAMILIES
from tests.conftest import INSTRUCTION, encoded_picture


@pytest.fixture(scope="module")
def captioner(tiny_folder):
    return load_captioner(tiny_folder)


def test_equal_arguments_build_equal_files(tmp_path):
    config = TinyConfig(vision_width=32, vision_layers=1, text_width=32, text_layers=1)
    for name in "ab":
        build_tiny_captioner(config, ["a cat"] * 9, INSTRUCTION, tmp_path / name, seed=3)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_prompt_has_one_placeholder_an_image_feature(captioner, prompts):
    inputs = prompt_inputs(captioner.processor, [prompts[0].image], [INSTRUCTION])
    ids = inputs["input_ids"][0].tolist()
    image_token = captioner.model.config.image_token_id
    assert ids.count(image_token) == TinyConfig().image_tokens == 16
    assert image_token in captioner.banned_ids
    assert captioner.pad_id in captioner.banned_ids
    assert not set(captioner.eos_ids) & set(captioner.banned_ids)


def ends(given, *, eos, pad):
    """What ends a caption of a model whose generation configuration names ``given``."""
    tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=pad, get_added_vocab=dict)
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=given), config=SimpleNamespace()
    )
    return eos_ids(model, SimpleNamespace(tokenizer=tokenizer))


def test_captions_are_taught_the_end_that_may_be_sampled():
    # Qwen2.5-VL's ids: padding is named as an end as well, and never sampled.
    assert ends([151645, 151643], eos=151645, pad=151643) == (151645,)
    assert ends([3, 9, 5], eos=9, pad=0) == (9, 3, 5)
    assert ends(None, eos=9, pad=9) == (9,)
    assert ends(4, eos=9, pad=0) == (4,)


@pytest.mark.parametrize(("given", "eos", "pad"), [(None, None, 0), ([0], 9, 0)])
def test_captions_that_could_never_end_are_refused(given, eos, pad):
    with pytest.raises(ValueError, match="names no end-of-sequence token that may be sampled"):
        ends(given, eos=eos, pad=pad)


def test_a_caption_decodes_to_itself_and_ends_with_the_end_token(captioner):
    ids = caption_token_ids(captioner.processor, "a red picture", captioner.eos_ids[0])
    assert ids[-1] in captioner.eos_ids
    text = captioner.processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.strip() == "a red picture"


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_what_looks_like_a_special_token_in_a_caption_is_text(family, tiny_folder):
    if family == "tiny":
        processor = load_processor(tiny_folder)
    else:
        _, processor = FAMILIES[family](["a red dog", "a cat on a sofa"] * 9)
    tokenizer = processor.tokenizer
    special = tokenizer.all_special_tokens
    assert len(special) > 3
    for token in special:
        caption = f"a sign that says {token} and more"
        ids = caption_token_ids(processor, caption, tokenizer.eos_token_id)
        assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
    # What is no caption is read as before.
    assert tokenizer(special[0], add_special_tokens=False)["input_ids"] == [
        tokenizer.convert_tokens_to_ids(special[0])
    ]


def test_only_the_chosen_parts_train(tiny_folder):
    model = load_captioner(tiny_folder).model
    names = choose_trainable(model, ["connector"])
    assert names == ["model.connector.modality_projection.proj.weight"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    everything = choose_trainable(model, ["vision", "connector", "language"])
    assert len(everything) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision"),
        ("model.visual.blocks.3.attn.qkv.weight", "vision"),
        ("model.visual.patch_embed.proj.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "connector"),
        ("model.visual.pos_embed.weight", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "connector"),
        ("qformer.encoder.layer.0.attention.attention.query.weight", "connector"),
        ("query_tokens", "connector"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language"),
        ("lm_head.weight", "language"),
    ],
)
def test_parameters_belong_to_the_part_their_name_says(name, part):
    assert part_of(name) == part


def test_the_input_cache_gives_what_the_processor_gives(captioner, prompts):
    images = [prompt.image for prompt in prompts[:3]]
    cache = InputCache(captioner.processor)
    for _ in range(2):
        got = cache.batch(images, INSTRUCTION)
        want = prompt_inputs(captioner.processor, images, [INSTRUCTION] * 3)
        assert set(got) == set(want)
        for name in want:
            assert torch.equal(got[name], want[name]), name


def test_the_input_cache_is_bounded_and_forgets_the_oldest(captioner):
    pictures = [encoded_picture((200, 0, 0), seed=seed) for seed in range(5)]
    probe = InputCache(captioner.processor)
    probe.batch(pictures[:1], INSTRUCTION)
    cache = InputCache(captioner.processor, max_bytes=2 * probe._bytes)
    for picture in pictures:
        cache.batch([picture], INSTRUCTION)
    assert len(cache._entries) == 2 and cache._bytes == 2 * probe._bytes


@pytest.fixture
def processed(monkeypatch):
    """How many pictures went through the processor, one entry a call."""
    counts = []

    def counting(processor, images, texts):
        counts.append(len(images))
        return prompt_inputs(processor, images, texts)

    monkeypatch.setattr("rayrl.learner.inputs.prompt_inputs", counting)
    return counts


def room_for(captioner, pictures):
    """An input cache that holds so many of the test's pictures."""
    probe = InputCache(captioner.processor)
    probe.batch([encoded_picture((0, 0, 200), seed=99)], INSTRUCTION)
    return InputCache(captioner.processor, max_bytes=pictures * probe._bytes)


def test_what_was_prepared_is_not_processed_again(captioner, processed):
    pictures = [encoded_picture((200, 0, 0), seed=seed) for seed in range(4)]
    cache = room_for(captioner, 10)
    processed.clear()
    cache.prepare([pictures[0], b"no picture", *pictures[1:]], INSTRUCTION)
    processed.clear()
    got = cache.batch(pictures, INSTRUCTION)
    assert not processed
    want = prompt_inputs(captioner.processor, pictures, [INSTRUCTION] * 4)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_what_the_next_step_waits_for_is_not_pushed_out(captioner, processed):
    first, others, second = (
        [encoded_picture((200, 0, 0), seed=10 * step + seed) for seed in range(3)]
        for step in range(3)
    )
    cache = room_for(captioner, 3)
    cache.prepare(first, INSTRUCTION)
    cache.batch(others, INSTRUCTION)
    processed.clear()
    cache.batch(first, INSTRUCTION)
    assert not processed
    # Its step is over: it makes room.
    cache.prepare(second, INSTRUCTION)
    processed.clear()
    cache.batch(second, INSTRUCTION)
    assert not processed
    cache.batch(first, INSTRUCTION)
    assert len(processed) == 3
    # Beside what is awaited there is only what was asked for last.
    assert len(cache._entries) == 4


def test_no_more_is_prepared_than_fits(captioner, processed):
    pictures = [encoded_picture((200, 0, 0), seed=seed) for seed in range(6)]
    cache = room_for(captioner, 3)
    cache.prepare(pictures, INSTRUCTION)
    assert len(cache._ahead) == 3
    processed.clear()
    cache.batch(pictures[:3], INSTRUCTION)
    assert not processed


def noise(width, height):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_a_picture_that_the_processor_refuses_is_named(captioner, monkeypatch):
    def refuse(processor, images, instructions):
        if images == [narrow]:
            raise ValueError("absolute aspect ratio must be smaller than 200, got 400.0")
        return prompt_inputs(processor, images, instructions)

    narrow = noise(1, 400)
    monkeypatch.setattr(inputs, "prompt_inputs", refuse)
    cache = InputCache(captioner.processor)
    images, ids = [noise(64, 64), narrow], ["coco/1", "coco/2"]
    with pytest.raises(ValueError, match=r"^prompt coco/2: absolute aspect ratio must be smaller"):
        cache.batch(images, INSTRUCTION, ids)
    with pytest.raises(ValueError, match=r"^absolute aspect ratio must be smaller"):
        cache.batch(images, INSTRUCTION)
    # As the learner asks for it.
    shape = np.ones((2, 1, 1))
    batch = TrainBatch(
        prompt_ids=tuple(ids),
        images=tuple(images),
        prompt_token_ids=(np.ones(1, np.int32),) * 2,
        token_ids=shape.astype(np.int32),
        mask=shape.astype(bool),
        rollout_logprobs=shape.astype(np.float32),
        rewards=np.ones((2, 1), np.float32),
        weight_versions=np.zeros((2, 1), np.int32),
        truncated=np.zeros((2, 1), bool),
    )
    step = inputs.StepInputs(cache, captioner.model, batch, INSTRUCTION)
    with pytest.raises(ValueError, match=r"^prompt coco/2: absolute"):
        step.select([1])


def test_pictures_in_different_numbers_of_tiles_are_not_processed_again(captioner, processed):
    processor = copy.deepcopy(captioner.processor)
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 256}
    pictures = [noise(64, 64), noise(96, 32), noise(40, 90)]
    want = prompt_inputs(processor, pictures, [INSTRUCTION] * 3)
    cache = InputCache(processor)
    alone = [cache.batch([picture], INSTRUCTION)["pixel_values"].shape for picture in pictures]
    assert len(set(alone)) > 1
    processed.clear()
    got = cache.batch(pictures, INSTRUCTION)
    assert not processed
    assert set(got) == set(want)
    for name in want:
        assert torch.equal(got[name], want[name].to(got[name].dtype)), name


def test_pictures_are_kept_in_few_bytes(captioner):
    whole, half = (
        InputCache(captioner.processor, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    one, other = (cache.batch([noise(64, 64)], INSTRUCTION) for cache in (whole, half))
    assert other["pixel_attention_mask"].dtype == torch.bool
    assert torch.equal(one["pixel_values"].bfloat16(), other["pixel_values"])
    assert half._bytes < 0.6 * whole._bytes
