"""Compiled layers take the same steps, and what cannot compile is refused before the first."""

from __future__ import annotations

import shutil

import pytest
import torch

from rayrl.config import LearnerConfig
from tests.unit.test_learner import batch, largest_difference, learner, parameters

__all__ = ["batch"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_layers_take_the_same_steps(tiny_folder, batch):
    # Two batches of different lengths; a frozen tower, so that there is less to compile.
    options = {"trainable": ("language",), "lr": 1e-4}
    plain, compiled = learner(tiny_folder, **options), learner(tiny_folder, compile=True, **options)
    layer = compiled.policy.model.model.text_model.layers[0]
    assert layer._compiled_call_impl is not None
    for _ in range(2):
        one, other = plain.update(batch), compiled.update(batch)
        assert other.metrics["learner/grad_norm"] == pytest.approx(
            one.metrics["learner/grad_norm"], rel=1e-4
        )
        assert other.metrics["kl"] == pytest.approx(one.metrics["kl"], abs=1e-6)
    assert largest_difference(parameters(plain), parameters(compiled)) < 1e-5


def test_what_does_not_compile_is_refused_at_the_start_with_the_reason(tiny_folder, monkeypatch):
    def backend(module, **options):
        def call(*args, **kwargs):
            raise RuntimeError("no working C++ compiler")

        module._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", backend)
    message = "Idefics3ForConditionalGeneration does not compile: RuntimeError: no working C"
    with pytest.raises(ValueError, match=message):
        learner(tiny_folder, compile=True)


def test_a_layer_that_computes_something_else_is_refused(tiny_folder, monkeypatch):
    def backend(module, **options):
        module._compiled_call_impl = lambda hidden, *args, **kwargs: hidden * 1.5

    monkeypatch.setattr(torch.nn.Module, "compile", backend)
    with pytest.raises(ValueError, match="compiled log-probs differ by"):
        learner(tiny_folder, compile=True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"lora": {"rank": 4}}, "lora.rank"),
        ({"num_workers": 2, "parallel": "fsdp"}, "parallel fsdp"),
    ],
)
def test_what_compiled_layers_do_not_go_with_is_refused(config, reason):
    with pytest.raises(ValueError, match=f"compile does not go with {reason}"):
        LearnerConfig(compile=True, **config)
