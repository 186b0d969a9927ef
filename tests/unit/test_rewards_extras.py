"""What objectives want of the reward path beside scores, with numbers worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rayrl.batch import make_batch
from rayrl.config import Config
from rayrl.learner.provided import provided
from rayrl.objectives import preset
from rayrl.outline import outline
from rayrl.rewards.cider import CiderD
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.diversity import diversity_of, self_cider
from rayrl.rewards.extras import prefix_items, reference_items
from rayrl.rewards.http import _read_scores
from rayrl.rewards.judgements import judgements, satisfied
from rayrl.rewards.score import Dropped, Scorer
from rayrl.rewards.statistics import Statistics, reward_statistics
from rayrl.rewards.term import Failure, Item, Judged
from rayrl.rollout_metrics import group_metrics
from tests.unit.test_rewards_terms import GROUPS, REFERENCES, group

LENGTH = {"length": {"min_words": 3, "max_words": 5}}


def scorer(config, needs=()):
    config = RewardConfig(**config)
    return Scorer(config, reward_statistics(REFERENCES, config), needs)


def item(*captions, references=("x y", "x", "y z")):
    prompt = replace(GROUPS[0].prompt, references=references)
    return Item(prompt=prompt, captions=captions, finished=(True,) * len(captions))


def test_each_reference_is_a_caption_against_the_others():
    made = [(i.captions, i.prompt.references) for i in reference_items(item("a"))]
    assert made == [(("x y",), ("x", "y z")), (("x",), ("x y", "y z")), (("y z",), ("x y", "x"))]


def test_prefixes_are_of_whole_words_and_not_of_all_of_them():
    one, other, empty = prefix_items(item("a  red boat", "so", ""))
    assert one.captions == ("", "a", "a  red")
    assert one.finished == (False, False, False)
    assert (other.captions, empty.captions) == (("",), ("",))


def test_rewards_of_references_are_weighted_sums_of_leave_one_out_scores():
    config = {"terms": {"cider_d": 2.0, **LENGTH}}
    subject = scorer(config, {"reference_rewards"})
    first, second, third = subject.score(GROUPS)
    df = reward_statistics(REFERENCES, RewardConfig(**config)).df
    a, b = "a man rides a horse", "a man on a brown horse"
    want = 2 * CiderD(df).score([a, b], [[b], [a]])
    # "A man on a brown horse" has six words, one too many.
    np.testing.assert_allclose(first.fields["reference_rewards"], want - [0, 1], rtol=1e-6)
    assert second.fields["reference_rewards"].shape == (2,)
    assert third == Dropped(
        "p2", "cider_d: one reference caption, want at least two to score one by others"
    )


def test_images_with_fewer_references_are_filled_with_nan_which_objectives_leave_out():
    import torch

    three = replace(GROUPS[0], prompt=item("a").prompt)
    subject = scorer({"terms": LENGTH}, {"reference_rewards"})
    batch = make_batch(subject.score([three, GROUPS[1]]))
    rewards = batch.fields["reference_rewards"]
    assert np.isnan(rewards).tolist() == [[False] * 3, [False, False, True]]
    from rayrl.objectives.advantage import reference_value_baseline
    from rayrl.objectives.shaping import quantile_in_reference

    ragged = torch.tensor([[0.5, 1.0, torch.nan]])
    even = torch.tensor([[0.5, 1.0]])
    for part in (
        quantile_in_reference,
        lambda r, ref: reference_value_baseline(r, ref, value_temperature=0.5),
    ):
        got, want = (part(torch.tensor([[0.7, 1.2]]), some) for some in (ragged, even))
        assert torch.equal(got, want)


def test_prefixes_of_a_group_get_the_rewards_of_unfinished_captions():
    subject = scorer({"terms": LENGTH}, {"prefix_values"})
    (result,) = subject.score([group(0, "a man rides", "so")])
    # 3 to 5 words are wanted: 0, 1 and 2 of them miss 3, 2 and 1.
    assert [some.tolist() for some in result.prefix_rewards] == [[-3, -2, -1], [-3]]


def test_the_similarity_of_a_group_is_what_self_cider_is_made_of():
    subject = scorer({})
    groups = [group(0, "a man rides a horse", "a man rides a horse", "two dogs run fast")]
    (result,) = subject.score(groups)
    kernel = result.fields["similarity"]
    np.testing.assert_allclose(kernel[:2, :2], 1.0, atol=1e-6)
    np.testing.assert_allclose(kernel, kernel.T)
    assert kernel[0, 2] < 0.05
    import torch

    from rayrl.objectives import terms

    texts = [["a man rides a horse", "a man rides a horse", "two dogs run fast"]]
    df = reward_statistics(REFERENCES, RewardConfig()).df
    want = self_cider([[text.split() for text in row] for row in texts], df)
    got = terms.self_cider(torch.as_tensor(kernel, dtype=torch.float64)[None])
    assert got.item() == pytest.approx(want[0], abs=1e-6)
    assert "similarity" not in scorer({"terms": LENGTH}).score(groups)[0].fields


def test_constraints_are_bounds_on_terms():
    terms = {"a": np.array([0.0, 0.5, 1.0]), "b": np.array([1.0, -1.0, 2.0])}
    assert satisfied(terms, {"a": ">= 0.5"}).tolist() == [False, True, True]
    assert satisfied(terms, {"a": ">0.5", "b": "<= 2"}).tolist() == [False, False, True]
    assert satisfied(terms, {"b": "> -1.0"}).tolist() == [True, False, True]
    config = {"terms": {"cider_d": 1.0, **LENGTH}, "constraints": {"length": ">= 0"}}
    (result,) = scorer(config).score([group(0, "a man rides", "a man")])
    assert result.fields["judge_ok"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("constraints", "message"),
    [({"lenght": ">= 0"}, "no term 'lenght', want one of length"), ({"length": "0"}, "pattern")],
)
def test_constraints_that_cannot_be_are_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(terms={"cider_d": 1.0, **LENGTH}, constraints=constraints)


def judge(captions, prompt):
    """Calls every "horse" wrong."""
    spans = [((c.index("horse"), c.index("horse") + 5),) if "horse" in c else () for c in captions]
    return Judged(np.ones(len(captions)), versions=(3,) * len(captions), wrong_spans=tuple(spans))


def test_a_function_may_say_more_than_scores():
    path = f"{__name__}:judge"
    subject = scorer({"terms": {"judge": {"kind": "function", "path": path}, "cider_d": 1.0}})
    first, second = subject.score([GROUPS[0], group(0, "a horse", "a dog")])
    assert first.fields["reward_versions"].tolist() == [3, 3]
    assert first.wrong_spans == (((14, 19),), ())
    assert second.wrong_spans == (((2, 7),), ())
    batch = make_batch([first, second])
    assert batch.fields["reward_versions"].shape == (2, 2)
    assert batch.wrong_spans == (first.wrong_spans, second.wrong_spans)


def test_spans_of_several_judges_are_taken_together_and_versions_are_not():
    spans = [Judged(np.zeros(1), wrong_spans=(((0, 2),),)), Judged(np.zeros(1), None, (((5, 6),),))]
    assert judgements(dict(zip("ab", spans, strict=True))) == ({}, (((0, 2), (5, 6)),))
    versions = {name: Judged(np.zeros(1), versions=(1,)) for name in "ab"}
    assert judgements(versions) == Failure("versions from several terms, a, b, want one of them")


def test_a_judgement_that_does_not_fit_its_captions_is_refused():
    with pytest.raises(ValueError, match="versions of 1 captions, want 2"):
        Judged(np.zeros(2), versions=(1,))
    with pytest.raises(ValueError, match="caption 0: wrong span"):
        Judged(np.zeros(1), wrong_spans=(((3, 3),),))


def test_a_server_may_say_more_than_scores():
    items = [item("a", "b"), item("c")]
    answer = {
        "scores": [[1, 2], [3]],
        "versions": [[7, 7], [8]],
        "wrong_spans": [[[[0, 1]], []], [[]]],
    }
    one, other = _read_scores(json.loads(json.dumps(answer)), items)
    assert (one.versions, one.wrong_spans) == ((7, 7), (((0, 1),), ()))
    assert (other.scores.tolist(), other.versions, other.wrong_spans) == ([3.0], (8,), ((),))
    plain = _read_scores({"scores": [[1, 2], [3]]}, items)
    assert [some.tolist() for some in plain] == [[1, 2], [3]]


def test_without_document_frequencies_nothing_is_alike():
    assert Scorer(RewardConfig(terms=LENGTH), Statistics()).similarity(GROUPS) == []


def test_without_need_the_first_groups_are_enough_for_a_metric():
    groups = [GROUPS[0]] * 40
    some, every = (scorer({}, needs).score(groups) for needs in ((), ("similarity",)))
    assert ["similarity" in one.fields for one in some] == [True] * 32 + [False] * 8
    assert all("similarity" in one.fields for one in every)
    assert "similarity" not in make_batch(some).fields
    assert make_batch(every).fields["similarity"].shape == (40, 2, 2)
    kernel = every[0].fields["similarity"]
    of_one = diversity_of(kernel[None])[0]
    assert group_metrics(outline(some), 0)["objective/self_cider"] == pytest.approx(of_one)
    assert 0 < of_one < 1


def test_what_a_configuration_does_not_bring_is_said_with_what_would():
    objective = preset("cgpo_crpg")
    config = Config(reward={"terms": {"cider_d": 1.0, **LENGTH}})
    with pytest.raises(ValueError, match=r"judge_ok .*configure reward\.constraints"):
        objective.check(provided(config))
    judged = Config(reward={"terms": {"cider_d": 1.0, **LENGTH}, "constraints": {"length": ">= 0"}})
    objective.check(provided(judged))


def test_groups_may_differ_in_size():
    groups = [group(0, "a man"), GROUPS[0], group(0, "a man", "a man", "two dogs run")]
    kernels = [result.fields["similarity"] for result in scorer({}).score(groups)]
    assert [kernel.shape for kernel in kernels] == [(1, 1), (2, 2), (3, 3)]
    assert kernels[0].item() == 1
    alone = scorer({}).score([groups[2]])[0].fields["similarity"]
    np.testing.assert_allclose(kernels[2], alone)


def test_judgements_of_smaller_groups_are_filled_with_nothing():
    path = f"{__name__}:judge"
    config = {
        "terms": {"judge": {"kind": "function", "path": path}, "cider_d": 1.0},
        "constraints": {"judge": ">= 1"},
    }
    batch = make_batch(scorer(config).score([group(0, "a horse"), GROUPS[0]]))
    assert batch.fields["judge_ok"].tolist() == [[True, False], [True, True]]
    assert batch.fields["reward_versions"].tolist() == [[3, 0], [3, 3]]
    assert batch.fields["similarity"][0].tolist() == [[1, 0], [0, 0]]
