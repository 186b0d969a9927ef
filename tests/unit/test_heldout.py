"""Held-out scores: pycocoevalcap's convention, before and after side by side."""

from __future__ import annotations

import json

import pytest
from pycocoevalcap.cider.cider import Cider

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


def test_a_single_image_is_refused_with_the_reason(tmp_path, two):
    with pytest.raises(ValueError, match=r"1 held-out image.*0 by definition"):
        Heldout(two[:1], tmp_path)
