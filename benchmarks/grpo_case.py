"""One GRPO job for two systems: the same model, data, reward and step sizes, step by step.

A peer is a process that does a whole step (sampling, reward, update) whenever it is asked to, so
that systems with environments of their own can take turns on one machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rayrl.config import ModelConfig, Part, TinyConfig, XeConfig
from rayrl.data import Dataset, load_split
from rayrl.data.config import DataConfig
from rayrl.data.order import prompt_indices
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.statistics import Statistics, reward_statistics
from rayrl.types import Prompt

MAX_TOKENS = 20
MOST_PICTURES = 512
EVERY_PART: tuple[Part, ...] = ("vision", "connector", "language")
SHAPES = {
    # 2.6 M parameters, 64 x 64 pixels, 16 image tokens
    "a": TinyConfig(
        image_size=64,
        patch_size=8,
        pixel_shuffle=2,
        vision_width=128,
        vision_layers=3,
        text_width=192,
        text_layers=4,
    ),
    # 1 M parameters, 128 x 128 pixels, 256 image tokens
    "b": TinyConfig(
        image_size=128,
        patch_size=4,
        pixel_shuffle=2,
        vision_width=64,
        vision_layers=3,
        text_width=128,
        text_layers=3,
        max_positions=512,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What both systems are given.  ``folder`` holds the model.  With random weights its captions
    hardly ever end before MAX_TOKENS and share no words, the worst case; after ``xe_steps`` of
    cross-entropy they look like captions.  ``kl_coef`` above 0 needs a reference model.  The first
    ``pictures`` of the data are trained on, the parts in ``trainable`` train."""

    shape: str
    group_size: int
    images_per_step: int
    kl_coef: float
    lr: float
    folder: str
    xe_steps: int = 0
    pictures: int = MOST_PICTURES
    trainable: tuple[Part, ...] = EVERY_PART
    seed: int = 0

    @property
    def captions_per_step(self) -> int:
        return self.images_per_step * self.group_size

    def dump(self) -> str:
        return json.dumps(asdict(self))


def load_case(text: str) -> Case:
    given = json.loads(text)
    return Case(**{**given, "trainable": tuple(given["trainable"])})


def data(case: Case) -> Dataset:
    """Generated pictures at the model's size, more than a benchmark's steps use."""
    size = SHAPES[case.shape].image_size
    return load_split(DataConfig(image_size=size, max_train=MOST_PICTURES), "train")


def prompts_of(case: Case, pictures: Dataset) -> list[Prompt]:
    """Those that the steps take in turn."""
    return [pictures[i] for i in range(min(case.pictures, len(pictures)))]


def reward(pictures: Dataset) -> tuple[RewardConfig, Statistics]:
    """CIDEr-D against the training captions: configuration and document frequencies."""
    config = RewardConfig()
    return config, reward_statistics(pictures.references(), config)


def build_model(case: Case) -> Path:
    """Write the model folder, once a case."""
    from rayrl.vlm import build_tiny_captioner

    pictures = data(case)
    captions = [text for texts in pictures.references() for text in texts]
    tiny = SHAPES[case.shape]
    folder = build_tiny_captioner(tiny, captions, pictures.instruction, Path(case.folder), seed=0)
    if case.xe_steps:
        teach(folder, pictures, case)
    return folder


def teach(folder: Path, pictures: Dataset, case: Case) -> None:
    """Train the model in ``folder`` with cross-entropy, as stage 1 does but on fewer images a step,
    for on (b) it would take most of the benchmark's time."""
    from rayrl.learner.xe import XeTrainer

    config = XeConfig()
    trainer = XeTrainer(
        folder,
        model=ModelConfig(),
        config=config,
        instruction=pictures.instruction,
        max_tokens=MAX_TOKENS,
        seed=case.seed,
    )
    for step in range(case.xe_steps):
        order = prompt_indices(step, case.images_per_step, len(pictures), case.seed)
        prompts = [pictures[index] for _, index in order]
        trainer.step(
            [prompt.image for prompt in prompts],
            [prompt.references for prompt in prompts],
            progress=step / case.xe_steps,
        )
    trainer.save(folder)


class Seconds:
    """Time by phase of a step."""

    def __init__(self) -> None:
        self.by_phase: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.by_phase[phase] = self.by_phase.get(phase, 0.0) + spent


def report(seconds: Seconds, tokens: int, rewards: Sequence[float]) -> dict[str, Any]:
    """What a peer says of one step."""
    mean = sum(rewards) / len(rewards)
    return {
        "phases": seconds.by_phase,
        "captions": len(rewards),
        "tokens": tokens,
        "reward_mean": mean,
        "reward_std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
    }


def open_channel() -> TextIO:
    """Where a peer answers: the real standard output, which libraries no longer write to."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def answer(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def wait_for_request() -> bool:
    """Whether another step is asked for; no more input ends the peer."""
    return bool(sys.stdin.readline())


def say_ready(channel: TextIO) -> None:
    """That steps can be asked for, and how many threads they will have."""
    import torch

    answer(channel, {"threads": torch.get_num_threads()})


def serve(channel: TextIO, step: Callable[[], dict[str, Any]]) -> None:
    """Answer every request with one timed step."""
    say_ready(channel)
    while wait_for_request():
        started = time.perf_counter()
        result = step()
        answer(channel, {"seconds": time.perf_counter() - started, **result})
