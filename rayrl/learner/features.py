"""Image features, once per image and run, when vision tower and connector are frozen."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rayrl.learner.families import FAMILIES, Inputs, bare_model, encode_images


def image_key(image: bytes) -> bytes:
    """A 16-byte key for an encoded image file."""
    return hashlib.blake2b(image, digest_size=16).digest()


class FeatureCache:
    """Features of prompts' images, least recently used out first, bounded in bytes.

    They are those of one frozen vision tower: ``clear`` when other weights are loaded into it.
    Entries are kept on the CPU, so that the bound is one on host memory.

    On a CPU every image is encoded alone: its features then depend on nothing else in the batch,
    so that a resumed run, which starts with an empty cache, repeats bit for bit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def features(self, model: Any, inputs: Inputs, keys: Sequence[bytes]) -> list[Tensor]:
        """Features of P prompts, each [R, n, D] (see ``encode_images``), on the inputs' device.

        keys: one for each prompt; prompts with equal keys have equal images and equally many
        placeholder ids.  Raises ValueError where the features depend on a trainable parameter.
        """
        model = bare_model(model)
        if len(keys) != len(inputs["input_ids"]):
            raise ValueError(f"{len(keys)} keys for {len(inputs['input_ids'])} prompts")
        device = inputs["input_ids"].device
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, int] = {}
        for p, key in enumerate(keys):
            if key in self._entries:
                self._entries.move_to_end(key)
                found[key] = self._entries[key].to(device, non_blocking=True)
            else:
                missing[key] = p
        if missing:
            rows = list(missing.values())
            batches = [[row] for row in rows] if device.type == "cpu" else [rows]
            encoded = [image for batch in batches for image in _encode(model, inputs, batch)]
            for key, features in zip(missing, encoded, strict=True):
                found[key] = features
                self._put(key, features)
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        return [found[key] for key in keys]

    def _put(self, key: bytes, features: Tensor) -> None:
        # A copy of its own: a view would keep the whole batch's features alive.
        entry = features.to("cpu", copy=True)
        self._entries[key] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._entries.popitem(last=False)[1].nbytes


def _encode(model: Any, inputs: Inputs, prompts: Sequence[int]) -> list[Tensor]:
    """Features of some of the prompts, which no gradient may flow into."""
    family = FAMILIES[model.config.model_type]
    part = {
        "input_ids": inputs["input_ids"][list(prompts)],
        **family.take_images(inputs, family.image_inputs, prompts),
    }
    features = encode_images(model, part)
    if any(feature.requires_grad for feature in features):
        raise ValueError(
            f"{type(model).__name__}: image features depend on trainable parameters, so they "
            "cannot be cached; freeze the vision tower and the connector"
        )
    return features
