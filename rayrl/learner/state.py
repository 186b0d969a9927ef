"""The model of a checkpoint: its files, and loading them into a model that trains."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from rayrl.config import ModelConfig
from rayrl.vlm import load_captioner
from rayrl.weights import ModelFiles, read_model_files, write_model_files


def model_files(model: Any, processor: Any) -> ModelFiles:
    """What ``from_pretrained`` needs of model and processor, as files in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return read_model_files(folder)


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
    model.load_state_dict(source.state_dict())


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
