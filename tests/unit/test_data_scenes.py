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
from rayrl.data.scenes import COLOURS, GROUNDS, Scene, Thing, draw, make_scene, pair_splits
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
    assert scene.things == (Thing("green", "square"), Thing("orange", "circle"))
    assert captions == (
        "an orange circle beneath a green square",
        "a green square above an orange ball",
        "a green block and an orange circle",
        "a green square over an orange ball",
        "a picture of a green block and an orange ball",
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
            seen = picture[int(y * 64), int(x * 64)]
            assert np.abs(seen - COLOURS[thing.colour]).max() <= 1, (index, thing)
        places = [centre[0 if scene.arrangement == "row" else 1] for centre in scene.centres]
        assert places == sorted(places)


@pytest.mark.parametrize(("count", "share"), [(2, 0.045), (3, 0.02)])
def test_objects_are_large_and_do_not_touch(count, share):
    scenes = [make_scene(0, "train", index)[0] for index in range(120)]
    scenes = [scene for scene in scenes if len(scene.things) == count]
    assert len(scenes) > 10
    for scene in scenes:
        masks = []
        for thing, centre, turn in zip(scene.things, scene.centres, scene.turns, strict=True):
            alone = replace(scene, things=(thing,), centres=(centre,), turns=(turn,))
            masks.append((pixels(draw(alone, 64)) != GROUNDS[scene.ground]).any(axis=-1))
        assert min(mask.mean() for mask in masks) > share
        # One pixel may be half of the one and half of the other, no more.
        assert (np.sum(masks, axis=0) > 1).sum() <= 2, scene


def test_shapes_differ_in_outline():
    areas = {}
    for shape in ("circle", "square", "triangle", "star"):
        scene = Scene((Thing("red", shape),), "row", "light", ((0.5, 0.5),), 0.3, (0.0,))
        areas[shape] = (np.abs(pixels(draw(scene, 64)) - COLOURS["red"]).max(axis=-1) <= 40).mean()
    # Of a radius r: pi r^2; (1.2 r)^2 * 2; 3 sqrt(3)/4 (1.15 r)^2; 10/2 * 1.15 * 0.47 * sin 36 r^2.
    want = {"circle": 3.1416, "square": 2.88, "triangle": 1.718, "star": 1.588}
    for shape, area in areas.items():
        assert area == pytest.approx(want[shape] * 0.3**2, rel=0.05), shape


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
    things = (Thing("red", "circle"), Thing("blue", "square"))
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
