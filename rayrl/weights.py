"""Weights on the wire: numpy arrays with names, shapes, a version and a checksum.

The learner packs its parameters once a step; an engine pulls them by version, checks them against
the manifest and only then applies them.  bfloat16 travels as uint16, since numpy has no such type.
Small files of a model (configuration, tokenizer) travel the same way, so that a worker on a fresh
node needs nothing on its disk.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

# What is hashed of each tensor: this many blocks of as many values, so that a change of any layer
# shows at a bounded cost.  Blocks, for single values would touch as many pages of shared memory.
_BLOCKS = 64

ModelFiles = Mapping[str, np.ndarray]

ADAPTER_CONFIG = "adapter_config.json"
"""Where PEFT says of a folder that it holds adapters, and of which base."""


class Loadable(Protocol):
    """A version that an engine can apply, wherever its values lie."""

    @property
    def version(self) -> int: ...

    def verify(self) -> None:
        """Raise ValueError when the values are not those that were packed."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs, second names of shared parameters included: read them, never
        write."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """Parameters of one version.  ``arrays`` maps a checkpoint name to its values; ``bfloat16``
    names those that are bf16 bits in uint16.  ``tied`` maps a second name of a shared parameter
    to the one that carries its values: engines may hold such a matrix twice.  ``checksum`` covers
    names, shapes, types and a sample of the values."""

    version: int
    arrays: Mapping[str, np.ndarray]
    bfloat16: frozenset[str]
    tied: Mapping[str, str]
    checksum: str

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def verify(self) -> None:
        """Raise ValueError when the values are not those that were packed."""
        got = checksum(self.arrays)
        if got != self.checksum:
            raise ValueError(
                f"weights of version {self.version}: checksum {got}, want {self.checksum}; "
                "they were damaged on the way"
            )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs, second names included, that share memory with the arrays: read
        them, never write."""
        with warnings.catch_warnings():
            # Arrays in Ray's shared memory are read-only, which torch cannot express.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        for name in self.bfloat16:
            tensors[name] = tensors[name].view(torch.bfloat16)
        yield from tensors.items()
        for name, source in self.tied.items():
            yield name, tensors[source]


def pack(
    model: torch.nn.Module,
    version: int,
    names: Collection[str] | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
) -> Weights:
    """Copy a model's parameters (or those in ``names``) to host memory as one version; see
    :func:`pack_tensors`."""
    named = model.named_parameters(remove_duplicate=False)
    return pack_tensors(named, version, names, gather)


def pack_tensors(
    named: Iterable[tuple[str, torch.Tensor]],
    version: int,
    names: Collection[str] | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
) -> Weights:
    """Copy tensors (or those in ``names``) to host memory as one version.  A parameter that comes
    under a second name is tied to the first.

    gather: from a tensor to its whole values in host memory, one tensor after the other

    Raises ValueError naming the first parameter that is not finite: a broken policy must not
    reach the engines.
    """
    arrays: dict[str, np.ndarray] = {}
    halves: set[str] = set()
    tied: dict[str, str] = {}
    for name, tensor in distinct(named, version, names, gather, tied):
        if tensor.dtype == torch.bfloat16:
            halves.add(name)
            tensor = tensor.view(torch.uint16)
        # A copy, for on CPU numpy() would alias memory that the next step changes.
        arrays[name] = np.array(tensor.numpy())
    return Weights(
        version=version,
        arrays=arrays,
        bfloat16=frozenset(halves),
        tied=tied,
        checksum=checksum(arrays),
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN: the extremes of a tensor with a NaN are NaN.  One pass
    over memory, where ``isfinite`` writes several masks as long as the tensor."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def distinct(
    named: Iterable[tuple[str, torch.Tensor]],
    version: int,
    names: Collection[str] | None,
    gather: Callable[[torch.Tensor], torch.Tensor],
    tied: dict[str, str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor (or those in ``names``) once, contiguous and as ``gather`` gives it; the second
    name of a parameter goes into ``tied`` with its first.

    Raises ValueError naming the first that is not finite."""
    first_name: dict[int, str] = {}
    for name, parameter in named:
        source = name
        if isinstance(parameter, torch.nn.Parameter):
            source = first_name.setdefault(id(parameter), name)
        if names is not None and source not in names:
            continue
        if source != name:
            tied[name] = source
            continue
        tensor = gather(parameter.detach()).contiguous()
        if not _all_finite(tensor):
            raise ValueError(f"weights of version {version}: {name} is not finite")
        yield name, tensor


Sample = tuple[str, tuple[int, ...], np.ndarray]
"""A tensor's name, its shape, and a sample of its values, in which bfloat16 is uint16."""


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Hex digest over names, shapes, types and a sample of every array."""
    return digest((name, array.shape, _blocks(array.reshape(-1))) for name, array in arrays.items())


def digest(samples: Iterable[Sample]) -> str:
    """The :func:`checksum` of arrays of which there are samples alone."""
    # Processors have instructions for SHA-256.
    hashed = hashlib.sha256()
    for name, shape, sample in sorted(samples, key=lambda one: one[0]):
        hashed.update(f"{name}|{shape}|{sample.dtype.str}|".encode())
        hashed.update(sample.tobytes())
    return hashed.hexdigest()[:32]


def sample(name: str, tensor: torch.Tensor) -> Sample:
    """That of a tensor, wherever it is; only the sample is copied to the host."""
    values = sampled(tensor).cpu()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.uint16)
    return name, tuple(tensor.shape), values.numpy()


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """The sample [n] of a tensor's values that checksums cover, where the tensor is."""
    return _blocks(tensor.detach().reshape(-1)).reshape(-1)


_Flat = TypeVar("_Flat", np.ndarray, torch.Tensor)


def _blocks(flat: _Flat) -> _Flat:
    """Of values [n] as many blocks as they are long, evenly spaced, the last one at the end; all
    where they are few."""
    step = len(flat) // _BLOCKS
    if step <= _BLOCKS:
        return flat
    return flat[len(flat) - _BLOCKS * step :].reshape(_BLOCKS, step)[:, -_BLOCKS:]


def load_into(model: torch.nn.Module, weights: Loadable) -> None:
    """Copy ``weights`` into the model's parameters of the same names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in weights.tensors():
            if name not in parameters:
                raise ValueError(f"weights of version {weights.version}: no parameter {name!r}")
            target = parameters[name]
            if target.shape != tensor.shape:
                raise ValueError(
                    f"weights of version {weights.version}: {name} of shape "
                    f"{tuple(tensor.shape)}, want {tuple(target.shape)}"
                )
            target.copy_(tensor)


class FolderFiles(Mapping[str, np.ndarray]):
    """The files of a folder as it is now (not of its sub-folders) as byte arrays, each read when it
    is asked for: a large model is not held in memory for the sake of its small files."""

    def __init__(self, folder: Path) -> None:
        self._files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.fromfile(self._files[name], dtype=np.uint8)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_model_files(folder: str | Path) -> FolderFiles:
    """All files of a model folder; FileNotFoundError where it is none."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise FileNotFoundError(f"{folder}: no config.json, so this is not a model folder")
    return FolderFiles(folder)


def without_weights(files: ModelFiles) -> dict[str, np.ndarray]:
    """The small files among those of :func:`read_model_files`, in memory: what an engine starts
    from that will pull its weights."""
    weights = (".safetensors", ".safetensors.index.json", ADAPTER_CONFIG)
    return {name: files[name] for name in files if not name.endswith(weights)}


def write_model_files(files: ModelFiles, folder: Path, *, with_weights: bool) -> Path:
    """Write files of :func:`read_model_files` into ``folder``, or only those that are left
    :func:`without_weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files if with_weights else without_weights(files)).items():
        if Path(name).name != name:
            raise ValueError(f"model file {name!r}: want a bare file name")
        content.tofile(folder / name)
    return folder
