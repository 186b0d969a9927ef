"""The learner on a GPU.  Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from tests.unit.test_learner import P, batch, learner, parameters
from tests.unit.tiny_families import CASES, build, make_batch

__all__ = ["batch"]

DEVICE = "cuda"
NEAR = {"float32": 1e-3, "bfloat16": 0.1}
"""How far gradients may be from each other, relative to their length."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_learner_continues(tiny_folder, batch, dtype, tmp_path):
    straight, resumed = (learner(tiny_folder, dtype=dtype) for _ in range(2))
    straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    one, other = straight.update(batch), resumed.update(batch)
    assert one.metrics["learner/grad_norm"] == pytest.approx(
        other.metrics["learner/grad_norm"], rel=1e-2 if dtype == "bfloat16" else 1e-4
    )
    want, got = parameters(straight), parameters(resumed)
    if dtype == "float32":
        # Sums on a GPU have no fixed order, and AdamW divides each gradient by its own size.
        assert all(np.allclose(want[name], got[name], atol=3e-3) for name in want)


def values_and_gradient(compute, model, prompts, ids, mask):
    model.zero_grad()
    out = compute(model, prompts, ids, mask, with_entropy=True)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ((out.logprobs * weights).sum() + out.entropy.sum()).backward()
    moved = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return out.logprobs.detach().float(), torch.cat(moved)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("case", ["smolvlm", "qwen2.5-vl"])
def test_sharing_the_prefix_is_the_naive_computation(case, dtype, side):
    model = build(CASES[case][0]()).to(DEVICE, getattr(torch, dtype))
    prompts, ids, mask = make_batch(case, side=side)
    prompts = {name: value.to(DEVICE) for name, value in prompts.items()}
    prompts["pixel_values"] = prompts["pixel_values"].to(model.dtype)
    given = (model, prompts, ids.to(DEVICE), mask.to(DEVICE))
    want, want_gradient = values_and_gradient(naive_outputs, *given)
    got, gradient = values_and_gradient(prefix_shared_outputs, *given)
    assert float((got - want).abs().max()) < NEAR[dtype]
    assert float((gradient - want_gradient).norm()) < NEAR[dtype] * float(want_gradient.norm())


LANGUAGE = {"trainable": ("language",)}
ADAPTERS = {**LANGUAGE, "lora": {"rank": 4}}
SAME = {
    "shared": ({}, {"prefix_shared": False}),
    "recomputed": ({"activation_checkpointing": True}, {}),
    "features cached": (LANGUAGE, {**LANGUAGE, "feature_cache_mb": 0}),
    "adapters": (ADAPTERS, {**ADAPTERS, "prefix_shared": False}),
    "adapters recomputed": ({**ADAPTERS, "activation_checkpointing": True}, ADAPTERS),
}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("case", SAME)
def test_what_saves_work_or_memory_leaves_the_step(tiny_folder, batch, case, dtype):
    pytest.importorskip("peft")
    one, other = (learner(tiny_folder, dtype=dtype, lr=1e-5, **each) for each in SAME[case])
    # The first step makes the features, the second has them.
    for _ in range(2):
        norms = [each.update(batch).metrics["learner/grad_norm"] for each in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=NEAR[dtype]) and norms[0] > 0
    assert one.policy.model.device.type == DEVICE
    if case == "features cached":
        assert one.policy.features.misses == P and one.policy.features.hits >= P


@pytest.mark.parametrize("dtype", NEAR)
def test_a_gradient_that_is_not_finite_costs_a_step(tiny_folder, batch, dtype):
    subject = learner(tiny_folder, dtype=dtype)
    subject.update(batch)
    before = parameters(subject)
    model = subject.policy.model
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
    report = subject.update(batch)
    assert name in report.problem and report.metrics["learner/skipped"] == 1.0
    after = parameters(subject)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "model.safetensors" in subject.replay().model_files
    hook.remove()
    assert not subject.update(batch).problem
    assert any(not np.array_equal(before[n], value) for n, value in parameters(subject).items())
