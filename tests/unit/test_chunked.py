"""Chunked log-probs and entropy against plain autograd, and the memory they promise."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayrl.learner.chunked import Sampling, token_logprobs

N, D, V, M = 23, 16, 41, 57


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = torch.nn.Linear(D, V)
    hidden = torch.randn(N, D, requires_grad=True)
    row = torch.cat([torch.arange(N), torch.randint(N, (M - N,))]).sort().values
    return hidden, head, row, torch.randint(5, V, (M,))


def plain(hidden, head, row, token, sampling):
    logits = head(hidden)
    if sampling.softcap is not None:
        logits = sampling.softcap * torch.tanh(logits / sampling.softcap)
    logits = logits / sampling.temperature
    allowed = [i for i in range(V) if i not in sampling.banned]
    logprobs = logits[:, allowed].log_softmax(-1)
    position = torch.zeros(V, dtype=torch.long)
    position[allowed] = torch.arange(len(allowed))
    return logprobs[row, position[token]], -(logprobs.exp() * logprobs).sum(-1)


def backward(hidden, head, logprobs, entropy):
    for tensor in (hidden, head.weight, head.bias):
        tensor.grad = None
    torch.manual_seed(1)
    ((logprobs * torch.randn(M)).sum() + 3 * (entropy * torch.randn(N)).sum()).backward()
    return [tensor.grad.clone() for tensor in (hidden, head.weight, head.bias)]


@pytest.mark.parametrize("rows", [1, 7, N, 1000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3, banned=(0, 3)),
        Sampling(temperature=2.0, banned=(1,), softcap=1.5),
    ],
)
def test_equals_plain_autograd(problem, sampling, rows):
    hidden, head, row, token = problem
    want = plain(hidden, head, row, token, sampling)
    want_gradients = backward(hidden, head, *want)
    got = token_logprobs(
        hidden, head, row, token, sampling, with_entropy=True, chunk_bytes=4 * V * rows
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    for a, b in zip(backward(hidden, head, *got), want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_hand_computed_value():
    """Logits (0, ln 2, ln 5) at temperature 1, the last banned: p = 1/3, 2/3."""
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [2.0], [5.0]]).clamp(min=1).log()
    got, entropy = token_logprobs(
        torch.ones(1, 1),
        head,
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        Sampling(banned=(2,)),
        with_entropy=True,
    )
    assert got.exp().tolist() == pytest.approx([1 / 3, 2 / 3])
    assert entropy.item() == pytest.approx(0.6365141682948128)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_logits_of_the_batch_never_exist(problem):
    hidden, head, row, token = problem
    for rows in (4, N):
        with LargestTensor() as largest:
            out = token_logprobs(
                hidden, head, row, token, Sampling(), with_entropy=True, chunk_bytes=4 * V * rows
            )
            backward(hidden, head, *out)
        assert largest.elements == max(rows * V, V * D)


def test_half_precision_keeps_float32_results(problem):
    """Under autocast the head multiplies in bfloat16; log-probs and parameter gradients stay
    float32 and near the exact ones."""
    hidden, head, row, token = problem
    want = plain(hidden, head, row, token, Sampling())
    want_gradients = backward(hidden, head, *want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden, head, row, token, Sampling(), with_entropy=True)
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0.03)
    for a, b in zip(backward(hidden, head, *got), want_gradients, strict=True):
        assert a.dtype == torch.float32
        assert ((a - b).norm() / b.norm()).item() < 0.02


def test_frozen_parts_get_no_gradient(problem):
    hidden, head, row, token = problem
    head.weight.requires_grad_(False)
    token_logprobs(hidden, head, row, token, Sampling())[0].sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None and head.bias.grad is not None
    with torch.no_grad():
        assert not token_logprobs(hidden, head, row, token, Sampling())[0].requires_grad
