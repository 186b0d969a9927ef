"""Low-rank adapters (arXiv 2106.09685) through PEFT, which only this module imports."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayrl.adapters import AdapterWeights, merge, pairs_checksum
from rayrl.config import LoraConfig
from rayrl.learner.parallel import SOLO, Ranks, like, whole_tensor
from rayrl.parts import part_of
from rayrl.weights import ADAPTER_CONFIG, ModelFiles, read_model_files

_WRAP, _LAYER = "base_model.model.", ".base_layer."
_WEIGHTS = "adapter_model.safetensors"
_SAMPLED_ELEMENTS = 4096


class _Merged(torch.autograd.Function):
    """A linear layer whose weight is the sum of base and adapters, rounded to the base's type as it
    is published.  Gradients pass the rounding as if it were not there.

    The sum is taken again for the backward pass, in place of being kept for it: it costs the
    adapters' rank, where the layer costs the number of tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return torch.nn.functional.linear(x, merge(weight, a, b, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, a, b = ctx.saved_tensors
        of_x = gradient @ merge(weight, a, b, ctx.scale) if ctx.needs_input_grad[0] else None
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        of_b = rows.T @ (inputs @ a.to(x.dtype).T)
        of_a = (rows @ b.to(x.dtype)).T @ inputs
        return of_x, None, None, ctx.scale * of_a.float(), ctx.scale * of_b.float(), None


def _forward(layer: Any, x: Tensor) -> Tensor:
    """In place of PEFT's, which adds the adapters' outputs in float32: engines hold rounded sums,
    and at small learning rates most of what adapters add is less than what rounding takes."""
    base = layer.base_layer
    if layer.disable_adapters:
        outputs: Tensor = base(x)
        return outputs
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged: Tensor = _Merged.apply(x, base.weight, base.bias, a, b, layer.scaling["default"])
    return merged


@functools.cache
def _merging(kind: Any) -> Any:
    """A class of PEFT's layers with the ``forward`` above.  One for all of them: a function that is
    a layer's own would have torch.compile make every layer anew, and give up after some."""
    return type(f"Merging{kind.__name__}", (kind,), {"forward": _forward})


class Adapters:
    """Adapters on every linear layer of the parts that train, the output head left out.

    ``model`` is the adapted model, in which nothing but the adapters trains; its base stays as it
    is, so that with the adapters :meth:`off` it is the reference.
    """

    def __init__(self, model: Any, config: LoraConfig, parts: Collection[str], seed: int) -> None:
        try:
            import peft
        except ImportError:
            raise ValueError(
                f"learner.lora.rank {config.rank} needs PEFT: install rayrl[lora]"
            ) from None
        head = model.get_output_embeddings()
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and module is not head
            and part_of(f"{name}.weight") in parts
        ]
        if not targets:
            raise ValueError(
                f"no linear layer belongs to {sorted(parts)} in {type(model).__name__}"
            )
        options = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets
        )
        with torch.random.fork_rng(devices=[]):
            # Every rank draws the same A; B starts at 0, so the policy starts at the base.
            torch.manual_seed(seed)
            self.model = peft.get_peft_model(model, options).eval()
        self.scale = config.alpha / config.rank
        # PEFT has put a layer of its own in the place of each.
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
        for layer in self._layers.values():
            if layer.base_layer.weight.dtype != torch.float32:
                layer.__class__ = _merging(layer.__class__)

    def off(self) -> AbstractContextManager[None]:
        """While entered, the model computes as its base."""
        context: AbstractContextManager[None] = self.model.disable_adapter()
        return context

    def tensors(self, *, merged: bool) -> Iterator[tuple[str, Tensor]]:
        """The base's parameters under the names they have without adapters, those that adapters
        change merged with them or as they are.  Where a model is sharded, every rank must take all
        of them, in turn: one that is merged is whole while it is the last."""
        for wrapped, parameter in self.model.named_parameters(remove_duplicate=False):
            name = wrapped.removeprefix(_WRAP).replace(_LAYER, ".")
            if ".lora_" in wrapped:
                continue
            layer = name.removesuffix(".weight")
            if merged and _LAYER in wrapped and wrapped.endswith(".weight"):
                a, b = (whole_tensor(side.detach()) for side in self._pair(layer))
                yield name, merge(whole_tensor(parameter.detach()), a, b, self.scale)
            else:
                yield name, parameter

    @property
    def changed(self) -> list[str]:
        """Names of the parameters that adapters change."""
        return [f"{name}.weight" for name in self._layers]

    def weights(self, version: int, ranks: Ranks = SOLO) -> AdapterWeights | None:
        """The adapters alone, in host memory, on rank 0; the others, on which it must be called
        too, return None.

        Raises ValueError naming the first that is not finite."""
        pairs = {}
        for name in self._layers:
            a, b = (np.array(ranks.gathered(side).float().numpy()) for side in self._pair(name))
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"adapters of version {version}: {name} is not finite")
            pairs[f"{name}.weight"] = (a, b)
        if ranks.rank > 0:
            return None
        return AdapterWeights(
            version=version, scale=self.scale, pairs=pairs, checksum=pairs_checksum(pairs)
        )

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        module = self._layers[name]
        return module.lora_A["default"].weight, module.lora_B["default"].weight

    def files(self, processor: Any, ranks: Ranks = SOLO) -> ModelFiles:
        """The adapters and the processor, on rank 0; called on every rank.  Without config.json:
        from_pretrained then takes the base that the adapters name."""
        state = {name: ranks.gathered(p) for name, p in self._trained()}
        if ranks.rank > 0:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, state_dict=state)
            (Path(folder) / "README.md").unlink(missing_ok=True)
            processor.save_pretrained(folder)
            return dict(read_model_files(folder))

    def restore(self, files: ModelFiles) -> None:
        """Inverse of :meth:`files`.

        Raises ValueError where they are no adapters, or those of another model."""
        from safetensors.torch import load

        if _WEIGHTS not in files:
            raise ValueError("checkpoint of another model: it holds no adapters")
        state = load(files[_WEIGHTS].tobytes())
        have = {name: tuple(value.shape) for name, value in state.items()}
        mine = {name.replace(".default.", "."): p for name, p in self._trained()}
        want = {name: tuple(p.shape) for name, p in mine.items()}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ValueError(
                    f"checkpoint of another model: adapter {name} is {have.get(name, 'absent')} in "
                    f"the checkpoint and {want.get(name, 'absent')} in this run's model"
                )
        if ADAPTER_CONFIG in files:
            found = json.loads(files[ADAPTER_CONFIG].tobytes())
            scale = found["lora_alpha"] / found["r"]
            if scale != self.scale:
                raise ValueError(
                    f"the checkpoint's adapters count {scale:g} times (learner.lora.alpha "
                    f"{found['lora_alpha']:g} over rank {found['r']}), this run's {self.scale:g}: "
                    "give it the same learner.lora.alpha"
                )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(like(state[name], parameter))

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.model.named_parameters() if ".lora_" in n)

    def fingerprint(self) -> str:
        """Tells bases apart: names, shapes and a strided sample of the values."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self.tensors(merged=False):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)].float().cpu()
            digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()
