"""The model that trains, its frozen reference, and how their log-probs are computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from rayrl.adapters import AdapterWeights
from rayrl.buckets import Manifest, fill
from rayrl.checkpoint import Checkpoint
from rayrl.config import LearnerConfig, ModelConfig
from rayrl.learner.compiled import compile_layers, same_outputs
from rayrl.learner.families import bare_model
from rayrl.learner.flops import FlopCounter
from rayrl.learner.forward import Forward, feature_cache
from rayrl.learner.inputs import InputCache, StepInputs
from rayrl.learner.lora import Adapters
from rayrl.learner.masters import Masters
from rayrl.learner.parallel import Ranks, shard
from rayrl.learner.recompute import recompute_layers
from rayrl.learner.state import load_model_files, model_files
from rayrl.objectives.batch import GroupBatch
from rayrl.types import FloatArray, TrainBatch
from rayrl.vlm import choose_trainable, load_captioner
from rayrl.weights import ModelFiles, Weights, pack, pack_tensors


class Policy:
    """A captioner that trains.

    model: computes log-probs; reference: a copy of it as it was at the start, where one is asked
        for and needed (with ``adapters`` it is the model itself)
    trainable: names of the published parameters that change; named: what the optimizer steps, by
        name (the parameters that train, or their float32 ``masters``)
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
        instruction: str,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self._config = model
        self._ranks = ranks
        self._instruction = instruction
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        captioner = load_captioner(
            folder,
            dtype=model.dtype,
            device="cpu" if ranks.sharded else self.device,
            trust_remote_code=model.trust_remote_code,
        )
        self.model, self.processor = captioner.model, captioner.processor
        self.eos_id = captioner.eos_ids[0]
        self.adapters: Adapters | None = None
        self.reference: Any = None
        if config.lora.rank:
            self.adapters = Adapters(self.model, config.lora, model.trainable, seed)
            self.model = self.adapters.model
            self._fingerprint = self.adapters.fingerprint()
            self.trainable = self.adapters.changed
        else:
            if with_reference:
                self.reference = copy.deepcopy(self.model).requires_grad_(False)
            self.trainable = choose_trainable(self.model, model.trainable)
        self._publishes_adapters = config.lora.publish == "adapters"
        self.has_reference = with_reference
        self._inputs = InputCache(
            self.processor,
            max_bytes=config.input_cache_mb * 2**20,
            dtype=getattr(torch, model.dtype),
        )
        self.features = feature_cache(self.model, config)
        self.forward = Forward(
            config,
            FlopCounter(self.model),
            temperature=temperature,
            banned_ids=captioner.banned_ids,
            ranks=ranks,
            features=self.features,
        )
        if ranks.sharded:
            for each in (self.model, self.reference):
                if each is not None:
                    shard(bare_model(each), self.forward.compute, self.device)
        self._change_layers(config)
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masters = Masters(parameters)
        self.named = self.masters.named

    def _change_layers(self, config: LearnerConfig) -> None:
        """Compile the layers, and have them recompute, where that is configured."""
        model = bare_model(self.model)
        unchanged = same_outputs(model, self.processor, self.forward, self.eos_id)
        with unchanged if config.compile else nullcontext():
            if config.compile:
                compile_layers(model)
            if config.activation_checkpointing:
                recompute_layers(model)

    def inputs(self, batch: TrainBatch) -> StepInputs:
        """The processor's output for a batch's prompts, on demand."""
        return StepInputs(self._inputs, self.model, batch, self._instruction)

    def prepare(self, images: Sequence[bytes]) -> None:
        """Decode this rank's share of the next step's images, before their captions are there."""
        self._inputs.prepare(self._ranks.share(images), self._instruction)

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

    def ref_logprobs(self, groups: GroupBatch, inputs: StepInputs) -> torch.Tensor:
        """Log-probs [P, G, T] under the model as it was at the start: a frozen copy, or, with
        adapters, the same model with them off."""
        with self.as_reference() as model:
            return self.forward.frozen(model, groups, inputs)

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model as it was at the start, to compute without gradient."""
        with self.adapters.off() if self.adapters else nullcontext():
            yield self.model if self.adapters else self.reference

    @torch.no_grad()
    def score(self, image: bytes, token_ids: Sequence[int]) -> FloatArray:
        """Log-probs [T] of a caption, at temperature 1 with nothing banned; on every rank."""
        inputs = self._inputs.batch([image], self._instruction).to(self.model.device)
        ids = torch.tensor([[list(token_ids)]], device=self.model.device)
        logprobs = self.forward.plain(self.model, inputs, ids)
        return logprobs[0, 0].float().cpu().numpy()

    def weights(self, version: int, *, trained_only: bool) -> Weights | AdapterWeights | None:
        """All parameters, or those that change, as they compute; where adapters are published, the
        base and the adapters.  On rank 0; the others, on which it must be called too, return
        None."""
        names = self.trainable if trained_only else None
        gather = self._ranks.gathered
        if self.adapters is None:
            weights = pack(self.model, version, names, gather)
        elif self._publishes_adapters and trained_only:
            return self.adapters.weights(version, self._ranks)
        else:
            named = self.adapters.tensors(merged=not self._publishes_adapters)
            weights = pack_tensors(named, version, names, gather)
        return weights if self._ranks.rank == 0 else None

    def buckets(self, version: int, *, trained_only: bool) -> tuple[Manifest, list[torch.Tensor]]:
        """The same in buckets where the parameters are, or in host memory where they are sharded,
        adapters merged; on rank 0, and of no use on the others."""
        named = (
            self.model.named_parameters(remove_duplicate=False)
            if self.adapters is None
            else self.adapters.tensors(merged=True)
        )
        names = self.trainable if trained_only else None
        return fill(named, version, names, self._ranks.assembled)

    def files(self, *, whole: bool = False) -> ModelFiles:
        """What ``from_pretrained`` loads, on rank 0; called on every rank.  With adapters those
        alone, unless the ``whole`` model is asked for."""
        if self.adapters is not None and not whole:
            return self.adapters.files(self.processor, self._ranks)
        merged = None if self.adapters is None else self.adapters.tensors(merged=True)
        return model_files(bare_model(self.model), self.processor, self._ranks, merged)

    def meta(self) -> dict[str, str]:
        """What a checkpoint must say of the weights that are not in it."""
        return {"base_fingerprint": self._fingerprint} if self.adapters is not None else {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's weights.

        Raises ValueError naming the first parameter when it is one of another model."""
        if self.adapters is None:
            load_model_files(self.model, checkpoint.model_files, self._config)
        else:
            found = checkpoint.meta.get("base_fingerprint")
            if found != self._fingerprint:
                raise ValueError(
                    f"checkpoint of step {checkpoint.step}: its adapters are for a base of "
                    f"fingerprint {found}, this run's has {self._fingerprint}"
                )
            self.adapters.restore(checkpoint.model_files)
        self.masters.restore(checkpoint.arrays)
        if self.features is not None:
            self.features.clear()
