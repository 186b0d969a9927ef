"""The order of prompts: a pure function of (seed, epoch, index).

Nothing else is stored, so a run that is resumed, or whose workers came and went, continues with
exactly the prompts it would have seen.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=4)
def epoch_order(num_items: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation [num_items] of the items for one epoch (read-only).

    Items are sorted by the raw output of a counter-based generator keyed by (seed, epoch), whose
    stream numpy guarantees; ``Generator.permutation`` may change between numpy versions.
    """
    if num_items < 1:
        raise ValueError(f"num_items {num_items}: want at least one item to order")
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed}, epoch {epoch}: want both to be at least 0")
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_items)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def prompt_indices(step: int, batch_size: int, num_items: int, seed: int) -> list[tuple[int, int]]:
    """The (epoch, item) pairs of the batch of ``step`` (counted from 0).

    Batches are consecutive stretches of the endless sequence epoch 0, epoch 1, ...; one may span
    several epochs, and every epoch visits each item once.
    """
    if step < 0 or batch_size < 1:
        raise ValueError(f"step {step}, batch_size {batch_size}: want step >= 0, batch_size >= 1")
    if num_items < 1:
        raise ValueError(f"num_items {num_items}: want at least one item to order")
    start = step * batch_size
    return [item_at(place, num_items, seed) for place in range(start, start + batch_size)]


def item_at(place: int, num_items: int, seed: int) -> tuple[int, int]:
    """The (epoch, item) pair at a place, from 0, of the endless sequence epoch 0, epoch 1, ..."""
    epoch, index = divmod(place, num_items)
    return epoch, int(epoch_order(num_items, seed, epoch)[index])
