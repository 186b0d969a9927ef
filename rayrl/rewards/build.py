"""From the configuration of a term to the term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rayrl.rewards import config as c
from rayrl.rewards import penalties
from rayrl.rewards.bleu import bleu
from rayrl.rewards.cider import DocumentFrequency, ReferenceIndex
from rayrl.rewards.cider_term import BatchCiderTerm, CiderTerm
from rayrl.rewards.ensemble import EnsembleTerm, uncertainty_weighted, worst_case
from rayrl.rewards.function import FunctionTerm
from rayrl.rewards.http import ChatTerm, Client, HttpTerm
from rayrl.rewards.model_terms import ClipScoreTerm, MeteorTerm, SpiceTerm
from rayrl.rewards.rouge import rouge_l
from rayrl.rewards.term import CaptionTerm, Term


@dataclass(frozen=True, slots=True)
class Statistics:
    """What CIDEr-D scores against: frozen document frequencies, perhaps with the vectors of the
    training references, or those of each batch."""

    df: DocumentFrequency
    index: ReferenceIndex | None
    batch: bool


def build_terms(
    config: c.RewardConfig, df: DocumentFrequency, index: ReferenceIndex | None = None
) -> dict[str, Term]:
    """The terms of ``config`` by name.

    ValueError where ``df`` was counted with another ``eos`` than ``config`` declares, or a term
    cannot be made as configured; MetricUnavailable where Java or a model is missing.
    """
    if df.eos != config.eos:
        raise ValueError(
            f"the document frequencies {df.source} were counted with eos={df.eos}, the rewards "
            f"declare eos={config.eos}; set reward.eos, or count them again with "
            "reward_document_frequency(references, config)"
        )
    statistics = Statistics(df, index, batch=config.df == "batch")
    return {name: build_term(term, statistics) for name, term in config.terms.items()}


def build_term(config: c.TermConfig, statistics: Statistics) -> Term:
    """One term."""
    return _BUILDERS[type(config)](config, statistics)


def _cider(config: c.CiderConfig, statistics: Statistics) -> Term:
    if statistics.batch:
        return BatchCiderTerm(statistics.df.eos)
    return CiderTerm(statistics.df, statistics.index)


def _bleu(config: c.BleuConfig, _: Statistics) -> Term:
    return CaptionTerm(lambda captions, some: bleu(captions, some).captions[:, config.n - 1])


def _length(config: c.LengthConfig, _: Statistics) -> Term:
    low, high = config.min_words, config.max_words
    return CaptionTerm(lambda captions, _: penalties.length_penalty(captions, low, high))


def _repetition(config: c.RepetitionConfig, _: Statistics) -> Term:
    return CaptionTerm(lambda captions, _: penalties.repetition_penalty(captions, config.n))


def _bad_ending(_config: c.BadEndingConfig, _: Statistics) -> Term:
    return CaptionTerm(lambda captions, _: penalties.bad_ending_penalty(captions))


def _client(config: c.ServerConfig) -> Client:
    return Client(
        config.url, config.timeout_s, config.retries, config.in_flight, config.api_key_variable
    )


def _ensemble(config: c.EnsembleConfig, statistics: Statistics) -> Term:
    members = {
        name: (build_term(member, statistics), member.weight)
        for name, member in config.members.items()
    }
    rules = {"worst_case": worst_case, "uncertainty": uncertainty_weighted(config.penalty)}
    return EnsembleTerm(members, rules[config.rule])


_BUILDERS: Mapping[type[c.TermConfig], Callable[[Any, Statistics], Term]] = {
    c.CiderConfig: _cider,
    c.BleuConfig: _bleu,
    c.RougeConfig: lambda config, _: CaptionTerm(rouge_l),
    c.MeteorConfig: lambda config, _: MeteorTerm(config.timeout_s),
    c.SpiceConfig: lambda config, _: SpiceTerm(config.timeout_s),
    c.ClipScoreConfig: lambda config, _: ClipScoreTerm(
        config.folder, config.device, config.references
    ),
    c.LengthConfig: _length,
    c.RepetitionConfig: _repetition,
    c.BadEndingConfig: _bad_ending,
    c.FunctionConfig: lambda config, _: FunctionTerm(config.path, config.retries),
    c.HttpConfig: lambda config, _: HttpTerm(_client(config), config.items_per_request),
    c.ChatConfig: lambda config, _: ChatTerm(
        _client(config), config.model, config.question, config.scale
    ),
    c.EnsembleConfig: _ensemble,
}
