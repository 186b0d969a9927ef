"""From the configuration of a term to the term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayrl.rewards import config as c
from rayrl.rewards import penalties
from rayrl.rewards.bleu import bleu
from rayrl.rewards.cider_term import BatchCiderTerm, CiderTerm
from rayrl.rewards.ensemble import EnsembleTerm, uncertainty_weighted, worst_case
from rayrl.rewards.function import FunctionTerm
from rayrl.rewards.http import ChatTerm, Client, HttpTerm
from rayrl.rewards.model_terms import ClipScoreTerm, MeteorTerm, SpiceTerm
from rayrl.rewards.rouge import rouge_l
from rayrl.rewards.statistics import Statistics, check_eos
from rayrl.rewards.term import CaptionTerm, Term


def build_terms(config: c.RewardConfig, statistics: Statistics) -> dict[str, Term]:
    """The terms of ``config`` by name.

    ValueError where the document frequencies are missing, or were counted with another ``eos``
    than ``config`` declares, or a term cannot be made as configured; MetricUnavailable where Java
    or a model is missing.
    """
    cider = _cider(config, statistics) if config.counts_ngrams else None
    return {name: _build(term, cider) for name, term in config.terms.items()}


def _cider(config: c.RewardConfig, statistics: Statistics) -> Term:
    """The one CIDEr-D that all terms share."""
    if config.df == "batch":
        return BatchCiderTerm()
    df = statistics.df
    if df is None:
        raise ValueError(
            f"reward.df {config.df}: no document frequencies given; count them with "
            "reward_statistics(references, config)"
        )
    check_eos(df, config)
    return CiderTerm(df, statistics.index)


def _build(config: c.TermConfig, cider: Term | None) -> Term:
    return _BUILDERS[type(config)](config, cider)


def _bleu(config: c.BleuConfig, _: Term | None) -> Term:
    return CaptionTerm(lambda captions, some: bleu(captions, some).captions[:, config.n - 1])


def _length(config: c.LengthConfig, _: Term | None) -> Term:
    low, high = config.min_words, config.max_words
    return CaptionTerm(lambda captions, _: penalties.length_penalty(captions, low, high))


def _repetition(config: c.RepetitionConfig, _: Term | None) -> Term:
    return CaptionTerm(lambda captions, _: penalties.repetition_penalty(captions, config.n))


def _bad_ending(_config: c.BadEndingConfig, _: Term | None) -> Term:
    return CaptionTerm(lambda captions, _: penalties.bad_ending_penalty(captions))


def _client(config: c.ServerConfig) -> Client:
    return Client(
        config.url, config.timeout_s, config.retries, config.in_flight, config.api_key_variable
    )


def _ensemble(config: c.EnsembleConfig, cider: Term | None) -> Term:
    members = {
        name: (_build(member, cider), member.weight) for name, member in config.members.items()
    }
    rules = {"worst_case": worst_case, "uncertainty": uncertainty_weighted(config.penalty)}
    return EnsembleTerm(members, rules[config.rule])


_BUILDERS: Mapping[type[c.TermConfig], Callable[[Any, Any], Term]] = {
    c.CiderConfig: lambda _, cider: cider,
    c.BleuConfig: _bleu,
    c.RougeConfig: lambda config, _: CaptionTerm(rouge_l),
    c.MeteorConfig: lambda config, _: MeteorTerm(config.timeout_s),
    c.SpiceConfig: lambda config, _: SpiceTerm(config.timeout_s),
    c.ClipScoreConfig: lambda config, _: ClipScoreTerm(
        config.folder, "cuda" if config.gpus else "cpu", config.references
    ),
    c.LengthConfig: _length,
    c.RepetitionConfig: _repetition,
    c.BadEndingConfig: _bad_ending,
    c.FunctionConfig: lambda config, _: FunctionTerm(config.path, config.retries),
    c.HttpConfig: lambda config, _: HttpTerm(_client(config), config.items_per_request),
    c.ChatConfig: lambda config, _: ChatTerm(
        _client(config), config.model, config.question, config.scale, config.max_tokens
    ),
    c.EnsembleConfig: _ensemble,
}
