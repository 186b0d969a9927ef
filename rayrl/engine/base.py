"""What every rollout engine offers: tokens in, tokens and their log-probs out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from rayrl.config import EngineConfig, Part
from rayrl.types import Completion, FloatArray, Prompt, RolloutGroup

if TYPE_CHECKING:
    # It brings torch along, which a process that only samples elsewhere has no use for.
    from torch import Tensor

    from rayrl.weights import Loadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the captions of a group are drawn: ``group_size`` samples at ``temperature`` from the
    full vocabulary (no top-k or top-p, which the learner's softmax could not follow), up to
    ``max_tokens``; ``greedy_baseline`` adds the arg-max caption (SCST)."""

    group_size: int
    temperature: float
    max_tokens: int
    greedy_baseline: bool = False


class RolloutEngine(Protocol):
    """An engine holds one version of the weights and samples from it."""

    @property
    def weight_version(self) -> int:
        """Version of the loaded weights; -1 before the first load."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[RolloutGroup]:
        """One group a prompt.  Equal seeds and weights give equal groups, whatever else is in the
        batch.  ``forced`` are token ids for each prompt with which all its captions begin; at least
        one token of a caption is sampled, so they are cut to ``max_tokens`` - 1."""

    def greedy(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        """The arg-max caption of each prompt."""

    def score(self, prompt: Prompt, token_ids: Sequence[int]) -> FloatArray:
        """Log-probs [T] of a given caption, at temperature 1 with nothing banned."""

    def load_weights(self, weights: Loadable, *, changed: Sequence[Part]) -> None:
        """Apply a version and drop every cache that it made stale.  ``changed`` names the parts
        whose values may differ."""

    def held(self, weights: Loadable) -> Mapping[str, Tensor]:
        """The engine's own values of the tensors in ``weights``, by their names there; without
        those that it keeps in another layout."""

    def sleep(self, level: int) -> None:
        """Give the accelerator's memory back; the engine then holds no version.  Weights wait in
        host memory (level 1) or are dropped (level 2), so that the next version must be whole."""

    def wake_weights(self) -> None:
        """Take back the memory for weights, before the next version is loaded."""

    def wake_cache(self) -> None:
        """Take back the rest, after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """All an engine needs to start: a folder with configuration and tokenizer (weights are pulled
    later), its settings, whether the folder's own code may run, and whether it must be able to
    sleep, on a GPU that is not its own."""

    folder: Path
    config: EngineConfig
    group_size: int
    trust_remote_code: bool = False
    shares_gpu: bool = False


def forced_tokens(
    forced: Sequence[Sequence[int]] | None, prompts: Sequence[Prompt], sampling: Sampling
) -> list[list[int]]:
    """For each prompt the tokens that its captions begin with, cut so that one can follow."""
    given = [[] for _ in prompts] if forced is None else forced
    return [list(ids[: sampling.max_tokens - 1]) for _, ids in zip(prompts, given, strict=True)]


def request_seed(run_seed: int, step: int, prompt_id: str, round: int = 0) -> int:
    """The seed of one group, so that a group sampled again is the same group; the rounds of a step
    (:mod:`rayrl.rounds`) draw others.

    A multiple of 1024, because sample i of a group uses seed + i and groups must not overlap.
    """
    key = f"{run_seed}|{step}|{prompt_id}" + (f"|{round}" if round else "")
    digest = hashlib.blake2b(key.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") % 2**42 * 1024


def make_engine(setup: EngineSetup) -> RolloutEngine:
    """The engine that the configuration asks for, in the process that will sample with it; raises
    as :func:`chosen_backend`."""
    import torch

    gpu = torch.cuda.is_available()
    if chosen_backend(setup.config.backend, setup.folder, gpu=gpu) == "vllm":
        from rayrl.engine.vllm import VllmEngine

        return VllmEngine(setup)
    from rayrl.engine.hf import HfEngine

    return HfEngine(setup)


def chosen_backend(
    asked: Literal["auto", "vllm", "hf"], folder: Path, *, gpu: bool
) -> Literal["vllm", "hf"]:
    """Which engine that is for a model folder, on a worker with a GPU or without.  ValueError where
    vLLM is asked for, and computes another model than the learner, or is built for GPUs and has
    none."""
    if asked == "hf":
        return asked
    why_not = _no_vllm(folder, gpu)
    if asked == "auto":
        return "vllm" if vllm_importable() and not why_not else "hf"
    if why_not:
        raise ValueError(f"engine.backend vllm: {why_not}")
    return asked


def _no_vllm(folder: Path, gpu: bool) -> str:
    """Why captions of a model folder cannot be sampled with vLLM; empty where they can."""
    import torch

    if torch.version.cuda and not gpu:
        return "its build is for GPUs and this worker has none; want rollout.gpus, or backend hf"
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "paligemma":
        return (
            "PaliGemma attends to its whole prompt in both directions, and vLLM 0.32 to the image "
            "alone; want engine.backend hf"
        )
    return ""


def vllm_importable() -> bool:
    """Whether a vLLM is installed (it is not imported, which would take seconds)."""
    import importlib.util

    return importlib.util.find_spec("vllm") is not None
