"""Low-rank adapters on the wire: a few matrices that a worker adds to the base it already has.

A weight W of the base becomes W + scale B A (arXiv 2106.09685).  The sum is taken in float32 and
rounded to the base's type, by the same function on both ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rayrl.weights import ADAPTER_CONFIG, ModelFiles, Weights, checksum, pack_tensors

__all__ = [
    "ADAPTER_CONFIG",
    "AdapterWeights",
    "base_folder",
    "merge",
    "pairs_checksum",
    "with_base",
]


@torch.no_grad()
def merge(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``base`` [out, in] with the product of ``b`` [out, r] and ``a`` [r, in] added."""
    return (base.float() + scale * (b.float() @ a.float())).to(base.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """The adapters of one version.  ``pairs`` maps the base's name of a weight to A [r, in] and
    B [out, r] in float32; ``checksum`` covers both."""

    version: int
    scale: float
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    checksum: str

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())

    def merged(self, base: Weights | None) -> Weights:
        """The adapted weights, as a version that an engine loads.

        Raises ValueError where there is no base, it lacks a weight, or the adapters were damaged
        on the way."""
        who = f"adapters of version {self.version}"
        if base is None:
            raise ValueError(f"{who}: the base's weights must be loaded first")
        got = pairs_checksum(self.pairs)
        if got != self.checksum:
            raise ValueError(f"{who}: checksum {got}, want {self.checksum}")
        tensors = dict(base.tensors())
        for name in self.pairs:
            if name not in tensors:
                raise ValueError(f"{who}: the base has no weight {name!r}")
        named = (
            (name, merge(tensors[name], _tensor(a), _tensor(b), self.scale))
            for name, (a, b) in self.pairs.items()
        )
        return pack_tensors(named, self.version)


def pairs_checksum(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Hex digest of adapters by name."""
    return checksum({f"{n}/{side}": x for n, p in pairs.items() for side, x in enumerate(p)})


def _tensor(array: np.ndarray) -> Tensor:
    # A copy: arrays in shared memory are read-only, and adapters are small.
    return torch.from_numpy(np.array(array))


def with_base(files: ModelFiles, base: Path) -> ModelFiles:
    """Adapter files that say where their base is, so that ``from_pretrained`` finds it; files of a
    whole model as they are."""
    if ADAPTER_CONFIG not in files:
        return files
    config = json.loads(files[ADAPTER_CONFIG].tobytes())
    config["base_model_name_or_path"] = str(base.resolve())
    text = json.dumps(config, indent=1).encode()
    return {**files, ADAPTER_CONFIG: np.frombuffer(text, np.uint8)}


def base_folder(path: str | Path) -> str | Path:
    """The model that the adapters of a folder are for, or the folder itself where it has none.  A
    run folder may have been moved since, or come from a remote place: then it is the run's own.

    Raises FileNotFoundError when that model is not there."""
    adapters = Path(path) / ADAPTER_CONFIG
    if not adapters.is_file():
        return path
    base = str(json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"])
    if not Path(base).is_absolute() or Path(base).is_dir():
        return base
    own = Path(path).resolve().parents[1] / "stage1" / "final"
    if not own.is_dir():
        raise FileNotFoundError(f"{path}: its adapters are for {base}, which is not there")
    return own
