"""Groups for the tests of the objectives: a small one with known numbers, and random ones with a
tiny policy whose log-probs have gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rayrl.objectives import preset
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.objective import Objective, Prepared

F64 = torch.float64


def tensor(*rows: Any) -> Tensor:
    """Float64, so that worked numbers hold to all their digits."""
    return torch.tensor(rows[0] if len(rows) == 1 else rows, dtype=F64)


# Image 1, G = 4, T = 3, the third caption has two tokens; image 2 and a flat group.
REWARDS = tensor([[0.2, 0.5, 0.9, 1.2]])
REWARDS_2 = tensor([[0.4, 0.4, 0.6, 0.6]])
FLAT = tensor([[1.0, 1.0, 1.0, 1.0]])
CLIP = tensor([[0.8, 0.6, 0.7, 0.5]])
CLIP_2 = tensor([[0.5, 0.7, 0.5, 0.7]])
LABELS = tensor([[0.0, 0.0, 1.0, 1.0]])
MASK = torch.tensor([[[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]], dtype=torch.bool)
LENGTHS = MASK.sum(-1)
OLD = tensor([[[-1.0, -0.5, -2.0], [-0.7, -1.2, -0.3], [-1.5, -0.4, 0.0], [-0.9, -0.6, -1.1]]])
MOVED = tensor([[[0.1, -0.05, 0.3], [-0.2, 0.1, 0.05], [0.25, 0.15, 0.0], [-0.3, 0.4, 0.05]]])
REF_MOVED = tensor([[[0.05, 0.0, 0.1], [0.0, -0.1, 0.1], [0.1, 0.0, 0.0], [-0.1, 0.2, 0.0]]])
POLICY = OLD + MOVED
REF = OLD + REF_MOVED
VALID = torch.ones(1, 4, dtype=torch.bool)
NORMALIZED = (REWARDS - 0.7) / REWARDS.std(correction=0)

EXACT = {"ddof": 0, "eps": 0.0}


def assert_close(got: torch.Tensor | float, want: object, tolerance: float = 6e-5) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64),
        torch.as_tensor(want, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


def toy_batch(rewards: Tensor = REWARDS, **changes: Any) -> GroupBatch:
    """The small group, once for each row of ``rewards``."""
    p = len(rewards)

    def each(x: Tensor) -> Tensor:
        return x.expand(p, *x.shape[1:]).clone()

    batch = GroupBatch(
        image_ids=tuple(f"image {i}" for i in range(p)),
        token_ids=torch.zeros(p, 4, 3, dtype=torch.long),
        mask=each(MASK),
        rollout_logprobs=each(OLD),
        old_logprobs=each(OLD),
        terms={"cider_d": rewards},
        rewards=rewards,
        valid=each(VALID),
        truncated=torch.zeros(p, 4, dtype=torch.bool),
        ref_logprobs=each(REF),
    )
    return replace(batch, **changes)


def prepared(objective: Objective, batch: GroupBatch) -> Prepared:
    return objective.prepare(objective.initial_state(), batch)[1]


def loss_of(
    objective: Objective | str,
    batch: GroupBatch | None = None,
    policy: Tensor = POLICY,
    overrides: dict[str, Any] | None = None,
    **graph: Tensor,
) -> float:
    """The loss of the toy group at ``policy``."""
    if isinstance(objective, str):
        objective = preset(objective, **(overrides or {}))
    batch = toy_batch() if batch is None else batch
    ready = prepared(objective, batch)
    policy = policy.expand_as(batch.mask)
    return float(objective.loss(ready, policy, ready.normalizer(), **graph).loss)


def advantages_of(name: str, batch: GroupBatch, **overrides: Any) -> Tensor:
    """[P,G] (or [P,G,T]) advantages of a preset with one channel."""
    advantages = prepared(preset(name, **overrides), batch).fields["advantages"]
    return advantages[:, 0, :, 0] if advantages.shape[-1] == 1 else advantages[:, 0]


VOCABULARY = 12


class TinyPolicy(nn.Module):
    """Next-token logits from image and previous token; heads and a critic beside them."""

    def __init__(self, images: int, terms: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Embedding(2 * images, 8)
        self.token = nn.Embedding(VOCABULARY, 8)
        self.out = nn.Linear(8, VOCABULARY)
        self.heads = nn.ModuleList(nn.Linear(8, VOCABULARY) for _ in range(terms))
        self.critic = nn.Linear(8, 1)
        self.double()

    def hidden(self, rows: Tensor, tokens: Tensor) -> Tensor:
        previous = torch.cat([torch.zeros_like(tokens[..., :1]), tokens[..., :-1]], -1)
        image = self.image(rows).view(-1, *[1] * (tokens.ndim - 1), 8)
        return torch.tanh(image + self.token(previous))

    @staticmethod
    def picked(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        chosen = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return torch.where(mask, chosen, 0.0)

    def logprobs(self, batch: GroupBatch, rows: Tensor | None = None) -> Tensor:
        rows = _rows(batch) if rows is None else rows
        logits = self.out(self.hidden(rows, batch.token_ids))
        return self.picked(logits, batch.token_ids, batch.mask)

    def graph(self, batch: GroupBatch, needs: frozenset[str] | None = None) -> dict[str, Tensor]:
        """What a loss may need with gradient: all of it, or only what ``needs`` names."""
        rows = _rows(batch)
        hidden = self.hidden(rows, batch.token_ids)
        anchors = batch.token_ids[:, :2]
        makers: dict[str, Callable[[], Tensor]] = {
            "entropy": lambda: _entropy(self.out(hidden)) * batch.mask,
            "policy_values": lambda: self.critic(hidden)[..., 0] * batch.mask,
            "augmented_logprobs": lambda: self.logprobs(
                batch, rows + self.image.num_embeddings // 2
            ),
            "head_logprobs": lambda: torch.stack(
                [self.picked(head(hidden), batch.token_ids, batch.mask) for head in self.heads], -1
            ),
            "anchor_logprobs": lambda: self.picked(
                self.out(self.hidden(rows, anchors)), anchors, batch.mask[:, :2]
            ),
            "anchor_mask": lambda: batch.mask[:, :2],
        }
        return {name: make() for name, make in makers.items() if needs is None or name in needs}


def _entropy(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def _first_of_first(lengths: Tensor, t: int) -> Tensor:
    """True on the first token of each group's first caption, if it has another one."""
    forced = torch.zeros(*lengths.shape, t, dtype=torch.bool)
    forced[:, 0, 0] = lengths[:, 0] > 1
    return forced


def _rows(batch: GroupBatch) -> Tensor:
    return torch.tensor([int(name) for name in batch.image_ids])


TERMS = ("cider_d", "clip_score", "word_accuracy", "reward_model")


def synthetic_batch(
    policy: TinyPolicy, p: int = 4, g: int = 5, t: int = 6, seed: int = 1, num_terms: int = 2
) -> GroupBatch:
    """Groups with every optional field; the policy is old, engine and reference differ a little."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=F64)

    lengths = torch.randint(1, t + 1, (p, g), generator=draw)
    lengths[0, 0] = 1
    mask = torch.arange(t) < lengths[..., None]
    tokens = torch.randint(0, VOCABULARY, (p, g, t), generator=draw)
    tokens[:, 1, 0] = tokens[:, 0, 0]  # a shared prefix in every group
    terms = {name: uniform(p, g) for name in TERMS[:num_terms]}
    zeros = torch.zeros(p, g, t, dtype=F64)
    batch = GroupBatch(
        image_ids=tuple(str(i) for i in range(p)),
        token_ids=tokens,
        mask=mask,
        rollout_logprobs=zeros,
        old_logprobs=zeros,
        terms=terms,
        rewards=2 * terms["cider_d"],
        valid=torch.ones(p, g, dtype=torch.bool),
        truncated=lengths == t,
    )
    with torch.no_grad():
        old = policy.logprobs(batch)
        values = policy.graph(batch)["policy_values"]

    def near(scale: float) -> Tensor:
        return torch.where(mask, old + scale * (uniform(p, g, t) - 0.5), 0.0)

    similarity = uniform(p, g, g)
    similarity = similarity @ similarity.transpose(1, 2) / g
    scale = similarity.diagonal(dim1=1, dim2=2).sqrt()
    return replace(
        batch,
        rollout_logprobs=near(0.1),
        old_logprobs=old,
        ref_logprobs=near(0.4),
        greedy_rewards=uniform(p),
        reference_rewards=2 * uniform(p, 3),
        values=values,
        token_credit=(uniform(p, g, t) > 0.8).double(),
        guide_logprobs=near(0.4),
        forced=_first_of_first(lengths, t),
        judge_ok=uniform(p, g) > 0.3,
        reward_versions=torch.ones(p, g, dtype=torch.long),
        similarity=similarity / scale[:, :, None] / scale[:, None],
        prefix_values=2 * uniform(p, g, t + 1),
        collision=0.3 * uniform(p, g, t),
        auxiliary_logprobs=near(0.4)[..., None],
        augmented_ref_logprobs=near(0.4),
        earlier=(torch.arange(g) == g - 1).expand(p, g),
        caption_features=uniform(p, g, 3),
    )
