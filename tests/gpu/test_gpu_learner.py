"""The learner on a GPU.  Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrl.checkpoint import load_checkpoint, save_checkpoint
from tests.unit.test_learner import batch, learner, parameters

__all__ = ["batch"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_learner_continues(tiny_folder, batch, dtype, tmp_path):
    straight, resumed = (learner(tiny_folder, dtype=dtype) for _ in range(2))
    straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    one, other = straight.update(batch), resumed.update(batch)
    assert one.metrics["learner/grad_norm"] == pytest.approx(
        other.metrics["learner/grad_norm"], rel=1e-2 if dtype == "bfloat16" else 1e-4
    )
    want, got = parameters(straight), parameters(resumed)
    if dtype == "float32":
        # Sums on a GPU have no fixed order, and AdamW divides each gradient by its own size.
        assert all(np.allclose(want[name], got[name], atol=3e-3) for name in want)
