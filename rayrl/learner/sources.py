"""The providers that bring what an objective needs."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rayrl.learner.anchors import Anchors
from rayrl.learner.caption_features import CaptionFeatures
from rayrl.learner.changed import ChangedImages
from rayrl.learner.heads import Critic, TermHeads
from rayrl.learner.parallel import SOLO, Ranks
from rayrl.learner.policy import Policy
from rayrl.learner.providers import Collisions, OldLogprobs, OtherModels, Provider, Providers
from rayrl.objectives.config import SourcesConfig

FROM_REFERENCE = frozenset({"ref_logprobs", "augmented_ref_logprobs", "caption_features"})
"""Needs that the frozen model of stage 1 serves."""


def make_providers(
    needs: Collection[str],
    config: SourcesConfig,
    policy: Policy,
    *,
    updates_per_step: int,
    num_terms: int,
    ranks: Ranks = SOLO,
) -> Providers:
    """The providers of ``needs`` beyond the reference model."""
    hidden_size = policy.model.get_output_embeddings().in_features
    # With one update a step the losses' own pass is the old policy.
    wanted = {*needs, *(["old_logprobs"] if updates_per_step > 1 else [])}
    makers: dict[str, Callable[[], Provider]] = {
        "old_logprobs": OldLogprobs,
        "collision": Collisions,
        "guide_logprobs": lambda: OtherModels(
            "guide_logprobs", policy.others([config.guide]), policy.forward, single=True
        ),
        "auxiliary_logprobs": lambda: OtherModels(
            "auxiliary_logprobs", policy.others(config.auxiliaries), policy.forward, single=False
        ),
        "augmented_logprobs": lambda: ChangedImages(
            policy, config.image_change, config.change_strength
        ),
        "head_logprobs": lambda: TermHeads(
            hidden_size, num_terms, lr=config.head_lr, device=policy.device, ranks=ranks
        ),
        "caption_features": lambda: CaptionFeatures(policy),
        "anchor_logprobs": lambda: Anchors(policy.processor, policy.eos_id),
        "values": lambda: Critic(hidden_size, lr=config.head_lr, device=policy.device, ranks=ranks),
    }
    return Providers((make() for need, make in makers.items() if need in wanted), ranks)
