"""A rollout worker, a learner and a reward that take milliseconds, for runs with many faults.

What they compute depends on everything it should (seeds, versions, groups and their order), so that
a group that is lost, trained twice or sampled with other weights changes the final weights.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError

from rayrl.actors.losses import OtherVersion
from rayrl.canary import Canary
from rayrl.shares import Sampled
from rayrl.types import Completion, Prompt, RolloutGroup

WORDS = ("a", "red", "green", "blue", "circle", "square", "left", "of", "the", "two")
HANG, NO_MEMORY, NO_START, BALLAST_MB = "hang", "no_memory", "no_start", "ballast_mb"
TERM_DIES, TERM_RAISES, TERM_HANGS = "term_dies", "term_raises", "term_hangs"
SLOW_SAMPLING, SLOW_LEARNER = "slow_sampling", "slow_learner"
AWAKE, BESIDE = "awake", "beside"
_LONG = 50_000
"""Tokens of a prompt that make a part of a batch larger than what Ray sends in a message."""


@dataclass(frozen=True)
class FakeWeights:
    """One version: its number, its values, and bytes that only take room."""

    version: int
    values: np.ndarray
    ballast: np.ndarray | None = None


def fault(folder: Path, name: str) -> bool:
    """Whether the fault ``name`` was asked for; whoever asks first gets it, once."""
    try:
        (folder / name).rename(folder / f"{name}.taken.{os.getpid()}.{time.monotonic_ns()}")
    except FileNotFoundError:
        return False
    return True


def canary_scores(values: np.ndarray, canary) -> np.ndarray:
    return (-np.abs(values[: len(canary.token_ids)])).astype(np.float32)


def folder() -> Path:
    """Where fakes look for what they shall do wrong."""
    return Path(os.environ["RAYRL_TEST_FAULTS"])


def maybe_fail(where: str) -> None:
    if fault(folder(), f"{HANG}.{where}"):
        time.sleep(3600)
    if fault(folder(), f"{NO_MEMORY}.{where}"):
        # As the driver sees it where Ray's memory monitor kills the worker.
        raise OutOfMemoryError("the node was running low on memory")


def words(captions: list[str], prompt: Prompt) -> list[float]:
    """A reward term: words of each caption."""
    if fault(folder(), TERM_DIES):
        os._exit(1)
    if fault(folder(), TERM_RAISES):
        raise RuntimeError("asked to fail")
    if fault(folder(), TERM_HANGS):
        time.sleep(3600)
    return [float(len(set(caption.split()))) for caption in captions]


@ray.remote
class FakeRollout:
    """Answers like :class:`rayrl.actors.rollout.RolloutActor`, from a hash of seed and weights."""

    def __init__(self, files, config, group_size, trust_remote_code, shares_gpu) -> None:
        self._folder = folder()
        while (self._folder / NO_START).exists():
            time.sleep(0.1)
        self._weights = FakeWeights(-1, np.zeros(1))

    def started(self) -> None:
        """Answers once the worker is there."""

    def leave(self) -> None:
        ray.actor.exit_actor()

    def load(self, changed, *versions: FakeWeights) -> int:
        maybe_fail("load")
        for weights in versions:
            if weights.ballast is not None:
                assert (weights.ballast == weights.version % 256).all()
            # Copies, for a view would keep the object in the store.
            ballast = None if weights.ballast is None else weights.ballast[:0].copy()
            self._weights = FakeWeights(weights.version, np.array(weights.values), ballast)
        (self._folder / AWAKE).touch()
        return self._weights.version

    def sleep(self, level) -> None:
        """Takes as long as an engine takes for it, and forgets its weights as that does."""
        maybe_fail("sleep")
        time.sleep(0.3)
        kept = self._weights.values if level == 1 else np.zeros(1)
        self._weights = FakeWeights(-1, kept)
        (self._folder / AWAKE).unlink(missing_ok=True)

    def generate(self, prompts, draws, sampling, version):
        started = time.perf_counter()
        self._check(version)
        if (self._folder / SLOW_SAMPLING).exists():
            time.sleep(0.1 * len(prompts))
        elif not (self._folder / SLOW_LEARNER).exists():
            time.sleep(random.uniform(0.0, 0.04))
        maybe_fail("generate")
        groups = [
            self._group(prompt, draw.seed, draw.size)
            for prompt, draw in zip(prompts, draws, strict=True)
        ]
        return Sampled.of(groups, time.perf_counter() - started)

    def greedy(self, prompts, max_tokens, version):
        self._check(version)
        maybe_fail("greedy")
        return [self._completion(7) for _ in prompts]

    def score(self, canary, version):
        self._check(version)
        maybe_fail("score")
        return canary_scores(self._weights.values, canary)

    def _check(self, version: int) -> None:
        if version != self._weights.version:
            raise OtherVersion(f"asked for version {version}, holding {self._weights.version}")

    def _group(self, prompt: Prompt, seed: int, size: int) -> RolloutGroup:
        # With ballast, what is sampled lies on the worker's node too, and in no message.
        length = 2 if self._weights.ballast is None else _LONG
        return RolloutGroup(
            prompt=prompt,
            prompt_token_ids=np.arange(1, length + 1, dtype=np.int32),
            completions=tuple(self._completion(seed + i) for i in range(size)),
            group_size=size,
        )

    def _completion(self, seed: int) -> Completion:
        key = int(abs(self._weights.values).sum() * 1e6) % 2**32
        rng = np.random.default_rng((seed, key))
        ids = rng.integers(0, len(WORDS), size=6).astype(np.int32)
        return Completion(
            token_ids=ids,
            logprobs=rng.normal(-2.0, 0.1, 6).astype(np.float32),
            text=" ".join(WORDS[i] for i in ids),
            finish_reason="stop",
            weight_version=self._weights.version,
        )


@ray.remote
class FakeLearner:
    """Weights that every caption, its reward, version and place in the step move; answers like
    :class:`rayrl.actors.learner.LearnerActor`."""

    def __init__(self, config, files, rank, store) -> None:
        self._colocated = config.rollout.colocate
        self._look_for_an_engine()
        self._values = np.linspace(0.5, 1.5, 16)
        self._step = 0
        self.trained: list[list[str]] = []
        self._prepared: list[str] = []
        self._found: list[bool] = []

    def _look_for_an_engine(self) -> None:
        """Note one that is awake where this needs the GPU that they share."""
        if self._colocated and (folder() / AWAKE).exists():
            (folder() / BESIDE).touch()

    def prepare(self, *prompts) -> None:
        self._prepared = [prompt.prompt_id for some in prompts for prompt in some]

    def update(self, parts, *prompts):
        from rayrl.outline import whole
        from rayrl.types import StepReport

        maybe_fail("update")
        self._look_for_an_engine()
        pairs = zip(parts, prompts, strict=True)
        groups = whole([result for part, some in pairs for result in part.unpacked(some)])
        if (folder() / SLOW_LEARNER).exists():
            time.sleep(0.6)
        for place, group in enumerate(groups):
            for g, completion in enumerate(group.group.completions):
                moved = completion.token_ids.sum() * (1 + g) + completion.weight_version
                self._values = np.roll(self._values, 1)
                self._values[0] += 1e-3 * (place + 1) * float(group.rewards[g] + moved)
        self.trained.append([group.group.prompt.prompt_id for group in groups])
        self._found.append(self._prepared == self.trained[-1])
        self._step += 1
        shape = (len(groups), max(group.group.group_size for group in groups))
        return StepReport(
            step=self._step,
            weight_version=self._step,
            metrics={},
            advantages=np.zeros(shape, np.float32),
        )

    @ray.method(num_returns=2)
    def weights(self, *, trained_only: bool) -> tuple[int, FakeWeights]:
        maybe_fail("weights")
        file = folder() / BALLAST_MB
        megabytes = int(file.read_text()) if file.exists() else 0
        ballast = np.full(megabytes * 2**20, self._step % 256, np.uint8) if megabytes else None
        return self._step, FakeWeights(self._step, self._values.copy(), ballast)

    def canary(self, prompt: Prompt) -> Canary:
        return Canary(prompt=prompt, token_ids=[1, 2, 3])

    def score(self, canary) -> np.ndarray:
        return canary_scores(self._values, canary)

    def checkpoint(self):
        from rayrl.actors.pieces import shipped
        from rayrl.checkpoint import Checkpoint

        return shipped(
            Checkpoint(
                step=self._step,
                model_files={"config.json": np.frombuffer(b"{}", np.uint8)},
                arrays={"values": self._values.copy()},
                meta={
                    "weight_version": self._step,
                    "trained": self.trained,
                    "prepared": self._found,
                },
            )
        )

    def restore(self, checkpoint) -> int:
        self._look_for_an_engine()
        self._values, self._step = np.array(checkpoint.arrays["values"]), checkpoint.step
        self.trained = list(checkpoint.meta["trained"])
        return self._step
