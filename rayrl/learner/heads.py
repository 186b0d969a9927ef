"""Heads that train beside the policy, on its hidden states: a critic, and one for each term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rayrl.learner.optimizer import optimizer_arrays, restore_optimizer
from rayrl.learner.parallel import SOLO, Ranks
from rayrl.learner.providers import MicroBatch, Provider


class ValueHead(nn.Module):
    """One linear layer, so that the critic costs next to nothing; it starts at 0, where advantages
    are returns.

    The hidden states are detached: the critic reads the policy and does not shape it.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [...] of hidden states [..., D]."""
        return self.linear(hidden.detach().to(self.linear.weight.dtype))[..., 0]


class HeadProvider(Provider):
    """A module in float32 with an AdamW of its own at a constant rate; ``name`` is that of its
    arrays in a checkpoint."""

    reads_states = True

    def __init__(self, name: str, module: nn.Module, *, lr: float, ranks: Ranks = SOLO) -> None:
        self._name = name
        self._ranks = ranks
        self.module = module
        self._named = dict(module.named_parameters())
        self._prefix = f"{name}_optimizer"
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=lr, weight_decay=0.0)

    def before_update(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def after_update(self) -> dict[str, float]:
        # A head is small and whole on every rank, whatever becomes of the policy.
        replace(self._ranks, mode="data").total_gradients(list(self._named.values()))
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if bool(norm.isfinite()):
            self._optimizer.step()
        return {f"learner/grad_norm_{self._name}": float(norm)}

    def arrays(self) -> dict[str, np.ndarray]:
        weights = {
            f"{self._name}/{name}": p.detach().cpu().numpy().copy()
            for name, p in self._named.items()
        }
        return {**weights, **optimizer_arrays(self._optimizer, self._named, prefix=self._prefix)}

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, parameter in self._named.items():
            stored = arrays.get(f"{self._name}/{name}")
            if stored is None or stored.shape != tuple(parameter.shape):
                raise ValueError(
                    f"checkpoint of another run: {self._name} {name} is "
                    f"{'absent' if stored is None else stored.shape} in the checkpoint, want "
                    f"{tuple(parameter.shape)}; resume with the objective that it was written with"
                )
            parameter.copy_(torch.from_numpy(np.array(stored)))
        restore_optimizer(self._optimizer, self._named, arrays, self._prefix)


class Critic(HeadProvider):
    """Values of the captions' prefixes: of the prefix before each token, by the weights at the
    start of the step and by the current ones."""

    def __init__(self, hidden_size: int, *, lr: float, device: str, ranks: Ranks = SOLO) -> None:
        super().__init__("critic", ValueHead(hidden_size).to(device), lr=lr, ranks=ranks)

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        return {"values": self._values(part)}

    def in_update(self, part: MicroBatch) -> dict[str, Tensor]:
        return {"policy_values": self._values(part)}

    def _values(self, part: MicroBatch) -> Tensor:
        """[P, G, T], 0 where there is no token; each distinct prefix is computed once."""
        states = part.policy.states
        assert states is not None
        return states.spread(self.module(states.hidden))


class TermAdapters(nn.Module):
    """For each of K reward terms a residual of low rank on the hidden state before the model's own
    output matrix, so that a head costs 2 D r weights and not D V.  They start at 0, where every
    head is the policy."""

    def __init__(self, hidden_size: int, terms: int, *, rank: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        down = torch.randn(terms, hidden_size, rank, generator=draw) / hidden_size**0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(terms, rank, hidden_size))

    def forward(self, hidden: Tensor, term: int) -> Tensor:
        """Hidden states [N, D] of one head; gradients reach the model's own states too."""
        moved = hidden.to(self.down.dtype) @ self.down[term] @ self.up[term]
        return hidden + moved.to(hidden.dtype)


class TermHeads(HeadProvider):
    """Log-probs of the captions by one output head for each reward term, in the terms' order."""

    def __init__(
        self, hidden_size: int, terms: int, *, lr: float, device: str, ranks: Ranks = SOLO
    ) -> None:
        adapters = TermAdapters(hidden_size, terms, rank=16).to(device)
        super().__init__("term_heads", adapters, lr=lr, ranks=ranks)
        self._terms = terms

    def in_update(self, part: MicroBatch) -> dict[str, Tensor]:
        states = part.policy.states
        assert states is not None
        each = [states.logprobs(self.module(states.hidden, k))[0] for k in range(self._terms)]
        return {"head_logprobs": torch.stack(each, -1)}
