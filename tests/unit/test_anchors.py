"""Log-probs of reference captions: those of stage 1, whatever the number of references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.learner.logprobs import naive_logprobs
from rayrl.learner.replay import read_replay
from rayrl.objectives import preset
from rayrl.vlm import caption_token_ids, load_captioner, prompt_inputs
from tests.conftest import INSTRUCTION
from tests.unit.test_learner import batch, learner

__all__ = ["batch"]


def own_logprob(captioner, image, caption):
    ids = torch.tensor([[caption_token_ids(captioner.processor, caption, captioner.eos_ids[0])]])
    inputs = prompt_inputs(captioner.processor, [image], [INSTRUCTION])
    with torch.no_grad():
        banned = captioner.banned_ids
        logprobs = naive_logprobs(
            captioner.model, inputs, ids, torch.ones_like(ids, dtype=torch.bool), banned_ids=banned
        )
    return logprobs[0, 0].tolist()


@pytest.mark.parametrize("micro_batch_images", [2, 32])
def test_the_loss_of_references_is_that_of_stage_1(tiny_folder, batch, prompts, micro_batch_images):
    """The sampling temperature of 0.8 does not change it."""
    captioner = load_captioner(tiny_folder)
    references = [("a red thing",), *(prompt.references for prompt in prompts[1:])]
    subject = learner(
        tiny_folder, objective="grpo_reference_nll", micro_batch_images=micro_batch_images
    )
    subject.objective = preset("grpo_reference_nll", nll_coef=0.25)
    report = subject.update(replace(batch, references=tuple(references)))
    of_images = [
        np.mean([x for caption in some for x in own_logprob(captioner, prompt.image, caption)])
        for prompt, some in zip(prompts, references, strict=True)
    ]
    got = report.metrics["objective/loss_nll_references"]
    assert got == pytest.approx(-0.25 * np.mean(of_images), rel=1e-5)


def test_more_weight_makes_references_likelier(tiny_folder, batch, prompts):
    given = replace(batch, references=tuple(prompt.references for prompt in prompts))
    subject = learner(tiny_folder, objective="grpo_reference_nll", lr=3e-4)
    subject.objective = preset("grpo_reference_nll", nll_coef=10.0)
    losses = [subject.update(given).metrics["objective/loss_nll_references"] for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_batch_without_references_is_refused(tiny_folder, batch):
    with pytest.raises(ValueError, match="the batch has no reference captions"):
        learner(tiny_folder, objective="grpo_reference_nll").update(batch)


def test_a_replay_keeps_the_references(tiny_folder, batch, prompts):
    given = replace(batch, references=tuple(prompt.references for prompt in prompts))
    subject = learner(tiny_folder, objective="grpo_reference_nll")
    with torch.no_grad():
        subject.policy.model.get_output_embeddings().weight[7] = torch.nan
    assert subject.update(given).metrics["learner/skipped"] == 1
    assert read_replay(subject.replay())[0].references == given.references
