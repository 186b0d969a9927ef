"""Changed pictures, for objectives that make an image harder."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def with_noise(image: bytes, deviation: float, *, seed: int) -> bytes:
    """The encoded picture with Gaussian noise in every channel, as PNG.

    deviation: of the noise, as a share of the pixels' range of 0 to 255
    seed: equal pictures, deviations and seeds give equal bytes

    Raises ValueError for a negative deviation.
    """
    if deviation < 0:
        raise ValueError(f"noise of deviation {deviation}, want at least 0")
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.float64)
    noise = np.random.default_rng(seed).standard_normal(pixels.shape)
    changed = np.clip(np.rint(pixels + 255 * deviation * noise), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(changed).save(out, "PNG")
    return out.getvalue()
