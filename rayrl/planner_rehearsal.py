"""A planner on a made-up step, so that what cannot work is said before a run and not within."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rayrl.config import Config
from rayrl.joins import replaced
from rayrl.objectives.inject import TROUBLE
from rayrl.outline import Here
from rayrl.planning import Drawn, Planner, Request, plan
from rayrl.rounds import counted, joined
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup

_ROUNDS = 4
"""Enough to see what a planner asks for: one may want more than made-up groups ever give it."""

_FAILED = -100.0
"""A reward that is below any floor."""


def joins_captions(planner: Planner, config: Config) -> bool:
    """Whether the planner asks for captions that join those of a group, rather than replacing them
    all, in a step of the run's size: half of its groups have failed, the rewards of the others
    spread.

    Raises ValueError, naming the planner, where it fails or what it asks for makes no sense, as
    where its parameters do not fit the group's size.  A LookupError or OSError says nothing: it may
    know the run's images by their names, or read what these groups have not.
    """
    prompts = map(_prompt, itertools.count())
    images, size = config.train.images_per_step, config.train.group_size
    drawn = Drawn(
        step=0,
        total_steps=config.train.steps,
        group_size=size,
        prompts=tuple(itertools.islice(prompts, images)),
        groups=(None,) * images,
    )
    supplies = {
        "take": lambda count: list(itertools.islice(prompts, count)),
        "encode": lambda text: list(range(1, 1 + len(text.split()))),
    }
    for _ in range(_ROUNDS):
        try:
            requests = plan(drawn, [planner], supplies)
        except (LookupError, OSError):
            return False
        except TROUBLE as error:
            raise ValueError(
                f"rollout {planner.name}, tried on a made-up step of {images} images: "
                f"{type(error).__name__}: {error}"
            ) from error
        if any(request.join is not replaced for request in requests):
            return True
        if not requests:
            return False
        groups = [_scored(request, list(config.reward.terms)) for request in requests]
        drawn = counted(joined(drawn, requests, Here(groups)), requests)
    return False


def _prompt(number: int) -> Prompt:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, "PNG")
    return Prompt(
        # As most sets of images have them: a planner may look at it.
        prompt_id=str(number),
        image=out.getvalue(),
        text="Describe the image.",
        references=("a made-up picture of nothing at all", "nothing is in this made-up picture"),
    )


def _scored(request: Request, terms: Sequence[str]) -> ScoredGroup:
    """What a request brings."""
    rewards = np.arange(request.size, dtype=np.float32)
    if request.slot % 2 == 0:
        rewards = np.full(request.size, _FAILED, np.float32)
    ids = np.array([*request.forced, 1, 2, 3], np.int32)
    caption = Completion(
        token_ids=ids,
        logprobs=np.full(len(ids), -1.0, np.float32),
        text="a made-up caption",
        finish_reason="stop",
        weight_version=0,
        num_forced=len(request.forced),
    )
    group = RolloutGroup(
        prompt=request.prompt,
        prompt_token_ids=np.array([1], np.int32),
        completions=(caption,) * request.size,
        group_size=request.size,
    )
    return ScoredGroup(group=group, terms=dict.fromkeys(terms, rewards), rewards=rewards)
