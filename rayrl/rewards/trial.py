"""A made-up group of a real image, to see whether terms can score at all."""

from __future__ import annotations

import numpy as np

from rayrl.types import Completion, Prompt, RolloutGroup


def trial_group(prompt: Prompt) -> RolloutGroup:
    """Two captions of the image, as a policy might have sampled them: its first references."""
    captions = list(dict.fromkeys((*prompt.references, "a picture")))[:2]
    return RolloutGroup(
        prompt=prompt,
        prompt_token_ids=np.array([1], np.int32),
        completions=tuple(
            Completion(
                token_ids=np.array([1], np.int32),
                logprobs=np.zeros(1, np.float32),
                text=caption,
                finish_reason="stop",
                weight_version=0,
            )
            for caption in captions
        ),
        group_size=len(captions),
    )
