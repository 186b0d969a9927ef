"""What a learner can bring of an objective's needs, and the providers that do."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rayrl.config import Config
from rayrl.learner.anchors import Anchors
from rayrl.learner.caption_features import CaptionFeatures
from rayrl.learner.changed import ChangedImages
from rayrl.learner.heads import Critic, TermHeads
from rayrl.learner.parallel import SOLO, Ranks
from rayrl.learner.policy import Policy
from rayrl.learner.providers import Collisions, OldLogprobs, OtherModels, Provider, Providers
from rayrl.objectives import build
from rayrl.objectives.compile import PROVIDED
from rayrl.objectives.config import SourcesConfig
from rayrl.objectives.rehearsal import rehearse
from rayrl.rewards.config import FunctionConfig, HttpConfig
from rayrl.rounds import check_planners

FROM_REFERENCE = frozenset({"ref_logprobs", "augmented_ref_logprobs", "caption_features"})
"""Needs that the frozen model of stage 1 serves."""


def provided(config: Config) -> frozenset[str]:
    """What a run of these settings can give an objective beyond tokens and rewards."""
    judge = any(isinstance(t, FunctionConfig | HttpConfig) for t in config.reward.terms.values())
    given = {
        "whole_minibatch": _whole_minibatches(config),
        "similarity": config.reward.counts_ngrams,
        "judge_ok": bool(config.reward.constraints),
        "reward_versions": judge,
        "token_credit": judge,
        "guide_logprobs": bool(config.objective.sources.guide),
        "auxiliary_logprobs": bool(config.objective.sources.auxiliaries),
    }
    return PROVIDED.difference(given) | {need for need, there in given.items() if there}


def check_objective(config: Config) -> None:
    """Raise ValueError, in words, where the objective's plan does not fit together, needs what a
    run of these settings cannot bring, or does not fit its reward terms or the group's size: before
    any work."""
    objective = build(config.objective)
    objective.check(provided(config))
    check_planners(objective.planners(0), config.train.group_size)
    rehearse(objective, list(config.reward.terms), config.train.group_size)


def _whole_minibatches(config: Config) -> bool:
    """Whether a rank's share of a minibatch goes through the model at once."""
    learner = config.learner
    largest = -(-(config.train.images_per_step // learner.minibatches) // learner.num_workers)
    return largest <= learner.micro_batch_images and not learner.micro_batch_tokens


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
