"""What steps sample, round by round: which prompts, which seeds, what becomes of the results."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayrl.engine.base import request_seed
from rayrl.objectives import preset
from rayrl.outline import Here, whole
from rayrl.planning import Request
from rayrl.rewards.score import Dropped
from rayrl.rounds import Rounds
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup

IMAGES, GROUP = 3, 2


def prompt_at(place: int) -> Prompt:
    return Prompt(prompt_id=f"p{place}", image=b"png", text="Describe.", references=("a b c d",))


def completion(ids, *, text="", forced=0, version=0, first_logprob=-1.0) -> Completion:
    return Completion(
        token_ids=np.array(ids, np.int32),
        logprobs=first_logprob - np.arange(len(ids), dtype=np.float32),
        text=text or f"caption {list(ids)}",
        finish_reason="stop",
        weight_version=version,
    )


def scored(request: Request, rewards) -> ScoredGroup:
    """What a request brings: captions whose first word counts them, with these rewards."""
    rewards = np.array(rewards, np.float32)
    assert len(rewards) == request.size
    group = RolloutGroup(
        prompt=request.prompt,
        prompt_token_ids=np.array([1, 2], np.int32),
        completions=tuple(completion([*request.forced, 10 + i]) for i in range(request.size)),
        group_size=request.size,
    )
    return ScoredGroup(group=group, terms={"cider_d": rewards}, rewards=rewards)


def rounds(objective: str = "dapo", **changes) -> Rounds:
    return Rounds(
        **{
            "planners": preset(objective).planners,
            "prompt_at": prompt_at,
            "encode": lambda text: [ord(word) for word in text.split()],
            "num_prompts": 1000,
            "images_per_step": IMAGES,
            "group_size": GROUP,
            "total_steps": 10,
            "seed": 7,
            **changes,
        }
    )


def places_and_seeds(requests) -> list[tuple[int, str, int]]:
    return [(r.slot, r.prompt.prompt_id, r.seed) for r in requests]


def asked(requests) -> list[tuple[int, str, int]]:
    return [(r.slot, r.prompt.prompt_id, r.size) for r in requests]


def answer(requests, rewards_of) -> Here:
    return Here([scored(r, rewards_of(r)) for r in requests])


def groups_of(drawn) -> list[ScoredGroup]:
    return list(whole(drawn.results.all()))


def spread(request: Request) -> list[float]:
    return list(range(request.size))


def flat(request: Request) -> list[float]:
    return [0.5] * request.size


def test_without_planners_a_step_is_one_round_of_the_next_prompts():
    subject = rounds("grpo")
    first = subject.begin(0)
    assert asked(first) == [(0, "p0", 2), (1, "p1", 2), (2, "p2", 2)]
    assert [r.seed for r in first] == [request_seed(7, 0, f"p{i}") for i in range(3)]
    assert subject.go_on(0, answer(first, flat)) == ()
    drawn = subject.complete(0)
    assert [g.group.prompt.prompt_id for g in groups_of(drawn)] == ["p0", "p1", "p2"]
    assert drawn.metrics() == {
        "rounds/count": 1.0,
        "rounds/captions": 6.0,
        "rounds/asked_again": 0.0,
        "groups/dropped": 0.0,
    }
    assert asked(subject.begin(1)) == [(0, "p3", 2), (1, "p4", 2), (2, "p5", 2)]


def test_flat_and_dropped_groups_are_refilled_by_the_next_prompts():
    subject = rounds()
    first = subject.begin(0)
    second = subject.go_on(
        0, Here([scored(first[0], [1, 1]), scored(first[1], [0, 1]), Dropped("p2", "no answer")])
    )
    assert asked(second) == [(0, "p3", 2), (2, "p4", 2)]
    assert [r.seed for r in second] == [request_seed(7, 0, p, 1) for p in ("p3", "p4")]
    third = subject.go_on(0, Here([scored(second[0], [3, 4]), scored(second[1], [2, 2])]))
    assert asked(third) == [(2, "p5", 2)]
    assert subject.go_on(0, Here([scored(third[0], [5, 6])])) == ()
    drawn = subject.complete(0)
    assert [g.group.prompt.prompt_id for g in groups_of(drawn)] == ["p3", "p1", "p5"]
    assert [g.rewards.tolist() for g in groups_of(drawn)] == [[3, 4], [0, 1], [5, 6]]
    assert drawn.metrics() == {
        "rounds/count": 3.0,
        "rounds/captions": 12.0,
        "rounds/asked_again": 3.0,
        "groups/dropped": 1.0,
    }


def test_refilling_is_bounded_and_keeps_the_step_whole():
    subject = rounds(planners=preset("dapo", refill_rounds=2).planners)
    requests, count = subject.begin(0), 0
    while requests:
        count += 1
        requests = subject.go_on(0, answer(requests, flat))
    drawn = subject.complete(0)
    assert count == drawn.round == 3
    assert [g.group.prompt.prompt_id for g in groups_of(drawn)] == ["p6", "p7", "p8"]


def test_a_refill_that_cannot_be_scored_leaves_the_flat_group():
    subject = rounds(planners=preset("dapo", refill_rounds=1).planners)
    first = subject.begin(0)
    second = subject.go_on(0, answer(first, flat))
    assert subject.go_on(0, Here([Dropped(r.prompt.prompt_id, "late") for r in second])) == ()
    drawn = subject.complete(0)
    assert [g.group.prompt.prompt_id for g in groups_of(drawn)] == ["p0", "p1", "p2"]
    assert len(drawn.dropped) == 3


def test_a_spread_of_rewards_that_counts_as_none_is_a_parameter():
    subject = rounds(planners=preset("dapo", min_spread=0.5).planners)
    first = subject.begin(0)
    got = subject.go_on(0, answer(first, lambda r: {0: [0, 1.0], 1: [0, 1.1]}.get(r.slot, [0, 9])))
    # The standard deviation of 0 and 1 is 0.5, that of 0 and 1.1 is 0.55.
    assert asked(got) == [(0, "p3", 2)]
    # The same number drops the group in the update.
    assert preset("dapo", min_spread=0.5).plan.parameters()["min_spread"] == 0.5


def test_a_step_without_any_group_says_why():
    subject = rounds("grpo")
    requests = subject.begin(0)
    subject.go_on(0, Here([Dropped(r.prompt.prompt_id, "the scorer is down") for r in requests]))
    with pytest.raises(RuntimeError, match=r"all 3 groups .* the first, p0: the scorer is down"):
        subject.complete(0)


def drive(
    subject: Rounds,
    start: int,
    stop: int,
    ahead: int,
    log: list,
    *,
    halt: int | None = None,
    read_ahead: bool = True,
):
    """Steps as the driver takes them: ``ahead`` steps begin before the oldest goes on.  Images
    whose number divides by 4 give flat groups.  Returns the state after step ``halt``."""

    def rewards(request):
        return flat(request) if int(request.prompt.prompt_id[1:]) % 4 == 0 else spread(request)

    pending: list = []
    begun = step = start
    while step < stop:
        while begun < min(stop, step + ahead + 1):
            pending.append(subject.begin(begun))
            begun += 1
        if read_ahead and begun < stop:
            subject.read_ahead(begun)
        requests = pending.pop(0)
        while requests:
            log += [(step, r.prompt.prompt_id, r.seed) for r in requests]
            requests = subject.go_on(step, answer(requests, rewards))
        subject.finish(step)
        step += 1
        if step == halt:
            return json.loads(json.dumps(subject.state()))
    return subject.state()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_prompt_is_taken_once_and_a_resumed_run_takes_the_same(ahead):
    straight: list = []
    end = drive(rounds(), 0, 8, ahead, straight)
    places = sorted(int(name[1:]) for _, name, _ in straight)
    assert places == list(range(end["next"]))
    assert end["next"] > 8 * IMAGES and end["first"] == {}

    broken: list = []
    state = drive(rounds(), 0, 8, ahead, broken, halt=3)
    assert len(state["first"]) == min(ahead, 5)
    resumed = rounds()
    resumed.restore(state)
    assert drive(resumed, 3, 8, ahead, broken) == end
    assert broken == straight


def test_a_run_that_is_saved_in_the_middle_of_a_step_takes_the_same_prompts_for_it_again():
    subject = rounds()
    first, ahead = subject.begin(0), subject.begin(1)
    more = subject.go_on(0, answer(first, flat))
    assert [r.prompt.prompt_id for r in more] == ["p6", "p7", "p8"]
    state = json.loads(json.dumps(subject.state()))
    resumed = rounds()
    resumed.restore(state)
    assert resumed.state() == state
    for again, before in ((resumed.begin(0), first), (resumed.begin(1), ahead)):
        assert places_and_seeds(again) == places_and_seeds(before)
    assert places_and_seeds(resumed.go_on(0, answer(first, flat))) == places_and_seeds(more)
    # The next ones are new.
    other = resumed.go_on(1, answer(ahead, flat))
    assert [r.prompt.prompt_id for r in other] == ["p9", "p10", "p11"]
    assert [r.prompt.prompt_id for r in resumed.begin(2)] == ["p12", "p13", "p14"]


def test_a_step_that_is_complete_is_not_behind_a_run_until_it_was_trained_on():
    subject = rounds("grpo")
    requests = subject.begin(0)
    assert subject.go_on(0, answer(requests, spread)) == ()
    subject.complete(0)
    resumed = rounds("grpo")
    resumed.restore(subject.state())
    assert places_and_seeds(resumed.begin(0)) == places_and_seeds(requests)
    subject.finish(0)
    assert subject.state()["first"] == {}


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_images_are_read_once_and_steps_that_are_read_ahead_are_the_same(objective, ahead):
    read: list[int] = []

    def noted(place: int) -> Prompt:
        read.append(place)
        return prompt_at(place)

    taken: list = []
    end = drive(rounds(objective, prompt_at=noted), 0, 8, ahead, taken)
    assert sorted(read) == list(range(end["next"]))
    alone: list = []
    assert drive(rounds(objective), 0, 8, ahead, alone, read_ahead=False) == end
    assert alone == taken


def test_a_step_is_read_before_it_begins_and_one_that_began_before_on_the_images_it_had():
    subject = rounds("grpo")
    prompts = subject.read_ahead(0)
    assert [prompt.prompt_id for prompt in prompts] == ["p0", "p1", "p2"]
    # The very objects, by which the fleet knows them.
    assert [r.prompt for r in subject.begin(0)] == prompts
    resumed = rounds("grpo")
    resumed.restore({"next": 9, "first": {"4": [3, 3]}, "mean_reward": None})
    assert [prompt.prompt_id for prompt in resumed.read_ahead(4)] == ["p3", "p4", "p5"]
    assert [r.prompt.prompt_id for r in resumed.begin(4)] == ["p3", "p4", "p5"]
    assert [r.prompt.prompt_id for r in resumed.begin(5)] == ["p9", "p10", "p11"]


def test_requests_for_one_prompt_do_not_draw_the_same_captions():
    again = rounds("grpo", prompt_at=lambda place: prompt_at(place % 2))
    seeds = [r.seed for r in again.begin(0)]
    # Sample i of a request uses seed + i: the third request, for the first prompt, goes on.
    assert seeds[2] == seeds[0] + GROUP
    assert len({seed + i for seed in seeds for i in range(GROUP)}) == 6


def test_planners_do_not_ask_for_the_same_group():
    def greedy_planner(drawn, *, extra):
        return [Request(slot=1, prompt=drawn.prompts[1], size=extra)] if drawn.round == 1 else []

    from rayrl.objectives.plan import part

    both = preset("dapo", rollout=[part(greedy_planner, extra=3), *preset("dapo").plan.rollout])
    subject = rounds(planners=both.planners)
    second = subject.go_on(0, answer(subject.begin(0), flat))
    assert asked(second) == [(0, "p3", 2), (1, "p1", 3), (2, "p4", 2)]


def own(planner, **changes) -> Rounds:
    return rounds(planners=preset("grpo", rollout=planner).planners, **changes)


def test_a_planner_may_be_a_generator():
    def smaller(drawn):
        for slot in drawn.free if drawn.round == 0 else ():
            yield Request(slot=slot, prompt=drawn.prompts[slot], size=1)

    subject = own(smaller)
    first = subject.begin(0)
    assert asked(first) == [(0, "p0", 1), (1, "p1", 1), (2, "p2", 1)]
    assert subject.go_on(0, answer(first, flat)) == ()


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        (lambda drawn: None, r"rollout <lambda> returned None, want a list of requests"),
        (
            lambda drawn: [drawn.prompts[0]],
            r"rollout <lambda> asked for Prompt\(.*, want a Request",
        ),
        (
            lambda drawn: [Request(slot=-1, prompt=drawn.prompts[0], size=1)],
            "asked for slot -1, want one of the step's, 0 to 2",
        ),
        (
            lambda drawn: [Request(slot=3, prompt=drawn.prompts[0], size=1)],
            "asked for slot 3, want one of the step's, 0 to 2",
        ),
    ],
)
def test_what_is_no_request_for_a_group_of_the_step_is_refused(planner, message):
    with pytest.raises(ValueError, match=message):
        own(planner).begin(0)


def test_a_planner_that_is_never_content_ends_the_run():
    def again(drawn, take):
        return [Request(slot=0, prompt=take(1)[0], size=1)]

    subject = own(again, images_per_step=1)
    requests, count = subject.begin(0), 0
    with pytest.raises(RuntimeError, match=r"step 0: rollout again still asks .* after 100 rounds"):
        while requests:
            count += 1
            requests = subject.go_on(0, answer(requests, flat))
    assert count == 100


def test_a_phase_brings_its_own_planners():
    from rayrl.objectives.plan import Phases
    from rayrl.objectives.schedule import Schedule

    taking_turns = Schedule("both", Phases((preset("grpo").plan, preset("dapo").plan), (1, 2)))
    names = [[planner.name for planner in taking_turns.planners(step)] for step in range(4)]
    assert names == [[], ["refill"], ["refill"], []]


def test_a_request_for_no_caption_is_refused():
    with pytest.raises(ValueError, match="prompt p4: 0 captions, want at least 1"):
        Request(slot=0, prompt=prompt_at(4), size=0)


def test_the_running_mean_of_rewards_follows_the_steps():
    subject = rounds("grpo")
    for step, mean in ((0, 1.0), (1, 3.0)):
        subject.go_on(step, answer(subject.begin(step), lambda r, m=mean: [m - 1, m + 1]))
        subject.finish(step)
    assert subject.state()["mean_reward"] == pytest.approx(1.0 + 0.1 * (3.0 - 1.0))
