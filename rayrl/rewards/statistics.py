"""What CIDEr-D scores against in a run: counted once, shared by every reward actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayrl.rewards import ptb
from rayrl.rewards.config import DF_FILES, RewardConfig
from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.rewards.pickles import read_pickle
from rayrl.rewards.reference_index import ReferenceIndex
from rayrl.rewards.signature import PTB_SIGNATURE, batch_signature, cider_signature
from rayrl.rewards.term import tokenized_references


@dataclass(frozen=True, eq=False)
class Statistics:
    """Frozen document frequencies, and the vectors of the training references.

    Both are plain numpy arrays: put into Ray's object store once, they are read by the actors of a
    node without a copy.  ``df`` is None where no term counts n-grams, or each step counts its own;
    references that ``index`` does not hold are added by each scorer for itself as they come.
    """

    df: DocumentFrequency | None = None
    index: ReferenceIndex | None = None


def reward_statistics(references: Sequence[Sequence[str]], config: RewardConfig) -> Statistics:
    """What the terms of ``config`` need; ``references`` are the raw captions of each training
    image.

    FileNotFoundError and ValueError for a file of document frequencies that cannot serve.
    """
    if config.df == "batch" or not config.counts_ngrams:
        return Statistics()
    tokenized = [[ptb.tokenize(caption) for caption in captions] for captions in references]
    df = _document_frequency(tokenized, config)
    check_eos(df, config)
    return Statistics(df, ReferenceIndex.build(df, tokenized))


def step_document_frequency(
    references: Mapping[str, tuple[str, ...]], config: RewardConfig
) -> DocumentFrequency | None:
    """Under ``df: batch`` the document frequencies of a whole step, else None.

    ``references`` are the raw captions of each prompt id of the step.  However the step is then
    split over reward actors, every caption is scored against the same frequencies.  ValueError for
    fewer than two images.
    """
    if config.df != "batch" or not config.counts_ngrams:
        return None
    tokenized = [tokenized_references(some) for some in references.values()]
    return DocumentFrequency.from_references(tokenized, eos=config.eos, source="batch")


def check_eos(df: DocumentFrequency, config: RewardConfig) -> None:
    """ValueError where ``df`` was counted with another ``eos`` than ``config`` declares."""
    if df.eos != config.eos:
        raise ValueError(
            f"the document frequencies {df.source} were counted with eos={df.eos}, the rewards "
            f"declare eos={config.eos}; set reward.eos, or count them again with "
            "reward_statistics(references, config)"
        )


def reward_signature(config: RewardConfig, statistics: Statistics) -> str:
    """What a reward of this run means, in one line."""
    if statistics.df is not None:
        return cider_signature(statistics.df)
    return batch_signature(config.eos) if config.counts_ngrams else PTB_SIGNATURE


def _document_frequency(
    tokenized: Sequence[Sequence[Sequence[str]]], config: RewardConfig
) -> DocumentFrequency:
    if config.df.endswith(".npz"):
        return DocumentFrequency.load(config.df)
    if config.df.endswith(DF_FILES):
        return read_pickle(config.df)
    if config.df == "caption":
        tokenized = [[caption] for captions in tokenized for caption in captions]
    return DocumentFrequency.from_references(tokenized, eos=config.eos, source=config.df)
