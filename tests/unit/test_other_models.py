"""Log-probs that come from elsewhere: other models, changed images, heads of single terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.config import Config, TinyConfig
from rayrl.learner.batches import group_batch
from rayrl.learner.changed import changed_image
from rayrl.learner.heads import TermHeads
from rayrl.learner.provided import provided
from rayrl.objectives import preset
from rayrl.objectives.config import SourcesConfig
from rayrl.vlm import build_tiny_captioner, decode_image
from tests.conftest import COLOURS, INSTRUCTION, encoded_picture
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, prompts):
    """The tiny captioner from another seed: the same tokens, other weights."""
    captions = [text for prompt in prompts for text in prompt.references] * 4
    config = TinyConfig(vision_width=32, vision_layers=1, text_width=64, text_layers=2)
    folder = tmp_path_factory.mktemp("other")
    return build_tiny_captioner(config, captions, INSTRUCTION, folder, seed=1)


def start_fields(subject, batch):
    return subject.losses.with_start_fields(group_batch(batch, "cpu"), subject.policy.inputs(batch))


def test_a_guide_scores_the_captions_with_its_own_weights(tiny_folder, other_folder, batch):
    sources = SourcesConfig(guide=str(other_folder))
    got = start_fields(learner(tiny_folder, objective="tgdpo", sources=sources), batch)
    want = start_fields(learner(other_folder, objective="grpo"), batch)
    torch.testing.assert_close(got.guide_logprobs, want.ref_logprobs, rtol=0, atol=1e-5)
    assert (got.guide_logprobs - got.ref_logprobs).abs().max() > 0.1


def test_the_work_of_a_guide_counts(tiny_folder, other_folder, batch):
    def work(**options):
        subject = learner(tiny_folder, **options)
        start_fields(subject, batch)
        return subject.policy.forward.flops

    alone = work(objective="grpo")
    guided = work(objective="tgdpo", sources=SourcesConfig(guide=str(other_folder)))
    # The guide has the reference's shape, and neither a backward pass.
    assert guided == pytest.approx(2 * alone)


def test_a_frozen_tower_of_the_policy_is_not_the_guides(tiny_folder, other_folder, batch):
    """The policy's image features are cached; the guide has features of its own."""
    sources = SourcesConfig(guide=str(other_folder))
    some = {"objective": "tgdpo", "sources": sources}
    got = start_fields(learner(tiny_folder, trainable=("language",), **some), batch)
    want = start_fields(learner(tiny_folder, **some), batch)
    torch.testing.assert_close(got.guide_logprobs, want.guide_logprobs, rtol=0, atol=1e-5)


def test_there_is_one_column_for_each_auxiliary_model(tiny_folder, other_folder, batch):
    sources = SourcesConfig(auxiliaries=(str(other_folder), str(tiny_folder)))
    subject = learner(tiny_folder, objective="two_stage_constrained", sources=sources)
    got = start_fields(subject, batch).auxiliary_logprobs
    assert got.shape == (*batch.shape, 2)
    own = start_fields(learner(tiny_folder, objective="grpo"), batch).ref_logprobs
    torch.testing.assert_close(got[..., 1], own, rtol=0, atol=1e-5)
    assert (got[..., 0] - own).abs().max() > 0.1


def test_models_that_cannot_serve_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="no model folder 'nowhere'"):
        learner(tiny_folder, objective="tgdpo", sources=SourcesConfig(guide="nowhere"))
    strange = build_tiny_captioner(TinyConfig(), ["a cat"] * 9, INSTRUCTION, tmp_path / "m", seed=0)
    with pytest.raises(ValueError, match="its tokens are not those of the model that trains"):
        learner(tiny_folder, objective="tgdpo", sources=SourcesConfig(guide=str(strange)))


def test_a_guide_that_is_not_configured_is_asked_for():
    with pytest.raises(ValueError, match=r"guide_logprobs .*configure objective\.sources\.guide"):
        preset("tgdpo").check(provided(Config()))
    given = Config(objective={"preset": "tgdpo", "sources": {"guide": "somewhere"}})
    preset("tgdpo").check(provided(given))


def test_a_changed_image_has_its_size_and_a_window_that_does_not_move():
    image = encoded_picture(COLOURS["red"], size=40)
    before = np.asarray(decode_image(image))
    assert changed_image(image, "crop", 0.0) == image
    masked = np.asarray(decode_image(changed_image(image, "mask", 0.25)))
    grey = (masked == 128).all(-1)
    assert grey.sum() == 10 * 10  # a quarter of each side of 40 pixels
    assert (masked[~grey] == before[~grey]).all()
    cropped = changed_image(image, "crop", 0.5)
    assert np.asarray(decode_image(cropped)).shape == before.shape
    assert changed_image(image, "crop", 0.5) == cropped
    assert (np.asarray(decode_image(cropped)) != before).any()


def test_an_unchanged_image_gives_no_gradient(tiny_folder, batch):
    norms = {}
    for strength in (0.0, 0.6):
        sources = SourcesConfig(change_strength=strength, image_change="mask")
        subject = learner(tiny_folder, objective="pami_changed_image", sources=sources)
        # Away from the reference, where both margins are 0.
        subject.restore(_moved(tiny_folder, batch))
        report = subject.update(batch)
        norms[strength] = report.metrics["learner/grad_norm"]
        if strength == 0:
            # -log sigmoid(0) of every group with a pair.
            assert report.metrics["objective/loss_policy"] == pytest.approx(np.log(2), rel=1e-6)
    assert norms[0.0] < 1e-6 < 1e-4 < norms[0.6]


def _moved(tiny_folder, batch):
    subject = learner(tiny_folder, objective="pami_changed_image")
    subject.update(batch)
    return subject.checkpoint()


def test_heads_start_as_the_policy_and_part(tiny_folder, batch):
    terms = {"a": batch.rewards, "b": 1 - batch.rewards}
    given = replace(batch, terms=terms)
    subject = learner(tiny_folder, objective="mah_dpo_heads", num_terms=2)
    # All heads and the reference agree at first, so each margin is 0.
    first = subject.update(given).metrics["objective/loss_policy"]
    assert first == pytest.approx(np.log(2), rel=1e-5)
    for _ in range(5):
        last = subject.update(given).metrics["objective/loss_policy"]
    # Opposite rewards: one policy could not serve both, two heads can.
    assert last < 0.9 * first
    (heads,) = [m for m in subject.providers._members if isinstance(m, TermHeads)]
    up = heads.module.up.detach()
    assert torch.nn.functional.cosine_similarity(up[0].flatten(), up[1].flatten(), 0) < 0


def test_one_head_is_online_dpo_at_first(tiny_folder, batch):
    given = replace(batch, terms={"cider_d": batch.rewards})
    one = learner(tiny_folder, objective="mah_dpo_heads", num_terms=1, grad_clip=1e9)
    other = learner(tiny_folder, objective="online_dpo", grad_clip=1e9)
    a, b = (subject.update(given).metrics["learner/grad_norm"] for subject in (one, other))
    assert a == pytest.approx(b, rel=1e-4)


def test_heads_are_resumed_bit_for_bit(tiny_folder, batch, tmp_path):
    given = replace(batch, terms={"a": batch.rewards, "b": 1 - batch.rewards})
    straight, resumed = (
        learner(tiny_folder, objective="mah_dpo_heads", num_terms=2) for _ in range(2)
    )
    straight.update(given)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    for subject in (straight, resumed):
        subject.update(given)
    for name, value in parameters(straight).items():
        assert np.array_equal(parameters(resumed)[name], value), name
    other = learner(tiny_folder, objective="mah_dpo_heads", num_terms=3)
    with pytest.raises(ValueError, match=r"term_heads down is \(2, 64, 16\) in the checkpoint"):
        other.restore(load_checkpoint(tmp_path / "latest"))


def test_adapters_are_off_for_the_reference_after_a_changed_image(tiny_folder, batch):
    options = {"objective": "pami_changed_image", "lora": {"rank": 2}, "schedule": "constant"}
    subject = learner(tiny_folder, **options)
    first = start_fields(subject, batch).augmented_ref_logprobs
    for _ in range(3):
        subject.update(batch)
    torch.testing.assert_close(start_fields(subject, batch).augmented_ref_logprobs, first)


def test_a_critic_learns_beside_adapters(tiny_folder, batch):
    subject = learner(tiny_folder, objective="ppo", lora={"rank": 2})
    reports = [subject.update(batch).metrics for _ in range(6)]
    name = "objective/critic_explained_variance"
    assert reports[-1][name] > reports[0][name]
