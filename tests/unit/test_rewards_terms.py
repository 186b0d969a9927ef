"""Reward terms one by one, their sum, and what happens when one fails."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayrl.config import Config
from rayrl.joins import extended
from rayrl.only_logged import only_logged
from rayrl.outline import outline
from rayrl.rewards import model_terms, ptb
from rayrl.rewards.build import build_terms
from rayrl.rewards.cider import CiderD, DocumentFrequency, ReferenceIndex
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.deadline import Deadline
from rayrl.rewards.ensemble import EnsembleTerm, uncertainty_weighted, worst_case
from rayrl.rewards.function import FunctionTerm, load_function
from rayrl.rewards.penalties import bad_ending_penalty, length_penalty, repetition_penalty
from rayrl.rewards.score import (
    Dropped,
    Scorer,
    combine,
)
from rayrl.rewards.statistics import (
    Statistics,
    reward_signature,
    reward_statistics,
    step_document_frequency,
)
from rayrl.rewards.term import Failure, Item, Judged, Scores
from rayrl.rollout_metrics import group_metrics, sample_records
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup

REFERENCES = [
    ("A man rides a horse.", "A man on a brown horse"),
    ("Two dogs run in the grass.", "Dogs are running"),
    ("A red boat on a lake.",),
]


def completion(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(
        token_ids=np.array([1, 2], dtype=np.int32),
        logprobs=np.zeros(2, dtype=np.float32),
        text=text,
        finish_reason=finish_reason,
        weight_version=0,
    )


def group(
    i: int, *captions: str, greedy: str | None = None, finish_reason: str = "stop"
) -> RolloutGroup:
    prompt = Prompt(prompt_id=f"p{i}", image=b"image", text="Describe.", references=REFERENCES[i])
    return RolloutGroup(
        prompt=prompt,
        prompt_token_ids=np.array([1], dtype=np.int32),
        completions=tuple(completion(text, finish_reason) for text in captions),
        group_size=len(captions),
        greedy=None if greedy is None else completion(greedy),
    )


GROUPS = [
    group(0, "A man rides a horse.", "a man with a", greedy="A man."),
    group(1, "two dogs", "two dogs", greedy="grass"),
    group(2, "a boat a boat a boat", "", greedy="A red boat on a lake!"),
]


def item(*captions: str, i: int = 0) -> Item:
    return Item(GROUPS[i].prompt, captions, (True,) * len(captions))


def training_df(config: RewardConfig) -> DocumentFrequency:
    df = reward_statistics(REFERENCES, config).df
    assert df is not None
    return df


def scorer(**fields: object) -> Scorer:
    config = RewardConfig.model_validate(fields)
    return Scorer(config, reward_statistics(REFERENCES, config))


def only_scored(results: Sequence[ScoredGroup | Dropped]) -> list[ScoredGroup]:
    assert all(isinstance(result, ScoredGroup) for result in results)
    return [result for result in results if isinstance(result, ScoredGroup)]


def test_cider_d_with_eos_is_the_default() -> None:
    results = only_scored(scorer().score(GROUPS))
    words = [[ptb.tokenize(text) for text in some] for some in REFERENCES]
    cider = CiderD(DocumentFrequency.from_references(words, eos=True))
    for i, result in enumerate(results):
        texts = [*result.group.captions, result.group.greedy.text if result.group.greedy else ""]
        expected = cider.score([ptb.tokenize(text) for text in texts], [words[i]] * 3)
        np.testing.assert_allclose(result.rewards, expected[:2], rtol=1e-6)
        assert result.greedy_reward == pytest.approx(expected[2])
        assert result.terms["cider_d"].tolist() == result.rewards.tolist()
        assert result.rewards.dtype == np.float32
    assert results[2].greedy_reward == pytest.approx(10.0)
    assert results[1].rewards[0] == results[1].rewards[1] > 0


def test_a_caption_cut_at_the_limit_has_no_eos() -> None:
    ended, cut = (
        only_scored(scorer().score([group(0, "A man rides a horse", finish_reason=reason)]))[0]
        for reason in ("stop", "length")
    )
    assert cut.rewards[0] < ended.rewards[0]
    without = scorer(eos=False)
    ended, cut = (
        only_scored(without.score([group(0, "A man rides a horse", finish_reason=reason)]))[0]
        for reason in ("stop", "length")
    )
    assert cut.rewards[0] == ended.rewards[0]


def test_document_frequencies_by_mode(tmp_path: Path) -> None:
    by_image = training_df(RewardConfig())
    by_caption = training_df(RewardConfig(df="caption"))
    assert (by_image.num_documents, by_image.eos, by_image.source) == (3, True, "train")
    assert (by_caption.num_documents, by_caption.source) == (5, "caption")
    by_image.save(tmp_path / "coco.npz")
    config = RewardConfig(df=str(tmp_path / "coco.npz"))
    assert training_df(config).content_hash == by_image.content_hash
    with pytest.raises(ValueError, match=r"train were counted with eos=True.*eos=False"):
        Scorer(RewardConfig(eos=False), Statistics(by_image))
    with pytest.raises(ValueError, match=r"df train: no document frequencies given; count them"):
        Scorer(RewardConfig(), Statistics())


def test_the_frequencies_of_the_batch_change_the_reward() -> None:
    frozen, batch = scorer(), scorer(df="batch")
    whole = only_scored(batch.score(GROUPS))
    for mine, theirs in zip(whole, only_scored(frozen.score(GROUPS)), strict=True):
        np.testing.assert_allclose(mine.rewards, theirs.rewards, rtol=1e-6)
    some = only_scored(batch.score(GROUPS[:2]))
    assert some[0].rewards.tolist() != whole[0].rewards.tolist()
    with pytest.raises(ValueError, match=r"batch: document frequencies over 1 image"):
        batch.score(GROUPS[:1])


def test_the_frequencies_of_a_step_do_not_depend_on_how_it_is_split() -> None:
    config = RewardConfig(df="batch")
    step_df = step_document_frequency({f"p{i}": some for i, some in enumerate(REFERENCES)}, config)
    whole = only_scored(scorer(df="batch").score(GROUPS))
    apart = [
        result
        for group in GROUPS
        for result in only_scored(scorer(df="batch").score([group], step_df))
    ]
    for mine, theirs in zip(apart, whole, strict=True):
        assert mine.rewards.tolist() == theirs.rewards.tolist()
        assert mine.greedy_reward == theirs.greedy_reward
    assert step_df is not None and (step_df.num_documents, step_df.eos) == (3, True)
    with pytest.raises(ValueError, match=r"batch: document frequencies over 1 image"):
        step_document_frequency({"p0": REFERENCES[0]}, config)


def test_what_else_is_scored_does_not_change_the_frequencies_of_a_step() -> None:
    config, groups = RewardConfig(df="batch"), GROUPS[:2]
    alone = only_scored(Scorer(config, Statistics()).score(groups))
    beside = only_scored(Scorer(config, Statistics(), {"reference_rewards"}).score(groups))
    assert "reference_rewards" in beside[0].fields
    for mine, theirs in zip(alone, beside, strict=True):
        assert mine.rewards.tolist() == theirs.rewards.tolist()


def test_a_term_apart_asks_for_the_cpus_and_gpus_it_is_given() -> None:
    def asks(name: str, **fields: object) -> tuple[float, float] | None:
        return RewardConfig.model_validate({"terms": {name: fields}}).terms[name].asks

    path, clip = path_of(count_words), {"folder": "clip"}
    assert asks("cider_d") is asks("function", path=path) is asks("clip_score", **clip) is None
    assert asks("function", path=path, gpus=0.25) == (0.0, 0.25)
    assert asks("function", path=path, cpus=3) == (3.0, 0.0)
    assert asks("clip_score", **clip, gpus=2) == (0.0, 2.0)
    assert asks("meteor") == asks("spice") == (0.5, 0.0)
    assert asks("meteor", cpus=1.5) == (1.5, 0.0)
    assert asks("http", url="http://x") == (0.0, 0.0)
    shared = {"kind": "clip_score", **clip, "gpus": 0.25}
    members = {"one": shared, "other": shared, "meteor": 1.0, "rouge_l": 1.0}
    assert asks("ensemble", members=members) == (0.5, 0.5)
    assert asks("ensemble", members={"rouge_l": 1.0}) is None


def test_only_what_the_terms_need_is_counted() -> None:
    nested = {"kind": "ensemble", "members": {"cider_d": 1.0, "bleu": 1.0}}
    for terms, df, counted in (
        ({"cider_d": 1.0}, "train", True),
        ({"both": nested}, "caption", True),
        ({"bleu": 1.0}, "train", False),
        ({"cider_d": 1.0}, "batch", False),
    ):
        config = RewardConfig.model_validate({"terms": terms, "df": df})
        statistics = reward_statistics(REFERENCES, config)
        assert (statistics.df is not None, statistics.index is not None) == (counted, counted)
        if statistics.index is not None:
            assert len(statistics.index) == 3
        in_step = step_document_frequency({"a": REFERENCES[0], "b": REFERENCES[1]}, config)
        assert (in_step is not None) == (df == "batch")


def test_the_signature_of_rewards_says_what_was_counted() -> None:
    def signature(**fields: object) -> str:
        config = RewardConfig.model_validate(fields)
        return reward_signature(config, reward_statistics(REFERENCES, config))

    assert signature().startswith("Cider-D[n4,s6.0]+eos:yes+df:train[3]#")
    assert signature(df="batch").startswith("Cider-D[n4,s6.0]+eos:yes+df:batch+tok:ptb")
    assert signature(terms={"rouge_l": 1.0}).startswith("tok:ptb+rayrl:")


def test_a_shared_index_gives_the_same_rewards() -> None:
    config = RewardConfig()
    df = training_df(config)
    words = [[" ".join(ptb.tokenize(text)) for text in some] for some in REFERENCES[:2]]
    index = ReferenceIndex.build(df, words)
    own = only_scored(Scorer(config, Statistics(df)).score(GROUPS))
    shared = only_scored(Scorer(config, Statistics(df, index)).score(GROUPS))
    for mine, theirs in zip(own, shared, strict=True):
        np.testing.assert_allclose(mine.rewards, theirs.rewards, rtol=1e-6)
    assert len(index) == 2


def test_terms_are_weighted_and_logged() -> None:
    results = only_scored(
        scorer(
            terms={
                "rouge_l": 2.0,
                "bad_ending": {"weight": 0.5},
                "bleu": {"weight": 0.0, "n": 1},
                "short": {"kind": "length", "weight": 0.1, "min_words": 3, "max_words": 4},
            }
        ).score(GROUPS)
    )
    first = results[0]
    assert set(first.terms) == {"rouge_l", "bad_ending", "bleu", "short"}
    assert first.terms["bad_ending"].tolist() == [0.0, -1.0]
    assert first.terms["short"].tolist() == [-1.0, 0.0]
    assert first.terms["bleu"][0] == pytest.approx(1.0)
    assert first.terms["rouge_l"][0] == pytest.approx(1.0)
    np.testing.assert_allclose(
        first.rewards,
        2 * first.terms["rouge_l"] + 0.5 * first.terms["bad_ending"] + 0.1 * first.terms["short"],
        rtol=1e-6,
    )


def test_penalties_by_hand() -> None:
    captions = ["a b c", "a", "a b c d e f", ""]
    assert length_penalty(captions, 2, 4).tolist() == [0.0, -1.0, -2.0, -2.0]
    np.testing.assert_allclose(repetition_penalty(["a b a b", "a b"], 2), [-1 / 3, 0.0])
    assert bad_ending_penalty(["a dog", "a dog in the"]).tolist() == [0.0, -1.0]


def test_ensembles_by_hand() -> None:
    members = np.array([[1.0, 2.0], [3.0, 2.0], [2.0, 8.0]])
    assert worst_case(members).tolist() == [1.0, 2.0]
    np.testing.assert_allclose(uncertainty_weighted(0.5)(members), [2 - 0.5 * 2 / 3, 4 - 0.5 * 8])


class Fixed:
    """A term with given scores, or a failure, for every item."""

    def __init__(self, value: float | Failure) -> None:
        self.value = value

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        value = self.value
        if isinstance(value, Failure):
            return [value] * len(items)
        return [np.full(len(item.captions), value) for item in items]


def test_ensembles_scale_their_members_and_fail_with_them() -> None:
    good = EnsembleTerm({"a": (Fixed(1.0), 3.0), "b": (Fixed(2.0), 1.0)}, worst_case)
    (scores,) = good.score([item("x", "y")])
    assert isinstance(scores, np.ndarray) and scores.tolist() == [2.0, 2.0]
    bad = EnsembleTerm({"a": (Fixed(1.0), 3.0), "b": (Fixed(Failure("no")), 1.0)}, worst_case)
    assert bad.score([item("x")]) == [Failure("b: no")]


def test_an_ensemble_from_the_configuration() -> None:
    members = {"rouge_l": 1.0, "one": {"kind": "bleu", "n": 1, "weight": 0.5}}
    terms = {"cautious": {"kind": "ensemble", "rule": "worst_case", "members": members}}
    result = only_scored(scorer(terms=terms).score(GROUPS))[0]
    assert result.rewards[0] == pytest.approx(0.5)


def count_words(captions: list[str], prompt: Prompt) -> list[float]:
    if prompt.prompt_id == "p1":
        raise ValueError("I cannot judge dogs")
    return [float(len(caption.split())) for caption in captions]


def wrong_size(captions: list[str], prompt: Prompt) -> list[float]:
    return [1.0]


def not_finite(captions: list[str], prompt: Prompt) -> list[float]:
    return [float("nan") for _ in captions]


def broken(captions: list[str], prompt: Prompt) -> list[float]:
    return captions.no_such_attribute  # type: ignore[attr-defined]


BROKEN = f"{__name__}:broken"


def path_of(function: object) -> str:
    return f"{__name__}:{function.__name__}"  # type: ignore[attr-defined]


def test_a_users_function_scores_or_drops_a_group() -> None:
    terms = {"cider_d": 1.0, "words": {"kind": "function", "path": path_of(count_words)}}
    results = scorer(terms=terms).score(GROUPS)
    assert isinstance(results[0], ScoredGroup) and isinstance(results[2], ScoredGroup)
    assert results[0].terms["words"].tolist() == [5.0, 4.0]
    assert results[1] == Dropped(
        "p1", f"words: {path_of(count_words)} raised ValueError: I cannot judge dogs"
    )


class ServiceError(Exception):
    """As those of openai and httpx: derived from Exception itself."""


@pytest.mark.parametrize("error", [OSError, ServiceError])
def test_a_users_function_is_tried_again_and_then_drops_the_group(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def score(retries: int, *items: Item) -> list[Scores | Judged | Failure]:
        calls = []

        def flaky(captions: list[str], prompt: Prompt) -> list[float]:
            calls.append(prompt.prompt_id)
            if len(calls) < 3:
                raise error("not yet")
            return [1.0 for _ in captions]

        monkeypatch.setattr(sys.modules[__name__], "broken", flaky)
        scores = FunctionTerm(BROKEN, retries).score(items)
        assert len(calls) == 3
        assert isinstance(scores[-1], np.ndarray) and scores[-1].tolist() == [1.0]
        return scores

    score(2, item("x"))
    first, _ = score(1, item("x"), item("y", i=1))
    assert first == Failure(f"{BROKEN} raised {error.__name__}: not yet")


def test_what_a_function_has_no_time_for_is_dropped_and_the_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("rayrl.rewards.deadline.time.monotonic", lambda: now[0])

    def takes_a_minute(captions: list[str], prompt: Prompt) -> list[float]:
        now[0] += 60
        return [1.0 for _ in captions]

    monkeypatch.setattr(sys.modules[__name__], "broken", takes_a_minute)
    config = RewardConfig.model_validate({"terms": {"mine": {"kind": "function", "path": BROKEN}}})
    subject = Scorer(config, Statistics(), deadline=Deadline(200.0))
    for _ in range(2):
        # Two calls for each group, whose greedy caption is scored too; there is time for four.
        first, second, third = subject.score(GROUPS)
        assert isinstance(first, ScoredGroup) and isinstance(second, ScoredGroup)
        assert third == Dropped("p2", f"mine: {BROKEN} had no time left of 200 s for the batch")
        now[0] += 1000


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["good", "bad"], "gave list that is no row of numbers: could not convert string"),
        ([[1.0], [1.0, 2.0]], "gave list that is no row of numbers: setting an array"),
        ((score for score in (1.0, 2.0)), "gave generator that is no row of numbers"),
        (torch.ones(2, requires_grad=True), "gave Tensor that is no row of numbers: Can't call"),
        (torch.ones(2, dtype=torch.bfloat16), "gave Tensor that is no row of numbers"),
        ([1e39, 1.0], "scores [1e+39, 1.0], want finite ones that are within float32"),
        ([2e38, 1.0], "rewards [inf, 2.0]: the weighted sum is beyond float32"),
    ],
)
def test_what_is_no_score_drops_the_group(
    values: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "broken", lambda captions, prompt: values)
    terms = {"mine": {"kind": "function", "path": BROKEN, "weight": 2.0}}
    (result,) = scorer(terms=terms).score([group(0, "a man", "a horse")])
    assert isinstance(result, Dropped) and reason in result.reason


def test_wrong_scores_of_a_users_function_drop_the_group_and_mistakes_stop() -> None:
    for function, reason in (
        (wrong_size, r"gave scores of shape (1,) for 2 captions"),
        (not_finite, "scores [nan, nan], want finite ones"),
    ):
        terms = {"mine": {"kind": "function", "path": path_of(function)}}
        results = scorer(terms=terms).score(GROUPS[:1])
        assert isinstance(results[0], Dropped) and reason in results[0].reason
    terms = {"mine": {"kind": "function", "path": path_of(broken)}}
    with pytest.raises(AttributeError, match="no_such_attribute"):
        scorer(terms=terms).score(GROUPS[:1])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rayrl.types", "want package.module:function"),
        (
            "no_such_package.rewards:score",
            "no module 'no_such_package'; want it in the folder that",
        ),
        ("rayrl.types:no_such", "module 'rayrl.types' has no 'no_such'"),
    ],
)
def test_a_path_to_no_function_says_which_part_is_wrong(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(path)


def test_a_term_that_is_only_logged_drops_no_group() -> None:
    words = {"kind": "function", "path": path_of(count_words), "weight": 0}
    config = RewardConfig.model_validate({"terms": {"cider_d": 1.0, "words": words}})
    scores = Scorer(config, Statistics(training_df(config))).score_terms(GROUPS)
    assert isinstance(combine(GROUPS, scores, config)[1], Dropped)
    results = only_scored(combine(GROUPS, scores, config, only_logged=("words",)))
    alone = only_scored(scorer().score(GROUPS))
    assert [result.terms.keys() for result in results] == [{"cider_d"}] * 3
    for mine, theirs in zip(results, alone, strict=True):
        assert mine.rewards.tolist() == theirs.rewards.tolist()
        assert mine.greedy_reward == theirs.greedy_reward
    assert results[0].logged["words"].tolist() == [5.0, 4.0]
    assert np.isnan(results[1].logged["words"]).tolist() == [True, True]
    metrics = group_metrics(outline(results), version=0)
    captions = [results[i].logged["words"] for i in (0, 2)]
    assert metrics["reward/words"] == pytest.approx(np.mean(captions))
    assert metrics["reward_missing/words"] == 2 and "reward_missing/cider_d" not in metrics
    shown = sample_records(results, np.zeros((3, 2), np.float32), step=1)
    terms = [[list(caption["terms"]) for caption in record["captions"]] for record in shown]
    assert terms[0] == [["cider_d", "words"]] * 2 and terms[1] == [["cider_d"]] * 2
    only_failed = group_metrics(outline(results[1:2]), version=0)
    assert "reward/words" not in only_failed and only_failed["reward_missing/words"] == 2
    longer = extended(results[0], results[1])
    np.testing.assert_array_equal(longer.logged["words"], [5.0, 4.0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("objective", "reward", "names"),
    [
        ({}, {}, ("judge", "length")),
        ({}, {"constraints": {"length": ">= 0"}}, ("judge",)),
        ({"preset": "mo_grpo", "set": {"term_weights": {"length": 0.1}}}, {}, ("judge",)),
        ({"preset": "carl_product", "set": {"main_term": "judge"}}, {}, ("length",)),
        ({"preset": "capo_wrong_spans"}, {}, ("length",)),
        ({"set": {"advantage": "my_module:mine"}}, {}, ()),
    ],
)
def test_terms_that_something_else_reads_are_not_only_logged(
    objective: dict, reward: dict, names: tuple[str, ...]
) -> None:
    judge = {"kind": "http", "url": "http://judge", "weight": 0}
    terms = {"cider_d": 1.0, "judge": judge, "length": 0.0}
    config = Config.model_validate({"objective": objective, "reward": {"terms": terms, **reward}})
    assert only_logged(config) == names


def test_a_greedy_caption_that_fails_drops_the_group() -> None:
    scores = scorer().score_terms(GROUPS)
    term = scores["cider_d"]
    broken_greedy = type(term)(term.groups, (Failure("down"), *term.greedy[1:]), term.seconds)
    results = combine(GROUPS, {"cider_d": broken_greedy}, RewardConfig())
    assert results[0] == Dropped("p0", "cider_d: down")
    assert isinstance(results[1], ScoredGroup)


def test_terms_scored_apart_are_combined_as_one() -> None:
    whole = RewardConfig.model_validate({"terms": {"cider_d": 1.0, "rouge_l": 0.5}})
    df = training_df(whole)
    apart: dict = {}
    for name, term in whole.terms.items():
        part = whole.model_copy(update={"terms": {name: term}})
        apart |= Scorer(part, Statistics(df)).score_terms(GROUPS)
    together = Scorer(whole, Statistics(df)).score(GROUPS)
    for mine, theirs in zip(combine(GROUPS, apart, whole), together, strict=True):
        assert isinstance(mine, ScoredGroup) and isinstance(theirs, ScoredGroup)
        assert mine.rewards.tolist() == theirs.rewards.tolist()
    assert all(scores.seconds > 0 for scores in apart.values())


class FlakyMeteor:
    """A process that dies on its first ``failures`` calls."""

    failures = 0
    started = 0

    def __init__(self, timeout_s: float) -> None:
        type(self).started += 1

    def score(self, captions: list[str], references: list[list[str]]) -> tuple[float, Scores]:
        if type(self).failures:
            type(self).failures -= 1
            raise ChildProcessError("Java ended with status 137")
        return 0.5, np.full(len(captions), 0.25)

    def close(self) -> None:
        pass


def test_meteor_is_started_again_once_and_then_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_terms, "Meteor", FlakyMeteor)
    FlakyMeteor.failures, FlakyMeteor.started = 1, 0
    results = only_scored(scorer(terms={"meteor": 1.0}).score(GROUPS))
    assert FlakyMeteor.started == 2
    assert results[0].rewards.tolist() == [0.25, 0.25]
    FlakyMeteor.failures = 2
    dropped = scorer(terms={"meteor": 1.0}).score(GROUPS)
    assert dropped[0] == Dropped("p0", "meteor: Java ended with status 137")
    assert FlakyMeteor.started == 5, "two in place of those that failed"


def test_nothing_to_score_is_nothing() -> None:
    assert scorer(terms={"cider_d": 1.0, "rouge_l": 1.0}).score([]) == []


def test_every_kind_can_be_built_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_terms, "Meteor", FlakyMeteor)
    from rayrl.rewards.config import KINDS
    from rayrl.rewards.java import MetricUnavailable

    needed = {
        "clip_score": {"folder": "/nowhere"},
        "function": {"path": path_of(count_words)},
        "http": {"url": "http://localhost"},
        "chat": {"url": "http://localhost", "model": "m"},
        "ensemble": {"members": {"bleu": 1.0}},
    }
    statistics = reward_statistics(REFERENCES, RewardConfig())
    for kind in KINDS:
        config = RewardConfig.model_validate({"terms": {kind: needed.get(kind, 1.0)}})
        try:
            terms = build_terms(config, statistics)
        except MetricUnavailable as reason:
            assert kind in ("clip_score", "spice"), reason
        else:
            assert list(terms) == [kind]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"terms": {"cider": 1.0}}, "kind 'cider', want one of cider_d"),
        ({"terms": {"cider_d": [1]}}, r"term cider_d: \[1\], want a weight or a section"),
        ({"terms": {"cider_d": 0.0}}, "no term has a weight"),
        ({"terms": {}}, "no term has a weight"),
        ({"terms": {"mean": {"kind": "length"}}}, "term mean: the metric reward/mean is another"),
        ({"terms": {"cider_d": 1.0, "greedy": {"kind": "length"}}}, "metric reward/greedy is"),
        ({"terms": {"bleu": {"n": 5}}}, "less than or equal to 4"),
        ({"terms": {"bleu": {"m": 1}}}, "Extra inputs are not permitted"),
        ({"terms": {"clip_score": {"folder": "x", "gpus": 1.5}}}, "1.5 GPUs, want a fraction of"),
        ({"terms": {"cider_d": math.nan}}, "finite number"),
        ({"terms": {"cider_d": "inf"}}, "finite number"),
        ({"terms": {"length": {"min_words": 30}}}, "min_words 30 with max_words 20: every caption"),
        (
            {"terms": {"chat": {"url": "http://x", "model": "m", "question": "Is it good?"}}},
            "question 'Is it good.' says nothing of the caption, want {caption} in it",
        ),
        ({"terms": {"ensemble": {"members": {}}}}, "at least 1 item after validation, not 0"),
        ({"terms": {"meteor": {"cpus": -1}}}, "greater than or equal to 0"),
        ({"terms": {"cider_d": {"gpus": 1}}}, "Extra inputs are not permitted"),
        (
            {
                "terms": {
                    "ensemble": {
                        "members": {
                            "one": {"kind": "clip_score", "folder": "x", "gpus": 0.75},
                            "other": {"kind": "function", "path": "a:b", "gpus": 0.5},
                        }
                    }
                }
            },
            "1.25 GPUs, want a fraction of",
        ),
        ({"df": "trian"}, "df 'trian', want one of train or a file"),
        ({"terms": {"e": {"kind": "ensemble", "members": {"x": 1}}}}, "term x: kind 'x'"),
    ],
)
def test_wrong_configurations_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig.model_validate(fields)
