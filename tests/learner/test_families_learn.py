"""Captioners of other families, with their own processors, through what a run does with them."""

from __future__ import annotations

import numpy as np
import pytest

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.config import ModelConfig, XeConfig
from rayrl.learner.xe import XeTrainer
from tests.captioners import FAMILIES, qwen_without_video, write_captioner
from tests.conftest import INSTRUCTION
from tests.unit.test_learner import learner, make_batch, parameters, same_numbers


@pytest.fixture(autouse=True, scope="module")
def without_video():
    with qwen_without_video():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, prompts, tmp_path_factory):
    captions = [text for prompt in prompts for text in prompt.references] * 4
    return write_captioner(request.param, captions, tmp_path_factory.mktemp(request.param))


def test_stage_1_teaches_the_references(folder, prompts):
    trainer = XeTrainer(
        folder,
        model=ModelConfig(),
        config=XeConfig(lr=3e-3, captions_per_image=2),
        instruction=INSTRUCTION,
        max_tokens=12,
        seed=0,
    )
    images, references = [p.image for p in prompts], [p.references for p in prompts]
    losses = [trainer.step(images, references, 0.5)["loss"] for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stage_1_goes_on_from_a_checkpoint_bit_for_bit(folder, prompts, dtype, tmp_path):
    def begun(place):
        return XeTrainer(
            place,
            model=ModelConfig(dtype=dtype),
            config=XeConfig(captions_per_image=1),
            instruction=INSTRUCTION,
            max_tokens=12,
            seed=0,
        )

    def step(trainer):
        # One of several references is chosen anew in every step.
        images, references = [p.image for p in prompts], [p.references for p in prompts]
        return trainer.step(images, references, trainer.steps / 4)

    straight = begun(folder)
    losses = [step(straight) for _ in range(2)]
    save_checkpoint(tmp_path, straight.checkpoint({}), keep=1)
    place = (tmp_path / "latest").resolve()
    again = begun(place)
    again.restore(load_checkpoint(place))
    assert again.steps == 2
    for _ in range(2):
        losses.append(step(straight))
        assert step(again) == losses[-1]
    assert len({loss["loss"] for loss in losses}) == 4
    want, got = (dict(t.captioner.model.named_parameters()) for t in (straight, again))
    assert all(bool((want[name] == got[name]).all()) for name in want)


@pytest.mark.parametrize("trainable", [("vision", "connector", "language"), ("language",)])
def test_a_resumed_learner_continues_bit_for_bit(folder, prompts, trainable, tmp_path):
    batch = make_batch(folder, prompts)
    straight, resumed = (learner(folder, trainable=trainable) for _ in range(2))
    first = straight.update(batch)
    assert first.metrics["learner/grad_norm"] > 1e-4
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    assert same_numbers(straight.update(batch), resumed.update(batch))
    want, got = parameters(straight), parameters(resumed)
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_the_shared_prefix_takes_the_step_of_the_naive_computation(folder, prompts):
    batch = make_batch(folder, prompts)
    norms = []
    for shared in (True, False):
        subject = learner(folder, grad_clip=1e9, prefix_shared=shared)
        norms.append(subject.update(batch).metrics["learner/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
