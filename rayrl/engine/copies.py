"""Groups of captions by ``generate``, for models whose prefix cannot be shared: G copies of image
and prompt.  ``shared.py`` is the faster way, and gives the same captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayrl.engine.draw import Drawn, choose
from rayrl.learner.chunked import Sampling
from rayrl.learner.families import Inputs


@torch.inference_mode()
def sample_copies(
    model: Any,
    inputs: Inputs,
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    banned_ids: Sequence[int],
    eos_ids: Sequence[int],
    uniform: Tensor | None,
    forced: Sequence[Sequence[int]],
) -> Drawn:
    """Arguments as of ``shared.sample_groups``."""
    from transformers import LogitsProcessorList

    device = inputs["input_ids"].device
    chooser = _Chooser(
        forced=[ids for ids in forced for _ in range(group_size)],
        sampling=Sampling(temperature=temperature, banned=tuple(banned_ids)),
        uniform=None if uniform is None else uniform.flatten(0, 1).to(device),
    )
    sequences = model.generate(
        **inputs,
        # The chooser leaves one finite score a row, so that sampling is its choice.
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=group_size,
        max_new_tokens=max_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=eos_ids[0],
        logits_processor=LogitsProcessorList([chooser]),
    )
    shape = (len(inputs["input_ids"]), group_size, -1)
    return Drawn(
        ids=sequences[:, inputs["input_ids"].shape[1] :].view(shape),
        logprobs=torch.stack(chooser.logprobs, dim=1).view(shape),
    )


class _Chooser:
    """A logits processor that chooses each row's token by that row's own numbers ``uniform``
    [R, T] (or takes the arg-max), records its log-prob, and leaves only that token finite.  A row's
    first tokens may be given; they are certain, so their log-prob is 0.

    ``generate`` itself draws all rows from one stream, which would make a group depend on what
    else is in the batch.
    """

    def __init__(
        self, *, forced: Sequence[Sequence[int]], sampling: Sampling, uniform: Tensor | None
    ) -> None:
        self._forced = forced
        self._sampling = sampling
        self._uniform = uniform
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logprobs)
        logprobs = self._sampling.log_softmax(scores)
        chosen = choose(logprobs, None if self._uniform is None else self._uniform[:, step])
        picked = logprobs.gather(1, chosen[:, None])[:, 0]
        for row, ids in enumerate(self._forced):
            if step < len(ids):
                chosen[row], picked[row] = ids[step], 0.0
        self.logprobs.append(picked)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
