"""Compiled layers take the same steps, and what cannot compile is refused before the first."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.unit.test_learner import batch, largest_difference, learner, parameters

__all__ = ["batch"]


@pytest.fixture(autouse=True)
def compiler_on(monkeypatch):
    # Tests of vLLM, which turns the compiler off on a CPU, may have run in this process before.
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_layers_take_the_same_steps(tiny_folder, batch):
    # Two batches of different lengths; a frozen tower, so that there is less to compile.
    options = {"trainable": ("language",), "lr": 1e-4}
    plain, compiled = learner(tiny_folder, **options), learner(tiny_folder, compile=True, **options)
    layers = compiled.policy.model.model.text_model.layers
    assert all(hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in layers)
    for _ in range(2):
        one, other = plain.update(batch), compiled.update(batch)
        assert other.metrics["learner/grad_norm"] == pytest.approx(
            one.metrics["learner/grad_norm"], rel=1e-4
        )
        assert other.metrics["kl"] == pytest.approx(one.metrics["kl"], abs=1e-6)
    assert largest_difference(parameters(plain), parameters(compiled)) < 1e-5


def test_a_compiler_that_is_turned_off_is_an_error_and_not_ignored(tiny_folder, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ValueError, match="does not compile: TORCHDYNAMO_DISABLE=1 turns the comp"):
        learner(tiny_folder, compile=True)


def replacing(make):
    """A stand-in for ``torch.compile`` that gives the function that ``make`` makes of a layer's."""
    return lambda function, **options: make(function)


def test_what_does_not_compile_is_refused_at_the_start_with_the_reason(tiny_folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", replacing(lambda function: broken))
    message = "Idefics3ForConditionalGeneration does not compile: RuntimeError: no working C"
    with pytest.raises(ValueError, match=message):
        learner(tiny_folder, compile=True)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"lora": {"rank": 2}}])
def test_a_layer_that_computes_something_else_is_refused(tiny_folder, monkeypatch, options):
    monkeypatch.setattr(
        torch, "compile", replacing(lambda function: lambda hidden, *_, **__: hidden * 1.5)
    )
    with pytest.raises(ValueError, match=r"Idefics3.*compiled log-probs differ by"):
        learner(tiny_folder, compile=True, **options)
