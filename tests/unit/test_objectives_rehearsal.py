"""Objectives tried on made-up groups: what cannot work is said before a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayrl.config import Config
from rayrl.learner.provided import check_objective
from rayrl.objectives import preset, presets
from rayrl.objectives.rehearsal import rehearse

# Those that name their terms, or take a number of them.
TERMS = {
    "asr_word_accuracy": ["word_accuracy"],
    "reward_model": ["reward_model"],
}
TWO = ["cider_d", "clip_score"]


def test_every_preset_can_be_rehearsed() -> None:
    refused = {}
    for name in presets():
        for group_size in (2, 5):
            try:
                rehearse(preset(name), TERMS.get(name, TWO), group_size)
            except ValueError as error:
                refused[name, group_size] = str(error)
    assert refused == {}


@pytest.mark.parametrize(
    ("name", "overrides", "terms", "message"),
    [
        ("modpo", {"main_term": "cidr"}, TWO, "main_term: no reward term 'cidr'; did you mean ci"),
        ("reward_model", {}, TWO, "no reward term 'reward_model'; known are cider_d, clip_score"),
        ("harmonic_reward", {}, ["cider_d"], "wants two terms, got cider_d"),
        ("constrained_grpo", {"limits": "long:0.2"}, TWO, "no cost 'long', the batch has cider_d,"),
        ("pmd_mean", {"advantage": "prefix_tree"}, TWO, "advantages of single tokens"),
        ("krpo_kalman", {"scope": "batch"}, TWO, "scope 'batch': want 'group' or 'stream'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(name, overrides, terms, message) -> None:
    objective = preset(name, **overrides)
    with pytest.raises(
        ValueError, match=rf"objective {name}, tried on groups of 4 .*: .*{message}"
    ):
        rehearse(objective, terms, 4)


def test_a_part_of_ones_own_is_rehearsed_too() -> None:
    def wrong(rewards: Tensor) -> Tensor:
        return rewards @ torch.ones(2)

    with pytest.raises(ValueError, match=r"objective nsc, tried on groups of 5 .*: size mismatch"):
        rehearse(preset("nsc", advantage=wrong), TWO, 5)


def test_phases_are_rehearsed_each() -> None:
    with pytest.raises(ValueError, match="objective veripo_schedule, phase 0, tried on"):
        rehearse(preset("veripo_schedule"), TWO, 0)


def test_a_run_rehearses_with_its_own_terms_before_it_starts() -> None:
    check_objective(Config())
    gdpo = {"objective": {"preset": "modpo"}, "reward": {"terms": {"bleu": 1.0, "rouge_l": 1.0}}}
    with pytest.raises(ValueError, match="no reward term 'cider_d'; known are bleu, rouge_l"):
        check_objective(Config.model_validate(gdpo))
