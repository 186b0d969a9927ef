"""What a learner can bring of an objective's needs, and the providers that do."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rayrl.config import LearnerConfig
from rayrl.learner.heads import Critic
from rayrl.learner.parallel import SOLO, Ranks
from rayrl.learner.providers import Collisions, OldLogprobs, Provider, Providers
from rayrl.objectives.compile import PROVIDED
from rayrl.objectives.config import SourcesConfig


def provided(config: LearnerConfig, images_per_step: int) -> frozenset[str]:
    """What a learner of these settings can give an objective beyond tokens and rewards: losses
    over whole minibatches only where a rank's share of one goes through the model at once."""
    largest = -(-(images_per_step // config.minibatches) // config.num_workers)
    whole = largest <= config.micro_batch_images and not config.micro_batch_tokens
    return PROVIDED | {"whole_minibatch"} if whole else frozenset(PROVIDED)


def make_providers(
    needs: Collection[str],
    config: SourcesConfig,
    *,
    updates_per_step: int,
    hidden_size: int,
    device: str,
    ranks: Ranks = SOLO,
) -> Providers:
    """The providers of ``needs`` beyond the reference model, for a policy with hidden states of
    ``hidden_size``."""
    # With one update a step the losses' own pass is the old policy.
    wanted = {*needs, *(["old_logprobs"] if updates_per_step > 1 else [])}
    makers: dict[str, Callable[[], Provider]] = {
        "old_logprobs": OldLogprobs,
        "collision": Collisions,
        "values": lambda: Critic(hidden_size, lr=config.head_lr, device=device, ranks=ranks),
    }
    return Providers((make() for need, make in makers.items() if need in wanted), ranks)
