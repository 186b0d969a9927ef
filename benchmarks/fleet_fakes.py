"""An engine that only takes its time and a learner that takes none, for bench_fleet.py.

``install`` runs in every Ray worker before anything else and puts them in the place of the real
ones; all the rest of a run (driver, actors, rewards, weights, logs) is what users run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayrl.engine.base import EngineSetup, Sampling
from rayrl.types import Completion, Prompt, RolloutGroup, StepReport, TrainBatch
from rayrl.weights import Weights

SECONDS_VARIABLE = "RAYRL_BENCH_ENGINE_SECONDS"
FOLDER_VARIABLE = "RAYRL_BENCH_FOLDER"
SHARES_FILE = "shares.json"
"""For each worker of the job, its time as a share of the slowest one's."""
PROMPT_TOKENS, CAPTION_TOKENS = 24, 20
WORDS = ["a", "red", "square", "is", "left", "of", "the", "blue", "ring", "on", "light", "ground"]


class SleepingEngine:
    """Answers every request for captions after a fixed time, its own work included."""

    def __init__(self, setup: EngineSetup) -> None:
        folder = Path(os.environ[FOLDER_VARIABLE])
        shares = json.loads((folder / SHARES_FILE).read_text())
        self._seconds = float(os.environ[SECONDS_VARIABLE]) * shares[_number(folder, len(shares))]
        self.weight_version = -1

    def held(self, weights: Weights) -> dict[str, Any]:
        return {}

    def load_weights(self, weights: Weights, **_: Any) -> None:
        weights.verify()
        self.weight_version = weights.version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], *_: Any
    ) -> list[RolloutGroup]:
        due = time.monotonic() + self._seconds
        groups = [
            RolloutGroup(
                prompt=prompt,
                prompt_token_ids=np.arange(PROMPT_TOKENS, dtype=np.int32),
                completions=tuple(self._caption(seed + g) for g in range(sampling.group_size)),
                group_size=sampling.group_size,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        time.sleep(max(0.0, due - time.monotonic()))
        return groups

    def greedy(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        return [self._caption(0) for _ in prompts]

    def score(self, prompt: Prompt, token_ids: Sequence[int]) -> np.ndarray:
        return np.zeros(len(token_ids), np.float32)

    def _caption(self, seed: int) -> Completion:
        words = [WORDS[(seed + i * i) % len(WORDS)] for i in range(CAPTION_TOKENS // 2)]
        return Completion(
            token_ids=np.full(CAPTION_TOKENS, seed % 512, np.int32),
            logprobs=np.full(CAPTION_TOKENS, -1.0, np.float32),
            text=" ".join(words),
            finish_reason="stop",
            weight_version=self.weight_version,
        )


def _number(folder: Path, workers: int) -> int:
    """Which worker this is, from 0: the first number that nobody has taken."""
    for number in range(workers):
        try:
            (folder / f"worker-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    return 0  # one that replaces another


def install() -> None:
    """Replace engine and learner in this worker process, where actors find them by name."""
    import rayrl.engine.base
    import rayrl.learner.learner

    class IdleLearner(rayrl.learner.learner.Learner):
        """A learner whose steps are free and leave the weights as they are."""

        def prepare(self, images: Sequence[bytes]) -> None:
            pass

        def update(self, batch: TrainBatch, *_: Any) -> StepReport:
            self.step += 1
            return StepReport(
                step=self.step,
                weight_version=self.weight_version,
                metrics={},
                advantages=np.zeros(batch.rewards.shape, np.float32),
            )

        def score(self, image: bytes, token_ids: Sequence[int]) -> np.ndarray:
            return np.zeros(len(token_ids), np.float32)

    rayrl.engine.base.make_engine = SleepingEngine  # type: ignore[assignment]
    rayrl.learner.learner.Learner = IdleLearner  # type: ignore[misc]
