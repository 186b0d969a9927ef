"""What some objectives want of the reward path beside the captions' scores: how alike the captions
of a group are, the rewards of the references, the rewards of the captions' prefixes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rayrl.rewards import ptb
from rayrl.rewards.diversity import similarity
from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.rewards.term import Failure, Item
from rayrl.types import RolloutGroup

_WORD = re.compile(r"\S+")


def reference_items(item: Item) -> tuple[Item, ...]:
    """Each reference of an image as a caption, against the others (leave-one-out)."""
    references = item.prompt.references
    return tuple(
        replace(
            item,
            prompt=replace(item.prompt, references=references[:i] + references[i + 1 :]),
            captions=(reference,),
            finished=(True,),
        )
        for i, reference in enumerate(references)
    )


def prefix_items(item: Item) -> tuple[Item, ...]:
    """For each caption its prefixes of 0, 1, ... words but not all of them, as captions that did
    not end by themselves."""
    prefixes = [
        tuple(caption[: word.start()].rstrip() for word in _WORD.finditer(caption)) or ("",)
        for caption in item.captions
    ]
    return tuple(replace(item, captions=some, finished=(False,) * len(some)) for some in prefixes)


MAKERS = {"reference_rewards": reference_items, "prefix_values": prefix_items}
"""By need, what is scored for it beside a group's captions."""


def extra_items(item: Item, needs: Collection[str]) -> dict[str, tuple[Item, ...] | Failure]:
    """By need, what is scored for it, or why nothing can be."""
    made: dict[str, tuple[Item, ...] | Failure] = {}
    for need in sorted(MAKERS.keys() & set(needs)):
        if need == "reference_rewards" and len(item.prompt.references) < 2:
            made[need] = Failure("one reference caption, want at least two to score one by others")
        else:
            made[need] = MAKERS[need](item)
    return made


def group_similarity(
    groups: Sequence[RolloutGroup], df: DocumentFrequency
) -> list[npt.NDArray[np.float32]]:
    """CIDEr / 10 between the captions of each group, [G, G] each; groups may differ in size."""
    captions = [[ptb.tokenize(c.text) for c in group.completions] for group in groups]
    kernels = [np.ones((1, 1), np.float32) for _ in groups]
    for size in {len(some) for some in captions} - {1}:
        rows = [i for i, some in enumerate(captions) if len(some) == size]
        for i, kernel in zip(rows, similarity([captions[i] for i in rows], df), strict=True):
            kernels[i] = kernel.astype(np.float32)
    return kernels
