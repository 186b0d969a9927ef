"""Rewards of rollout groups: terms, weighted and summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrl.rewards import ptb
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.config import RewardConfig
from rayrl.types import RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that could not be scored, and why."""

    prompt_id: str
    reason: str


def reward_document_frequency(
    references: Sequence[Sequence[str]], config: RewardConfig
) -> DocumentFrequency:
    """The document frequencies that ``config`` asks for, from each image's raw captions."""
    tokenized = [[ptb.tokenize(caption) for caption in captions] for captions in references]
    return DocumentFrequency.from_references(tokenized, eos=config.eos, source=config.df)


class Scorer:
    """Scores rollout groups with the terms of ``config``."""

    def __init__(self, config: RewardConfig, df: DocumentFrequency) -> None:
        if df.eos != config.eos:
            raise ValueError(
                f"the document frequencies were counted with eos={df.eos}, the rewards want "
                f"eos={config.eos}; build them with reward_document_frequency(references, config)"
            )
        self.config = config
        self._cider = CiderD(df)

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup | Dropped]:
        """Each group with its rewards, or the reason why it has none."""
        completions = [
            (group, completion)
            for group in groups
            for completion in (*group.completions, *([group.greedy] if group.greedy else []))
        ]
        references = {
            id(group): [ptb.tokenize(text) for text in group.prompt.references] for group in groups
        }
        scores = self._cider.score(
            [ptb.tokenize(completion.text) for _, completion in completions],
            [references[id(group)] for group, _ in completions],
            [completion.finish_reason == "stop" for _, completion in completions],
        )
        scored: list[ScoredGroup | Dropped] = []
        start = 0
        for group in groups:
            end = start + group.group_size
            terms = {"cider_d": scores[start:end].astype(np.float32)}
            greedy = None if group.greedy is None else float(scores[end])
            start = end + (group.greedy is not None)
            scored.append(
                ScoredGroup(
                    group=group, terms=terms, rewards=terms["cider_d"], greedy_reward=greedy
                )
            )
        return scored


def corpus_cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a held-out set, 0..10, as pycocoevalcap reports it: PTB tokens, no ``<eos>``,
    document frequencies from the references of this set.  Raw text; one caption an image."""
    tokenized = [[ptb.tokenize(text) for text in captions_] for captions_ in references]
    df = DocumentFrequency.from_references(tokenized, source="corpus")
    return float(CiderD(df).score([ptb.tokenize(text) for text in captions], tokenized).mean())
