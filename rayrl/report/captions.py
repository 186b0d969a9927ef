"""Captions of the report: which are shown, chosen so that they do not flatter."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from rayrl.report.run_folder import Row


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Some held-out images and how they were chosen."""

    title: str
    note: str
    images: list[Row]


def change(image: Row) -> float:
    """The change of an image's CIDEr-D (x100) from before to after."""
    return float(image["after"]["cider_d"] - image["before"]["cider_d"])


def pick_images(images: Sequence[Row], count: int = 5) -> list[Pick]:
    """``count`` images drawn without looking at the scores, the largest gains, the largest losses.

    The draw is over all images and the same at every call, so one of the others may be in it.
    """
    ranked = sorted(images, key=change, reverse=True)
    picks = [
        Pick(
            title="Drawn at random",
            note="without looking at the scores",
            images=random.Random(0).sample(list(images), min(count, len(images))),
        ),
        Pick(
            title="Largest gains",
            note="picked for their scores",
            images=[image for image in ranked if change(image) > 0][:count],
        ),
        Pick(
            title="Largest losses",
            note="picked for their scores",
            images=[image for image in reversed(ranked) if change(image) < 0][:count],
        ),
    ]
    return [pick for pick in picks if pick.images]


def mark_words(caption: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """The words of a caption, each with whether a reference has it; case and punctuation aside.

    >>> mark_words("A red cat.", ["the red dog"])
    [('A', False), ('red', True), ('cat.', False)]
    """
    known = {_bare(word) for reference in references for word in reference.split()} | {""}
    return [(word, _bare(word) in known) for word in caption.split()]


def example_groups(samples: Sequence[Row]) -> list[Row]:
    """Of the first and of the last logged step, the group whose rewards differ most."""
    groups = [sample for sample in samples if len(sample["captions"]) > 1]
    if not groups:
        return []
    steps = [group["step"] for group in groups]
    return [
        max((group for group in groups if group["step"] == step), key=_spread)
        for step in dict.fromkeys((min(steps), max(steps)))
    ]


def largest_advantage(groups: Sequence[Row]) -> float:
    """The largest size of an advantage, which the bars are drawn against; 0 without any."""
    advantages = [caption["advantage"] for group in groups for caption in group["captions"]]
    return max((abs(a) for a in advantages if a is not None), default=0.0)


def _spread(group: Row) -> float:
    rewards = [caption["reward"] for caption in group["captions"]]
    return float(max(rewards) - min(rewards))


def _bare(word: str) -> str:
    return word.strip(string.punctuation).lower()
