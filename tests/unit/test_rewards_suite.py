"""The evaluation suite: BLEU and ROUGE-L against pycocoevalcap, diversity by hand, and every way
to hand in a wrong results file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as ReferenceBleu
from pycocoevalcap.rouge.rouge import Rouge as ReferenceRouge

from rayrl.rewards import diversity
from rayrl.rewards.bleu import bleu
from rayrl.rewards.bootstrap import compare, paired_bootstrap
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.java import MetricUnavailable
from rayrl.rewards.results import match, read_results, write_results
from rayrl.rewards.rouge import longest_common_subsequence, rouge_l
from rayrl.rewards.selftest import selftest
from rayrl.rewards.suite import CaptionSet, evaluate, sample_diversity

CAPTIONS = ["a red dog runs", "a cat", "", "dog dog dog dog", "the man with a"]
REFERENCES = [
    ["a red dog runs fast", "the dog runs"],
    ["a black cat sleeps"],
    ["a boat", "a boat on a lake"],
    ["a dog", "dog dog and dog", "the dog"],
    ["a man with a hat in the park"],
]


def as_coco(captions: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    return dict(enumerate(references)), {i: [caption] for i, caption in enumerate(captions)}


def test_bleu_equals_pycocoevalcap() -> None:
    for captions, references in ((CAPTIONS, REFERENCES), (CAPTIONS[2:3], REFERENCES[2:3])):
        corpus, each = ReferenceBleu(4).compute_score(*as_coco(captions, references), verbose=0)
        result = bleu(captions, references)
        np.testing.assert_allclose(result.corpus, corpus, rtol=1e-12)
        np.testing.assert_allclose(result.captions, np.array(each).T, rtol=1e-12)


def test_references_may_be_rows_of_an_array() -> None:
    """Whose rows are other objects each time, that come to lie where others did."""
    words = [f"w{i}" for i in range(15)]
    rng = np.random.default_rng(0)
    references = [[" ".join(rng.choice(words, 6)) for _ in range(3)] for _ in range(40)]
    captions = [some[0] for some in references]
    rows, cider = np.array(references), CiderD(DocumentFrequency.from_references(references))
    want = cider.score(captions, references)
    # Not those that are known by now.
    other = CiderD(DocumentFrequency.from_references(references))
    assert other.score(captions, rows).tolist() == want.tolist()
    got = bleu(captions, rows).captions
    assert got.tolist() == bleu(captions, references).captions.tolist()
    assert rouge_l(captions, rows).tolist() == rouge_l(captions, references).tolist()


def test_bleu_by_hand() -> None:
    """Two of three words, one of two bigrams, and one word short of the closest reference."""
    result = bleu(["a red cat"], [["a red dog runs", "a b c d e f g"]])
    brevity = math.exp(1 - 4 / 3)
    np.testing.assert_allclose(
        result.corpus[:2], [2 / 3 * brevity, math.sqrt(2 / 3 * 1 / 2) * brevity], rtol=1e-8
    )


def test_rouge_l_equals_pycocoevalcap() -> None:
    _, each = ReferenceRouge().compute_score(*as_coco(CAPTIONS, REFERENCES))
    np.testing.assert_allclose(rouge_l(CAPTIONS, REFERENCES), each, atol=1e-15)
    words = [caption.split() for caption in CAPTIONS]
    assert rouge_l(words, REFERENCES).tolist() == rouge_l(CAPTIONS, REFERENCES).tolist()


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [("abcde", "ace", 3), ("abc", "def", 0), ("aab", "aba", 2), ("", "abc", 0), ("abab", "ba", 2)],
)
def test_longest_common_subsequence(one: str, other: str, length: int) -> None:
    assert longest_common_subsequence(one, other) == length
    assert longest_common_subsequence(other, one) == length


def test_missing_references_are_named() -> None:
    for metric in (bleu, rouge_l):
        with pytest.raises(ValueError, match="item 1: no reference"):
            metric(["a", "b"], [["a"], []])


def test_div_n_by_hand() -> None:
    groups = [["a dog runs", "a dog sits"], ["a a"]]
    assert diversity.div_n(groups, 1) == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert diversity.div_n(groups, 2) == pytest.approx((3 / 6 + 1 / 2) / 2)


def test_mbleu_is_one_for_copies_and_near_zero_for_strangers() -> None:
    copies = [["a dog runs in the park"] * 3] * 2
    strangers = [["a b c d e", "f g h i j", "k l m n o"]] * 2
    assert diversity.mbleu4(copies) == pytest.approx(1.0, abs=1e-8)
    assert diversity.mbleu4(strangers) < 1e-8


def test_self_cider_by_hand() -> None:
    """Equal captions have one eigenvalue; K captions with nothing in common have K equal ones."""
    df = DocumentFrequency.from_references([["a dog runs fast"], ["my big cat sleeps now"]])
    groups = [["a dog runs fast"] * 2, ["a dog runs fast", "my big cat sleeps"]]
    np.testing.assert_allclose(diversity.self_cider(groups, df), [0.0, 1.0], atol=1e-12)
    half = diversity.self_cider([["a dog runs fast", "a dog my big"]], df)[0]
    assert 0.0 < half < 1.0


def test_oracle_mean_vocabulary_and_novelty() -> None:
    references = [["a dog runs fast"], ["my cat sleeps now"]]
    df = DocumentFrequency.from_references(references)
    groups = [["a dog runs fast", "x"], ["x", "x"]]
    oracle, mean = diversity.oracle_and_mean(groups, references, df)
    assert (oracle, mean) == (pytest.approx(5.0), pytest.approx(2.5))
    flat = [caption for group in groups for caption in group]
    assert diversity.vocabulary_size(flat) == 5
    assert diversity.novel_share(flat, {"x"}) == 0.25


def test_groups_of_unequal_size_are_refused() -> None:
    df = DocumentFrequency.from_references([["a"], ["b"]])
    with pytest.raises(ValueError, match=r"images with \[1, 2\] captions"):
        diversity.self_cider([["a"], ["a", "b"]], df)
    with pytest.raises(ValueError, match=r"images with \[1\] captions"):
        diversity.mbleu4([["a"], ["b"]])


def test_bad_endings_and_repetition_by_hand() -> None:
    captions = ["a man with a", "a man with a hat", "", "the dog runs to"]
    assert diversity.bad_ending(captions).tolist() == [1.0, 0.0, 1.0, 1.0]
    shares = diversity.repetition(["a dog a dog a dog", "a dog", "a", ""], n=2)
    np.testing.assert_allclose(shares, [1 - 2 / 5, 0, 0, 0])


def test_evaluation_is_a_table_with_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_java() -> str:
        raise MetricUnavailable("no java on the PATH")

    monkeypatch.setattr("rayrl.rewards.meteor.find_java", no_java)
    monkeypatch.setattr("rayrl.rewards.spice.find_java", no_java)
    data = CaptionSet(["A man rides a horse.", "A boat"], [["A man rides a horse!"], ["a boat."]])
    evaluation = evaluate(data)
    assert evaluation.left_out["meteor"] == evaluation.left_out["spice"] == "no java on the PATH"
    assert "CLIP folder" in evaluation.left_out["clip_score"]
    assert not {"meteor", "spice", "clip_score"} & set(evaluation.scores)
    assert evaluation.scores["cider_d"] == pytest.approx((10.0 + 5.0) / 2)
    assert evaluation.captions["cider_d"] == pytest.approx([10.0, 5.0])
    table = evaluation.table()
    assert "2 captions, x100" in table
    assert "cider_d       750.00" in table
    assert "meteor: left out, no java on the PATH" in table
    assert evaluation.scores["length"] == 3.5
    assert evaluation.scores["vocabulary"] == 5
    assert "vocabulary" not in evaluation.captions and "novel" not in evaluation.scores
    assert "+eos:no+df:corpus[2]#" in evaluation.signature


def test_novel_captions_are_counted_where_training_captions_are_given() -> None:
    data = CaptionSet(["A boat!", "a dog"], [["a"], ["b"]], training=["a boat .", "x"])
    assert evaluate(data, ("health",)).scores["novel"] == 0.5


def of_two(data: CaptionSet) -> dict:
    return {"mine": (0.5, np.zeros(2))}


def rouge_again(data: CaptionSet) -> dict:
    return {"rouge_l": (0.5, None)}


def failing(data: CaptionSet) -> dict:
    return {"length": (data.captions[0] / 2, None)}


def test_a_metric_of_ones_own_that_fails_costs_no_other_its_scores() -> None:
    """Each caption has its score, and a name of its own."""
    data = CaptionSet(["a", "b", "c"], [["a"]] * 3)
    own = [f"{__name__}:{name}" for name in ("of_two", "rouge_again", "failing")]
    evaluation = evaluate(data, ("rouge_l", *own))
    assert evaluation.scores == {"rouge_l": pytest.approx(1 / 3)}
    said = [evaluation.left_out[name] for name in own]
    assert "of_two: mine of each caption has shape (2,), want (3,) or None" in said[0]
    assert said[1] == "it gives rouge_l, which another metric gave"
    assert "failing failed: TypeError: unsupported operand" in said[2]
    assert evaluate(data, (own[1],)).scores == {"rouge_l": 0.5}
    with pytest.raises(ValueError, match="has no 'no_such'"):
        evaluate(data, (f"{__name__}:no_such",))


def test_unknown_metrics_and_wrong_sizes_are_refused() -> None:
    data = CaptionSet(["a"], [["a"]])
    with pytest.raises(ValueError, match=r"metric 'cider', want one of \['cider_d'"):
        evaluate(data, ("cider",))
    with pytest.raises(ValueError, match="over 1 image"):
        evaluate(data, ("cider_d",))
    assert evaluate(data, ("rouge_l",)).scores == {"rouge_l": 1.0}
    with pytest.raises(ValueError, match="1 captions but 2 references"):
        CaptionSet(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="item 0: references 'a b', want a list of captions"):
        CaptionSet(["a"], ["a b"])
    with pytest.raises(ValueError, match="caption None, want a str"):
        evaluate(CaptionSet([None, "a"], [["a"], ["b"]]), ("rouge_l",))  # type: ignore[list-item]


def test_diversity_of_samples() -> None:
    groups = [["A dog runs.", "a dog runs"], ["My cat sleeps", "Your cow!"]]
    scores = sample_diversity(groups, [["a dog runs"], ["my cat sleeps"]], ["A dog runs"])
    assert scores["novel"] == 0.5
    assert scores["vocabulary"] == 8
    assert scores["oracle_cider_d"] == pytest.approx(7.5)
    assert scores["mean_cider_d"] == pytest.approx(7.5 * 3 / 4)
    assert scores["div_1"] == pytest.approx((3 / 6 + 5 / 5) / 2)


def test_self_test_passes() -> None:
    checks = selftest()
    assert len(checks) >= 12
    assert [check for check in checks if not check.ok] == []


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_results_survive_a_round_trip_with_number_ids(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", {"391895": "a man", "b": "a boat"})
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"image_id": 391895, "caption": "a man"},
        {"image_id": "b", "caption": "a boat"},
    ]
    assert read_results(tmp_path / "r.json") == {391895: "a man", "b": "a boat"}
    for given in ("a dog", ["a dog"], [{"image_id": "x", "caption": "a dog"}]):
        assert read_results(write(tmp_path / "d.json", {"x": given})) == {"x": "a dog"}
    odd = [{"image_id": 7.0, "caption": "a dog \ud83d"}]
    assert read_results(write(tmp_path / "d.json", odd)) == {7: "a dog "}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "holds int, want a list"),
        ([{"image_id": 1}], "entry 0 is .* want image_id and caption"),
        (["a"], "entry 0 is 'a'"),
        ([{"image_id": 1.5, "caption": "a"}], "image_id 1.5, want an int or a str"),
        ([{"image_id": 1, "caption": ["a"]}], r"image 1 has caption \['a'\], want one str"),
        ({"1": ["a", "b"]}, r"image 1 has caption \['a', 'b'\], want one str"),
        ({"1": []}, r"image 1 has caption \[\], want one str"),
        ([{"image_id": 1, "caption": "a"}] * 2, "image 1 has two captions"),
        ([{"image_id": True, "caption": "a"}], "image_id True, want an int or a str"),
    ],
)
def test_wrong_results_are_named(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_results(write(tmp_path / "r.json", value))


def test_results_that_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match=r"r\.json: not JSON"):
        read_results(tmp_path / "r.json")
    (tmp_path / "r.json").write_bytes('{"1": "größe"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.json: not UTF-8: byte 0xf6 at 9"):
        read_results(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"1": "a", "2": "b", "1": "c"}')
    with pytest.raises(ValueError, match="image 1 has two captions"):
        read_results(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"r\.json: nested too deeply"):
        read_results(tmp_path / "r.json")


def test_results_and_references_must_be_of_the_same_images() -> None:
    references = {1: ["a"], 2: ["b"]}
    assert match({"2": "y", "1": "x"}, references) == (["x", "y"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"1 of 2 images have no caption, such as \['2'\]"):
        match({1: "x"}, references)
    with pytest.raises(ValueError, match=r"1 captions are of images without references.*\['3'\]"):
        match({1: "x", 2: "y", 3: "z"}, references)
    with pytest.raises(ValueError, match="once by number and once by text"):
        match({1: "x", 2: "y", "2": "z"}, references)


def test_bootstrap_finds_a_difference_and_only_one_that_is_there() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 400)  # images differ much more than systems do
    better = paired_bootstrap(hard, hard + rng.normal(0.1, 0.5, 400), num_samples=2000)
    assert better.difference == pytest.approx(0.1, abs=0.05)
    assert better.low > 0 and better.p_value < 0.01
    # The interval of a mean is 1.96 standard errors to each side.
    assert better.high - better.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    same = paired_bootstrap(hard, hard + rng.normal(0.0, 0.5, 400), num_samples=500)
    assert same.low < 0 < same.high
    equal = paired_bootstrap(hard, hard, num_samples=100)
    assert (equal.difference, equal.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"shapes \(400,\) and \(3,\)"):
        paired_bootstrap(hard, [1, 2, 3])


def test_systems_are_compared_by_every_metric_of_captions() -> None:
    references = [[f"a w{i} b c dog"] for i in range(20)]
    a = CaptionSet(["a b c dog"] * 20, references)
    b = CaptionSet([f"A w{i} b c dog." for i in range(20)], references)
    found, left_out = compare(a, b, ("cider_d", "rouge_l", "bleu", "clip_score"), num_samples=500)
    assert list(found) == ["cider_d", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    assert list(left_out) == ["clip_score"]
    assert found["cider_d"].mean_b == pytest.approx(10.0)
    assert found["cider_d"].mean_a == 0.0, "what every image has weighs nothing"
    assert all(one.p_value == 0.0 and one.num_images == 20 for one in found.values())
    corpus = bleu(a.tokens, a.reference_tokens).corpus
    assert found["bleu_2"].mean_a == pytest.approx(corpus[1], rel=1e-12)
    with pytest.raises(ValueError, match="other references"):
        compare(a, CaptionSet(b.captions, references[::-1]))


def test_bleu_of_a_resampled_set_is_that_of_its_captions() -> None:
    """One image is right and one wrong.  A draw of two has 2, 1 or 0 right ones: BLEU-1 is 1, the
    pooled 2/3 x brevity (not the mean of both captions), or 0."""
    references = [["a red dog runs"], ["my cat sleeps now"]]
    right = CaptionSet(["a red dog runs", "my cat sleeps now"], references)
    half = CaptionSet(["a red dog runs", "x y"], references)
    pooled = 4 / 6 * math.exp(1 - 8 / 6)
    one = compare(half, right, ("bleu",), num_samples=4000)[0]["bleu_1"]
    assert (one.mean_a, one.mean_b) == (pytest.approx(pooled), pytest.approx(1.0))
    assert (one.low, one.high) == (pytest.approx(0.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    # Drawn twice the right image, which happens in a quarter of the draws, nothing is better.
    assert one.p_value == pytest.approx(0.25, abs=0.03)
