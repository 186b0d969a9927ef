"""Both engines and the learner give the same tokens the same log-probs, before and after an
update that moves the vision tower (vLLM keeps image embeddings by image, not by weights)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.adapters import AdapterWeights
from rayrl.canary import make_canary
from rayrl.config import EngineConfig
from rayrl.engine.base import EngineSetup, Sampling, make_engine, request_seed
from rayrl.engine.hf import HfEngine
from rayrl.learner.inputs import InputCache
from rayrl.learner.logprobs import prefix_shared_logprobs
from rayrl.readback import ReadBack, differing
from rayrl.vlm import caption_prefix_ids, load_captioner
from rayrl.weights import pack
from tests.unit.test_learner import batch, learner

__all__ = ["batch"]

ALL = ("vision", "connector", "language")
SAMPLING = Sampling(group_size=4, temperature=0.7, max_tokens=12)

pytestmark = pytest.mark.vllm


def start(backend, folder):
    if backend == "vllm":
        pytest.importorskip("vllm")
        # As in a process that scores captions too: vLLM once failed on what numba brings along.
        pytest.importorskip("numba")
    config = EngineConfig(backend=backend, kv_cache_mb=64, max_concurrency=64)
    return make_engine(EngineSetup(folder=folder, config=config, group_size=4))


@pytest.fixture(scope="module", params=["hf", "vllm"])
def engine(request, tiny_folder):
    return start(request.param, tiny_folder)


@pytest.fixture
def captioner(tiny_folder):
    return load_captioner(tiny_folder)


def seeds(prompts):
    return [request_seed(0, 0, prompt.prompt_id) for prompt in prompts]


def learner_difference(captioner, groups):
    """Largest |engine - learner| over all sampled tokens."""
    length = max(len(c.token_ids) for g in groups for c in g.completions)
    ids = torch.zeros(len(groups), 4, length, dtype=torch.long)
    there = torch.zeros(len(groups), 4, length, dtype=torch.bool)
    mask = there.clone()
    sampled = torch.zeros(len(groups), 4, length)
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            n = len(completion.token_ids)
            ids[p, g, :n] = torch.from_numpy(completion.token_ids).long()
            sampled[p, g, :n] = torch.from_numpy(completion.logprobs)
            mask[p, g, completion.num_forced : n] = True
            there[p, g, :n] = True
    cache = InputCache(captioner.processor)
    inputs = cache.batch([g.prompt.image for g in groups], groups[0].prompt.text)
    for row, group in zip(inputs["input_ids"], groups, strict=True):
        assert row.tolist() == group.prompt_token_ids.tolist()
    with torch.no_grad():
        got = prefix_shared_logprobs(
            captioner.model, inputs, ids, there, SAMPLING.temperature, captioner.banned_ids
        )
    return float((got - sampled)[mask].abs().max())


def moved(captioner, part, scale=0.05):
    """The captioner with the parameters of one part perturbed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in captioner.model.named_parameters():
            if part in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return captioner


def test_a_caption_that_is_cut_off_is_refused(engine, captioner, prompts):
    engine.load_weights(pack(captioner.model, 0), changed=ALL)
    length = len(engine.generate(prompts[:1], SAMPLING, [1])[0].prompt_token_ids)
    longest = 128 - length
    (whole,) = engine.greedy(prompts[:1], longest)
    assert len(whole.token_ids) == longest, "a caption that ends by itself is never cut off"
    if isinstance(engine, HfEngine):
        return  # which has no longest sequence
    with pytest.raises(ValueError, match=rf"\(length {length}\) and .*max_tokens {longest + 1} "):
        engine.greedy(prompts[:1], longest + 1)
    with pytest.raises(ValueError, match=r"want --engine\.max_model_len 129 or more"):
        too_long = replace(SAMPLING, max_tokens=longest + 1)
        engine.generate(prompts[:1], too_long, [1], [[5, 6]])


def test_logprobs_agree_before_and_after_an_update_of_every_part(engine, captioner, prompts):
    engine.load_weights(pack(captioner.model, 0), changed=ALL)
    assert learner_difference(captioner, engine.generate(prompts, SAMPLING, seeds(prompts))) < 1e-5
    before = learner_difference
    moved(captioner, "model.")
    engine.load_weights(pack(captioner.model, 1), changed=ALL)
    assert engine.weight_version == 1
    assert before(captioner, engine.generate(prompts, SAMPLING, seeds(prompts))) < 1e-5


def test_an_update_of_the_vision_tower_alone_reaches_images_seen_before(engine, captioner, prompts):
    engine.load_weights(pack(captioner.model, 2), changed=ALL)
    stale = engine.generate(prompts, SAMPLING, seeds(prompts))
    moved(captioner, "vision_model", scale=0.3)
    # The check can fail: captions of the old tower do not fit the new one.
    assert learner_difference(captioner, stale) > 1e-3
    names = {n for n, _ in captioner.model.named_parameters() if "vision_model" in n}
    engine.load_weights(pack(captioner.model, 3, names), changed=("vision",))
    assert learner_difference(captioner, engine.generate(prompts, SAMPLING, seeds(prompts))) < 1e-5


def test_what_an_engine_holds_is_read_back_and_a_lost_value_is_found(engine, captioner):
    weights, check = pack(captioner.model, 30), ReadBack()
    engine.load_weights(weights, changed=ALL)
    # Whatever can be read is equal from the start.
    assert not differing(engine.held(weights), weights)
    checked, there = check.check(engine.held(weights), weights), len(dict(weights.tensors()))
    # On CPU vLLM packs matrices for its kernels; embeddings, norms and biases can be read.
    assert checked == there if isinstance(engine, HfEngine) else there // 3 < checked <= there
    name = next(n for n in engine.held(weights) if n.endswith("norm.weight"))
    with torch.no_grad():
        engine.held(weights)[name][0] += 1
    with pytest.raises(RuntimeError, match=f"version 30: read back of {name}: 1 of"):
        check.check(engine.held(weights), weights)


def test_an_update_without_the_encoder_reset_would_be_caught(engine, captioner, prompts):
    if not hasattr(engine, "_llm"):
        pytest.skip("only vLLM keeps image embeddings")
    engine.load_weights(pack(captioner.model, 4), changed=ALL)
    engine.generate(prompts, SAMPLING, seeds(prompts))
    moved(captioner, "vision_model", scale=0.3)
    # Claiming that only the language model changed leaves the embeddings of the old tower.
    engine.load_weights(pack(captioner.model, 5), changed=("language",))
    assert learner_difference(captioner, engine.generate(prompts, SAMPLING, seeds(prompts))) > 1e-3


def test_a_given_caption_is_scored_as_the_learner_does_with_every_version(
    engine, captioner, prompts, tiny_folder
):
    from rayrl.learner.logprobs import naive_logprobs

    ids = make_canary(captioner.processor, prompts[0], 20).token_ids
    tensor = torch.tensor([[list(ids)]])
    inputs = InputCache(captioner.processor).batch([prompts[0].image], prompts[0].text)
    for version in (20, 21):
        engine.load_weights(pack(captioner.model, version), changed=ALL)
        # Keys and values, and the image's embedding, of this version are cached here.
        engine.generate(prompts, SAMPLING, seeds(prompts))
        with torch.no_grad():
            want = naive_logprobs(captioner.model, inputs, tensor, torch.ones_like(tensor).bool())
        got = engine.score(prompts[0], ids)
        assert got.shape == (len(ids),)
        assert np.abs(got - want[0, 0].numpy()).max() < 1e-5
        moved(captioner, "model.")


def test_adapters_and_merged_weights_give_the_policy_that_the_learner_has(
    engine, captioner, prompts, tiny_folder, batch
):
    pytest.importorskip("peft")
    drawn = []
    for form in ("merged", "adapters"):
        lora = {"rank": 4, "publish": form}
        subject = learner(tiny_folder, lora=lora, lr=1e-2)
        base = subject.weights(trained_only=False)
        engine.load_weights(base, changed=ALL)
        before = engine.generate(prompts, SAMPLING, seeds(prompts))
        subject.update(batch)
        last = subject.weights(trained_only=True)
        assert isinstance(last, AdapterWeights) == (form == "adapters")
        last = last.merged(base) if form == "adapters" else last
        engine.load_weights(last, changed=ALL)
        drawn.append(engine.generate(prompts, SAMPLING, seeds(prompts)))
        adapted = replace(captioner, model=subject.policy.model)
        assert learner_difference(adapted, before) > 1e-3
        assert learner_difference(adapted, drawn[-1]) < 1e-5
    for one, other in zip(*drawn, strict=True):
        for first, second in zip(one.completions, other.completions, strict=True):
            assert np.array_equal(first.token_ids, second.token_ids)
            assert np.array_equal(first.logprobs, second.logprobs)


def test_a_group_is_the_same_alone_and_in_a_batch(engine, captioner, prompts):
    engine.load_weights(pack(captioner.model, 6), changed=ALL)
    together = engine.generate(prompts, SAMPLING, seeds(prompts))
    alone = engine.generate(prompts[2:3], SAMPLING, seeds(prompts)[2:3])[0]
    for one, other in zip(alone.completions, together[2].completions, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert np.abs(one.logprobs - other.logprobs).max() < 1e-5


def test_forced_tokens_begin_a_caption_and_the_rest_is_sampled_after_them(
    engine, captioner, prompts
):
    engine.load_weights(pack(captioner.model, 6), changed=ALL)
    beginnings = [caption_prefix_ids(captioner.processor, p.references[0])[:3] for p in prompts]
    beginnings[1] = []
    beginnings[2] = beginnings[2] * 20
    groups = engine.generate(prompts, SAMPLING, seeds(prompts), beginnings)
    plain = engine.generate(prompts, SAMPLING, seeds(prompts))
    for given, group, other in zip(beginnings, groups, plain, strict=True):
        # At least one token is sampled.
        count = min(len(given), SAMPLING.max_tokens - 1)
        assert group.prompt_token_ids.tolist() == other.prompt_token_ids.tolist()
        for completion in group.completions:
            assert completion.num_forced == count
            assert completion.token_ids[:count].tolist() == given[:count]
            assert completion.logprobs[:count].tolist() == [0.0] * count
            assert count < len(completion.token_ids) <= SAMPLING.max_tokens
            decoded = captioner.processor.tokenizer.decode(
                completion.token_ids.tolist(), skip_special_tokens=True
            )
            assert completion.text == decoded.strip()
        if not given:
            for one, two in zip(group.completions, other.completions, strict=True):
                assert one.token_ids.tolist() == two.token_ids.tolist()
    assert groups[0].captions[0].startswith(prompts[0].references[0].split()[0])
    assert learner_difference(captioner, groups) < 1e-5
    alone = engine.generate(prompts[:1], SAMPLING, seeds(prompts)[:1], beginnings[:1])[0]
    for one, two in zip(alone.completions, groups[0].completions, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()


def test_banned_ids_are_never_sampled_and_captions_end_once(engine, captioner, prompts):
    engine.load_weights(pack(captioner.model, 7), changed=ALL)
    # An all but uniform policy would sample the image token in one of 85 draws or so.
    with torch.no_grad():
        captioner.model.get_input_embeddings().weight.mul_(0.01)
    engine.load_weights(pack(captioner.model, 8), changed=ALL)
    many = Sampling(group_size=16, temperature=1.0, max_tokens=12)
    groups = engine.generate(prompts, many, seeds(prompts))
    for group in groups:
        for completion in group.completions:
            ids = completion.token_ids.tolist()
            assert not set(ids) & set(captioner.banned_ids)
            ends = [i for i in ids if i in captioner.eos_ids]
            assert len(ends) == (completion.finish_reason == "stop")
            assert not ends or ids[-1] in captioner.eos_ids


def test_an_engine_without_weights_refuses(tiny_folder, prompts):
    fresh = start("hf", tiny_folder)
    assert fresh.weight_version == -1
    with pytest.raises(RuntimeError, match="no weights yet"):
        fresh.generate(prompts, SAMPLING, seeds(prompts))


def test_damaged_weights_are_refused_and_named(engine, captioner):
    weights = pack(captioner.model, 9)
    weights.arrays[
        "lm_head.weight" if "lm_head.weight" in weights.arrays else next(iter(weights.arrays))
    ][0] += 1
    with pytest.raises(ValueError, match="version 9: checksum"):
        engine.load_weights(weights, changed=ALL)
