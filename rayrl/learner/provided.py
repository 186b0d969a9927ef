"""Whether a run can bring what its objective needs, said before anything is started."""

from __future__ import annotations

from importlib.util import find_spec

from rayrl.config import Config
from rayrl.joins import OF_PAIRS
from rayrl.learner.earlier import NOT_REMEMBERED
from rayrl.objectives import build
from rayrl.objectives.compile import PROVIDED
from rayrl.objectives.objective import Objective
from rayrl.objectives.rehearsal import learns_from_one, rehearse
from rayrl.planner_rehearsal import joins_captions
from rayrl.rewards.config import FunctionConfig, HttpConfig


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
    run of these settings cannot bring, or does not fit its reward terms or the group's size, or
    where it is to train adapters and PEFT is missing: before any work."""
    rank = config.learner.lora.rank
    # Found and not imported: it brings PyTorch along.
    if rank and find_spec("peft") is None:
        raise ValueError(f"learner.lora.rank {rank} needs PEFT: install rayrl[lora]")
    objective = build(config.objective, max_tokens=config.sampling.max_tokens)
    objective.check(provided(config))
    _check_joins(objective, config)
    terms, weights = list(config.reward.terms), config.reward.weights
    # What is wrong with groups of any size does not show on those of one caption.
    rehearse(objective, terms, max(2, config.train.group_size), weights)
    if config.train.group_size == 1 and not learns_from_one(objective, terms, weights):
        raise ValueError(
            f"train.group_size 1: objective {objective.name} compares the captions of a group, so "
            "one caption teaches it nothing; want at least 2"
        )


def _check_joins(objective: Objective, config: Config) -> None:
    """Raise ValueError where captions join a group without a field that the objective needs, or a
    planner's requests make no sense."""
    name, needs = objective.name, objective.needs
    for lost in sorted(needs & NOT_REMEMBERED if "earlier" in needs else ()):
        raise ValueError(
            f"objective {name} needs earlier and {lost}, but captions of an earlier checkpoint "
            f"come without {lost}; leave out the part that needs the one or the other"
        )
    for planner in (planner for phase in objective.phases() for planner in phase.planners(0)):
        for lost in sorted(needs & OF_PAIRS if joins_captions(planner, config) else ()):
            raise ValueError(
                f"objective {name} needs {lost}, but rollout {planner.name} joins captions to "
                f"groups, which then have no {lost}; leave out one of them"
            )


def _whole_minibatches(config: Config) -> bool:
    """Whether a rank's share of a minibatch goes through the model at once."""
    learner = config.learner
    largest = -(-(config.train.images_per_step // learner.minibatches) // learner.num_workers)
    return largest <= learner.micro_batch_images and not learner.micro_batch_tokens
