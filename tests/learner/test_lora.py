"""Adapters: where they start, what they publish, what a checkpoint holds."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch

from rayrl.adapters import AdapterWeights, base_folder, with_base
from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.config import EngineConfig
from rayrl.engine.base import EngineSetup, Sampling
from rayrl.engine.hf import HfEngine
from rayrl.vlm import load_captioner
from rayrl.weights import Weights, load_into
from tests.unit.test_learner import batch, largest_difference, learner, parameters, same_numbers

__all__ = ["batch"]

pytest.importorskip("peft")
LANGUAGE = ("language",)


def adapted(folder, *, publish="merged", trainable=LANGUAGE, **config):
    lora = {"rank": 4, "alpha": 8, "publish": publish}
    return learner(folder, trainable=trainable, lora=lora, **config)


def test_the_policy_starts_at_the_base_and_moves_only_in_adapted_layers(tiny_folder, batch):
    subject = adapted(tiny_folder, lr=1e-2)
    base = dict(load_captioner(tiny_folder).model.named_parameters())
    before = parameters(subject)
    assert before.keys() == base.keys()
    assert all(np.array_equal(before[n], p.detach().numpy()) for n, p in base.items())
    report = subject.update(batch)
    assert report.metrics["kl"] == 0.0  # with the adapters off it is the reference itself
    assert subject.policy.reference is None
    second = subject.update(batch)
    assert second.metrics["kl"] > 0
    after = parameters(subject)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(subject.weights(trained_only=True).arrays)
    assert len(moved) == 14 and all("text_model.layers" in name for name in moved)


def test_the_reference_is_the_policy_with_adapters_off(tiny_folder, batch):
    from rayrl.learner.batches import group_batch

    subject, plain = adapted(tiny_folder, lr=1e-2), learner(tiny_folder)
    groups, inputs = group_batch(batch, "cpu"), subject.policy.inputs(batch)
    for _ in range(2):
        subject.update(batch)
    got = subject.policy.ref_logprobs(groups, inputs)
    want = plain.policy.ref_logprobs(groups, plain.policy.inputs(batch))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    policy = subject.policy.forward.frozen(subject.policy.model, groups, inputs)
    assert (policy - want).abs().max() > 1e-2


def engine(folder):
    config = EngineConfig(backend="hf", max_concurrency=8)
    return HfEngine(EngineSetup(folder=folder, config=config, group_size=3))


def test_merged_weights_and_adapters_give_the_engine_the_same_policy(tiny_folder, batch, prompts):
    merged, apart = adapted(tiny_folder), adapted(tiny_folder, publish="adapters")
    base = apart.weights(trained_only=False)
    for _ in range(2):
        merged.update(batch), apart.update(batch)
    small, whole = apart.weights(trained_only=True), merged.weights(trained_only=True)
    assert isinstance(small, AdapterWeights) and isinstance(whole, Weights)
    assert small.version == whole.version == 2
    assert small.num_bytes < whole.num_bytes / 3
    got = small.merged(base)
    assert got.arrays.keys() == whole.arrays.keys()
    assert all(np.array_equal(got.arrays[name], whole.arrays[name]) for name in got.arrays)
    sampling = Sampling(group_size=3, temperature=1.0, max_tokens=6)
    groups = []
    for last in (whole, got):
        subject = engine(tiny_folder)
        subject.load_weights(base, changed=LANGUAGE)
        subject.load_weights(last, changed=LANGUAGE)
        groups.append(subject.generate(prompts[:2], sampling, [0, 1024]))
    for one, other in zip(*groups, strict=True):
        for first, second in zip(one.completions, other.completions, strict=True):
            assert np.array_equal(first.token_ids, second.token_ids)
            assert np.array_equal(first.logprobs, second.logprobs)


def test_the_engines_log_probs_are_the_learners(tiny_folder, batch, prompts):
    from rayrl.learner.logprobs import prefix_shared_logprobs
    from rayrl.vlm import prompt_inputs

    subject = adapted(tiny_folder, lr=1e-2)
    subject.update(batch)
    rollout = engine(tiny_folder)
    rollout.load_weights(subject.weights(trained_only=False), changed=LANGUAGE)
    sampling = Sampling(group_size=2, temperature=1.0, max_tokens=5)
    (group,) = rollout.generate(prompts[:1], sampling, [0])
    captioner = load_captioner(tiny_folder)
    inputs = prompt_inputs(captioner.processor, [prompts[0].image], [prompts[0].text])
    for completion in group.completions:
        ids = torch.tensor(completion.token_ids).long()[None, None]
        got = prefix_shared_logprobs(
            subject.policy.model,
            inputs,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            banned_ids=captioner.banned_ids,
        )
        assert got[0, 0].tolist() == pytest.approx(completion.logprobs.tolist(), abs=1e-5)


@pytest.mark.parametrize("compute", ["forward", "recompute"])
def test_in_bfloat16_the_policy_is_the_one_that_is_published(tiny_folder, batch, compute):
    """Rounding takes most of what small adapters add, from engines and learner alike."""
    from rayrl.learner.batches import group_batch

    options = {"dtype": "bfloat16", "activation_checkpointing": compute == "recompute"}
    subject = adapted(tiny_folder, lr=1e-4, **options)
    for _ in range(2):
        subject.update(batch)
    groups = group_batch(batch, "cpu")

    def of(learner):
        policy = learner.policy
        return policy.forward.frozen(policy.model, groups, policy.inputs(batch))

    got, base = of(subject), of(learner(tiny_folder, trainable=LANGUAGE, **options))
    whole = learner(tiny_folder, trainable=LANGUAGE, **options)
    load_into(whole.policy.model, subject.weights(trained_only=True))
    assert torch.equal(got, of(whole)) and not torch.equal(got, base)
    # What PEFT would compute is another policy.
    for layer in subject.policy.adapters._layers.values():
        layer.__class__ = type(layer).__base__
    assert not torch.equal(got, of(subject))


def test_gradients_pass_the_rounding(tiny_folder):
    from rayrl.learner.lora import _Merged

    torch.manual_seed(0)
    shapes = {"x": (2, 3, 8), "weight": (6, 8), "bias": (6,), "a": (2, 8), "b": (6, 2)}
    given = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    x, weight, bias, a, b = given.values()
    seed = torch.randn(2, 3, 6)
    plain = torch.nn.functional.linear(x, weight, bias) + 0.5 * x @ a.T @ b.T
    want = torch.autograd.grad((plain * seed).sum(), [x, a, b])
    got = _Merged.apply(x, weight, bias, a, b, 0.5)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((got * seed).sum(), [x, a, b]), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    rounded = [each.detach().bfloat16() for each in (x, weight, bias)]
    low = _Merged.apply(*rounded, a, b, 0.5)
    low_want = (low.float() * seed).sum()
    for mine, theirs in zip(torch.autograd.grad(low_want, [a, b]), want[1:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1)


def test_a_checkpoint_holds_adapters_alone_and_loads_with_from_pretrained(
    tiny_folder, batch, tmp_path
):
    subject = adapted(tiny_folder)
    subject.update(batch)
    checkpoint = subject.checkpoint()
    assert "model.safetensors" not in checkpoint.model_files
    whole = sum(array.nbytes for array in parameters(subject).values())
    assert len(checkpoint.model_files["adapter_model.safetensors"]) < whole / 3
    from dataclasses import replace

    files = with_base(checkpoint.model_files, tiny_folder)
    place = save_checkpoint(tmp_path, replace(checkpoint, model_files=files), keep=1)
    loaded = dict(load_captioner(place).model.named_parameters())
    for name, value in parameters(subject).items():
        assert np.abs(loaded[name].detach().numpy() - value).max() < 1e-7, name
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(place)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_adapters_find_their_base_in_a_run_folder_that_was_moved(tiny_folder, tmp_path):
    from dataclasses import replace

    shutil.copytree(tiny_folder, tmp_path / "old/stage1/final")
    checkpoint = adapted(tiny_folder).checkpoint()
    files = with_base(checkpoint.model_files, tmp_path / "old/stage1/final")
    save_checkpoint(tmp_path / "old/checkpoints", replace(checkpoint, model_files=files), keep=1)
    (tmp_path / "old").rename(tmp_path / "new")
    latest = tmp_path / "new/checkpoints/latest"
    assert base_folder(latest) == tmp_path / "new/stage1/final"
    assert load_captioner(latest).model is not None
    shutil.rmtree(tmp_path / "new/stage1")
    with pytest.raises(FileNotFoundError, match=r"adapters are for .*/old/stage1/final, which is"):
        load_captioner(latest)


@pytest.mark.parametrize("publish", ["merged", "adapters"])
def test_a_resumed_run_continues_bit_for_bit(tiny_folder, batch, tmp_path, publish):
    options = {"publish": publish, "inner_epochs": 2, "dtype": "bfloat16"}
    straight = adapted(tiny_folder, **options)
    straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed = adapted(tiny_folder, **options)
    assert resumed.restore(load_checkpoint(tmp_path / "latest")) == 1
    assert same_numbers(straight.update(batch), resumed.update(batch))
    for name, value in straight._named.items():
        assert torch.equal(resumed._named[name], value), name


def test_adapters_of_another_base_or_shape_are_refused(tiny_folder, batch):
    from dataclasses import replace

    subject = adapted(tiny_folder)
    checkpoint = subject.checkpoint()
    with pytest.raises(ValueError, match="adapters are for a base of fingerprint 00"):
        subject.restore(replace(checkpoint, meta={**checkpoint.meta, "base_fingerprint": "00"}))
    scaled = learner(tiny_folder, trainable=LANGUAGE, lora={"rank": 4, "alpha": 12})
    with pytest.raises(ValueError, match=r"2 times \(learner\.lora\.alpha 8 over rank 4\), .* 3: "):
        scaled.restore(checkpoint)
    other = learner(tiny_folder, trainable=LANGUAGE, lora={"rank": 2})
    with pytest.raises(ValueError, match="checkpoint of another model: adapter base_model"):
        other.restore(checkpoint)
    with pytest.raises(ValueError, match="the base's weights must be loaded first"):
        adapted(tiny_folder, publish="adapters").weights(trained_only=True).merged(None)


def test_adapters_of_the_vision_tower_train_too(tiny_folder, batch):
    subject = adapted(tiny_folder, trainable=("vision", "connector", "language"))
    names = subject.policy.trainable
    assert any("vision_model" in n for n in names) and any("connector" in n for n in names)
    assert not any("lm_head" in name for name in names)
    before = parameters(subject)
    subject.update(batch)
    assert largest_difference(before, parameters(subject)) > 1e-6


def test_a_skipped_step_of_adapters_keeps_the_whole_model(tiny_folder, batch):
    subject = adapted(tiny_folder)
    name = next(iter(subject._named))
    subject._named[name].register_hook(lambda gradient: gradient * float("inf"))
    subject.update(batch)
    assert "model.safetensors" in subject.replay().model_files


def test_without_peft_the_reason_is_said(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"learner.lora.rank 4 needs PEFT: install rayrl\[lora\]"):
        adapted(tiny_folder)
