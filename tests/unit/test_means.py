"""Metrics that are added up over micro-batches."""

from __future__ import annotations

import pytest
import torch

from rayrl.learner import means
from rayrl.learner.means import Means


def test_numbers_and_tensors_of_any_type_add_up(monkeypatch):
    sums = Means()
    sums.add({"a": (torch.tensor(1.5), torch.tensor(2)), "b": (3.0, 0.0)})
    sums.add(
        {"a": (torch.tensor([2.5]), 2.0), "c": (torch.tensor(True), torch.tensor(4.0).bfloat16())}
    )
    weights = torch.tensor(2.0, requires_grad=True)
    sums.add({"d": (weights * 3, torch.tensor(1, dtype=torch.float64))})
    assert sums.pairs() == {"a": (4.0, 4.0), "b": (3.0, 0.0), "c": (1.0, 4.0), "d": (6.0, 1.0)}
    assert sums.means() == {"a": 1.0, "c": 0.25, "d": 6.0}
    sums.add({"b": (1.0, 2.0)})
    assert sums.means()["b"] == pytest.approx(2.0)


def test_tensors_are_read_together_when_somebody_asks(monkeypatch):
    """Each reading waits for a GPU."""
    read, real = [], means.torch.stack
    monkeypatch.setattr(means.torch, "stack", lambda some: read.append(len(some)) or real(some))
    sums = Means()
    for _ in range(3):
        sums.add({name: (torch.tensor(1.0), torch.tensor(2.0)) for name in "abcd"})
    assert read == []
    assert sums.means() == dict.fromkeys("abcd", 0.5)
    assert sums.means() == dict.fromkeys("abcd", 0.5)
    assert read == [24]
