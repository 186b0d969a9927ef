"""The update: what changes memory leaves results alone, what repeats continues bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.config import LearnerConfig, ModelConfig, TinyConfig
from rayrl.learner.batches import group_batch, minibatches
from rayrl.learner.learner import Learner
from rayrl.learner.measure import MEASURED
from rayrl.learner.parallel import SOLO
from rayrl.objectives import preset
from rayrl.objectives.config import NO_SOURCES
from rayrl.types import TrainBatch
from rayrl.vlm import build_tiny_captioner, load_captioner, prompt_inputs
from tests.conftest import INSTRUCTION

P, G, T = 6, 4, 5


def learner(
    folder,
    *,
    objective="grpo",
    trainable=("vision", "connector", "language"),
    ranks=SOLO,
    sources=NO_SOURCES,
    num_terms=1,
    reward_weights=None,
    dtype="float32",
    **config,
):
    return Learner(
        folder,
        model=ModelConfig(trainable=trainable, dtype=dtype),
        config=LearnerConfig(**{"lr": 1e-3, **config}),
        objective=preset(objective),
        temperature=0.8,
        instruction=INSTRUCTION,
        total_steps=10,
        seed=0,
        ranks=ranks,
        sources=sources,
        reward_weights={f"term {k}": 1.0 for k in range(num_terms)}
        if reward_weights is None
        else reward_weights,
    )


@pytest.fixture(scope="module")
def batch(tiny_folder, prompts):
    return make_batch(tiny_folder, prompts)


def make_batch(folder, prompts):
    """Random captions of the six prompts for the captioner of a folder."""
    captioner = load_captioner(folder)
    rng = np.random.default_rng(0)
    vocabulary = len(captioner.processor.tokenizer)
    allowed = [i for i in range(vocabulary) if i not in captioner.banned_ids]
    lengths = rng.integers(1, T + 1, (P, G))
    mask = np.arange(T) < lengths[..., None]
    inputs = prompt_inputs(captioner.processor, [p.image for p in prompts], [INSTRUCTION] * P)
    return TrainBatch(
        prompt_ids=tuple(p.prompt_id for p in prompts),
        images=tuple(p.image for p in prompts),
        prompt_token_ids=tuple(row.numpy().astype(np.int32) for row in inputs["input_ids"]),
        token_ids=np.where(mask, rng.choice(allowed, (P, G, T)), 0).astype(np.int32),
        mask=mask,
        rollout_logprobs=np.where(mask, -6.0, 0.0).astype(np.float32),
        rewards=rng.random((P, G)).astype(np.float32),
        weight_versions=np.zeros((P, G), np.int32),
        truncated=np.zeros((P, G), bool),
        terms={},
        greedy_rewards=np.full(P, 0.5, np.float32),
    )


def parameters(subject):
    weights = subject.weights(trained_only=False)
    return {name: np.array(value) for name, value in weights.arrays.items()}


def same_numbers(one, other):
    """Whether two reports agree in everything that the seed decides."""
    first, second = (
        {name: value for name, value in report.metrics.items() if name not in MEASURED}
        for report in (one, other)
    )
    return first == second


def largest_difference(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_micro_batches_change_memory_and_not_the_step(tiny_folder, batch):
    whole, parts = learner(tiny_folder), learner(tiny_folder, micro_batch_images=2)
    one, other = whole.update(batch), parts.update(batch)
    # AdamW's first step divides each gradient by its own size, so that rounding in one that is
    # all but zero shows; a hundredth of the step is far below any real difference.
    assert largest_difference(parameters(whole), parameters(parts)) < 1e-5
    assert one.metrics["learner/grad_norm"] == pytest.approx(
        other.metrics["learner/grad_norm"], rel=1e-5
    )
    assert one.metrics["learner/loss"] == pytest.approx(other.metrics["learner/loss"], abs=1e-6)


def test_the_shared_prefix_takes_the_step_of_the_naive_computation(tiny_folder, batch):
    shared = learner(tiny_folder, grad_clip=1e9)
    naive = learner(tiny_folder, grad_clip=1e9, prefix_shared=False)
    one, other = shared.update(batch), naive.update(batch)
    assert one.metrics["learner/grad_norm"] == pytest.approx(
        other.metrics["learner/grad_norm"], rel=1e-5
    )


def test_each_step_is_a_version_and_advantages_are_centred(tiny_folder, batch):
    subject = learner(tiny_folder)
    for step in (1, 2):
        report = subject.update(batch)
        assert (report.step, report.weight_version) == (step, step)
    assert report.advantages.shape == (P, G)
    assert np.abs(report.advantages.mean(axis=1)).max() < 1e-5
    assert report.advantages.std(axis=1) == pytest.approx(np.ones(P), abs=1e-3)


def test_the_step_raises_the_probability_of_what_was_rewarded(tiny_folder, batch):
    subject = learner(tiny_folder, objective="nsc", lr=3e-4)

    def mean_logprob(good):
        inputs = subject.policy.inputs(batch)
        out = subject.policy.forward.frozen(
            subject.policy.model, group_batch(batch, "cpu"), inputs
        ).numpy()
        per_caption = out.sum(-1) / batch.mask.sum(-1)
        better = batch.rewards > batch.rewards.mean(axis=1, keepdims=True)
        return float(per_caption[better == good].mean())

    before = mean_logprob(True) - mean_logprob(False)
    for _ in range(3):
        subject.update(batch)
    assert mean_logprob(True) - mean_logprob(False) > before + 0.01


def test_controllers_see_each_update_and_the_report_their_mean(tiny_folder, batch, monkeypatch):
    subject = learner(tiny_folder, objective="grpo", inner_epochs=3, lr=1e-2)
    seen, control = [], subject.objective.control

    def watched(state, metrics):
        seen.append(metrics["objective/ratio_deviation"])
        return control(state, metrics)

    monkeypatch.setattr(subject.objective, "control", watched)
    report = subject.update(batch)
    assert seen[0] == pytest.approx(0.0, abs=1e-5)
    assert sum(seen) / 3 == pytest.approx(report.metrics["objective/ratio_deviation"])


def test_a_step_of_which_nothing_is_selected_moves_nothing(tiny_folder, batch):
    """DAPO leaves out groups whose captions are all alike; what an optimizer remembers of the steps
    before would go on moving the weights."""
    subject = learner(tiny_folder, objective="dapo", weight_decay=0.1)
    subject.update(batch)
    before = parameters(subject)
    flat = replace(batch, rewards=np.ones_like(batch.rewards))
    report = subject.update(flat)
    assert report.metrics["objective/kept"] == report.metrics["learner/grad_norm"] == 0.0
    assert report.metrics["learner/update_ratio"] == report.metrics["learner/skipped"] == 0.0
    assert all(np.array_equal(before[name], value) for name, value in parameters(subject).items())
    assert subject.update(batch).metrics["learner/update_ratio"] > 0.0


def test_frozen_parts_stay_and_are_not_published_again(tiny_folder, batch):
    subject = learner(tiny_folder, trainable=("language",))
    before = parameters(subject)
    subject.update(batch)
    after = parameters(subject)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all("text_model" in name for name in moved)
    assert set(subject.weights(trained_only=True).arrays) == {
        n for n in before if "text_model" in n
    }


@pytest.mark.parametrize(
    "config", [{}, {"inner_epochs": 2, "minibatches": 3, "schedule": "cosine"}]
)
def test_a_resumed_learner_continues_bit_for_bit(tiny_folder, batch, tmp_path, config):
    straight = learner(tiny_folder, **config)
    for _ in range(2):
        straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed = learner(tiny_folder, **config)
    assert resumed.restore(load_checkpoint(tmp_path / "latest")) == 2
    for _ in range(2):
        one, other = straight.update(batch), resumed.update(batch)
    assert other.weight_version == 4
    assert same_numbers(one, other)
    for name, value in parameters(straight).items():
        assert np.array_equal(parameters(resumed)[name], value), name


def test_a_checkpoint_loads_with_from_pretrained(tiny_folder, batch, tmp_path):
    subject = learner(tiny_folder)
    subject.update(batch)
    place = save_checkpoint(tmp_path, subject.checkpoint(), keep=1)
    loaded = dict(load_captioner(place).model.named_parameters())
    for name, value in parameters(subject).items():
        assert np.array_equal(loaded[name].detach().numpy(), value), name


def test_a_checkpoint_of_another_model_is_refused_by_name(tiny_folder, tmp_path):
    other = TinyConfig(vision_width=32, vision_layers=1, text_width=32, text_layers=2)
    folder = build_tiny_captioner(other, ["a cat"] * 9, INSTRUCTION, tmp_path / "m", seed=0)
    checkpoint = learner(folder).checkpoint()
    with pytest.raises(ValueError, match="checkpoint of another model: model"):
        learner(tiny_folder).restore(checkpoint)


def test_prompt_ids_other_than_the_engines_are_refused_by_name(tiny_folder, batch):
    from dataclasses import replace

    ids = (*batch.prompt_token_ids[:-1], batch.prompt_token_ids[-1][1:])
    with pytest.raises(ValueError, match=f"prompt {batch.prompt_ids[-1]}: the engine used"):
        learner(tiny_folder).update(replace(batch, prompt_token_ids=ids))


@pytest.mark.parametrize("name", ["grpo", "scst", "nsc"])
def test_five_steps_move_the_weights_and_report_finite_metrics(tiny_folder, batch, name):
    subject = learner(tiny_folder, objective=name)
    before = parameters(subject)
    for _ in range(5):
        report = subject.update(batch)
    assert all(np.isfinite(value) for value in report.metrics.values())
    assert largest_difference(before, parameters(subject)) > 1e-4
    assert torch.isfinite(torch.tensor(report.metrics["learner/grad_norm"]))


@pytest.mark.parametrize(
    ("images", "sizes"), [(8, [2, 2, 2, 2]), (6, [1, 2, 1, 2]), (3, [1, 1, 1])]
)
def test_every_image_trains_once_an_epoch_however_many_groups_were_dropped(images, sizes):
    config = LearnerConfig(minibatches=4, inner_epochs=2)
    parts = list(minibatches(images, config, np.random.default_rng(0)))
    assert [len(part) for part in parts] == 2 * sizes
    for epoch in (parts[: len(sizes)], parts[len(sizes) :]):
        assert sorted(image for part in epoch for image in part) == list(range(images))
