"""Looking at a step that was skipped: which tensor, prompt and loss term is not finite first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrl.checkpoint import Checkpoint, load_checkpoint
from rayrl.config import Config
from rayrl.learner.batches import to_device
from rayrl.learner.finite import bad_terms, count
from rayrl.learner.learner import Learner
from rayrl.learner.replay import read_replay
from rayrl.objectives import build
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.prepare import NotFiniteError


def examine_folder(folder: Path, config: Config) -> Iterator[str]:
    """Load a replay's policy as the learner of ``config`` does, and :func:`examine` it.

    Nothing is compiled: compiled layers must first compute what others do, and a policy that is
    broken computes nothing that can be compared."""
    learner = Learner(
        folder,
        model=config.model,
        config=config.learner.model_copy(update={"compile": False}),
        objective=build(config.objective, max_tokens=config.sampling.max_tokens),
        temperature=config.sampling.temperature,
        instruction=config.data.instruction,
        total_steps=config.train.steps,
        seed=config.seed,
        sources=config.objective.sources,
        reward_weights=config.reward.weights,
    )
    yield from examine(learner, load_checkpoint(folder))


def examine(learner: Learner, replay: Checkpoint) -> Iterator[str]:
    """Run a replay's prompts one at a time through a learner that holds its policy, and say, a
    line each, what is not finite and where it was so first.  The learner's heads become those of
    the replay.

    Raises ValueError where these are not what the learner's objective has."""
    batch, groups, state = read_replay(replay)
    learner.providers.restore(replay.arrays)
    p, g, t = groups.mask.shape
    yield f"step {replay.step + 1}: {p} prompts x {g} captions of up to {t} tokens"
    yield f"in the run: {replay.meta['problem']}"
    found = list(_bad_parameters(learner.policy.model)) + list(_bad_fields(groups))
    groups = to_device(groups, learner.policy.device)
    try:
        _, prepared = learner.objective.prepare(state, _mended(groups))
    except NotFiniteError as error:
        yield from found
        yield str(error)
        return
    prepared = dataclasses.replace(prepared, batch=groups)
    fields = {name: value.float() for name, value in prepared.fields.items()}
    found += [f"{name}: {count(value)}" for name, value in fields.items() if not _finite(value)]
    yield from found
    images = list(replay.meta["images"])
    normalizer = prepared.select(images).normalizer()
    whole = "whole_minibatch" in learner.objective.needs
    bad = 0
    inputs = learner.policy.inputs(batch)
    for part in [images] if whole else [[i] for i in images]:
        learner.policy.model.zero_grad(set_to_none=True)
        with _FirstBad(learner.policy.model) as first:
            loss = learner.losses(learner.objective, prepared, part, inputs, normalizer)
            loss.loss.backward()
        if line := _verdict(loss, first):
            bad += 1
            yield f"prompt {', '.join(groups.image_ids[i] for i in part)}: {line}"
    if not bad and not found:
        yield "everything is finite here: the loss, every gradient, every module's output"


def _verdict(loss: Any, first: _FirstBad) -> str:
    """What was not finite for one prompt, or nothing."""
    parts = []
    if not _finite(loss.loss.detach()):
        parts.append(bad_terms(loss))
    if first.output:
        parts.append(f"first in the output of {first.output}")
    if first.gradient:
        parts.append(f"first gradient that is not finite: {first.gradient}")
    return "; ".join(parts)


class _FirstBad:
    """While entered, remembers the first module output and the first parameter gradient that are
    not finite, in the order of computation."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self.output = ""
        self.gradient = ""

    def __enter__(self) -> _FirstBad:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_hook(self._on_output(name)))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                hook = self._on_gradient(name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_output(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not self.output and isinstance(tensor, Tensor) and not _finite(tensor):
                self.output = f"{name} ({type(module).__name__}, {count(tensor)})"

        return hook

    def _on_gradient(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            if not self.gradient and parameter.grad is not None and not _finite(parameter.grad):
                self.gradient = f"{name} ({count(parameter.grad)})"

        return hook


def _bad_parameters(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if not _finite(parameter.detach()):
            yield f"parameter {name}: {count(parameter.detach())}"


def _bad_fields(groups: GroupBatch) -> Iterator[str]:
    """Fields of the batch that are not finite, with the first prompt that they are so for."""
    for name, value in {**_numbers(groups), **groups.terms}.items():
        if not _finite(value):
            row = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
            yield f"{name}: {count(value)}, first for prompt {groups.image_ids[row]}"


def _mended(groups: GroupBatch) -> GroupBatch:
    """The groups with 0 for what is not finite.  An objective that reads it for its advantages then
    has some, with which each prompt can be looked at."""
    mended = {
        name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
        for name, value in _numbers(groups).items()
    }
    return dataclasses.replace(groups, **mended)  # type: ignore[arg-type]


def _numbers(groups: GroupBatch) -> dict[str, Tensor]:
    """Fields whose values should be finite."""
    named = {spec.name: getattr(groups, spec.name) for spec in dataclasses.fields(groups)}
    # NaN there stands for references that an image does not have.
    named.pop("reference_rewards")
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
