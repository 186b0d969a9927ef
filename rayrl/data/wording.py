"""How people word the same picture: five reference captions of a generated scene.

Like real annotators these prefer some words to their synonyms, start where they like, and leave
things out: a colour, the relation, a whole object.  A model that imitates them well still speaks
like a random one of them; what they agree on is what CIDEr-D rewards.  All choices are weighted,
and all come from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal, NamedTuple

Arrangement = Literal["row", "column"]


class Thing(NamedTuple):
    """An object of a scene."""

    colour: str
    shape: str


Weights = Mapping[str, float]

COLOUR_WORDS: Mapping[str, Weights] = {
    "red": {"red": 90, "crimson": 10},
    "orange": {"orange": 92, "bright orange": 8},
    "yellow": {"yellow": 84, "golden": 16},
    "green": {"green": 92, "emerald": 8},
    "blue": {"blue": 92, "bright blue": 8},
    "purple": {"purple": 80, "violet": 20},
}
SHAPE_WORDS: Mapping[str, Weights] = {
    "ring": {"ring": 60, "circle": 30, "hoop": 10},
    "cross": {"cross": 70, "plus sign": 22, "plus": 8},
    "square": {"square": 68, "box": 24, "block": 8},
    "triangle": {"triangle": 92, "pyramid": 8},
}
GROUNDS: Mapping[str, Weights] = {
    "light": {
        "a white background": 36,
        "a light background": 28,
        "a sheet of paper": 20,
        "white": 16,
    },
    "dark": {"a dark background": 36, "a black background": 28, "a black page": 20, "black": 16},
}
# The relation of the first thing to the second in reading order, and the other way round.
FORWARD: Mapping[Arrangement, Weights] = {
    "row": {"to the left of": 50, "next to": 30, "beside": 20},
    "column": {"above": 60, "over": 25, "higher than": 15},
}
BACKWARD: Mapping[Arrangement, Weights] = {
    "row": {"to the right of": 50, "next to": 30, "beside": 20},
    "column": {"below": 50, "under": 35, "beneath": 15},
}
PLACED: Mapping[Arrangement, Weights] = {
    "row": {"side by side": 75, "next to each other": 25},
    "column": {"one above the other": 75, "on top of each other": 25},
}
LINED_UP: Mapping[Arrangement, Weights] = {
    "row": {"in a row": 70, "side by side": 30},
    "column": {"in a column": 60, "on top of each other": 40},
}
LEAVES_COLOUR_OUT = 0.12
STARTS_AT_THE_END = 0.25

TWO: Weights = {
    "{a} {relation} {b}": 32,
    "{a} is {relation} {b}": 12,
    "{a} and {b}": 7,
    "{a} and {b} on {ground}": 4,
    "there is {a} {relation} {b}": 7,
    "a picture of {a} and {b}": 4,
    "two shapes {placed}": 5,
    "two colorful shapes on {ground}": 5,
    "{a} on {ground}": 24,
}
THREE: Weights = {
    "{a}, {b} and {c}": 14,
    "{a}, {b} and {c} {placed}": 16,
    "{a} is {relation} {b} and {c}": 8,
    "there is {a}, {b} and {c}": 8,
    "{b} between {a} and {c}": 18,
    "three shapes {placed}": 6,
    "three colorful shapes on {ground}": 6,
    "{a} on {ground}": 12,
    "{a} and {b} on {ground}": 12,
}


def describe(
    things: Sequence[Thing],
    arrangement: Arrangement,
    ground: str,
    rng: Random,
    *,
    count: int = 5,
) -> tuple[str, ...]:
    """``count`` different captions of two or three things, given from left to right or from top
    to bottom."""
    captions: list[str] = []
    while len(captions) < count:
        caption = _caption(things, arrangement, ground, rng)
        if caption not in captions:
            captions.append(caption)
    return tuple(captions)


def _caption(things: Sequence[Thing], arrangement: Arrangement, ground: str, rng: Random) -> str:
    relations, ordered = FORWARD, list(things)
    if rng.random() < STARTS_AT_THE_END:
        relations, ordered = BACKWARD, ordered[::-1]
    template = _pick(TWO if len(things) == 2 else THREE, rng)
    names = [_name(thing, rng) for thing in ordered]
    return template.format(
        **dict(zip("abc", names, strict=False)),
        relation=_pick(relations[arrangement], rng),
        placed=_pick((PLACED if len(things) == 2 else LINED_UP)[arrangement], rng),
        ground=_pick(GROUNDS[ground], rng),
    )


def _name(thing: Thing, rng: Random) -> str:
    words = [_pick(SHAPE_WORDS[thing.shape], rng)]
    if rng.random() >= LEAVES_COLOUR_OUT:
        words.insert(0, _pick(COLOUR_WORDS[thing.colour], rng))
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _pick(weights: Weights, rng: Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
