"""Rounds that add to groups: hints, further captions, branches, changed pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_rounds import answer, asked, completion, groups_of, prompt_at, rounds, scored

from rayrl.batch import make_batch
from rayrl.data.augment import with_noise
from rayrl.joins import extended, grafted, worst_replaced
from rayrl.objectives import preset
from rayrl.outline import Here
from rayrl.planning import Request
from tests.conftest import encoded_picture

A, B = ord("a"), ord("b")


def zero_but_slot_1(request):
    return [0.0] * request.size if request.slot != 1 else [0.0] * (request.size - 1) + [0.1]


def test_a_failing_group_is_sampled_again_whole_after_a_part_of_a_reference():
    subject = rounds("ghpo_reference_hints")
    second = subject.go_on(0, answer(subject.begin(0), zero_but_slot_1))
    # A quarter of "a b c d" in the first third of the run.
    assert [(r.slot, r.size, r.forced) for r in second] == [(0, 2, (A,)), (2, 2, (A,))]
    assert subject.go_on(0, answer(second, lambda r: [1.0, 2.0])) == ()
    drawn = subject.complete(0)
    groups = groups_of(drawn)
    assert [g.rewards.tolist() for g in groups] == [[1, 2], pytest.approx([0, 0.1]), [1, 2]]
    assert [g.group.group_size for g in groups_of(drawn)] == [2, 2, 2]


def test_hints_grow_over_the_run():
    forced = []
    for step in (0, 3, 4, 6, 7, 9):
        subject = rounds("ghpo_reference_hints")
        (first, *_) = subject.go_on(step, answer(subject.begin(step), lambda r: [0.0, 0.0]))
        forced.append(len(first.forced))
    # Stages 0, 0, 1, 1, 2, 2 of shares 0.25, 0.5, 0.75 over ten steps and four tokens.
    assert forced == [1, 1, 2, 2, 3, 3]


def test_a_reference_too_short_for_a_hint_is_not_asked_for():
    subject = rounds("ghpo_reference_hints", encode=lambda text: [1, 2, 3])
    assert subject.go_on(0, answer(subject.begin(0), lambda r: [0.0, 0.0])) == ()


def test_guided_captions_join_the_failed_ones_and_train_without_the_hint():
    subject = rounds("guide_grpo")
    second = subject.go_on(0, answer(subject.begin(0), zero_but_slot_1))
    assert asked(second) == [(0, "p0", 4), (2, "p2", 4)]
    assert second[0].prompt.text == "Describe. Hint: a b c d"
    results = answer(second, lambda r: [1.0, 2.0, 3.0, 4.0])
    assert subject.go_on(0, results) == ()
    first, middle, _ = groups_of(subject.complete(0))
    assert first.group.prompt.text == "Describe."
    assert first.rewards.tolist() == [0, 0, 1, 2, 3, 4]
    assert first.terms["cider_d"].tolist() == [0, 0, 1, 2, 3, 4]
    assert first.group.group_size == 6 and middle.group.group_size == 2


def test_injected_captions_replace_the_worst_where_they_are_better():
    subject = rounds("igpo_inpainting", group_size=3)
    # A floor of 0: captions at or below it fail.
    first = subject.begin(0)
    second = subject.go_on(0, answer(first, lambda r: [-0.5, 0.0, -0.1]))
    assert [(r.slot, r.size, r.forced) for r in second] == [(i, 2, (A, B)) for i in range(3)]
    subject.go_on(0, answer(second, lambda r: [-0.2, 0.9]))
    group = groups_of(subject.complete(0))[0]
    # The best new one replaces the worst; the other one, -0.2, is worse than the next, -0.1.
    assert group.rewards.tolist() == pytest.approx([0.9, 0.0, -0.1])
    assert [c.token_ids.tolist() for c in group.group.completions] == [[A, B, 11], [11], [12]]


def test_any_objective_takes_a_planner():
    (planner,) = preset("nsc", rollout="refill", min_spread=0.1).planners(0)
    assert planner.params == {"min_spread": 0.1, "refill_rounds": 3}
    names = [p.name for p in preset("grpo", rollout="refill+hint_by_prefix").planners(0)]
    assert names == ["refill", "hint_by_prefix"]


def test_further_captions_go_where_rewards_spread():
    subject = rounds(
        "xrpo_novelty", group_size=4, planners=preset("xrpo_novelty", exploration=0.0).planners
    )
    spreads = {0: 0.1, 1: 1.0, 2: 0.1}
    second = subject.go_on(
        0, answer(subject.begin(0), lambda r: [0, spreads[r.slot], 0, spreads[r.slot]])
    )
    # A quarter of twelve captions, all for the one image whose spread is ten times as wide.
    assert asked(second) == [(1, "p1", 3)]
    subject.go_on(0, answer(second, lambda r: [5, 6, 7]))
    drawn = subject.complete(0)
    assert drawn.num_captions == 15
    batch = make_batch(groups_of(drawn))
    assert batch.valid.tolist() == [[1] * 4 + [0] * 3, [1] * 7, [1] * 4 + [0] * 3]
    assert batch.rewards[1].tolist() == [0, 1, 0, 1, 5, 6, 7]
    assert batch.rewards[0, 4:].tolist() == [0, 0, 0]
    assert not batch.mask[0, 4:].any()


def test_a_tree_branches_at_its_depths():
    tree = preset("dynamic_tree_rpo", tree_depths=(1, 3), tree_width=2)
    subject = rounds(group_size=8, images_per_step=1, planners=tree.planners)
    first = subject.begin(0)
    assert asked(first) == [(0, "p0", 2)]

    def grown(request, *tails):
        """Captions of three more words each, or of the given ones."""
        group = scored(request, list(range(request.size)))
        captions = tuple(
            replace(
                completion([*request.forced, *(tails[i] if tails else (50, 51, 52))]),
                num_forced=len(request.forced),
            )
            for i in range(request.size)
        )
        return replace(group, group=replace(group.group, completions=captions))

    second = subject.go_on(0, Here([grown(first[0], (1, 2, 3, 4), (5,))]))
    # The second caption ended before the depth: another is sampled from the start.
    assert [(r.size, r.forced) for r in second] == [(1, (1,)), (1, ())]
    assert second[1].seed == second[0].seed + 1
    third = subject.go_on(0, Here([grown(r) for r in second]))
    assert [r.forced for r in third] == [(1, 2, 3), (), (1, 50, 51), ()]
    assert subject.go_on(0, Here([grown(r) for r in third])) == ()
    (group,) = groups_of(subject.complete(0))
    ids = [c.token_ids.tolist() for c in group.group.completions]
    assert ids[:4] == [[1, 2, 3, 4], [5], [1, 50, 51, 52], [50, 51, 52]]
    assert ids[4:] == [[1, 2, 3, 50, 51, 52], [50, 51, 52], [1, 50, 51, 50, 51, 52], [50, 51, 52]]
    assert group.group.group_size == 8
    assert all(c.num_forced == 0 for c in group.group.completions)


def test_branches_keep_the_log_probs_of_the_tokens_they_share():
    parent = Request(slot=0, prompt=prompt_at(0), size=1)
    old = scored(parent, [1.0])
    old = replace(
        old, group=replace(old.group, completions=(completion([7, 8, 9], first_logprob=-1.0),))
    )
    new = scored(parent, [2.0])
    child = replace(completion([7, 8, 5], first_logprob=-30.0), num_forced=2)
    new = replace(new, group=replace(new.group, completions=(child,)))
    got = grafted(old, new, parent=0).group.completions[1]
    assert got.logprobs.tolist() == [-1, -2, -32]
    assert got.num_forced == 0


def test_a_tree_that_branches_at_its_root_is_a_group_of_independent_captions():
    tree = preset("dynamic_tree_rpo", tree_depths=(0,), tree_width=4)
    subject = rounds(group_size=8, planners=tree.planners)
    first = subject.begin(0)
    second = subject.go_on(0, answer(first, lambda r: [1.0, 2.0]))
    drawn = [(r.prompt.prompt_id, r.seed + i) for r in (*first, *second) for i in range(r.size)]
    # Nothing is forced, and no two captions have a seed in common.
    assert all(request.forced == () for request in second)
    assert len(drawn) == len(set(drawn)) == 3 * 8
    assert subject.go_on(0, answer(second, lambda r: [3.0] * r.size)) == ()
    assert [g.group.group_size for g in groups_of(subject.complete(0))] == [8, 8, 8]


def test_a_tree_that_does_not_fill_the_group_is_refused():
    tree = preset("dynamic_tree_rpo", tree_depths=(2, 5), tree_width=2)
    with pytest.raises(ValueError, match=r"trees of 4 captions, want a divisor of .* 6"):
        rounds(group_size=6, planners=tree.planners).begin(0)
    falling = preset("dynamic_tree_rpo", tree_depths=(5, 2), tree_width=2)
    with pytest.raises(ValueError, match="want them to rise"):
        rounds(group_size=8, planners=falling.planners).begin(0)


def test_easy_pictures_get_noise_and_hard_ones_a_hint():
    picture = encoded_picture((10, 20, 30), size=16)
    subject = rounds("reg_grpo", prompt_at=lambda i: replace(prompt_at(i), image=picture))
    means = {0: 1.0, 1: 2.0, 2: 6.0}
    second = subject.go_on(
        0, answer(subject.begin(0), lambda r: [means[r.slot] - 1, means[r.slot] + 1])
    )
    # In the first step the running mean is the step's own, 3: strengths -2, -1 and 3.
    assert [r.forced for r in second] == [(A, B), (A,), ()]
    assert [r.prompt.image == picture for r in second] == [True, True, False]
    assert second[2].prompt.image == with_noise(picture, 0.1 * 3, seed=0)
    assert second[2].prompt.prompt_id == "p2"


def test_noise_has_the_deviation_that_was_asked_for():
    import io

    grey = Image.fromarray(np.full((64, 64, 3), 128, np.uint8))
    out = io.BytesIO()
    grey.save(out, "PNG")
    changed = np.asarray(Image.open(io.BytesIO(with_noise(out.getvalue(), 0.1, seed=3))), float)
    assert (changed - 128).std() == pytest.approx(25.5, rel=0.02)
    assert (changed - 128).mean() == pytest.approx(0, abs=0.7)
    assert with_noise(out.getvalue(), 0.1, seed=3) == with_noise(out.getvalue(), 0.1, seed=3)
    with pytest.raises(ValueError, match=r"deviation -0.1, want at least 0"):
        with_noise(out.getvalue(), -0.1, seed=0)


def test_what_is_known_of_each_caption_moves_with_it():
    request = Request(slot=0, prompt=prompt_at(0), size=2)

    def group(rewards, ok, spans):
        return replace(
            scored(request, rewards),
            fields={
                "judge_ok": np.array(ok),
                "reference_rewards": np.array([9.0, 8.0, 7.0]),
                "similarity": np.eye(2),
            },
            wrong_spans=spans,
            prefix_rewards=(np.zeros(1, np.float32), np.ones(1, np.float32)),
        )

    old = group([0.0, 1.0], [True, False], (((0, 1),), ()))
    new = group([2.0, -1.0], [False, True], ((), ((2, 3),)))
    longer = extended(old, new)
    assert longer.fields["judge_ok"].tolist() == [True, False, False, True]
    assert longer.fields["reference_rewards"].tolist() == [9, 8, 7]
    # Captions of the two were never compared.
    assert "similarity" not in longer.fields
    assert longer.wrong_spans == (((0, 1),), (), (), ((2, 3),))
    mixed = worst_replaced(old, new)
    assert mixed.rewards.tolist() == [2.0, 1.0]
    assert mixed.fields["judge_ok"].tolist() == [False, False]
    assert mixed.wrong_spans == ((), ())
