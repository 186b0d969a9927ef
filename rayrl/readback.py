"""What an engine holds after a sync, read back and compared with what was sent.

A checksum proves that the right bytes arrived; this, that the engine put them where they belong.
It covers the parameters that an engine keeps as a checkpoint has them, or glued together by rows.
Of layouts that kernels have packed there is nothing to read: the canary (:mod:`rayrl.canary`)
proves those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rayrl.weights import Loadable, sampled


def differing(held: Mapping[str, Tensor], weights: Loadable) -> dict[str, str]:
    """By name, how samples of ``held`` (checkpoint name to the engine's values) differ from
    ``weights``, in the engine's type; empty where they do not."""
    return {name: how for name, how in _compared(held, weights) if how}


def _compared(held: Mapping[str, Tensor], weights: Loadable) -> Iterator[tuple[str, str]]:
    """Each tensor that both have, with how it differs, if it does."""
    for name, sent in weights.tensors():
        if name in held:
            yield name, _difference(held[name], sent)


def _difference(got: Tensor, sent: Tensor) -> str:
    if got.shape != sent.shape:
        return f"shape {tuple(got.shape)}, want {tuple(sent.shape)}"
    have, want = sampled(got).cpu(), sampled(sent).to(got.dtype).cpu()
    different = have != want
    if not different.any():
        return ""
    place = int(different.nonzero()[0])
    return (
        f"{int(different.sum())} of {len(want)} values differ, the first is "
        f"{float(have[place]):.6g}, want {float(want[place]):.6g}"
    )


class ReadBack:
    """Checks what one engine holds, version after version.

    The first one shows which tensors the engine keeps as a checkpoint has them: those that differ
    then are in another layout (turned, scaled, padded) and are left to the canary, which the first
    version always has to pass.  All others must be equal ever after.
    """

    def __init__(self) -> None:
        self._other_layout: frozenset[str] | None = None

    def check(self, held: Mapping[str, Tensor], weights: Loadable) -> int:
        """Returns how many tensors were compared.

        Raises RuntimeError naming the first that the engine holds with other values."""
        compared = dict(_compared(held, weights))
        if self._other_layout is None:
            self._other_layout = frozenset(name for name, how in compared.items() if how)
        for name, how in compared.items():
            if how and name not in self._other_layout:
                raise RuntimeError(
                    f"weights of version {weights.version}: read back of {name}: {how}: the engine "
                    "does not hold what it was sent"
                )
        return len(compared.keys() - self._other_layout)


def parts_of_fused(
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    fused: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that ``parameters`` of an engine hold, as views.

    shapes: checkpoint name to shape
    fused: last part of a module's name in the engine to those in the checkpoint whose rows it
        holds one after the other, as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    Rows past a tensor's own are padding.  Left out is what has no parameter of its shape, such as
    weights that were packed for a kernel.
    """
    found = {}
    for name, shape in shapes.items():
        have = parameters.get(name)
        if have is None:
            continue
        if have.shape == torch.Size(shape):
            found[name] = have
        elif have.dim() and shape and have[: shape[0]].shape == torch.Size(shape):
            found[name] = have[: shape[0]]
    for whole, parts in fused.items():
        for name, parameter in parameters.items():
            path, _, kind = name.rpartition(".")
            module, _, last = path.rpartition(".")
            names = [f"{module}.{part}.{kind}".removeprefix(".") for part in parts]
            if last != whole or not all(part in shapes for part in names):
                continue
            rows = [shapes[part][0] for part in names]
            if parameter.shape == (sum(rows), *shapes[names[0]][1:]):
                found.update(zip(names, parameter.split(rows), strict=True))
    return found
