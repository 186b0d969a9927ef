"""A version of the weights as a few flat buffers of bytes, to be sent from memory to memory.

One large message costs much less than hundreds of small ones.  The learner copies its parameters
into buckets; a transport (:mod:`rayrl.transport`) takes the buckets to an engine's process; there
they are read in place, and checked before anything is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rayrl.weights import Sample, digest, distinct, sample

BUCKET_BYTES = 256 * 2**20
"""Size of a bucket; a tensor above it has one of its own."""
_ALIGNED_BYTES = 16  # every piece starts at a multiple, so that it can be read as its own type


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where a tensor lies: bytes ``start`` to ``stop`` of a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bucket: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What travels beside the buckets.  ``sizes``: bytes of each; ``tied``: second names of shared
    parameters; ``handles``: what a transport needs to find the buckets, if anything."""

    version: int
    pieces: tuple[Piece, ...]
    sizes: tuple[int, ...]
    tied: Mapping[str, str]
    checksum: str
    handles: Any = None

    def with_handles(self, handles: Any) -> Manifest:
        return replace(self, handles=handles)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Received:
    """A version that lies in buckets; what an engine loads."""

    manifest: Manifest
    buckets: Sequence[Tensor]

    @property
    def version(self) -> int:
        return self.manifest.version

    def verify(self) -> None:
        """Raise ValueError when the values are not those that were packed."""
        got = digest(sample(*piece) for piece in self._pieces())
        if got != self.manifest.checksum:
            raise ValueError(
                f"weights of version {self.version}: checksum {got}, want "
                f"{self.manifest.checksum}; they were damaged on the way"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs, second names included, that share memory with the buckets."""
        first = dict(self._pieces())
        yield from first.items()
        for name, source in self.manifest.tied.items():
            yield name, first[source]

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        for piece in self.manifest.pieces:
            flat = self.buckets[piece.bucket][piece.start : piece.stop]
            yield piece.name, flat.view(piece.dtype).view(piece.shape)


def fill(
    named: Iterable[tuple[str, Tensor]],
    version: int,
    names: Collection[str] | None = None,
    gather: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> tuple[Manifest, list[Tensor]]:
    """Copy tensors (or those in ``names``) into buckets, where ``gather`` leaves them; see
    :func:`rayrl.weights.pack_tensors`, which copies the same into host memory.

    Raises ValueError naming the first parameter that is not finite."""
    tied: dict[str, str] = {}
    pieces: list[Piece] = []
    samples: list[Sample] = []
    full: list[Tensor] = []
    filling: list[Tensor] = []
    size = 0
    for name, tensor in distinct(named, version, names, gather, tied):
        flat = tensor.reshape(-1).view(torch.uint8)
        if filling and size + len(flat) > bucket_bytes:
            full.append(torch.cat(filling))
            filling, size = [], 0
        pieces.append(
            Piece(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                bucket=len(full),
                start=size,
                stop=size + len(flat),
            )
        )
        samples.append(sample(name, tensor))
        filling += [flat, flat.new_zeros(-len(flat) % _ALIGNED_BYTES)]
        size += sum(len(part) for part in filling[-2:])
    if filling:
        full.append(torch.cat(filling))
    manifest = Manifest(
        version=version,
        pieces=tuple(pieces),
        sizes=tuple(len(bucket) for bucket in full),
        tied=tied,
        checksum=digest(samples),
    )
    return manifest, full
