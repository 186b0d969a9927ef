"""Reference captions as the model would write them, and the policy's log-probs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayrl.learner.providers import MicroBatch, Provider
from rayrl.vlm import caption_token_ids


class Anchors(Provider):
    """Log-probs of all references of each image, with gradient, as in stage 1: at temperature 1,
    the end token included."""

    def __init__(self, processor: Any, eos_id: int) -> None:
        self._processor = processor
        self._eos_id = eos_id

    def in_update(self, part: MicroBatch) -> dict[str, Tensor]:
        ids, mask = self._targets(part.inputs.references(part.rows))
        ids, mask = ids.to(part.groups.mask.device), mask.to(part.groups.mask.device)
        out = part.forward.captions(part.model, ids, mask, part.prompts, temperature=1.0)
        return {"anchor_logprobs": out.logprobs, "anchor_mask": mask}

    def _targets(self, references: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [P,R,L]; images with fewer than R references have rows of padding."""
        rows = [
            [caption_token_ids(self._processor, caption, self._eos_id) for caption in captions]
            for captions in references
        ]
        shape = (
            len(rows),
            max(len(row) for row in rows),
            max(len(ids) for row in rows for ids in row),
        )
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for p, row in enumerate(rows):
            for r, tokens in enumerate(row):
                ids[p, r, : len(tokens)] = torch.tensor(tokens)
                mask[p, r, : len(tokens)] = True
        return ids, mask
