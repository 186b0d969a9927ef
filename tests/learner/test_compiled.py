"""Compiled layers take the same steps, and what cannot compile is refused before the first."""

from __future__ import annotations

import functools
import shutil
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from rayrl.config import TinyConfig
from rayrl.learner.last_layer import LastLayer
from rayrl.vlm import build_tiny_captioner
from tests.conftest import INSTRUCTION
from tests.unit.test_learner import batch, largest_difference, learner, make_batch, parameters

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
    *below, last = (layer.forward for layer in compiled.policy.model.model.text_model.layers)
    assert isinstance(last, LastLayer)
    assert all(hasattr(each, "_torchdynamo_orig_callable") for each in (*below, last.forward))
    for _ in range(2):
        one, other = plain.update(batch), compiled.update(batch)
        assert other.metrics["learner/grad_norm"] == pytest.approx(
            one.metrics["learner/grad_norm"], rel=1e-4
        )
        assert other.metrics["kl"] == pytest.approx(one.metrics["kl"], abs=1e-6)
    assert largest_difference(parameters(plain), parameters(compiled)) < 1e-5


def test_a_compiled_layer_serves_all_others(tmp_path, prompts):
    """With adapters in bfloat16 too, however many layers there are."""
    captions = [text for prompt in prompts for text in prompt.references] * 4
    sizes = TinyConfig(vision_width=32, vision_layers=1, text_width=64, text_layers=9)
    folder = build_tiny_captioner(sizes, captions, INSTRUCTION, tmp_path, seed=0)
    options = {"trainable": ("language",), "dtype": "bfloat16", "lora": {"rank": 2}, "lr": 1e-4}
    batch = make_batch(folder, prompts)
    torch.compiler.reset()
    counters.clear()
    plain = learner(folder, **options)
    # Without the slow last stage of the compiler.
    quick = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch.object(torch, "compile", quick):
        compiled = learner(folder, compile=True, **options)
    one, other = plain.update(batch), compiled.update(batch)
    assert other.metrics["learner/grad_norm"] == pytest.approx(
        one.metrics["learner/grad_norm"], rel=0.02
    )
    frames = counters["frames"]
    # Four pieces of a text layer and one of a vision layer, in each way they are called.
    assert frames["ok"] == frames["total"] < 32
    assert all("tree_attention" in reason for reason in counters["graph_break"])


def test_layers_that_compile_ever_anew_are_refused(tiny_folder, monkeypatch):
    monkeypatch.setattr("rayrl.learner.compiled._KINDS", 1)
    torch.compiler.reset()
    quick = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", quick)
    with pytest.raises(ValueError, match="its layers want more than 1 versions of the same code"):
        learner(tiny_folder, compile=True, trainable=("language",))


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
