"""The rollout actor: an engine behind Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray

from rayrl.config import EngineConfig, Part
from rayrl.engine.base import EngineSetup, Sampling, make_engine
from rayrl.types import Completion, Prompt, RolloutGroup
from rayrl.weights import ModelFiles, Weights, write_model_files


@ray.remote
class RolloutActor:
    """Samples groups with the weights that it pulled last; a fresh one holds none (version -1)."""

    def __init__(
        self, files: ModelFiles, config: EngineConfig, group_size: int, trust_remote_code: bool
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rayrl-engine-")
        folder = write_model_files(files, Path(self._folder.name), with_weights=False)
        self._engine = make_engine(
            EngineSetup(
                folder=folder,
                config=config,
                group_size=group_size,
                trust_remote_code=trust_remote_code,
            )
        )

    def load(self, changed: Sequence[Part], *versions: Weights) -> int:
        """Apply weights in turn (all parameters first, then those that trained); returns the
        version that the engine then holds."""
        for weights in versions:
            self._engine.load_weights(weights, changed=changed)
        return self._engine.weight_version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], version: int
    ) -> list[RolloutGroup]:
        """One group a prompt, refused unless the engine holds exactly ``version``."""
        self._check(version)
        return self._engine.generate(prompts, sampling, seeds)

    def greedy(self, prompts: Sequence[Prompt], max_tokens: int, version: int) -> list[Completion]:
        """The arg-max caption of each prompt, under the same condition."""
        self._check(version)
        return self._engine.greedy(prompts, max_tokens)

    def _check(self, version: int) -> None:
        held = self._engine.weight_version
        if held != version:
            raise ValueError(f"asked for captions of weight version {version}, holding {held}")
