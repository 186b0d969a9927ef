"""The model that trains, its frozen reference, and how their log-probs are computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rayrl.checkpoint import Checkpoint
from rayrl.config import LearnerConfig, ModelConfig
from rayrl.learner.flops import FlopCounter
from rayrl.learner.forward import Forward, feature_cache
from rayrl.learner.inputs import InputCache, StepInputs
from rayrl.learner.masters import Masters
from rayrl.learner.parallel import Ranks, shard
from rayrl.learner.recompute import recompute_layers
from rayrl.learner.state import load_model_files, model_files
from rayrl.types import TrainBatch
from rayrl.vlm import choose_trainable, load_captioner
from rayrl.weights import ModelFiles, Weights, pack


class Policy:
    """A captioner that trains.

    model: computes log-probs; reference: the same model as it was at the start, or None
    trainable: names of the parameters that train; named: by name, what the optimizer steps (the
        parameters themselves, or their float32 ``masters``)
    forward: log-probs of the model or the reference
    processor, eos_id: how captions are written as tokens
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: ModelConfig,
        config: LearnerConfig,
        with_reference: bool,
        temperature: float,
        ranks: Ranks,
    ) -> None:
        self._config = model
        self._ranks = ranks
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        captioner = load_captioner(
            folder,
            dtype=model.dtype,
            device="cpu" if ranks.sharded else self.device,
            trust_remote_code=model.trust_remote_code,
        )
        self.model, self.processor = captioner.model, captioner.processor
        self.eos_id = captioner.eos_ids[0]
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if with_reference else None
        self.trainable = choose_trainable(self.model, model.trainable)
        self._inputs = InputCache(self.processor)
        self.features = feature_cache(self.model, config)
        self.forward = Forward(
            config,
            FlopCounter(self.model),
            temperature=temperature,
            banned_ids=captioner.banned_ids,
            ranks=ranks,
            features=self.features,
        )
        if config.activation_checkpointing:
            recompute_layers(self.model)
        if ranks.sharded:
            for each in (self.model, self.reference):
                if each is not None:
                    shard(each, self.forward.compute, self.device)
        parameters = dict(self.model.named_parameters())
        self.masters = Masters({name: parameters[name] for name in self.trainable})
        self.named = self.masters.named

    def inputs(self, batch: TrainBatch, instruction: str) -> StepInputs:
        """The processor's output for a batch's prompts, on demand."""
        return StepInputs(self._inputs, self.model, batch, instruction)

    def others(self, folders: Sequence[str]) -> list[Any]:
        """Models of these folders that do not train.  ValueError where one is missing or writes
        captions in other tokens than this one."""
        return [self._other(folder) for folder in folders]

    def _other(self, folder: str) -> Any:
        if not Path(folder).is_dir():
            raise ValueError(f"no model folder {folder!r}, which the objective's sources name")
        other = load_captioner(
            folder,
            dtype=self._config.dtype,
            device=self.device,
            trust_remote_code=self._config.trust_remote_code,
        )
        if other.processor.tokenizer.get_vocab() != self.processor.tokenizer.get_vocab():
            raise ValueError(f"{folder}: its tokens are not those of the model that trains")
        return other.model.requires_grad_(False)

    def weights(self, version: int, *, trained_only: bool) -> Weights | None:
        """All parameters, or those that train, as they compute.  On rank 0; the others, on which
        it must be called too, return None."""
        names = self.trainable if trained_only else None
        weights = pack(self.model, version, names, gather=self._ranks.gathered)
        return weights if self._ranks.rank == 0 else None

    def files(self) -> ModelFiles:
        """What ``from_pretrained`` loads, on rank 0; called on every rank."""
        return model_files(self.model, self.processor, self._ranks)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's weights.

        Raises ValueError naming the first parameter when it is one of another model."""
        load_model_files(self.model, checkpoint.model_files, self._config)
        self.masters.restore(checkpoint.arrays)
        if self.features is not None:
            self.features.clear()
