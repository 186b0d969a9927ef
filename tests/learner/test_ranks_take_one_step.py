"""Two ranks take the steps of one: the same metrics, weights and checkpoints."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torch._dynamo.utils import counters

from rayrl.buckets import Received
from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.learner.measure import MEASURED
from rayrl.learner.parallel import SOLO
from tests.learner.rank_processes import RankProcesses
from tests.unit.allocated import peak_bytes
from tests.unit.test_learner import batch, largest_difference, learner
from tests.unit.test_skipped_steps import marked, spoil

__all__ = ["batch"]

STEPS = 3
ADAPTERS = {"lora": {"rank": 4}, "lr": 1e-4, "trainable": ("language",)}


@pytest.fixture(scope="module")
def two():
    processes = RankProcesses(2)
    yield processes
    processes.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sum_of_numbers(ranks):
    return ranks.total(torch.tensor(1.0 + ranks.rank)).item()


def test_ranks_wait_longer_for_one_that_starts_than_in_a_step(two):
    assert two.run("data", sum_of_numbers, late_s=9.0, timeout_s=5.0) == [3.0, 3.0]


def first_images(batch, count):
    """The groups of the first ``count`` images."""
    changes = {}
    for spec in fields(batch):
        value = getattr(batch, spec.name)
        if isinstance(value, dict):
            changes[spec.name] = {name: term[:count] for name, term in value.items()}
        elif value is not None:
            changes[spec.name] = value[:count]
    return replace(batch, **changes)


def steps(ranks, folder, batch, options, count=STEPS, start=None, save_to=None):
    """Train; returns every step's metrics, rank 0's weights before and after, and the gradient that
    the first step ended with, as one vector."""
    subject = learner(folder, ranks=ranks, **options)
    if start is not None:
        subject.restore(load_checkpoint(start))
    first = subject.weights(trained_only=False)
    reports = [subject.update(batch).metrics]
    moved = (p.grad for p in subject._named.values() if p.grad is not None)
    gradient = [ranks.gathered(each).flatten() for each in moved]
    reports += [subject.update(batch).metrics for _ in range(count - 1)]
    metrics = [{k: v for k, v in report.items() if k not in MEASURED} for report in reports]
    last = subject.weights(trained_only=True)
    checkpoint = subject.checkpoint()
    if ranks.rank > 0:
        assert first is last is checkpoint is None
        return metrics, None, None, None
    if save_to is not None:
        save_checkpoint(save_to, checkpoint, keep=1)
    first = {name: np.array(first.arrays[name]) for name in last.arrays}
    last = {name: np.array(value) for name, value in last.arrays.items()}
    return metrics, first, last, torch.cat(gradient).double().numpy()


CASES = {
    "grpo": {},
    "five images": {"images": 5},
    # One rank has nothing in any minibatch.
    "an image at a time": {"images": 5, "minibatches": 5, "inner_epochs": 2, "lr": 4e-6},
    # Three go through one rank's model, and two and one that does not count through the other's.
    "uneven micro-batches": {"images": 5, "micro_batch_images": 1},
    # Features are cached by the rank that saw the image, so ranks leave the tower out at
    # different times.
    "cached features": {"images": 5, "trainable": ("language",), "minibatches": 5},
    "naive": {"images": 5, "prefix_shared": False},
    "recomputed": {"images": 5, "activation_checkpointing": True},
    "token budget": {"images": 5, "micro_batch_tokens": 100},
    "adapters": {"images": 5, "lora": {"rank": 4}, "lr": 1e-4, "minibatches": 5},
    "dr_grpo": {"images": 5, "objective": "dr_grpo"},
    "pairs": {"images": 5, "objective": "online_dpo"},
    "critic": {"images": 5, "objective": "ppo", "minibatches": 5},
    # These read the output matrix outside of the pass that gathers it.
    "term heads": {"images": 5, "objective": "mah_dpo_heads", "num_terms": 2, "lr": 4e-5},
    "collisions": {"images": 5, "objective": "otb"},
    "changed images": {"images": 5, "objective": "pami_changed_image"},
    # The first step knows no earlier captions yet.
    "earlier captions": {"images": 5, "objective": "seppo_earlier", "lr": 2e-5},
    # Statistics over the step: advantages of all tokens have mean 0 and spread 1.
    "batch whitening": {"images": 5, "objective": "reinforce_plus_plus"},
    "self-trained scorer": {"images": 5, "objective": "reward_ranker"},
    # Statistics over the minibatch: a square root, the tokens with the largest covariance, bounds.
    "chi-squared": {"images": 5, "objective": "chi_squared_regularized", "inner_epochs": 2},
    "covariance": {"images": 5, "objective": "kl_cov", "inner_epochs": 2},
    "bounds": {"images": 5, "objective": "bapo_adaptive_clip", "inner_epochs": 2},
}


ACCUMULATED = {"grpo", "five images", "uneven micro-batches", "naive", "token budget"}
"""Where a step is one update, so that its gradient is that of equal weights."""


@pytest.fixture(scope="module")
def alone(tiny_folder, batch):
    """What one rank does in a case, computed once; in a process like those of two ranks, for what
    earlier tests loaded into this one changes how it rounds."""
    process = RankProcesses(1)

    @functools.cache
    def run(case):
        return process.run("data", steps, tiny_folder, *split_case(case, batch))[0]

    yield run
    process.close()


def split_case(case, batch):
    options = {"lr": 1e-5, **CASES[case]}
    judged = range(options.get("num_terms", 0))
    batch = replace(batch, terms={f"term {k}": batch.rewards ** (k + 1) for k in judged})
    return first_images(batch, options.pop("images", 6)), options


@pytest.mark.parametrize("mode", ["data", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one(two, alone, tiny_folder, batch, mode, case):
    metrics, before, after, gradient = alone(case)
    first, second = two.run(mode, steps, tiny_folder, *split_case(case, batch))
    assert first[0] == second[0]
    for want, got in zip(metrics, first[0], strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            # The log-ratio of a caption is a difference of sums of tens of nats.
            rounding = 1e-5 if name.endswith("_over_ref") else 1e-6
            assert got[name] == pytest.approx(value, rel=1e-6, abs=rounding), name
    assert largest_difference(before, first[1]) == 0
    assert largest_difference(before, after) > 2e-5
    assert largest_difference(after, first[2]) < 1e-6
    if case in ACCUMULATED:
        assert np.linalg.norm(first[3] - gradient) < 1e-6 * np.linalg.norm(gradient)


@pytest.mark.parametrize("mode", ["data", "fsdp"])
@pytest.mark.parametrize("parts", [{"lr": 1e-5}, ADAPTERS], ids=["weights", "adapters"])
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(
    two, tiny_folder, batch, mode, parts, tmp_path
):
    options = {"inner_epochs": 2, "objective": "apo_momentum", **parts}
    straight = steps(SOLO, tiny_folder, batch, options, count=3)
    places = [tmp_path / name for name in ("first", "second")]
    two.run(mode, steps, tiny_folder, batch, options, 1, None, places[0])
    steps(SOLO, tiny_folder, batch, options, 1, places[0] / "latest", places[1])
    first, _ = two.run(mode, steps, tiny_folder, batch, options, 1, places[1] / "latest")
    assert largest_difference(straight[1], first[2]) > 2e-5
    assert largest_difference(straight[2], first[2]) < 1e-6
    assert first[0][0]["learner/grad_norm"] == pytest.approx(
        straight[0][2]["learner/grad_norm"], rel=1e-5
    )


def continue_twice(ranks, folder, batch, options, place):
    """Weights after a step, and after the same step from a checkpoint of before it."""
    subject = learner(folder, ranks=ranks, **options)
    subject.update(batch)
    checkpoint = subject.checkpoint()
    if ranks.rank == 0:
        save_checkpoint(place, checkpoint, keep=1)
    torch.distributed.barrier()
    weights = []
    for _ in range(2):
        subject.restore(load_checkpoint(place / "latest"))
        subject.update(batch)
        packed = subject.weights(trained_only=True)
        weights.append(packed and {name: np.array(v) for name, v in packed.arrays.items()})
    return weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_two_ranks_continue_bit_for_bit(two, tiny_folder, batch, mode, dtype, tmp_path):
    options = {"lr": 1e-3, "dtype": dtype}
    (one, other), _ = two.run(mode, continue_twice, tiny_folder, batch, options, tmp_path)
    assert largest_difference(one, other) == 0


def steps_in_one_pass(ranks, folder):
    return learner(folder, ranks=ranks).optimizer.defaults["fused"]


@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_ranks_step_all_parameters_in_one_pass(two, tiny_folder, mode):
    # One by one, and in a dozen operations each, it takes ten times as long.
    assert two.run(mode, steps_in_one_pass, tiny_folder) == [True, True]


def compiled_steps(ranks, *arguments):
    """``steps`` by compiled layers, without the slow last stage of the compiler; and how many
    functions were compiled."""
    torch.compiler.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        return *steps(ranks, *arguments), counters["frames"]["ok"]


def test_sharded_adapters_in_compiled_layers_that_recompute(two, tiny_folder, batch):
    groups, options = first_images(batch, 5), {**ADAPTERS, "activation_checkpointing": True}
    metrics, before, after, _ = steps(SOLO, tiny_folder, groups, options, 2)
    options = {**options, "compile": True}
    arguments = (tiny_folder, groups, options, 2)
    (got, _, last, _, compiled), _ = two.run("fsdp", compiled_steps, *arguments)
    assert compiled >= 4
    for one, other in zip(metrics, got, strict=True):
        assert other["learner/grad_norm"] == pytest.approx(one["learner/grad_norm"], rel=1e-5)
        assert other["kl"] == pytest.approx(one["kl"], abs=1e-6)
    assert largest_difference(before, after) > 2e-5
    assert largest_difference(after, last) < 1e-6


def publish(ranks, folder, batch):
    """What rank 0 publishes of adapters that took a step: alone on their base, and merged; and
    how many bytes each way took at its peak and the largest parameter has, on every rank."""
    peaks, published = [], []
    for form in ("adapters", "merged"):
        lora = {"rank": 4, "publish": form}
        subject = learner(folder, ranks=ranks, lora=lora, lr=1e-2, trainable=("language",))
        base = subject.weights(trained_only=False)
        subject.update(batch)
        # gloo's threads let go of what they gathered when they come to it, on a busy machine late.
        # That adds to a peak and takes nothing from it.
        take = functools.partial(subject.weights, trained_only=True)
        peaks.append(min(peak_bytes(take) for _ in range(4)))
        last = subject.weights(trained_only=True)
        published.append(last.merged(base) if form == "adapters" and last else last)
        files = subject.policy.files(whole=True)
    if ranks.rank > 0:
        assert published == [None, None] and files == {}
        return peaks, None, None
    arrays = [{name: np.array(v) for name, v in weights.arrays.items()} for weights in published]
    return peaks, arrays, load(files["model.safetensors"].tobytes())


def test_sharded_adapters_are_published_without_a_second_copy(tiny_folder, batch):
    _, (want, _), _ = publish(SOLO, tiny_folder, batch)
    # Processes of its own: what the compiler left in others counts as memory too.
    fresh = RankProcesses(2)
    try:
        (_, (apart, merged), files), (peaks, _, _) = fresh.run("fsdp", publish, tiny_folder, batch)
    finally:
        fresh.close()
    assert merged.keys() == apart.keys() == want.keys()
    assert all(np.array_equal(merged[name], apart[name]) for name in merged)
    assert all(np.array_equal(merged[name], files[name]) for name in merged)
    assert largest_difference(want, merged) < 1e-5
    whole, largest = (f(v.nbytes for v in merged.values()) for f in (sum, max))
    adapters, one_merged = peaks
    # Rank 1 keeps nothing: a pair of matrices at most, and what one merged weight needs.
    assert 0 < adapters < largest
    assert largest < one_merged < 6 * largest < whole


def as_numbers(bits):
    """One vector of bfloat16 weights that travelled as uint16."""
    parts = [torch.from_numpy(bits[n].view(np.int16)).view(torch.bfloat16) for n in sorted(bits)]
    return torch.cat([part.double().flatten() for part in parts])


@pytest.mark.parametrize("parts", [{}, {**ADAPTERS, "activation_checkpointing": True}])
@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_two_ranks_in_bfloat16_take_about_the_steps_of_one(two, tiny_folder, batch, mode, parts):
    groups, options = first_images(batch, 5), {**parts, "lr": 1e-3, "dtype": "bfloat16"}
    metrics, before, after, _ = steps(SOLO, tiny_folder, groups, options)
    first, second = two.run(mode, steps, tiny_folder, groups, options)
    assert first[0] == second[0]
    for want, got in zip(metrics, first[0], strict=True):
        assert got["learner/grad_norm"] == pytest.approx(want["learner/grad_norm"], rel=5e-3)
    before, after, other = as_numbers(before), as_numbers(after), as_numbers(first[2])
    assert float((other - after).norm() / (after - before).norm()) < 0.2


def skipped_for_a_gradient(ranks, folder, batch, name):
    """What a rank says of a step in which a gradient has one value that is not a number."""
    subject = learner(folder, ranks=ranks)

    def spoil(parameter):
        own = parameter.grad.to_local() if ranks.sharded else parameter.grad
        if ranks.rank == 1 and own.numel():
            own.view(-1)[0] = float("nan")

    subject._named[name].register_post_accumulate_grad_hook(spoil)
    return subject.update(batch).problem


@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_ranks_name_the_gradient_that_one_of_them_spoiled(two, tiny_folder, batch, mode):
    name = "model.text_model.layers.1.mlp.down_proj.weight"
    said = two.run(mode, skipped_for_a_gradient, tiny_folder, batch, name)
    assert said[0] == said[1]
    assert f"the gradient of {name} is not (of " in said[0] and "1 nan" in said[0]


def skipped_before_the_first_update(ranks, folder, batch):
    """What a rank says of a step whose advantages one image would spoil, and whether it takes the
    next one."""
    subject = learner(folder, ranks=ranks, objective="chi_squared_reward", minibatches=2)
    spoil(subject, 7)
    problem = subject.update(marked(batch, 5)).problem
    return problem, subject.replay() is not None, subject.update(batch).metrics["learner/skipped"]


@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_ranks_skip_alike_a_step_that_one_of_them_cannot_prepare(two, tiny_folder, batch, mode):
    # The last image is of rank 1's share alone.
    said = two.run(mode, skipped_before_the_first_update, tiny_folder, batch)
    bad = "(of 120 values 20 nan) for prompts blue/1"
    want = f"old_logprobs {bad}; ref_logprobs {bad}"
    assert said == [(want, True, 0.0), (want, False, 0.0)]


def in_buckets(ranks, folder, batch, options):
    """What a rank would broadcast after a step, and what it publishes to be pulled."""
    subject = learner(folder, ranks=ranks, **options)
    subject.update(batch)
    manifest, buckets = subject.policy.buckets(1, trained_only=False)
    pulled = subject.weights(trained_only=False)
    if pulled is None:
        return None, None
    received = Received(manifest=manifest, buckets=buckets)
    received.verify()
    return [
        {name: value.numpy() for name, value in version.tensors()} for version in (received, pulled)
    ]


@pytest.mark.parametrize("options", [{}, ADAPTERS])
def test_shards_are_broadcast_as_they_are_pulled(two, tiny_folder, batch, options):
    (sent, pulled), _ = two.run("fsdp", in_buckets, tiny_folder, batch, options)
    assert sent.keys() == pulled.keys()
    assert all(np.array_equal(sent[name], pulled[name]) for name in pulled)
