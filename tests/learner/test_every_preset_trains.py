"""Every preset takes five real steps on the tiny captioner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.objectives import preset, presets
from rayrl.objectives.compile import CONFIGURED, PROVIDED
from rayrl.objectives.config import SourcesConfig
from rayrl.vlm import load_captioner
from tests.metric_names import not_listed
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]

# They name reward terms of their own, which this batch of one term does not have.
OTHER_TERMS = {"asr_word_accuracy", "reward_model", "clip_reward_scst"}
# Its bounds are so tight that random captions all fall outside: nothing is learned, by design.
NOTHING_PASSES = {"grpo_geometric_rejection"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_preset_can_be_fed():
    for name in presets():
        assert preset(name).needs <= PROVIDED | CONFIGURED.keys() | {"whole_minibatch"}, name


@pytest.fixture(scope="module")
def full_batch(tiny_folder, batch, prompts):
    """The batch with all that rewards and judges bring."""
    draw = np.random.default_rng(2)
    decode = load_captioner(tiny_folder).processor.tokenizer.decode
    texts = tuple(
        tuple(
            decode(ids[here].tolist(), skip_special_tokens=True).strip()
            for ids, here in zip(row, mask, strict=True)
        )
        for row, mask in zip(batch.token_ids, batch.mask, strict=True)
    )
    p, g, _ = batch.shape
    noise = draw.random((p, g, 3 * g))
    kernel = noise @ noise.transpose(0, 2, 1)
    scale = np.sqrt(np.diagonal(kernel, axis1=1, axis2=2))
    second = np.random.default_rng(1).random(batch.rewards.shape).astype(np.float32)
    return replace(
        batch,
        terms={"cider_d": batch.rewards - second, "length": second},
        texts=texts,
        references=tuple(prompt.references for prompt in prompts),
        wrong_spans=tuple(
            tuple(((0, 1),) if draw.random() > 0.5 else () for _ in t) for t in texts
        ),
        prefix_rewards=tuple(
            tuple(draw.random(len(text.split()) or 1).astype(np.float32) for text in row)
            for row in texts
        ),
        fields={
            "similarity": kernel / scale[:, :, None] / scale[:, None],
            "reference_rewards": draw.random((p, 3)),
            "judge_ok": batch.rewards > 0.4,
            "reward_versions": np.zeros((p, g), np.int64),
        },
    )


@pytest.mark.parametrize("name", sorted(set(presets()) - OTHER_TERMS - NOTHING_PASSES))
def test_five_steps_change_the_weights_and_report_finite_metrics(tiny_folder, full_batch, name):
    models = {"guide": str(tiny_folder), "auxiliaries": (str(tiny_folder),)}
    subject = learner(tiny_folder, objective=name, sources=SourcesConfig(**models), num_terms=2)
    before = parameters(subject)
    for _ in range(5):
        report = subject.update(full_batch)
    after = parameters(subject)
    assert max(float(np.abs(before[key] - after[key]).max()) for key in before) > 0
    bad = {key: value for key, value in report.metrics.items() if not np.isfinite(value)}
    assert not bad
    assert not_listed(report.metrics) == []
    assert np.isfinite(report.advantages).all()
