"""Cross-entropy on reference captions (stage 1), with the prompt shared by an image's captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrl.checkpoint import Checkpoint
from rayrl.config import ModelConfig, XeConfig
from rayrl.learner.inputs import InputCache
from rayrl.learner.logprobs import prefix_shared_logprobs
from rayrl.learner.masters import Masters
from rayrl.learner.optimizer import optimizer_arrays, restore_optimizer
from rayrl.learner.state import model_files
from rayrl.vlm import caption_token_ids, choose_trainable, load_captioner
from rayrl.weights import ModelFiles, write_model_files

_WARMUP, _FLOOR = 0.1, 0.1


def xe_learning_rate(progress: float, peak: float) -> float:
    """The rate at ``progress`` in [0, 1]: linear warm-up over a tenth, cosine to a tenth."""
    if progress < _WARMUP:
        return peak * max(progress, 0.01) / _WARMUP
    done = (min(progress, 1.0) - _WARMUP) / (1.0 - _WARMUP)
    return peak * (_FLOOR + (1.0 - _FLOOR) * 0.5 * (1.0 + math.cos(math.pi * done)))


def choose_captions(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` of an image's references, each as often as the others, give or take one."""
    rounds = -(-count // len(captions))
    order = [int(i) for _ in range(rounds) for i in rng.permutation(len(captions))]
    return [captions[i] for i in order[:count]]


class XeTrainer:
    """Trains a captioner on its references; one instance a Ray Train worker.

    steps: how many are done
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: ModelConfig,
        config: XeConfig,
        instruction: str,
        max_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.captioner = load_captioner(
            folder,
            dtype=model.dtype,
            device=device,
            trust_remote_code=model.trust_remote_code,
        )
        self._config = config
        self._instruction = instruction
        self._max_tokens = max_tokens
        self._world_size = world_size
        self._seed, self._rank = seed, rank
        self.steps = 0
        self._cache = InputCache(self.captioner.processor, dtype=self.captioner.model.dtype)
        names = choose_trainable(self.captioner.model, model.trainable)
        parameters = dict(self.captioner.model.named_parameters())
        self._masters = Masters({name: parameters[name] for name in names})
        self._parameters = list(self._masters.named.values())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )

    def step(
        self,
        images: Sequence[bytes],
        references: Sequence[Sequence[str]],
        progress: float,
        prompt_ids: Sequence[str] = (),
    ) -> dict[str, float]:
        """One optimizer step on P images with ``captions_per_image`` of their references each;
        the loss is the mean over caption tokens, of all workers together.  ``prompt_ids`` are for
        messages."""
        for group in self._optimizer.param_groups:
            group["lr"] = xe_learning_rate(progress, self._config.lr)
        ids, mask = self._targets(references)
        inputs = self._cache.batch(images, self._instruction, prompt_ids).to(ids.device)
        logprobs = prefix_shared_logprobs(
            self.captioner.model, inputs, ids, mask, banned_ids=self.captioner.banned_ids
        )
        self._optimizer.zero_grad(set_to_none=True)
        tokens = self._sum_over_workers(mask.sum().float())
        loss = -logprobs.sum() / tokens
        loss.backward()
        self._masters.collect()
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._sum_over_workers(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, self._config.grad_clip, error_if_nonfinite=True
        )
        self._optimizer.step()
        self._masters.publish()
        self.steps += 1
        total = self._sum_over_workers(loss.detach().clone())
        return {"loss": float(total), "grad_norm": float(norm), "tokens": float(tokens)}

    def mean(self, value: float) -> float:
        """The mean of the workers' values, with which they decide alike."""
        device = self.captioner.model.device
        total = self._sum_over_workers(torch.tensor(value, dtype=torch.float64, device=device))
        return float(total) / self._world_size

    def save(self, folder: Path) -> None:
        """Write a model folder that ``from_pretrained`` loads."""
        write_model_files(self._files(), folder, with_weights=True)

    def checkpoint(self, meta: Mapping[str, Any]) -> Checkpoint:
        """The model after the steps so far, and what :meth:`restore` needs; ``meta`` is whatever
        else is to be known."""
        arrays = optimizer_arrays(self._optimizer, self._masters.named)
        return Checkpoint(
            step=self.steps,
            model_files=self._files(),
            arrays={**arrays, **self._masters.arrays()},
            meta=meta,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on as the one whose checkpoint it is would have; its model is the one that this was
        made with."""
        self._masters.restore(checkpoint.arrays)
        restore_optimizer(self._optimizer, self._masters.named, checkpoint.arrays)
        self.steps = checkpoint.step

    def _targets(self, references: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [P, G, T] of the chosen captions, the end token included.

        Captions longer than ``max_tokens`` lose their tail, end token and all: a truncated
        sentence must not teach the model to stop there."""
        count = self._config.captions_per_image
        first = self._rank * len(references)
        rows = [
            [
                caption_token_ids(self.captioner.processor, caption, self.captioner.eos_ids[0])
                for caption in choose_captions(captions, count, self._rng(slot))
            ]
            for slot, captions in enumerate(references, start=first)
        ]
        rows = [[ids[: self._max_tokens] for ids in row] for row in rows]
        length = max(len(ids) for row in rows for ids in row)
        ids = torch.zeros(len(rows), count, length, dtype=torch.long)
        mask = torch.zeros(len(rows), count, length, dtype=torch.bool)
        for p, row in enumerate(rows):
            for g, tokens in enumerate(row):
                ids[p, g, : len(tokens)] = torch.tensor(tokens)
                mask[p, g, : len(tokens)] = True
        device = self.captioner.model.device
        return ids.to(device), mask.to(device)

    def _files(self) -> ModelFiles:
        return model_files(self.captioner.model, self.captioner.processor)

    def _rng(self, slot: int) -> np.random.Generator:
        """That of an image of the step, from 0 over all workers: however many there are, and
        whoever goes on from here, they choose the same."""
        return np.random.default_rng((self._seed, 2, self.steps, slot))

    def _sum_over_workers(self, tensor: Any) -> Any:
        if self._world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor
