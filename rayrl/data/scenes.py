"""Generated pictures: two, seldom three, large coloured shapes, in a row or in a column.

What is in a picture is easy to see, so that a tiny captioner trained from nothing sees it within
minutes on a CPU: the shapes fill different parts of their box (all of it, all but the middle, all
but the corners, a half), stand upright and hardly stray from their places.  How people word it is
not easy to guess (:mod:`wording`).  Cross-entropy therefore soon learns to imitate single
annotators, and reinforcement learning has something left to gain: the wording that all of them
agree on.

Everything is a function of (seed, split, index), so the first pictures stay the same when more are
asked for.  Every pair of objects belongs to one split: no training picture shows two objects
together that a validation or test picture is there to ask about.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from dataclasses import dataclass
from functools import cache
from random import Random

from PIL import Image, ImageDraw

from rayrl.data.config import DataConfig, Split
from rayrl.data.dataset import Dataset
from rayrl.data.wording import Arrangement, Thing, describe

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (218, 32, 36),
    "orange": (255, 138, 0),
    "yellow": (252, 222, 40),
    "green": (26, 158, 64),
    "blue": (36, 104, 242),
    "purple": (150, 50, 190),
}
SHAPES = ("square", "ring", "cross", "triangle")
GROUNDS: dict[str, Colour] = {"light": (244, 242, 236), "dark": (30, 32, 40)}
DARK_SHARE = 0.3
THREE_SHARE = 0.1
HELD_OUT_SHARE = 0.15
"""Of the pairs of objects, for validation, and as much again for test."""
JITTER_ALONG = 0.04
"""How far a thing strays along its row or column, as a share of the space it has there."""
JITTER_ACROSS = 0.06
"""How far it strays across, as a share of the picture's side."""
MAX_TURN = 0.05
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: things from left to right or from top to bottom, and where."""

    things: tuple[Thing, ...]
    arrangement: Arrangement
    ground: str
    centres: tuple[Point, ...]
    """x and y as shares of the picture's side."""
    radius: float
    """Half the size of a thing, as a share of the picture's side."""
    turns: tuple[float, ...]
    """How far each thing is turned clockwise, in radians."""


def load_scenes(config: DataConfig, split: Split) -> Dataset:
    """The pictures of one split; each is drawn once, when it is first asked for."""
    sizes, limit = config.scenes, config.limit(split)
    count = {"train": sizes.num_train, "val": sizes.num_val, "test": sizes.num_test}[split]
    items = [make_scene(sizes.seed, split, i) for i in range(min(count, limit) if limit else count)]
    digest = hashlib.blake2b(repr(items).encode(), digest_size=16)
    read_image = ScenePictures([scene for scene, _ in items], config.image_size)
    digest.update(read_image(0))
    return Dataset(
        ids=[f"scenes/{sizes.seed}/{split}/{i:05d}" for i in range(len(items))],
        captions=[captions for _, captions in items],
        instruction=config.instruction,
        read_image=read_image,
        image_digest=digest.hexdigest(),
    )


class ScenePictures:
    """Draws the picture of an index as PNG, and keeps it: at 48 pixels a side a thousand take
    0.6 MB."""

    def __init__(self, scenes: list[Scene], size: int) -> None:
        self._scenes, self._size = scenes, size
        self._drawn: dict[int, bytes] = {}

    def __call__(self, index: int) -> bytes:
        if index not in self._drawn:
            self._drawn[index] = draw(self._scenes[index], self._size)
        return self._drawn[index]


def make_scene(seed: int, split: Split, index: int) -> tuple[Scene, tuple[str, ...]]:
    """The scene of an index and its five captions."""
    rng = Random(f"{seed}/{split}/{index}")
    things = _things(rng, split, pair_splits(seed))
    arrangement: Arrangement = rng.choice(("row", "column"))
    ground = "dark" if rng.random() < DARK_SHARE else "light"
    step = 1 / len(things)
    centres = []
    for place in range(len(things)):
        along = (place + 0.5) * step + step * rng.uniform(-JITTER_ALONG, JITTER_ALONG)
        across = 0.5 + rng.uniform(-JITTER_ACROSS, JITTER_ACROSS)
        centres.append((along, across) if arrangement == "row" else (across, along))
    scene = Scene(
        things=things,
        arrangement=arrangement,
        ground=ground,
        centres=tuple(centres),
        radius=rng.uniform(0.38, 0.41) * step,
        turns=tuple(rng.uniform(-MAX_TURN, MAX_TURN) for _ in things),
    )
    return scene, describe(things, arrangement, ground, rng)


@cache
def pair_splits(seed: int) -> dict[frozenset[Thing], Split]:
    """Which split each pair of objects, unlike in colour and in shape, belongs to."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [
        frozenset((one, other))
        for one, other in itertools.combinations(things, 2)
        if one.colour != other.colour and one.shape != other.shape
    ]
    Random(f"{seed}/pairs").shuffle(pairs)
    held_out = round(HELD_OUT_SHARE * len(pairs))
    splits: dict[frozenset[Thing], Split] = dict.fromkeys(pairs, "train")
    splits |= dict.fromkeys(pairs[:held_out], "val")
    splits |= dict.fromkeys(pairs[held_out : 2 * held_out], "test")
    return splits


def _things(rng: Random, split: Split, splits: dict[frozenset[Thing], Split]) -> tuple[Thing, ...]:
    """Objects unlike in colour and shape, of which training has seen every pair, or, in a held-out
    split, at least one pair is of that split and the others were seen."""
    count = 3 if rng.random() < THREE_SHARE else 2
    while True:
        colours, shapes = rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)
        things = tuple(Thing(*thing) for thing in zip(colours, shapes, strict=True))
        kinds = {splits[frozenset(pair)] for pair in itertools.combinations(things, 2)}
        if split in kinds and kinds <= {split, "train"}:
            return things


def draw(scene: Scene, size: int) -> bytes:
    """The picture as PNG, ``size`` pixels a side."""
    side = size * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), GROUNDS[scene.ground])
    pen = ImageDraw.Draw(picture)
    for thing, (x, y), turn in zip(scene.things, scene.centres, scene.turns, strict=True):
        outline = _outline(thing.shape, (x * side, y * side), scene.radius * side, turn)
        pen.polygon(outline, fill=COLOURS[thing.colour])
    file = io.BytesIO()
    picture.reduce(SUPERSAMPLING).save(file, "PNG")
    return file.getvalue()


_RING_CORNERS = 48
_CORNERS: dict[str, list[Point]] = {
    # (distance as a share of the radius, angle in turns clockwise from the top)
    "square": [(1.2, 0.125), (1.2, 0.375), (1.2, 0.625), (1.2, 0.875)],
    # Once round outside and back inside; the cut where the two meet has no width.
    "ring": [(1.0, corner / _RING_CORNERS) for corner in range(_RING_CORNERS + 1)]
    + [(0.58, corner / _RING_CORNERS) for corner in range(_RING_CORNERS, -1, -1)],
    # An arm's two outer corners and the inner one after it, four times; the inner distance makes
    # the sides of an arm parallel.
    "cross": [
        (share, angle + quarter / 4)
        for quarter in range(4)
        for share, angle in (
            (1.1, -0.05),
            (1.1, 0.05),
            (1.1 * math.sqrt(2) * math.sin(2 * math.pi * 0.05), 0.125),
        )
    ],
    "triangle": [(1.12, 0.0), (1.12, 1 / 3), (1.12, 2 / 3)],
}


def _outline(shape: str, centre: Point, radius: float, turn: float) -> list[Point]:
    return [
        (
            centre[0] + share * radius * math.sin(2 * math.pi * angle + turn),
            centre[1] - share * radius * math.cos(2 * math.pi * angle + turn),
        )
        for share, angle in _CORNERS[shape]
    ]
