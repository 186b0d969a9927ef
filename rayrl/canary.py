"""A fixed caption that every engine scores after a sync, against the learner's log-probs.

Versions and checksums prove that the right bytes arrived.  This proves that they are in use: names
mapped to the right tensors, packed layouts rebuilt, no cache left from the version before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrl.types import FloatArray, Prompt
from rayrl.vlm import caption_prefix_ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canary:
    """``token_ids`` is a caption of ``prompt``, scored at temperature 1 with nothing banned."""

    prompt: Prompt
    token_ids: Sequence[int]


def make_canary(processor: Any, prompt: Prompt, max_tokens: int) -> Canary:
    """The prompt's first reference in the model's tokens, shorter than the longest caption, of
    ``max_tokens``: an engine scores a caption by sampling one token after it."""
    ids = caption_prefix_ids(processor, prompt.references[0])
    return Canary(prompt=prompt, token_ids=ids[: max(1, max_tokens - 1)])


def check_agreement(
    engine: FloatArray, learner: FloatArray, *, who: str, version: int, tolerance: float
) -> float:
    """Mean |difference| of two lists of log-probs [T] in nats.

    RuntimeError, with the worker, the version and the values, where it exceeds ``tolerance`` or is
    not a number.
    """
    if engine.shape != learner.shape:
        raise RuntimeError(
            f"{who} scored {engine.shape} tokens of the canary caption at version {version}, the "
            f"learner {learner.shape}"
        )
    difference = float(np.abs(engine - learner).mean())
    if difference <= tolerance:
        return difference
    raise RuntimeError(
        f"{who} does not compute with the weights of version {version}: log-probs of the canary "
        f"caption {_short(engine)}, the learner's {_short(learner)}, mean difference "
        f"{difference:.3g}, want at most {tolerance:g} (rollout.canary_tolerance)"
    )


def _short(values: FloatArray) -> str:
    shown = ", ".join(f"{value:.4f}" for value in values[:4])
    return f"[{shown}{', ...' if len(values) > 4 else ''}]"
