"""Sharing a step's images between ranks, and micro-batches that count for nothing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from rayrl.config import Config, LearnerConfig
from rayrl.learner.batches import Tokens, rank_micro_batches
from rayrl.learner.parallel import SOLO, Ranks, whole_tensor
from rayrl.objectives.stats import kth_largest
from tests.unit.objectives_toy import prepared
from tests.unit.test_objectives_presets import NAMES, objective_of, start_of


def test_shares_are_contiguous_and_of_nearly_equal_size():
    seven = list(range(7))
    assert [Ranks(rank=r, size=2).share(seven) for r in (0, 1)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [Ranks(rank=r, size=3).share([5]) for r in range(3)] == [[], [], [5]]
    for size in range(1, 9):
        shares = [Ranks(rank=r, size=size).share(seven) for r in range(size)]
        assert [i for share in shares for i in share] == seven
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [[4], [3, 0, 2], list(range(7))])
@pytest.mark.parametrize("budget", [0, 12])
def test_ranks_run_equally_many_micro_batches_and_each_image_counts_once(size, images, budget):
    config = LearnerConfig(micro_batch_images=2, micro_batch_tokens=budget)
    tokens = [Tokens(2, count) for count in (3, 7, 0, 1, 10, 2, 5)]
    parts = [
        rank_micro_batches(images, tokens, config, Ranks(rank=r, size=size)) for r in range(size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(rows for part in parts for rows, _ in part)
    counted = [i for part in parts for rows, counts in part if counts for i in rows]
    assert sorted(counted) == sorted(images)


def test_one_rank_sums_nothing():
    x, parameter = torch.tensor([1.0, -2.0]), torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert SOLO.total(x) is x
    assert SOLO.total_metrics({"a": (1.0, 2.0)}) == {"a": (1.0, 2.0)}
    SOLO.total_gradients([parameter])
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert float(SOLO.gradient_norm([parameter])) == 5.0
    assert whole_tensor(x) is x


@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_what_is_sharded_is_assembled_in_host_memory(mode):
    on_gpu = mock.Mock(spec=torch.Tensor)
    there = on_gpu.detach.return_value
    first = Ranks(rank=0, size=2, mode=mode)
    assert first.assembled(on_gpu) is (there.cpu.return_value if mode == "fsdp" else there)
    assert Ranks(rank=1, size=2, mode=mode).assembled(torch.ones(3)).numel() == 0
    assert torch.equal(SOLO.assembled(torch.ones(3)), torch.ones(3))


def test_the_kth_largest_is_exact_with_ties_infinities_and_negative_zero():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    values[:6] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1.5, 1.5])
    descending = values.sort(descending=True).values
    for k in (1, 2, 3, 150, 299, 300):
        found = kth_largest(values, torch.tensor(k), lambda x: x)
        assert float(found) == float(descending[k - 1])


def test_the_kth_largest_over_ranks_is_that_of_all_values_together():
    # The other rank's counts are known here, because it has the same values.
    values = torch.tensor([0.3, -1.0, 2.0])
    for k, want in ((1, 2.0), (2, 2.0), (3, 0.3), (5, -1.0)):
        found = kth_largest(values, torch.tensor(k), lambda count: 2 * count)
        assert float(found) == pytest.approx(want)


@pytest.mark.parametrize("name", NAMES)
def test_captions_that_count_for_nothing_have_no_loss_and_no_gradient(name):
    policy, batch = start_of(name)
    objective = objective_of(name)
    ready = prepared(objective, batch)
    logprobs = (policy.logprobs(batch).detach() - 0.3).requires_grad_()
    graph = policy.graph(batch, objective.needs)
    nothing = ready.weightless()
    loss = objective.loss(nothing, logprobs, ready.normalizer(), **graph).loss
    assert float(loss.detach()) == 0
    (loss + 0 * logprobs.sum()).backward()
    assert float(logprobs.grad.abs().max()) == 0
    counts = nothing.normalizer()
    assert (counts.tokens, counts.captions, counts.groups) == (0, 0, 0)


def test_ranks_that_could_never_work_are_refused():
    with pytest.raises(ValueError, match=r"num_workers 4, but a minibatch has only 2 images"):
        Config.model_validate(
            {"learner": {"num_workers": 4, "minibatches": 16}, "train": {"images_per_step": 32}}
        )
    with pytest.raises(ValueError, match="a rank runs on one GPU of its own"):
        LearnerConfig(num_workers=2, gpus=0.5)
