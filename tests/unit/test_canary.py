"""A fixed caption's log-probs: the engine's against the learner's."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from rayrl.canary import check_agreement, make_canary
from rayrl.config import Config, EngineConfig, LearnerConfig, ModelConfig
from rayrl.engine.base import EngineSetup, make_engine
from rayrl.learner.learner import Learner
from rayrl.learner.logprobs import prefix_shared_logprobs
from rayrl.objectives import preset
from rayrl.vlm import load_captioner, prompt_inputs
from rayrl.weights import pack

ALL = ("vision", "connector", "language")


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def test_the_difference_is_a_mean_over_tokens():
    difference = check_agreement(
        values(-1.0, -2.0), values(-1.5, -2.1), who="engine", version=3, tolerance=0.31
    )
    assert difference == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("engine", [values(-1.0, -2.0), values(-1.5, np.nan)])
def test_a_worker_that_disagrees_is_named_with_version_and_values(engine):
    want = (
        "rollout worker 4 does not compute with the weights of version 7: "
        "log-probs of the canary caption ["
    )
    with pytest.raises(RuntimeError, match=re.escape(want)) as error:
        check_agreement(
            engine, values(-1.5, -2.1), who="rollout worker 4", version=7, tolerance=0.29
        )
    assert "the learner's [-1.5000, -2.1000], mean difference" in str(error.value)
    assert "want at most 0.29 (rollout.canary_tolerance)" in str(error.value)


def test_another_number_of_tokens_is_an_error():
    with pytest.raises(RuntimeError, match=r"scored \(1,\) tokens .* learner \(2,\)"):
        check_agreement(values(-1.0), values(-1.0, -1.0), who="w", version=0, tolerance=1.0)


def test_the_tolerance_follows_the_types():
    assert Config().canary_tolerance == 0.01
    for section in ("model", "engine"):
        coarse = Config.model_validate({section: {"dtype": "bfloat16"}})
        assert coarse.canary_tolerance == pytest.approx(0.1)


def test_engine_and_learner_score_a_caption_alike_and_tell_other_weights_apart(
    tiny_folder, prompts
):
    captioner = load_captioner(tiny_folder)
    canary = make_canary(captioner.processor, prompts[0], 6)
    assert 1 <= len(canary.token_ids) <= 5
    engine = make_engine(
        EngineSetup(folder=tiny_folder, config=EngineConfig(backend="hf"), group_size=2)
    )
    engine.load_weights(pack(captioner.model, 0), changed=ALL)
    scored = engine.score(canary.prompt, canary.token_ids)
    # By hand: a group of one, through the prefix-shared pass.
    inputs = prompt_inputs(captioner.processor, [prompts[0].image], [prompts[0].text])
    ids = torch.tensor([[list(canary.token_ids)]])
    with torch.no_grad():
        want = prefix_shared_logprobs(captioner.model, inputs, ids, torch.ones_like(ids).bool())
    np.testing.assert_allclose(scored, want[0, 0].numpy(), atol=1e-5)
    learner = Learner(
        tiny_folder,
        model=ModelConfig(),
        config=LearnerConfig(),
        objective=preset("grpo"),
        temperature=0.7,
        instruction=prompts[0].text,
        total_steps=1,
        seed=0,
    )
    got = learner.score(prompts[0].image, canary.token_ids)
    assert check_agreement(scored, got, who="hf", version=0, tolerance=1e-5) < 1e-5
    with torch.no_grad():
        for parameter in captioner.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    engine.load_weights(pack(captioner.model, 1), changed=ALL)
    with pytest.raises(RuntimeError, match="of version 1"):
        other = engine.score(canary.prompt, canary.token_ids)
        check_agreement(other, got, who="hf", version=1, tolerance=0.01)
