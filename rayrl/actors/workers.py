"""The two pools of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import ObjectLostError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.actors.cluster import worker_environment
from rayrl.actors.pool import Pool, PoolSize, RestartBudget
from rayrl.actors.reward import RewardActor
from rayrl.actors.rollout import RolloutActor
from rayrl.config import Config
from rayrl.objectives import build
from rayrl.only_logged import only_logged
from rayrl.reference_rewards import scored_needs


def rollout_pool(
    config: Config,
    files: Any,
    budget: RestartBudget,
    prepare: Callable[[Any, ObjectLostError | None], Any],
    place: Any = None,
) -> Pool:
    """Rollout workers, in ``place`` where one is given; ``files`` is a reference to the model's
    files."""
    rollout = config.rollout

    def start() -> Any:
        return RolloutActor.options(  # type: ignore[attr-defined]
            num_cpus=rollout.cpus,
            num_gpus=rollout.gpus,
            runtime_env=worker_environment(rollout.cpus, rollout.gpus),
            scheduling_strategy=place or "DEFAULT",
        ).remote(
            files,
            config.engine,
            config.train.group_size,
            config.model.trust_remote_code,
            rollout.colocate,
        )

    size = PoolSize(
        wanted=rollout.num_workers,
        minimum=rollout.min_workers,
        deadline_s=rollout.start_timeout_s,
        asked={"CPU": rollout.cpus, "GPU": rollout.gpus},
    )
    return Pool("rollout worker", start, size, budget, prepare=prepare)


def reward_pool(
    config: Config, statistics: tuple[Any], budget: RestartBudget, learner: Any = None
) -> Pool:
    """Reward workers, of which one is enough to go on; ``statistics`` holds a reference to what
    rewards are scored against.  They start on the machine of ``learner``, the learner's placement
    group, where it has room: on one of a rollout worker they would keep it from leaving once that
    is let go.  So where that machine is still to come they start when they are needed."""
    train = config.train
    needs = build(config.objective, max_tokens=config.sampling.max_tokens).needs
    scored = scored_needs(needs, config.objective.sources)
    logged = only_logged(config)

    def start() -> Any:
        return RewardActor.options(  # type: ignore[attr-defined]
            num_cpus=train.reward_cpus, scheduling_strategy=_beside(_node_of(learner))
        ).remote(config.reward, statistics, train.reward_timeout_s, scored, logged)

    size = PoolSize(
        wanted=train.reward_workers,
        minimum=1,
        deadline_s=config.rollout.start_timeout_s,
        asked={"CPU": train.reward_cpus},
    )
    known = learner is None or bool(_node_of(learner))
    return Pool("reward worker", start, size, budget, begin=known)


def _node_of(place: Any) -> str:
    """The machine of a placement group's first bundle; "" where it has none yet."""
    nodes = placement_group_table(place)["bundles_to_node_id"] if place is not None else {}
    return nodes.get(0) or ""


def _beside(node: str) -> Any:
    """Where a worker is to be started that wants to be on a machine, and else anywhere."""
    if not node:
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
