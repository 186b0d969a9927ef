"""From the configuration of a term to the term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rayrl.rewards import config as c
from rayrl.rewards import penalties
from rayrl.rewards.bleu import bleu
from rayrl.rewards.cider_term import BatchCiderTerm, CiderTerm
from rayrl.rewards.deadline import UNLIMITED, Deadline
from rayrl.rewards.ensemble import EnsembleTerm, uncertainty_weighted, worst_case
from rayrl.rewards.function import FunctionTerm
from rayrl.rewards.http import ChatTerm, Client, HttpTerm
from rayrl.rewards.model_terms import ClipScoreTerm, MeteorTerm, SpiceTerm
from rayrl.rewards.rouge import rouge_l
from rayrl.rewards.statistics import Statistics, check_eos
from rayrl.rewards.term import CaptionTerm, Term


class _Shared(NamedTuple):
    """What all terms of a scorer share: the one CIDEr-D, and by when they are to answer."""

    cider: Term | None
    deadline: Deadline


def build_terms(
    config: c.RewardConfig, statistics: Statistics, deadline: Deadline = UNLIMITED
) -> dict[str, Term]:
    """The terms of ``config`` by name; those that wait for others give up at ``deadline``.

    ValueError where the document frequencies are missing, or were counted with another ``eos``
    than ``config`` declares, or a term cannot be made as configured; MetricUnavailable where Java
    or a model is missing.
    """
    cider = _cider(config, statistics) if config.counts_ngrams else None
    shared = _Shared(cider, deadline)
    return {name: _build(term, shared) for name, term in config.terms.items()}


def _cider(config: c.RewardConfig, statistics: Statistics) -> Term:
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


def _build(config: c.TermConfig, shared: _Shared) -> Term:
    return _BUILDERS[type(config)](config, shared)


def _bleu(config: c.BleuConfig, _: _Shared) -> Term:
    return CaptionTerm(lambda captions, some: bleu(captions, some).captions[:, config.n - 1])


def _length(config: c.LengthConfig, _: _Shared) -> Term:
    low, high = config.min_words, config.max_words
    return CaptionTerm(lambda captions, _: penalties.length_penalty(captions, low, high))


def _repetition(config: c.RepetitionConfig, _: _Shared) -> Term:
    return CaptionTerm(lambda captions, _: penalties.repetition_penalty(captions, config.n))


def _bad_ending(_config: c.BadEndingConfig, _: _Shared) -> Term:
    return CaptionTerm(lambda captions, _: penalties.bad_ending_penalty(captions))


def _client(config: c.ServerConfig, shared: _Shared) -> Client:
    return Client(
        url=config.url,
        timeout_s=config.timeout_s,
        retries=config.retries,
        in_flight=config.in_flight,
        api_key_variable=config.api_key_variable,
        deadline=shared.deadline,
    )


def _chat(config: c.ChatConfig, shared: _Shared) -> Term:
    client = _client(config, shared)
    return ChatTerm(client, config.model, config.question, config.scale, config.max_tokens)


def _ensemble(config: c.EnsembleConfig, shared: _Shared) -> Term:
    members = {
        name: (_build(member, shared), member.weight) for name, member in config.members.items()
    }
    rules = {"worst_case": worst_case, "uncertainty": uncertainty_weighted(config.penalty)}
    return EnsembleTerm(members, rules[config.rule])


_BUILDERS: Mapping[type[c.TermConfig], Callable[[Any, Any], Term]] = {
    c.CiderConfig: lambda _, shared: shared.cider,
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
    c.FunctionConfig: lambda config, shared: FunctionTerm(
        config.path, config.retries, shared.deadline
    ),
    c.HttpConfig: lambda config, shared: HttpTerm(
        _client(config, shared), config.items_per_request
    ),
    c.ChatConfig: _chat,
    c.EnsembleConfig: _ensemble,
}
