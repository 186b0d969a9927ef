"""The same captions after a changed image, for objectives by which a caption must depend on it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rayrl.learner.policy import Policy
from rayrl.learner.providers import MicroBatch, Provider
from rayrl.vlm import decode_image


def crop(picture: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """A random window that is smaller by the share ``strength`` a side, as large as before."""
    width, height = (max(1, round(side * (1 - strength))) for side in picture.size)
    left, top = _corner(picture, width, height, draw)
    return picture.crop((left, top, left + width, top + height)).resize(picture.size)


def mask(picture: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """Grey over a random window whose sides are the share ``strength`` of the picture's."""
    width, height = (round(side * strength) for side in picture.size)
    changed = picture.copy()
    left, top = _corner(picture, width, height, draw)
    changed.paste((128, 128, 128), (left, top, left + width, top + height))
    return changed


CHANGES: Mapping[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "crop": crop,
    "mask": mask,
}


def changed_image(image: bytes, change: str, strength: float) -> bytes:
    """An encoded image of the same size; where the window lies is a function of the image alone.
    A strength of 0 leaves the image as it is."""
    if strength == 0:
        return image
    seed = int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big")
    picture = CHANGES[change](decode_image(image), strength, np.random.default_rng(seed))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


class ChangedImages(Provider):
    """Log-probs of the captions after a changed image, under the reference and the policy."""

    def __init__(self, policy: Policy, change: str, strength: float) -> None:
        self._policy = policy
        self._change = change
        self._strength = strength

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        with self._policy.as_reference() as model:
            out = part.forward(model, part.groups, self._prompts(part))
        return {"augmented_ref_logprobs": out.logprobs}

    def in_update(self, part: MicroBatch) -> dict[str, Tensor]:
        out = part.forward(part.model, part.groups, self._prompts(part))
        return {"augmented_logprobs": out.logprobs}

    def _prompts(self, part: MicroBatch) -> Any:
        return part.inputs.select(
            part.rows, lambda image: changed_image(image, self._change, self._strength)
        )


def _corner(
    picture: Image.Image, width: int, height: int, draw: np.random.Generator
) -> tuple[int, int]:
    return (
        int(draw.integers(picture.width - width + 1)),
        int(draw.integers(picture.height - height + 1)),
    )
