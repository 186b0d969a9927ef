"""What a step samples: a first round of groups, then further rounds that depend on their rewards.

A part in an objective's ``rollout`` slot is a planner.  It sees what was drawn so far and asks for
more: other images in place of flat groups, captions that start with words of a reference, more
captions where rewards spread.  A request says itself how what it brings joins the group that is
there, so a planner is one pure function (:mod:`rayrl.planning`).

    requests = rounds.begin(step)                  the first round
    while requests:
        results = sample and score requests        in order
        requests = rounds.go_on(step, results)     the next round, or none
    drawn = rounds.complete(step)                  the step's groups
    rounds.finish(step)                            once they were trained on
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayrl.config import Config
from rayrl.data.order import item_at
from rayrl.engine.base import request_seed
from rayrl.outline import Here, Results
from rayrl.planning import Drawn, Planner, Request, plan
from rayrl.rewards.score import Dropped
from rayrl.types import Prompt


def seeded(requests: Sequence[Request], run_seed: int, drawn: Drawn) -> tuple[Request, ...]:
    """The requests with their seeds, a function of (run seed, step, prompt, round): a request that
    is made again brings the same captions.  Sample i of a request uses seed + i, so requests for
    one prompt follow each other."""
    sizes: dict[str, int] = {}
    out = []
    for request in requests:
        who = request.prompt.prompt_id
        first = request_seed(run_seed, drawn.step, who, drawn.round)
        out.append(replace(request, seed=first + sizes.get(who, 0)))
        sizes[who] = sizes.get(who, 0) + request.size
    return tuple(out)


def joined(drawn: Drawn, requests: Sequence[Request], results: Results) -> Drawn:
    """The step with a round's results.  One that was dropped leaves its slot as it was."""
    groups = list(drawn.groups)
    for request, result in zip(requests, results.all(), strict=True):
        if not isinstance(result, Dropped):
            groups[request.slot] = request.join(groups[request.slot], result)
    dropped = (*drawn.dropped, *results.outline.dropped)
    there = [group for group in groups if group is not None]
    return replace(drawn, groups=tuple(groups), dropped=dropped, results=Here((*there, *dropped)))


def counted(drawn: Drawn, requests: Sequence[Request]) -> Drawn:
    """The step after one more round."""
    return replace(
        drawn,
        round=drawn.round + 1,
        num_captions=drawn.num_captions + sum(request.size for request in requests),
        asked_again=drawn.asked_again + (len(requests) if drawn.round else 0),
    )


@dataclass
class Rounds:
    """The rounds of all steps that are on the way, and the prompts they take.

    Prompts are taken from an endless sequence, in the order in which steps begin and go on.  That
    order is the driver's own, so which prompt goes where depends on nothing that runs in parallel;
    :meth:`state` is all that a resumed run needs to go on with exactly the next prompts.

    prompt_at: the prompt at a place (from 0) of the sequence, of which the first ``num_prompts``
        hold each prompt once
    """

    planners: Callable[[int], Sequence[Planner]]
    prompt_at: Callable[[int], Prompt]
    encode: Callable[[str], list[int]]
    num_prompts: int
    images_per_step: int
    group_size: int
    total_steps: int
    seed: int
    _next: int = 0
    _first: dict[int, tuple[int, int]] = field(default_factory=dict)
    _taken: dict[int, list[int]] = field(default_factory=dict)
    _left: list[int] = field(default_factory=list)
    _drawn: dict[int, Drawn] = field(default_factory=dict)
    _asked: dict[int, tuple[Request, ...]] = field(default_factory=dict)
    _ahead: dict[int, Prompt] = field(default_factory=dict)
    _mean_reward: float | None = None

    @classmethod
    def of_run(
        cls,
        config: Config,
        planners: Callable[[int], Sequence[Planner]],
        data: Sequence[Prompt],
        model: Path,
    ) -> Rounds:
        """Those of a run on ``data`` in the order of the run's seed; ``model`` is a folder."""

        @functools.cache
        def processor() -> Any:
            from rayrl.vlm import load_processor

            return load_processor(model, trust_remote_code=config.model.trust_remote_code)

        def encode(text: str) -> list[int]:
            from rayrl.vlm import caption_prefix_ids

            return caption_prefix_ids(processor(), text)

        return cls(
            planners=planners,
            prompt_at=lambda place: data[item_at(place, len(data), config.seed)[1]],
            encode=encode,
            num_prompts=len(data),
            images_per_step=config.train.images_per_step,
            group_size=config.train.group_size,
            total_steps=config.train.steps,
            seed=config.seed,
        )

    def prompts(self) -> Iterator[Prompt]:
        """Every prompt that the run may take, once each, in the order of the first epoch: all,
        where planners take further ones."""
        steps = range(self.total_steps)
        more = any("take" in one.inputs for step in steps for one in self.planners(step))
        count = self.num_prompts if more else self.total_steps * self.images_per_step
        return map(self.prompt_at, range(min(count, self.num_prompts)))

    def read_ahead(self, step: int) -> list[Prompt]:
        """The prompts that ``step`` will begin with, as far as is known now, read before it begins.

        A step before it whose planners take further prompts pushes it on in the sequence; what was
        read for it then goes to them.  OSError or ValueError where an image cannot be read."""
        start, count = self._first.get(step, (self._next, self.images_per_step))
        places = range(start, start + count)
        self._ahead = {place: self._ahead.get(place) or self.prompt_at(place) for place in places}
        return list(self._ahead.values())

    def begin(self, step: int) -> tuple[Request, ...]:
        """The first round of ``step``; on the prompts that the step had, if it began before the
        run was resumed."""
        if step not in self._first:
            self._first[step] = (self._next, self.images_per_step)
            self._next += self.images_per_step
        start, count = self._first[step]
        prompts = tuple(self._prompts(range(start, start + count)))
        self._drawn[step] = Drawn(
            step=step,
            total_steps=self.total_steps,
            group_size=self.group_size,
            prompts=prompts,
            groups=(None,) * count,
        )
        return self._plan(step)

    def go_on(self, step: int, results: Results) -> tuple[Request, ...]:
        """The next round of ``step``, given the results of the last one in the order of its
        requests; empty when the step is complete."""
        drawn, asked = self._drawn[step], self._asked[step]
        if self.planners(step):
            drawn = joined(drawn, asked, results)
        else:
            # Nobody will look at the groups here, so they stay where they are.
            drawn = replace(drawn, results=results, dropped=results.outline.dropped)
        self._drawn[step] = replace(counted(drawn, asked), mean_reward=self._mean_reward)
        return self._plan(step)

    def complete(self, step: int) -> Drawn:
        """The complete step.

        RuntimeError where no group is left, with the reason of the first that was dropped."""
        drawn = self._drawn[step]
        if not len(drawn.results.outline.means):
            first = drawn.dropped[0]
            raise RuntimeError(
                f"all {len(drawn.dropped)} groups of the step were dropped; "
                f"the first, {first.prompt_id}: {first.reason}"
            )
        return drawn

    def finish(self, step: int) -> None:
        """Forget a complete step, whose groups were trained on: a run that is saved has it behind
        it."""
        del self._first[step], self._asked[step]
        self._taken.pop(step, None)
        mean = float(self._drawn.pop(step).results.outline.means.mean())
        before = mean if self._mean_reward is None else self._mean_reward
        self._mean_reward = before + _NEWEST * (mean - before)

    def state(self) -> dict[str, Any]:
        """Where the run is, as JSON values: the next place, the places of the steps that have
        begun and are not finished, and those that their planners took."""
        first = {str(step): list(places) for step, places in self._first.items()}
        taken = [place for step in sorted(self._taken) for place in self._taken[step]]
        return {
            "next": self._next,
            "first": first,
            "left": taken + self._left,
            "mean_reward": self._mean_reward,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self._next, self._mean_reward = state["next"], state["mean_reward"]
        self._first = {int(step): (a, n) for step, (a, n) in state["first"].items()}
        self._left = list(state.get("left", []))

    def _plan(self, step: int) -> tuple[Request, ...]:
        drawn = self._drawn[step]
        supplies = {"take": functools.partial(self._take, step), "encode": self.encode}
        planners = self.planners(step)
        requests = plan(drawn, planners, supplies)
        if requests and drawn.round >= MOST_ROUNDS:
            names = ", ".join(planner.name for planner in planners)
            raise RuntimeError(
                f"step {step}: rollout {names} still asks for captions after {drawn.round} rounds, "
                "want planners that come to an end"
            )
        self._asked[step] = seeded(requests, self.seed, drawn)
        return self._asked[step]

    def _take(self, step: int, count: int) -> list[Prompt]:
        """The next prompts of the order: before others those that a step took which was begun
        before the run was resumed, and begins again."""
        again, self._left = self._left[:count], self._left[count:]
        start, self._next = self._next, self._next + count - len(again)
        places = [*again, *range(start, self._next)]
        self._taken.setdefault(step, []).extend(places)
        return self._prompts(places)

    def _prompts(self, places: Iterable[int]) -> list[Prompt]:
        return [
            self._ahead.pop(place) if place in self._ahead else self.prompt_at(place)
            for place in places
        ]


MOST_ROUNDS = 100
"""A planner that asks for more than that would never be content."""

_NEWEST = 0.1
"""Weight of a step in the running mean of rewards, for planners that compare with the past."""
