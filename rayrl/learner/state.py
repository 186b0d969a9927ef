"""The model of a checkpoint: its files, and loading them into a model that trains."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from rayrl.config import ModelConfig
from rayrl.learner.parallel import SOLO, Ranks, like
from rayrl.vlm import load_captioner
from rayrl.weights import ModelFiles, read_model_files, write_model_files

FILE_SIZE = "1GB"
"""About how large a file of weights becomes, as transformers counts."""


def model_files(
    model: Any,
    processor: Any,
    ranks: Ranks = SOLO,
    named: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> ModelFiles:
    """What ``from_pretrained`` needs of model and processor, as files in memory; on rank 0.
    ``named`` tensors take the place of the model's own."""
    state = _whole_state(model, ranks) if named is None else _gathered(named, ranks)
    if ranks.rank > 0:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        # Files that pass one by one through machines with less memory than the model has bytes.
        model.save_pretrained(folder, state_dict=state, max_shard_size=FILE_SIZE)
        processor.save_pretrained(folder)
        return dict(read_model_files(folder))


def load_model_files(model: torch.nn.Module, files: ModelFiles, config: ModelConfig) -> None:
    """Inverse of :func:`model_files`, into a model of the same shapes.

    Raises ValueError naming the first parameter when it is one of another model."""
    with tempfile.TemporaryDirectory() as folder:
        write_model_files(files, Path(folder), with_weights=True)
        source = load_captioner(
            folder, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        ).model
    have, want = _shapes(source), _shapes(model)
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"checkpoint of another model: {name} is {have.get(name, 'absent')} in the "
                f"checkpoint and {want.get(name, 'absent')} in this run's model"
            )
    target = model.state_dict()
    with torch.no_grad():
        for name, value in source.state_dict().items():
            target[name].copy_(like(value, target[name]))


def _whole_state(model: torch.nn.Module, ranks: Ranks) -> dict[str, torch.Tensor] | None:
    """The state of a sharded model, gathered tensor by tensor, with tied ones still tied; None
    where the model's own will do."""
    if not ranks.sharded:
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return _gathered(
        ((name, parameters.get(name, value)) for name, value in model.state_dict().items()), ranks
    )


def _gathered(named: Iterable[tuple[str, torch.Tensor]], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Whole tensors in host memory, one after the other; a parameter with two names once."""
    parameters: dict[int, torch.Tensor] = {}
    state = {}
    for name, value in named:
        if not isinstance(value, torch.nn.Parameter):
            state[name] = ranks.gathered(value)
            continue
        if id(value) not in parameters:
            parameters[id(value)] = ranks.gathered(value)
        state[name] = parameters[id(value)]
    return state


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
