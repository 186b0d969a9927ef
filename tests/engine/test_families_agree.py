"""Captioners of other families, with their own processors: engines and learner see the same prompt
and give the same tokens the same log-probs."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from rayrl.canary import make_canary
from rayrl.engine.hf import HfEngine
from rayrl.vlm import load_captioner
from rayrl.weights import pack
from tests.captioners import FAMILIES, qwen_without_video, write_captioner
from tests.engine.test_engines_agree import SAMPLING, learner_difference, moved, seeds, start

pytestmark = pytest.mark.vllm

ALL = ("vision", "connector", "language")


@pytest.fixture(autouse=True, scope="module")
def without_video():
    with qwen_without_video():
        yield


@pytest.fixture
def folder(family, prompts, tmp_path):
    captions = [text for prompt in prompts for text in prompt.references] * 4
    return write_captioner(family, captions, tmp_path)


needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="vLLM imports torchvision for this family"
)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "hf") for family in FAMILIES),
        ("blip-2", "vllm"),
        pytest.param("llava", "vllm", marks=needs_torchvision),
    ],
)
def test_engine_and_learner_agree(folder, backend, prompts):
    engine, captioner = start(backend, folder), load_captioner(folder)
    for version in range(2):
        engine.load_weights(pack(captioner.model, version), changed=ALL)
        groups = engine.generate(prompts, SAMPLING, seeds(prompts))
        assert learner_difference(captioner, groups) < 1e-4
        canary = make_canary(captioner.processor, prompts[0], 20)
        scored = engine.score(canary.prompt, canary.token_ids)
        assert np.isfinite(scored).all() and len(scored) == len(canary.token_ids)
        moved(captioner, "model.")


@pytest.mark.parametrize("family", ["paligemma"])
def test_a_family_that_vllm_computes_otherwise_is_sampled_with_transformers(folder):
    assert isinstance(start("auto", folder), HfEngine)
    with pytest.raises(ValueError, match=r"attends to its whole prompt.* want engine.backend hf"):
        start("vllm", folder)
