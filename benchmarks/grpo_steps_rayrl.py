"""Whole steps of rayrl in one process: engine, scorer, learner, weights.

The parts are those that the actors hold; Ray itself is left out.  Run by bench_against_trl.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo_case import (
    MAX_TOKENS,
    SHAPES,
    Case,
    Seconds,
    data,
    load_case,
    open_channel,
    prompts_of,
    report,
    serve,
)
from grpo_case import reward as reward_of

from rayrl.batch import make_batch
from rayrl.config import Backend, Config
from rayrl.data.order import prompt_indices
from rayrl.engine.base import EngineSetup, Sampling, make_engine, request_seed
from rayrl.learner.learner import Learner
from rayrl.objectives import build
from rayrl.rewards.score import Scorer
from rayrl.types import RolloutGroup, ScoredGroup


def configure(case: Case, backend: Backend) -> Config:
    tokens = SHAPES[case.shape].image_tokens
    return Config.model_validate(
        {
            "engine": {"backend": backend, "max_model_len": tokens + 64, "kv_cache_mb": 512},
            "sampling": {"max_tokens": MAX_TOKENS},
            "model": {"trainable": case.trainable},
            "objective": {"preset": "grpo", "set": {"kl_coef": case.kl_coef}},
            "learner": {"lr": case.lr, "schedule": "constant"},
            "train": {"images_per_step": case.images_per_step, "group_size": case.group_size},
        }
    )


class Steps:
    """The loop's body, one call a step, first sampling and then learning."""

    def __init__(self, case: Case, backend: Backend) -> None:
        self._case, self._config = case, configure(case, backend)
        pictures = data(case)
        self._prompts = prompts_of(case, pictures)
        self._step = 0
        self._scorer = Scorer(*reward_of(pictures))
        self._engine = make_engine(
            EngineSetup(
                folder=Path(case.folder), config=self._config.engine, group_size=case.group_size
            )
        )
        self._learner = Learner(
            Path(case.folder),
            model=self._config.model,
            config=self._config.learner,
            objective=build(self._config.objective, max_tokens=self._config.sampling.max_tokens),
            temperature=self._config.sampling.temperature,
            instruction=self._config.data.instruction,
            total_steps=self._config.train.steps,
            seed=case.seed,
        )
        self._load(trained_only=False)

    def __call__(self) -> dict[str, Any]:
        seconds = Seconds()
        with seconds("sampling"):
            sampled = self._sample(self._step)
        scored = self._learn(sampled, seconds)
        with seconds("sync"):
            self._load(trained_only=True)
        self._step += 1
        return self._report(sampled, scored, seconds)

    def _sample(self, step: int) -> list[RolloutGroup]:
        case = self._case
        order = prompt_indices(step, case.images_per_step, len(self._prompts), case.seed)
        prompts = [self._prompts[index] for _, index in order]
        seeds = [request_seed(case.seed, step, prompt.prompt_id) for prompt in prompts]
        sampling = Sampling(
            group_size=case.group_size,
            temperature=self._config.sampling.temperature,
            max_tokens=MAX_TOKENS,
        )
        return self._engine.generate(prompts, sampling, seeds)

    def _learn(self, sampled: Sequence[RolloutGroup], seconds: Seconds) -> list[ScoredGroup]:
        with seconds("reward"):
            groups = self._scorer.score(sampled)
        scored = [group for group in groups if isinstance(group, ScoredGroup)]
        if len(scored) < len(groups):
            raise RuntimeError(f"{len(groups) - len(scored)} of {len(groups)} groups were dropped")
        with seconds("update"):
            self._learner.update(make_batch(scored))
        return scored

    def _report(
        self, sampled: Sequence[RolloutGroup], scored: Sequence[ScoredGroup], seconds: Seconds
    ) -> dict[str, Any]:
        tokens = sum(len(c.token_ids) for group in sampled for c in group.completions)
        return report(seconds, tokens, [float(r) for group in scored for r in group.rewards])

    def _load(self, *, trained_only: bool) -> None:
        weights = self._learner.weights(trained_only=trained_only)
        self._engine.load_weights(weights, changed=self._case.trainable)


class StepsAhead(Steps):
    """The same with ``max_staleness`` 1: the next step is sampled while the learner updates.  Both
    end within the step, so that nothing runs on in another system's turn."""

    def __init__(self, case: Case, backend: Backend) -> None:
        self._sampler = ThreadPoolExecutor(1)
        super().__init__(case, backend)
        self._sampled = self._sample(0)

    def __call__(self) -> dict[str, Any]:
        seconds, sampled = Seconds(), self._sampled
        self._step += 1
        ahead = self._sampler.submit(self._sample, self._step)
        scored = self._learn(sampled, seconds)
        with seconds("sampling"):
            self._sampled = ahead.result()
        with seconds("sync"):
            self._load(trained_only=True)
        return self._report(sampled, scored, seconds)


LOOPS = {"0": Steps, "1": StepsAhead}


def main(backend: Backend, staleness: str, text: str) -> None:
    channel = open_channel()
    steps = LOOPS[staleness](load_case(text), backend)
    serve(channel, steps)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
