"""Held-out scores: pycocoevalcap's convention, before and after side by side."""

from __future__ import annotations

import json

import pytest
from pycocoevalcap.cider.cider import Cider

from rayrl import heldout
from rayrl.heldout import Heldout
from rayrl.rewards import ptb
from rayrl.types import Prompt
from tests.conftest import encoded_picture


def surely(what, write):
    write()


def prompt(name, *references):
    image = encoded_picture((9, 9, 9))
    return Prompt(prompt_id=name, image=image, text="t", references=references)


@pytest.fixture
def two():
    return [
        prompt("a", "a man is speaking", "a man talks on a stage"),
        prompt("b", "rain falls", "the rain falls on a roof"),
    ]


def test_a_copy_of_a_single_reference_scores_1000(tmp_path):
    prompts = [prompt("a", "a man is speaking loudly"), prompt("b", "the rain falls down")]
    corpus, each = Heldout(prompts, tmp_path).score(["a man is speaking loudly", "a dog"])
    assert each == pytest.approx([1000.0, 0.0]) and corpus == pytest.approx(500.0)


def test_punctuation_and_case_cost_nothing_as_in_pycocoevalcap(tmp_path):
    prompts = [
        prompt("a", "A man, two dogs.", "Two dogs and a man", "a man's dog"),
        prompt("b", "Rain falls on a roof!", "The rain falls."),
        prompt("c", "It's a red-hot stove", "a hot stove"),
    ]
    captions = ["a man and two dogs", "rain falls.", "A Stove"]
    _, each = Heldout(prompts, tmp_path).score(captions)
    tokenize = ptb.tokenize
    references = {i: [" ".join(tokenize(r)) for r in p.references] for i, p in enumerate(prompts)}
    candidates = {i: [" ".join(tokenize(c))] for i, c in enumerate(captions)}
    _, expected = Cider().compute_score(references, candidates)
    assert each == pytest.approx((100 * expected).tolist(), abs=1e-9)
    assert min(each) > 0


def test_a_picture_is_made_small_once_for_all_evaluations(tmp_path, two, monkeypatch):
    made = []
    monkeypatch.setattr(heldout, "thumbnail", lambda image: made.append(image) or f"of {len(made)}")
    scored = Heldout(two, tmp_path)
    for version in (0, 5):
        scored.record(version, ["a man", "rain"], attempt=surely)
    assert made == [one.image for one in two]
    written = json.loads((tmp_path / "eval_captions.json").read_text())["images"]
    assert [image["image_base64_jpeg"] for image in written] == ["of 1", "of 2"]


def test_the_first_captions_stay_beside_the_newest_also_after_a_resume(tmp_path, two):
    heldout = Heldout(two, tmp_path)
    first = heldout.record(0, ["a man", "rain"], attempt=surely)
    heldout.record(5, ["a man is speaking", "rain falls"], attempt=surely)
    again = Heldout(two, tmp_path)
    last = again.record(9, ["a man talks", "rain falls"], attempt=surely)
    written = json.loads((tmp_path / "eval_captions.json").read_text())
    assert written["version"] == 9
    before = [image["before"] for image in written["images"]]
    assert [b["caption"] for b in before] == ["a man", "rain"]
    assert sum(b["cider_d"] for b in before) / 2 == pytest.approx(first)
    after = [image["after"]["cider_d"] for image in written["images"]]
    assert sum(after) / 2 == pytest.approx(last)


def before_of(folder) -> dict[str, dict]:
    images = json.loads((folder / "eval_captions.json").read_text())["images"]
    return {image["prompt_id"]: image["before"] for image in images}


def test_another_held_out_set_keeps_the_first_captions_of_the_images_that_stay(tmp_path, two):
    Heldout(two, tmp_path).record(0, ["a man", "rain falls"], attempt=surely)
    alone = before_of(tmp_path)
    # Of b there is another picture now, and c is new.
    other = [prompt("c", "a dog runs"), two[0], prompt("b", "snow falls", "it snows")]
    heldout = Heldout(other, tmp_path)
    heldout.record(30, ["a dog", "a man talks", "it is cold"], attempt=surely)
    before = before_of(tmp_path)
    assert {name: (b["caption"], b["version"]) for name, b in before.items()} == {
        "c": ("a dog", 30),
        "a": ("a man", 0),
        "b": ("it is cold", 30),
    }
    # By the statistics of the references that it stands among now.
    want = heldout.score(["a dog", "a man", "it is cold"])[1]
    assert [b["cider_d"] for b in before.values()] == want
    assert before["a"]["cider_d"] != alone["a"]["cider_d"]
    # And again after the next resume.
    Heldout(other, tmp_path).record(40, ["dogs", "men", "cold"], attempt=surely)
    assert before_of(tmp_path) == before


def test_the_first_captions_of_an_earlier_version_are_of_the_start(tmp_path, two):
    Heldout(two, tmp_path).record(0, ["a man", "rain falls"], attempt=surely)
    file = tmp_path / "eval_captions.json"
    written = json.loads(file.read_text())
    for image in written["images"]:
        del image["before"]["version"]
    file.write_text(json.dumps(written))
    Heldout(two, tmp_path).record(30, ["men", "rains"], attempt=surely)
    assert [(b["caption"], b["version"]) for b in before_of(tmp_path).values()] == [
        ("a man", 0),
        ("rain falls", 0),
    ]


def test_a_run_that_begins_has_no_captions_of_an_attempt_before_it(tmp_path, two):
    Heldout(two, tmp_path).record(0, ["a man", "rain falls"], attempt=surely)
    Heldout(two, tmp_path).record(0, ["men", "rains"], attempt=surely)
    assert [b["caption"] for b in before_of(tmp_path).values()] == ["men", "rains"]


def test_sets_are_told_apart_by_their_references_and_their_order_does_not_matter(tmp_path, two):
    three = [*two, prompt("c", "a dog runs")]
    name = Heldout(two, tmp_path).name
    assert name.startswith("corpus[2]#") and name in Heldout(two, tmp_path).signature
    assert Heldout(two[::-1], tmp_path).name == name
    assert Heldout.first(2, three, tmp_path).name == name
    assert Heldout.first(9, three, tmp_path).prompts == three
    assert len({name, Heldout(three, tmp_path).name, Heldout(three[1:], tmp_path).name}) == 3


def test_a_single_image_is_refused_with_the_reason(tmp_path, two):
    with pytest.raises(ValueError, match=r"1 held-out image.*0 by definition"):
        Heldout(two[:1], tmp_path)
