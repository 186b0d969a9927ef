"""Whole synchronous steps of rayrl in one process: engine, scorer, learner, weights.

The parts are those that the actors hold; Ray itself is left out.  Run by bench_against_trl.py.
"""

from __future__ import annotations

import sys
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
from rayrl.types import ScoredGroup


def configure(case: Case, backend: Backend) -> Config:
    tokens = SHAPES[case.shape].image_tokens
    return Config.model_validate(
        {
            "engine": {"backend": backend, "max_model_len": tokens + 64, "kv_cache_mb": 512},
            "sampling": {"max_tokens": MAX_TOKENS},
            "objective": {"preset": "grpo", "set": {"kl_coef": case.kl_coef}},
            "learner": {"lr": case.lr, "schedule": "constant"},
            "train": {"images_per_step": case.images_per_step, "group_size": case.group_size},
        }
    )


class Steps:
    """The loop's body, one call a step."""

    def __init__(self, case: Case, backend: Backend) -> None:
        self._case, self._config, self._data = case, configure(case, backend), data(case)
        self._seconds, self._step = Seconds(), 0
        self._scorer = Scorer(*reward_of(self._data))
        self._engine = make_engine(
            EngineSetup(
                folder=Path(case.folder), config=self._config.engine, group_size=case.group_size
            )
        )
        self._learner = Learner(
            Path(case.folder),
            model=self._config.model,
            config=self._config.learner,
            objective=build(self._config.objective),
            temperature=self._config.sampling.temperature,
            instruction=self._config.data.instruction,
            total_steps=self._config.train.steps,
            seed=case.seed,
        )
        self._load(trained_only=False)

    def __call__(self) -> dict[str, Any]:
        case, seconds = self._case, Seconds()
        order = prompt_indices(self._step, case.images_per_step, len(self._data), case.seed)
        prompts = [self._data[index] for _, index in order]
        seeds = [request_seed(case.seed, self._step, prompt.prompt_id) for prompt in prompts]
        sampling = Sampling(
            group_size=case.group_size,
            temperature=self._config.sampling.temperature,
            max_tokens=MAX_TOKENS,
        )
        with seconds("sampling"):
            sampled = self._engine.generate(prompts, sampling, seeds)
        with seconds("reward"):
            groups = self._scorer.score(sampled)
        scored = [group for group in groups if isinstance(group, ScoredGroup)]
        if len(scored) < len(groups):
            raise RuntimeError(f"{len(groups) - len(scored)} of {len(groups)} groups were dropped")
        with seconds("update"):
            self._learner.update(make_batch(scored))
        with seconds("sync"):
            self._load(trained_only=True)
        self._step += 1
        tokens = sum(len(c.token_ids) for group in sampled for c in group.completions)
        return report(seconds, tokens, [float(r) for group in scored for r in group.rewards])

    def _load(self, *, trained_only: bool) -> None:
        weights = self._learner.weights(trained_only=trained_only)
        self._engine.load_weights(weights, changed=self._config.model.trainable)


def main(backend: Backend, text: str) -> None:
    channel = open_channel()
    steps = Steps(load_case(text), backend)
    serve(channel, steps)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
