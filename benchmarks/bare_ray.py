"""The calls of a run's step and nothing else: what Ray alone takes of them on this machine.

As many actors as the run has workers, that sleep as long as its engines do; the same calls with
objects of the same sizes, in the same order.  No rewards, no checks, no logs, no second attempt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

CAPTION_TOKENS, TEXT = 20, "a red square is left of the blue ring"
STEPS, WARM_UP = 10, 2


class Sizes(NamedTuple):
    """What a worker gets and gives in a step."""

    image_bytes: int
    captions: int
    weight_bytes: int


@ray.remote(num_cpus=0.01)
class _Rollout:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def load(self, weights: np.ndarray) -> None:
        pass

    def generate(self, images: np.ndarray, captions: int) -> tuple[Any, ...]:
        due = time.monotonic() + self._seconds
        numbers = np.zeros((2, captions * CAPTION_TOKENS), np.float32)
        sampled = (numbers, [TEXT] * captions)
        time.sleep(max(0.0, due - time.monotonic()))
        return sampled


@ray.remote(num_cpus=0.01, allow_out_of_order_execution=True)  # type: ignore[call-overload]
class _Reward:
    def score(self, images: np.ndarray, sampled: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*sampled, np.zeros(len(sampled[1]), np.float32))


@ray.remote(num_cpus=0.5)
class _Learner:
    def __init__(self, weight_bytes: int) -> None:
        self._weights = np.zeros(weight_bytes, np.uint8)

    def update(self, scored: Sequence[tuple[Any, ...]], *images: np.ndarray) -> None:
        pass

    def weights(self) -> np.ndarray:
        return self._weights


def measure(
    seconds: Sequence[float], staleness: int, reward_workers: int, sizes: Sizes
) -> tuple[float, float]:
    """Seconds of a step, and the processor time of this process in it: medians.

    seconds: for each worker, how long it takes for its part
    """
    learner = _Learner.remote(sizes.weight_bytes)  # type: ignore[attr-defined]
    rollout = [_Rollout.remote(one) for one in seconds]  # type: ignore[attr-defined]
    reward = [_Reward.remote() for _ in range(reward_workers)]  # type: ignore[attr-defined]
    actors = [learner, *rollout, *reward]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    try:
        return _steps(learner, rollout, reward, staleness, sizes)
    finally:
        for actor in actors:
            ray.kill(actor)


def _steps(
    learner: Any, rollout: Sequence[Any], reward: Sequence[Any], staleness: int, sizes: Sizes
) -> tuple[float, float]:
    def stage() -> list[Any]:
        return [ray.put(np.zeros(sizes.image_bytes, np.uint8)) for _ in rollout]

    def submit(images: list[Any]) -> tuple[list[Any], list[Any]]:
        sampled = [
            worker.generate.remote(some, sizes.captions)
            for worker, some in zip(rollout, images, strict=True)
        ]
        scored = [
            reward[i % len(reward)].score.remote(some, groups)
            for i, (some, groups) in enumerate(zip(images, sampled, strict=True))
        ]
        return images, scored

    def publish() -> list[Any]:
        weights = learner.weights.remote()
        ray.wait([weights], fetch_local=False)
        return [worker.load.remote(weights) for worker in rollout]

    loads, staged = publish(), stage()
    pending: list[tuple[list[Any], list[Any]]] = []
    walls, processor = [], []
    for _ in range(STEPS):
        wall, used = time.perf_counter(), time.process_time()
        while len(pending) <= staleness:
            pending.append(submit(staged))
            staged = stage()
        if not staleness:
            ray.get(loads)
        images, scored = pending.pop(0)
        missing, results = scored, {}
        while missing:
            there, missing = ray.wait(missing)
            results |= dict(zip(there, ray.get(there), strict=True))
        ray.get(loads)
        ray.get(learner.update.remote(ray.put([results[ref] for ref in scored]), *images))
        loads = publish()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - used)
    for _, scored in pending:
        ray.get(scored)
    return statistics.median(walls[WARM_UP:]), statistics.median(processor[WARM_UP:])
