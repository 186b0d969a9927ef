"""CIDEr-D against pycocoevalcap, against hand-computed values, and against itself."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider as ReferenceCider

from rayrl.rewards import cider, cider_numba, cider_numpy, reference_index
from rayrl.rewards.cider import Cider, CiderD, DocumentFrequency, ReferenceIndex

PATHS = {"numpy": cider_numpy.components, "numba": cider_numba.components}


@pytest.fixture(params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on both paths."""
    monkeypatch.setattr(cider, "_components", lambda: PATHS[request.param])
    yield request.param


def reference_scores(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """pycocoevalcap, whose document frequencies are those of ``references``."""
    gts = dict(enumerate(references))
    res = {i: [caption] for i, caption in enumerate(captions)}
    return ReferenceCider().compute_score(gts, res)[1]


def corpus(seed: int, images: int) -> tuple[list[str], list[list[str]]]:
    """Captions of every awkward kind, and 1 to 40 references an image, some of them equal."""
    rng = random.Random(seed)
    vocabulary = [f"w{int(rng.paretovariate(0.7))}" for _ in range(400)]

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(low, high)))

    captions, references = [], []
    for _ in range(images):
        some = [sentence(0, 14) for _ in range(rng.choice((1, 2, 5, 5, 5, 40)))]
        if rng.random() < 0.2:
            some += rng.choices(some, k=2)
        copied = rng.choice(some).split()
        captions.append(
            rng.choice(
                (
                    "",
                    sentence(1, 3),
                    sentence(4, 20),
                    " ".join(copied),
                    " ".join(copied[: len(copied) // 2] + sentence(0, 5).split()),
                    " ".join(copied * 3),
                    "unseen unseen words unseen words w1",
                    "w1 " * rng.randint(1, 30),
                )
            )
        )
        references.append(some)
    return captions, references


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocoevalcap(seed: int) -> None:
    captions, references = corpus(seed, images=300)
    df = DocumentFrequency.from_references(references)
    scores = CiderD(df).score(captions, references)
    expected = reference_scores(captions, references)
    assert expected.max() > 1.0
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


def test_hand_computed() -> None:
    """Three images; "dog" is in two, so idf(dog) = log(3/2), idf(red) = idf(cat) = log(3)."""
    references = [["red dog"], ["dog"], ["cat"]]
    df = DocumentFrequency.from_references(references)
    score = CiderD(df).components(["dog dog cat"], [["red dog"]])[0]
    dog, three = math.log(3 / 2), math.log(3)
    hypothesis = math.hypot(2 * dog, three)  # cat is unseen in the reference, but counts
    reference = math.hypot(dog, three)
    penalty = math.exp(-((2 - 1) ** 2) / 72)  # two bigrams against one
    expected = 10 * min(2 * dog, dog) * dog / (hypothesis * reference) * penalty
    np.testing.assert_allclose(score, [expected, 0, 0, 0], atol=1e-15)
    plain = Cider(df).components(["dog dog cat"], [["red dog"]])[0]
    np.testing.assert_allclose(plain[0], 20 * dog * dog / (hypothesis * reference), atol=1e-14)


def test_published_values() -> None:
    """The example of jmhessel/clipscore, whose README gives 0.5637 and 0.2790."""
    references = [
        [
            "two cats are sleeping next to each other",
            "a grey cat is cuddling with an orange cat on a blanket",
            "the orange cat is happy that the black cat is close to it",
        ],
        [
            "a dog is wearing ear muffs as it lies on a carpet",
            "a black dog and an orange cat are looking at the photographer",
            "headphones are placed on a dogs ears",
        ],
    ]
    good = [
        "an orange cat and a grey cat are lying together",
        "a black dog wearing headphones looks at the camera "
        "as an orange cat walks in the background",
    ]
    bad = [
        "a calico cat and a white cat are lying together",
        "a black dog wearing a hat looks at the camera as a tabby walks in the background",
    ]
    df = DocumentFrequency.from_references(references)
    np.testing.assert_allclose(
        CiderD(df).score(good, references), [0.5070732170027852, 0.620409301348665], atol=1e-14
    )
    np.testing.assert_allclose(
        CiderD(df).score(bad, references), [0.0, 0.5580330614326794], atol=1e-14
    )
    assert Cider(df).score(good, references).mean() == pytest.approx(0.7496345418397591, abs=1e-14)
    assert Cider(df).score(bad, references).mean() == pytest.approx(0.3948449878944157, abs=1e-14)


def test_a_copy_scores_ten_and_of_three_words_seven_and_a_half() -> None:
    df = DocumentFrequency.from_references([["a b c d e"], ["x y z"], ["q"]])
    scores = CiderD(df).score(["a b c d e", "x y z"], [["a b c d e"], ["x y z"]])
    np.testing.assert_allclose(scores, [10.0, 7.5], atol=1e-12)


def test_duplicate_references_lower_the_score_of_the_other() -> None:
    df = DocumentFrequency.from_references([["a b", "c d"], ["x"]])
    once, thrice = CiderD(df).score(["a b"] * 2, [["a b", "c d"], ["a b", "c d", "c d", "c d"]])
    np.testing.assert_allclose([once, thrice], [2.5, 1.25], atol=1e-12)


def test_identical_captions_score_bit_identically_whatever_stands_around_them() -> None:
    captions, references = corpus(9, images=60)
    scorer = CiderD(DocumentFrequency.from_references(references))
    alone = [scorer.score([c], [r])[0] for c, r in zip(captions, references, strict=True)]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 5))
    together = scorer.score([captions[i] for i in order], [references[i] for i in order])
    assert together.tolist() == [alone[i] for i in order]
    assert len(set(alone)) > 20


def test_lists_of_words_equal_strings() -> None:
    captions, references = corpus(3, images=30)
    df = DocumentFrequency.from_references(references)
    split = [[text.split() for text in item] for item in references]
    assert DocumentFrequency.from_references(split).content_hash == df.content_hash
    as_words = CiderD(df).score([c.split() for c in captions], split)
    assert as_words.tolist() == CiderD(df).score(captions, references).tolist()


def test_eos_is_a_word_of_captions_that_ended() -> None:
    captions, references = corpus(5, images=100)
    finished = [i % 3 != 0 for i in range(100)]
    with_eos = [[f"{text} <eos>" for text in item] for item in references]
    ended = [f"{c} <eos>" if end else c for c, end in zip(captions, finished, strict=True)]
    df = DocumentFrequency.from_references(references, eos=True)
    np.testing.assert_allclose(
        CiderD(df).score(captions, references, finished),
        reference_scores(ended, with_eos),
        atol=1e-12,
    )


def test_stopping_in_the_middle_costs_more_with_eos() -> None:
    references = [
        ["a man with a hat", "a man wearing a hat"],
        ["a dog runs"],
        ["a cat with a ball"],
    ]
    whole, cut = "a man with a hat", "a man with a"
    loss = {}
    for eos in (False, True):
        df = DocumentFrequency.from_references(references, eos=eos)
        scores = CiderD(df).score([whole, cut], [references[0]] * 2)
        loss[eos] = scores[0] - scores[1]
    assert loss[True] > loss[False] > 0


def test_scoring_leaves_no_trace_of_captions() -> None:
    """The df of pyciderevalcap grows with every unseen n-gram; here nothing does."""
    captions, references = corpus(1, images=50)
    df = DocumentFrequency.from_references(references)
    scorer = CiderD(df)
    first = scorer.score(captions, references)
    before = (df.content_hash, len(df.words), scorer._own.nbytes, len(scorer._own.word_ids))
    for i in range(20):
        scorer.score([f"never seen {i} {j}" for j in range(50)], references)
    after = (df.content_hash, len(df.words), scorer._own.nbytes, len(scorer._own.word_ids))
    assert after == before
    assert scorer.score(captions, references).tolist() == first.tolist()


def test_the_number_of_images_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    captions, references = corpus(2, images=40)
    df = DocumentFrequency.from_references(references)
    expected = CiderD(df).score(captions, references)
    monkeypatch.setattr(reference_index, "MAX_IMAGES", 7)
    scorer = CiderD(df)
    for i in range(0, 40, 4):
        scores = scorer.score(captions[i : i + 4], references[i : i + 4])
        assert scores.tolist() == expected[i : i + 4].tolist()
        assert len(scorer._own) <= 7


def test_a_shared_index_is_read_only_arrays_and_is_never_changed() -> None:
    captions, references = corpus(4, images=80)
    references[70] = ["words that no document has"]
    captions[70] = "words that no caption has"
    df = DocumentFrequency.from_references(references[:50])
    expected = CiderD(df).score(captions, references)
    buffers: list[pickle.PickleBuffer] = []
    index = ReferenceIndex.build(df, references[:60])
    data = pickle.dumps((df, index), protocol=5, buffer_callback=buffers.append)
    assert len(data) < 5000, "arrays travel outside the pickle, as Ray shares them"
    frozen = [bytes(buffer) for buffer in buffers]
    shared_df, shared = pickle.loads(data, buffers=frozen)
    scorer = CiderD(shared_df, shared)
    for _ in range(2):
        np.testing.assert_allclose(scorer.score(captions, references), expected, rtol=1e-14)
    assert len(shared) == 60
    assert len(scorer._own) == 20
    assert expected[70] > 0


def test_an_index_of_other_document_frequencies_is_refused() -> None:
    one = DocumentFrequency.from_references([["a"], ["b"]])
    other = DocumentFrequency.from_references([["a"], ["c"]])
    with pytest.raises(ValueError, match="build it again"):
        CiderD(one, ReferenceIndex.build(other, [["a"]]))


def test_wrong_shapes_are_named() -> None:
    scorer = CiderD(DocumentFrequency.from_references([["a b"], ["c"]]))
    with pytest.raises(ValueError, match="2 captions but 1 lists"):
        scorer.score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="item 1: no reference"):
        scorer.score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="item 0: references 'a b', want a list"):
        scorer.score(["a"], ["a b"])
    assert scorer.score([], []).shape == (0,)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ({7: ["a b"]}, {7: ["a b"]}, r"captions are a dict.*score\(\[res\[i\]\[0\] for i in res"),
        ("a b", [["a b"]], "captions are a str, want a list"),
        ([None], [["a b"]], "caption None, want a str or a list of words"),
        ([float("nan")], [["a b"]], "caption nan, want a str"),
        (
            [["a red dog"]],
            [["a b"]],
            r"\['a red dog'.* has the word 'a red dog', want a caption as",
        ),
        ([[["a"]]], [["a b"]], r"has the word \['a'\]"),
        ([[3, 17]], [["a b"]], "has the word 3, want a caption as one str"),
        (["a"], [None], "item 0: references None, want a list of captions"),
        (["a"], [[None]], "caption None, want a str"),
        (["a"], [[["new words"]]], "has the word 'new words'"),
    ],
)
def test_wrong_types_are_named(
    eos: bool, captions: object, references: object, message: str
) -> None:
    scorer = CiderD(DocumentFrequency.from_references([["a b"], ["c"]], eos=eos))
    with pytest.raises(ValueError, match=message):
        scorer.score(captions, references)  # type: ignore[arg-type]
    assert scorer.score(["a b"], [["a b"]]).shape == (1,), "it goes on"


@pytest.mark.parametrize("path", ["numpy"], indirect=True)
def test_more_than_255_references_and_repetitions() -> None:
    """Counts are kept in a byte until one does not fit.  (For wider ones numba compiles anew.)"""
    references = [[f"w{i} x" for i in range(300)], ["y " * 400], ["z"]]
    captions = ["w7 x", "y " * 350, "z"]
    df = DocumentFrequency.from_references(references)
    np.testing.assert_allclose(
        CiderD(df).score(captions, references),
        reference_scores(captions, references),
        atol=1e-12,
    )
