"""The reward actor: a scorer behind Ray."""

from __future__ import annotations

import ray

from rayrl.rewards.cider import DocumentFrequency
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.score import Dropped, Scorer
from rayrl.types import RolloutGroup, ScoredGroup


@ray.remote
class RewardActor:
    """Scores whole batches of groups; the document frequencies are shared by the node's actors."""

    def __init__(self, config: RewardConfig, df: DocumentFrequency) -> None:
        self._scorer = Scorer(config, df)

    def score(self, groups: list[RolloutGroup]) -> list[ScoredGroup | Dropped]:
        """One result a group, in order: scored, or dropped with the reason."""
        return self._scorer.score(groups)
