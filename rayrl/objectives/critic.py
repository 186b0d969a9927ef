"""A critic: values of caption prefixes from the policy's own hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One linear layer on the hidden state before each token, so that the critic costs next to
    nothing; it starts at 0, where advantages are returns.

    The hidden states are detached: the critic reads the policy and does not shape it.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Values [P,G,T] from hidden states [P,G,T,D]; 0 where ``mask`` is False."""
        values = self.linear(hidden.detach().to(self.linear.weight.dtype))[..., 0]
        return torch.where(mask, values, 0.0)
