"""The generated data set: the same everywhere, easy to see, worded in many ways."""

import io
import itertools
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from rayrl.data import DataConfig, load_split
from rayrl.data.config import ScenesConfig
from rayrl.data.scenes import (
    COLOURS,
    GROUNDS,
    SHAPES,
    Scene,
    Thing,
    draw,
    make_scene,
    pair_splits,
)
from rayrl.data.wording import describe

SMALL = DataConfig(scenes=ScenesConfig(num_train=200, num_val=60, num_test=60))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def pairs(scene: Scene) -> list[frozenset[Thing]]:
    return [frozenset(pair) for pair in itertools.combinations(scene.things, 2)]


def test_the_same_seed_gives_the_same_pictures_and_captions():
    one, other = load_split(SMALL, "train"), load_split(SMALL, "train")
    assert one.fingerprint() == other.fingerprint()
    assert one.references() == other.references()
    assert [one[i].image for i in range(20)] == [other[i].image for i in range(20)]
    another_seed = SMALL.model_copy(update={"scenes": ScenesConfig(num_train=200, seed=1)})
    assert load_split(another_seed, "train").fingerprint() != one.fingerprint()


def test_captions_do_not_change_between_machines():
    scene, captions = make_scene(0, "train", 0)
    assert scene.things == (Thing("green", "ring"), Thing("orange", "square"))
    assert captions == (
        "an orange square beneath a green ring",
        "a green ring above an orange square",
        "a green hoop and an orange box",
        "a green ring over an orange square",
        "a picture of a green hoop and an orange square",
    )


def test_asking_for_more_pictures_keeps_the_first_ones():
    fewer = load_split(SMALL.model_copy(update={"max_train": 30}), "train")
    more = load_split(SMALL, "train")
    assert len(fewer) == 30
    assert fewer.references() == more.references()[:30]
    assert fewer[29].image == more[29].image


def test_no_training_picture_shows_a_pair_that_is_held_out():
    splits = pair_splits(0)
    # 6 x 4 things: 6*5/2 pairs of colours times 4*3 ordered shapes.
    assert Counter(splits.values()) == {"train": 126, "val": 27, "test": 27}
    for split in ("train", "val", "test"):
        for index in range(150):
            kinds = [splits[pair] for pair in pairs(make_scene(0, split, index)[0])]
            assert split in kinds
            assert set(kinds) <= {split, "train"}


def test_every_object_stands_where_the_scene_says_in_its_colour():
    for index in range(60):
        scene, _ = make_scene(3, "train", index)
        picture = pixels(draw(scene, 64))
        assert picture.shape == (64, 64, 3)
        assert np.abs(picture[0, 0] - GROUNDS[scene.ground]).max() <= 1
        for thing, (x, y) in zip(scene.things, scene.centres, strict=True):
            # A ring has its colour at 0.58 to 1 of its radius, and the ground in the middle.
            to_the_right = 0.79 * scene.radius if thing.shape == "ring" else 0.0
            seen = picture[int(y * 64), int((x + to_the_right) * 64)]
            assert np.abs(seen - COLOURS[thing.colour]).max() <= 1, (index, thing)
            if thing.shape == "ring":
                middle = picture[int(y * 64), int(x * 64)]
                assert np.abs(middle - GROUNDS[scene.ground]).max() <= 1, index
        places = [centre[0 if scene.arrangement == "row" else 1] for centre in scene.centres]
        assert places == sorted(places)


@pytest.mark.parametrize(("count", "share"), [(2, 0.06), (3, 0.026)])
def test_objects_are_large_and_do_not_touch(count, share):
    scenes = [make_scene(0, "train", index)[0] for index in range(300)]
    scenes = [scene for scene in scenes if len(scene.things) == count]
    assert len(scenes) > 20
    for scene in scenes:
        assert len({thing.shape for thing in scene.things}) == count
        assert len({thing.colour for thing in scene.things}) == count
        masks = []
        for thing, centre, turn in zip(scene.things, scene.centres, scene.turns, strict=True):
            alone = replace(scene, things=(thing,), centres=(centre,), turns=(turn,))
            masks.append((pixels(draw(alone, 64)) != GROUNDS[scene.ground]).any(axis=-1))
        assert min(mask.mean() for mask in masks) > share
        # One pixel may be half of the one and half of the other, no more.
        assert (np.sum(masks, axis=0) > 1).sum() <= 2, scene


def covered(shape: str) -> np.ndarray:
    """How much of each pixel, from 0 to 1, an upright thing of radius 0.3 covers: [64, 64]."""
    scene = Scene((Thing("red", shape),), "row", "light", ((0.5, 0.5),), 0.3, (0.0,))
    green = pixels(draw(scene, 64))[..., 1]
    return (green - GROUNDS["light"][1]) / (COLOURS["red"][1] - GROUNDS["light"][1])


def test_shapes_have_the_areas_of_their_outlines():
    # Of a radius r: (1.2 r)^2 * 2; (1 - 0.58^2) * 24 sin(7.5 deg) r^2, the outline having 48
    # corners; two bars of 2 w by 2 h less their overlap of (2 w)^2, for w, h = 1.1 r times the
    # sine and the cosine of 18 deg; 3 sqrt(3)/4 (1.12 r)^2.
    want = {"square": 2.88, "ring": 2.0788, "cross": 2.3827, "triangle": 1.6295}
    assert set(want) == set(SHAPES)
    for shape, area in want.items():
        assert covered(shape).mean() == pytest.approx(area * 0.3**2, rel=0.05), shape


def test_only_the_triangle_changes_when_turned_by_a_quarter():
    for shape in SHAPES:
        upright = covered(shape)
        assert np.abs(upright - upright[:, ::-1]).mean() < 0.005, shape
        change = np.abs(upright - np.rot90(upright)).mean()
        assert change > 0.05 if shape == "triangle" else change < 0.005, shape


def test_five_different_captions_with_words_left_out():
    data = load_split(SMALL, "train")
    texts = [caption for captions in data.references() for caption in captions]
    assert all(len(set(captions)) == 5 for captions in data.references())
    vocabulary = {word for text in texts for word in text.replace(",", "").split()}
    assert 55 <= len(vocabulary) <= 120
    articles = zip(texts, (text.split() for text in texts), strict=True)
    for text, words in articles:
        for article, noun in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (noun[0] in "aeiou"), text
    colours = {"red", "crimson", "orange", "yellow", "golden", "green", "emerald", "blue"}
    colours |= {"purple", "violet"}
    colourless = sum(not colours & set(text.split()) for text in texts) / len(texts)
    assert 0.05 < colourless < 0.25


def test_wording_is_skewed_so_that_a_consensus_exists():
    things = (Thing("red", "ring"), Thing("blue", "square"))
    rng, counts = Random(0), Counter()
    for _ in range(400):
        counts.update(describe(things, "row", "light", rng))
    (_, most), *_, (_, least) = counts.most_common()
    assert most > 40 * least
    assert len(counts) > 200


def test_pictures_are_held_apart_by_id():
    ids = {split: load_split(SMALL, split).ids for split in ("train", "val", "test")}
    assert ids["val"][7] == "scenes/0/val/00007"
    assert len({name for names in ids.values() for name in names}) == 200 + 60 + 60
