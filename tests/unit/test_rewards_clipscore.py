"""CLIPScore with a tiny random CLIP: the formula, the prefix, the pixels."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from rayrl.rewards.clipscore import ClipScore, check_clip_folder, preprocess
from rayrl.rewards.java import MetricUnavailable
from rayrl.rewards.suite import METRICS, CaptionSet, evaluate

WORDS = ["[UNK]", "[BOS]", "[EOS]", "A", "photo", "depicts", "a", "dog", "cat", "runs", "sits"]


def picture(seed: int, width: int = 50, height: int = 40) -> bytes:
    low, high = (0, 60) if seed % 2 else (190, 255)
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def tiny_clip(path: Path) -> Path:
    """A folder with a random CLIP of the words above."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    text = CLIPTextConfig(
        vocab_size=len(WORDS), num_attention_heads=2, max_position_embeddings=12, **small, **ids
    )
    vision = CLIPVisionConfig(num_attention_heads=2, image_size=32, patch_size=8, **small)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    CLIPModel(config).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]", pad_token="[EOS]"
    ).save_pretrained(path)
    return path


def unit(vector: torch.Tensor) -> np.ndarray:
    array = vector.double().numpy()
    return array / np.linalg.norm(array)


def text_vector(model: CLIPModel, text: str) -> np.ndarray:
    ids = [1, *(WORDS.index(word) for word in text.split()), 2]
    with torch.inference_mode():
        pooled = model.text_model(torch.tensor([ids])).pooler_output
        return unit(model.text_projection(pooled)[0])


def image_vector(model: CLIPModel, image: bytes) -> np.ndarray:
    with torch.inference_mode():
        pixels = torch.from_numpy(preprocess(image, 32))[None]
        return unit(model.visual_projection(model.vision_model(pixels).pooler_output)[0])


def test_formula_and_prefix(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    images = [picture(i) for i in (0, 1, 1)]
    captions = ["a dog runs", "a cat", "a dog runs"]
    references = [["a cat sits", "dog"], ["a cat"], ["dog"]]
    cosines, closest = [], []
    for image, caption, some in zip(images, captions, references, strict=True):
        text = text_vector(model, "A photo depicts " + caption)
        cosines.append(image_vector(model, image) @ text)
        closest.append(max(text @ text_vector(model, "A photo depicts " + r) for r in some))
    expected = 2.5 * np.maximum(0, cosines)
    assert min(cosines) < 0 < max(cosines), "both branches of the maximum are there"
    clip = ClipScore(folder, batch_size=2)
    np.testing.assert_allclose(clip.score(images, captions), expected, atol=1e-6)
    total = expected + np.maximum(0, closest)
    np.testing.assert_allclose(
        clip.score(images, captions, references),
        2 * expected * np.maximum(0, closest) / total,
        atol=5e-6,
    )


@pytest.mark.parametrize(("width", "height"), [(50, 40), (40, 51), (32, 32), (33, 97), (20, 30)])
def test_pixels_are_those_of_the_clip_processor(width: int, height: int) -> None:
    image = picture(3, width, height)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = processor(Image.open(io.BytesIO(image)), return_tensors="np")["pixel_values"][0]
    pixels = preprocess(image, 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32
    # The crop of an odd margin may be rounded to either side: one pixel row.
    same = [
        np.allclose(pixels[:, :, a : 32 - b], expected[:, :, b : 32 - a], atol=0.05)
        and np.allclose(pixels[:, c : 32 - d], expected[:, d : 32 - c], atol=0.05)
        for a, b in ((0, 0), (0, 1), (1, 0))
        for c, d in ((0, 0), (0, 1), (1, 0))
    ]
    assert any(same)


def test_in_the_suite(folder: Path) -> None:
    data = CaptionSet(
        ["a dog", "a cat"],
        [["a dog"], ["cat runs"]],
        images=[picture(0), picture(1)],
        clip_folder=str(folder),
    )
    scores = evaluate(data, ("clip_score",)).scores
    assert set(scores) == {"clip_score", "ref_clip_score"}


def test_what_is_missing_is_said() -> None:
    with pytest.raises(MetricUnavailable, match="no CLIP model at /nowhere"):
        METRICS["clip_score"](CaptionSet(["a"], [["a"]], [b"x"], clip_folder="/nowhere"))
    left_out = evaluate(CaptionSet(["a"], [["a"]]), ("clip_score",)).left_out
    assert "needs the images and a local CLIP folder" in left_out["clip_score"]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", r"\(no config\.json\)"),
        ("model.safetensors", r"\(no model\.safetensors or model\.safetensors\.index\.json\)"),
        ("tokenizer.json", r"\(no tokenizer\.json or vocab\.json\)"),
    ],
)
def test_a_folder_without_a_file_is_named_with_it(
    folder: Path, tmp_path: Path, gone: str, message: str
) -> None:
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    (lacking / gone).unlink()
    with pytest.raises(MetricUnavailable, match=f"no CLIP model at {lacking} {message}"):
        check_clip_folder(lacking)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_cannot_be_read_is_left_out(folder: Path, tmp_path: Path, broken: str) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / broken).write_bytes(b"{")
    data = CaptionSet(
        ["a dog", "a cat"],
        [["a dog"], ["cat"]],
        images=[picture(0), picture(1)],
        clip_folder=str(damaged),
    )
    left_out = evaluate(data, ("clip_score", "bleu")).left_out
    assert left_out["clip_score"].startswith(f"the CLIP model at {damaged} cannot be read: ")
    assert "\n" not in left_out["clip_score"]


@pytest.mark.parametrize("kind", ["gpt2", "siglip", None])
def test_a_model_that_is_no_clip_is_refused(folder: Path, tmp_path: Path, kind: object) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(MetricUnavailable, match=f"model_type {kind!r}, want 'clip'"):
        check_clip_folder(other)


def two_with(clip: Path) -> CaptionSet:
    """Two captions, to be scored with the CLIP model of a folder."""
    return CaptionSet(
        ["a dog", "a cat"],
        [["a dog"], ["cat"]],
        images=[picture(0), picture(1)],
        clip_folder=str(clip),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("visual_projection.weight"), "1 weights are not in it, such"),
        (lambda weights: weights.update({"logit_scale": torch.zeros(1)}), "size"),
    ],
)
def test_weights_that_are_not_all_of_a_clip_are_left_out_and_other_metrics_kept(
    folder: Path, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    ClipScore(other)  # what older versions wrote
    change(weights)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    evaluation = evaluate(two_with(other), ("clip_score", "bleu"))
    assert set(evaluation.scores) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    reason = evaluation.left_out["clip_score"]
    assert reason.startswith(f"the CLIP model at {other} cannot be read: ") and message in reason


def test_a_gpu_without_room_loses_no_other_metric(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClipScore, "both", full)
    evaluation = evaluate(two_with(folder), ("clip_score", "bleu"))
    assert evaluation.left_out == {"clip_score": "CUDA out of memory"}
    assert "bleu_4" in evaluation.scores


def test_long_captions_are_cut(folder: Path) -> None:
    clip = ClipScore(folder)
    long = clip.score([picture(0)] * 2, ["a dog " * 40, "a dog " * 50])
    assert long[0] == long[1]
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        clip.score([picture(0)], ["a", "b"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_scores_as_the_cpu_does(folder: Path) -> None:
    images = [picture(seed) for seed in range(6)]
    captions = ["a dog runs", "a cat", "a photo", "a dog sits", "a cat runs", "a"]
    references = [["a dog", "a cat sits"]] * 6
    for some in (None, references):
        cpu, gpu = (
            ClipScore(folder, device, batch_size=4).score(images, captions, some)
            for device in ("cpu", "cuda")
        )
        np.testing.assert_allclose(gpu, cpu, atol=1e-4)
