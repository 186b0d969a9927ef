"""Arrays that grow at their end."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Column:
    """Rows in one block of memory; ``values`` is what it holds so far.

    Appending is amortised: the block grows by a quarter.  Integers too large for its type widen it.
    """

    def __init__(self, dtype: npt.DTypeLike, rows: npt.ArrayLike = ()) -> None:
        self._block = np.asarray(rows, dtype=dtype)
        self._size = len(self._block)

    @property
    def values(self) -> npt.NDArray[Any]:
        """The rows, a view."""
        return self._block[: self._size]

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows at the end."""
        end = self._size + len(rows)
        dtype = self._block.dtype
        if dtype.kind in "iu" and len(rows) and rows.max() > np.iinfo(dtype).max:
            dtype = np.promote_types(dtype, np.min_scalar_type(rows.max()))
        if end > len(self._block) or dtype != self._block.dtype:
            grown = np.empty((end + end // 4, *self._block.shape[1:]), dtype=dtype)
            grown[: self._size] = self.values
            self._block = grown
        self._block[self._size : end] = rows
        self._size = end
