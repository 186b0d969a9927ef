"""CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv:2104.08718), as jmhessel/clipscore.

2.5 * max(0, cosine) between the image and "A photo depicts <caption>", by CLIP ViT-B/32 for
published numbers.  torchmetrics' CLIPScore (another model, no prefix, times 100) does not compare.
Everything is float32: the original computes in float16 on a GPU, which moves the fourth digit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPModel

from rayrl.data.images import decode
from rayrl.rewards.java import MetricUnavailable

SCALE = 2.5
PREFIX = "A photo depicts "
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

_FILES = (
    ("config.json",),
    # Never a pickle.
    ("model.safetensors", "model.safetensors.index.json"),
    ("tokenizer.json", "vocab.json"),
)
"""Of each of these a CLIP model's folder has one."""

Scores = npt.NDArray[np.float64]
Item = TypeVar("Item", bytes, str)


class ClipScore:
    """CLIP from a local folder, on CPU or GPU."""

    def __init__(self, folder: str | Path, device: str = "cpu", batch_size: int = 64) -> None:
        """MetricUnavailable where the folder is not a CLIP model, or one that cannot be read."""
        check_clip_folder(folder)
        try:
            loaded: Any = CLIPModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        # RuntimeError: weights of other shapes.
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _unreadable(folder, error) from error
        model, found = loaded
        # They would be random.  Older checkpoints have position_ids, newer ones do not.
        lacking = sorted(
            name for name in found["missing_keys"] if not name.endswith("position_ids")
        )
        if lacking:
            shown = ", ".join(lacking[:3])
            raise _unreadable(folder, f"{len(lacking)} weights are not in it, such as {shown}")
        self._model = model.float().eval().to(device)
        self._device = device
        self._batch_size = batch_size

    def score(
        self,
        images: Sequence[bytes],
        captions: Sequence[str],
        references: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """CLIPScore of raw captions, float64 [N]; RefCLIPScore if ``references`` are given: the
        harmonic mean with the largest cosine between the caption and a reference.

        ``images`` are encoded files, of which a batch is held at a time.  An image or caption that
        occurs many times is embedded once.
        """
        scores, textual = self._scores(images, captions)
        return scores if references is None else self._with(references, scores, textual)

    def both(
        self,
        images: Sequence[bytes],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> tuple[Scores, Scores]:
        """CLIPScore and RefCLIPScore, as :meth:`score` gives them, of images that are read once."""
        scores, textual = self._scores(images, captions)
        return scores, self._with(references, scores, textual)

    def _scores(self, images: Sequence[bytes], captions: Sequence[str]) -> tuple[Scores, Scores]:
        """CLIPScore [N], and the captions' vectors [N, D]."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions, want as many")
        visual = self._once(images, self._embed_images)
        textual = self._once(captions, self._embed_texts)
        return SCALE * np.maximum(0.0, (visual * textual).sum(axis=1)), textual

    def _with(self, references: Sequence[Sequence[str]], scores: Scores, textual: Scores) -> Scores:
        """RefCLIPScore [N] from CLIPScore and the captions' vectors."""
        closest = np.array(
            [
                max(0.0, float((self._once(some, self._embed_texts) @ text).max()))
                for some, text in zip(references, textual, strict=True)
            ]
        )
        total = scores + closest
        return np.divide(2 * scores * closest, total, out=np.zeros_like(total), where=total > 0)

    def _once(self, items: Sequence[Item], embed: Callable[[list[Item]], torch.Tensor]) -> Scores:
        """Unit vectors [N, D] of items, each distinct one embedded once, in batches."""
        row: dict[object, int] = {}
        rows: list[int] = []
        batches: list[torch.Tensor] = []
        waiting: list[Item] = []
        for item in items:
            key = blake2b(item).digest() if isinstance(item, bytes) else item
            if key not in row:
                row[key] = len(row)
                waiting.append(item)
            rows.append(row[key])
            if len(waiting) == self._batch_size:
                batches.append(embed(waiting))
                waiting = []
        if waiting:
            batches.append(embed(waiting))
        vectors = torch.cat(batches).double().cpu().numpy()
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors[rows]

    @torch.inference_mode()
    def _embed_images(self, images: list[bytes]) -> torch.Tensor:
        size = self._model.config.vision_config.image_size
        pixels = np.stack([preprocess(image, size) for image in images])
        output = self._model.vision_model(torch.from_numpy(pixels).to(self._device))
        return self._model.visual_projection(output.pooler_output)

    @torch.inference_mode()
    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        batch = self._tokenizer(
            [PREFIX + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        output = self._model.text_model(batch["input_ids"], batch["attention_mask"])
        return self._model.text_projection(output.pooler_output)


def check_clip_folder(folder: str | Path) -> None:
    """MetricUnavailable, with what is not there, unless a folder has the files of a CLIP model and
    its configuration says that it is one: before work whose score it is for."""
    for wanted in _FILES:
        if not any(Path(folder, name).is_file() for name in wanted):
            raise MetricUnavailable(
                f"no CLIP model at {folder} (no {' or '.join(wanted)}); want a local folder with "
                "config.json, weights as safetensors and tokenizer, such as "
                "openai/clip-vit-base-patch32"
            )
    try:
        config = json.loads(Path(folder, "config.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, f"config.json: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise MetricUnavailable(
            f"no CLIP model at {folder}: its config.json has model_type {kind!r}, want 'clip'"
        )


def _unreadable(folder: str | Path, reason: object) -> MetricUnavailable:
    text = " ".join(str(reason).split())
    return MetricUnavailable(f"the CLIP model at {folder} cannot be read: {text}")


def preprocess(image: bytes, size: int) -> npt.NDArray[np.float32]:
    """CLIP's pixels [3, size, size]: shorter side to ``size``, bicubic; centre crop; normalised."""
    picture = decode(image)
    width, height = picture.size
    short = min(width, height)
    scaled = (int(size * width / short), int(size * height / short))
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32)
    return ((pixels / 255.0 - _MEAN) / _STD).transpose(2, 0, 1)
