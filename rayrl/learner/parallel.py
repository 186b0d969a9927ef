"""Several ranks that take one rank's step: torch.distributed behind a few sums.

Every rank holds the whole step's groups and prepares the objective over all of them, so that its
statistics are exact, and computes log-probs and gradients for its share of the images only.  A
loss is a share of the minibatch's mean, hence everything here is summed over ranks, never
averaged, and shares may be of different sizes.

``data``: every rank has the whole model; gradients are summed.  ``fsdp``: parameters, gradients
and optimizer state are split over the ranks (FSDP2, arXiv 2304.11277); a layer is gathered when it
runs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rayrl.parts import part_of

T = TypeVar("T")

_BUCKET_BYTES = 64 * 2**20
"""Gradients that are copied together for one all-reduce."""


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that take a step together: ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1
    mode: Literal["data", "fsdp"] = "data"

    @property
    def sharded(self) -> bool:
        """Whether parameters are split over the ranks."""
        return self.mode == "fsdp" and self.size > 1

    def share(self, items: Sequence[T], rank: int | None = None) -> list[T]:
        """A rank's contiguous part (this one's by default), of nearly equal size; may be empty."""
        rank = self.rank if rank is None else rank
        n = len(items)
        return list(items[n * rank // self.size : n * (rank + 1) // self.size])

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, on every rank.  Its gradient is the one of the sum of all ranks'
        losses, so every rank must take part in the backward pass too."""
        return x if self.size == 1 else _Total.apply(x)

    def total_metrics(
        self, metrics: Mapping[str, tuple[float, float]]
    ) -> dict[str, tuple[float, float]]:
        """(sum, weight) pairs, of the same names on every rank, added up over ranks."""
        if self.size == 1:
            return dict(metrics)
        names = sorted(metrics)
        pairs = torch.tensor([metrics[name] for name in names], dtype=torch.float64)
        dist.all_reduce(pairs)
        return {name: (float(a), float(b)) for name, (a, b) in zip(names, pairs, strict=True)}

    def total_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks.  A parameter that no rank used keeps
        None; sharded ones were summed during the backward pass."""
        if self.size == 1 or self.sharded:
            return
        device = parameters[0].device
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        used = used.to(device)
        dist.all_reduce(used)
        chosen = [p for p, count in zip(parameters, used.tolist(), strict=True) if count]
        for bucket in _buckets(chosen):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            sizes = [gradient.numel() for gradient in gradients]
            for parameter, part in zip(bucket, flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    @torch.no_grad()
    def gathered(self, tensor: Tensor) -> Tensor:
        """A tensor's whole values in host memory on rank 0.  The others, which must ask for the
        same tensors in the same order, only take part and get an empty one."""
        if self.sharded:
            tensor = whole_tensor(tensor)
        return tensor.detach().cpu() if self.rank == 0 else torch.empty(0, dtype=tensor.dtype)

    @torch.no_grad()
    def assembled(self, tensor: Tensor) -> Tensor:
        """The same, left in the memory of rank 0's device; of a sharded model it is in host memory
        all the same, for that device may have no room for all parameters."""
        if self.sharded:
            return self.gathered(tensor)
        return tensor.detach() if self.rank == 0 else torch.empty(0, dtype=tensor.dtype)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of all gradients together, the same on every rank."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return whole_tensor(nn.utils.get_total_norm(gradients))


SOLO = Ranks()
"""The only process of a learner."""


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, up to a bound in bytes."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.nbytes for p in bucket) + parameter.nbytes > _BUCKET_BYTES
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def open_store(address: str, size: int, *, timeout_s: float) -> dist.TCPStore:
    """Where ranks find each other: open as long as this lives, at any free port, its ``port``."""
    return dist.TCPStore(
        address,
        0,
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def join(
    address: str,
    port: int,
    *,
    rank: int,
    size: int,
    mode: Literal["data", "fsdp"],
    start_timeout_s: float,
    timeout_s: float,
) -> Ranks:
    """Become ``rank`` of the ``size`` that meet at an open store, where they wait for each other
    for up to ``start_timeout_s``.  From then on a rank that misses a collective for longer than
    ``timeout_s`` fails it on the others."""
    store = dist.TCPStore(
        address, port, size, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
    # PyTorch waits for the others as long as for a collective, and they may start on machines that
    # are slow, or not there yet.
    store.set(f"rank {rank}", "here")
    store.wait([f"rank {i}" for i in range(size)], timedelta(seconds=start_timeout_s))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    return Ranks(rank=rank, size=size, mode=mode)


def shard(model: Any, compute: Callable[..., Any], device: str) -> None:
    """Split a model's parameters over the ranks, layer by layer, and move them to ``device``, which
    never holds more than one whole layer.

    compute: the function that will be called with the model, through :func:`compute_sharded`

    A vision tower or connector in which nothing trains stays whole on every rank, so that a rank
    which has cached its images' features can leave it out while another runs it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer

    training = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    split = {"language", *training}
    ignored = {p for name, p in model.named_parameters() if part_of(name) not in split}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
        "ignored_params": ignored,
        "reshard_after_forward": True,
        # Whatever the type that parameters compute in, sums over ranks round once.
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        if not set(layer.parameters()) <= ignored:
            fully_shard(layer, **options)
    # What is outside layers is needed again at once by the backward pass.
    fully_shard(model, **{**options, "reshard_after_forward": not training})
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.sharded_compute = types.MethodType(compute, model)
    register_fsdp_forward_method(model, "sharded_compute")


def compute_sharded(model: Any, *arguments: Any, **options: Any) -> Any:
    """Call the function that :func:`shard` was given, gathering parameters as they are needed."""
    outputs = model.sharded_compute(*arguments, **options)
    if not torch.is_grad_enabled():
        model.reshard()  # else the backward pass does, after it has used them
    return outputs


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor's values on every rank: gathered where it is sharded, itself where not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_head(head: nn.Linear) -> nn.Linear:
    """An output matrix to compute with outside of the pass that gathers it, without gradient; on
    every rank."""
    if not isinstance(head.weight, DTensor):
        return head
    whole = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    for name, parameter in head.named_parameters():
        gathered = whole_tensor(parameter.detach())
        whole.register_parameter(name, nn.Parameter(gathered, requires_grad=False))
    return whole


@torch.no_grad()
def like(values: Tensor, target: Tensor) -> Tensor:
    """Whole ``values``, the same on every rank, laid out over devices and ranks as ``target``."""
    values = values.to(device=target.device, dtype=target.dtype)
    if not isinstance(target, DTensor):
        return values
    return distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
