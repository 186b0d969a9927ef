"""Is this installation right?  Metrics on the example of jmhessel/clipscore and on cases that can
be worked out by hand, against published values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rayrl.rewards.cider import Cider
from rayrl.rewards.meteor import Meteor
from rayrl.rewards.suite import CaptionSet, evaluate

TOLERANCE = 1e-9

_REFERENCES = [
    [
        "two cats are sleeping next to each other.",
        "a grey cat is cuddling with an orange cat on a blanket.",
        "the orange cat is happy that the black cat is close to it.",
    ],
    [
        "a dog is wearing ear muffs as it lies on a carpet.",
        "a black dog and an orange cat are looking at the photographer.",
        "headphones are placed on a dogs ears.",
    ],
]
_GOOD = [
    "an orange cat and a grey cat are lying together.",
    "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
]
_BAD = [
    "a calico cat and a white cat are lying together.",
    "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
]
_COPIES = [["A man rides a brown horse."], ["Three small birds"], ["a boat on a lake at sunset"]]

# The README of jmhessel/clipscore prints four digits of these; the others are pycocoevalcap's.
_GOOD_SCORES = {
    "bleu_1": 0.6666666666419753,
    "bleu_2": 0.4898979485377655,
    "bleu_3": 0.3468814950494093,
    "bleu_4": 3.754749996447119e-05,
    "rouge_l": 0.42801048464089075,
    "cider_d": 0.5637412591757252,
}
_BAD_SCORES = {
    "bleu_1": 0.4814814814636489,
    "bleu_4": 1.8597451116765103e-05,
    "rouge_l": 0.31211054726129817,
    "cider_d": 0.2790165307163397,
}
_METEOR = {"good": 0.34441, "bad": 0.18607}


@dataclass(frozen=True, slots=True)
class Check:
    """One value: what it is of, what it should be and what it is."""

    name: str
    expected: float
    got: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        return abs(self.expected - self.got) <= self.tolerance


def selftest() -> list[Check]:
    """The checks that need no Java, all of which should be ``ok``."""
    return [*_published(), *_by_hand()]


def meteor_checks() -> list[Check]:
    """Those of METEOR, which takes half a minute to start; MetricUnavailable where Java is missing,
    ChildProcessError or TimeoutError where it fails."""
    return list(_meteor())


def _published() -> Iterator[Check]:
    for name, captions, expected in (("good", _GOOD, _GOOD_SCORES), ("bad", _BAD, _BAD_SCORES)):
        scores = evaluate(CaptionSet(captions, _REFERENCES), ("bleu", "rouge_l", "cider_d")).scores
        for metric, value in expected.items():
            yield Check(f"{metric} of the {name} captions", value, scores[metric])
    data = CaptionSet(_GOOD, _REFERENCES)
    plain = float(Cider(data.df).score(data.tokens, data.reference_tokens).mean())
    yield Check("plain CIDEr of the good captions", 0.7496345418397591, plain)


def _by_hand() -> Iterator[Check]:
    data = CaptionSet([some[0] for some in _COPIES], _COPIES)
    each = evaluate(data, ("cider_d",)).captions["cider_d"]
    yield Check("CIDEr-D of a copy of its reference", 10.0, float(each[0]))
    yield Check("CIDEr-D of a copy of three words, which has no 4-gram", 7.5, float(each[1]))


def _meteor() -> Iterator[Check]:
    with Meteor() as meteor:
        for name, captions in (("good", _GOOD), ("bad", _BAD)):
            data = CaptionSet(captions, _REFERENCES)
            corpus, _ = meteor.score(data.tokens, data.reference_tokens)
            yield Check(f"meteor of the {name} captions", _METEOR[name], corpus, tolerance=5e-6)
