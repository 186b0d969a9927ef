"""Whole runs of the driver's loop on fakes, and whether two of them did the same."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from rayrl import grpo
from rayrl.actors import learner_group, workers
from rayrl.actors.fleet import Fleet
from rayrl.actors.pool import RestartBudget
from rayrl.actors.tracing import Tracer
from rayrl.backup import Backup
from rayrl.checkpoint import list_checkpoints
from rayrl.config import Config
from rayrl.data import load_split
from rayrl.heldout import Heldout
from rayrl.metrics import Phases, RunLog
from rayrl.objectives import build
from rayrl.rewards.statistics import reward_statistics
from rayrl.rounds import Rounds
from rayrl.skipped import Skipped
from tests.ray.fakes import FakeLearner, FakeRollout

STEPS = 14
IMAGES, IMAGES_PER_STEP = 60, 7  # to train on


@dataclass
class Done:
    """What a run left behind; ``prepared`` says of each step whether the learner had been told its
    prompts when it came."""

    weights: bytes
    trained: list[list[str]]
    rows: list[dict]
    prepared: list[bool]


class Watched(RunLog):
    """Calls ``after`` with every step that is logged and its metrics, ``said`` with messages."""

    after = staticmethod(lambda step, metrics: None)
    said = staticmethod(lambda text: None)

    def step(self, step, metrics) -> None:
        super().step(step, metrics)
        self.after(step, metrics)

    def message(self, text) -> None:
        super().message(text)
        self.said(text)


def run(
    folder,
    monkeypatch,
    *,
    after=None,
    said=None,
    staleness=0,
    steps=STEPS,
    save_every=1000,
    keep=2,
    objective=None,
    learner=None,
    reward=None,
    reward_timeout_s=120.0,
    **rollout,
) -> Done:
    """A whole run of the driver's loop on fakes; goes on from the folder's last checkpoint."""
    monkeypatch.setattr(workers, "RolloutActor", FakeRollout)
    monkeypatch.setattr(learner_group, "LearnerActor", FakeLearner)
    config = Config.model_validate(
        {
            "run_folder": str(folder),
            "objective": objective or {},
            "xe": {"control": False},
            "data": {"scenes": {"num_train": IMAGES, "num_val": 8}},
            "rollout": {
                "num_workers": 3,
                "min_workers": 1,
                "cpus": 0.5,
                "canary_every": 1,
                "timeout_s": 60.0,
                "max_restarts": 100,
                **rollout,
            },
            "learner": {"cpus": 0.1, **(learner or {})},
            "reward": reward or {},
            "train": {
                "steps": steps,
                "images_per_step": IMAGES_PER_STEP,
                "group_size": 3,
                "max_staleness": staleness,
                "eval_every": 8,
                "checkpoint_every": save_every,
                "keep_checkpoints": keep,
                "reward_workers": 2,
                "reward_cpus": 0.1,
                "reward_timeout_s": reward_timeout_s,
                "tensorboard": False,
            },
        }
    )
    data, val = load_split(config.data, "train"), load_split(config.data, "val")
    statistics = reward_statistics(data.references(), config.reward)
    saved = list_checkpoints(folder / "checkpoints")
    last = saved[-1] if saved else None
    log = Watched(folder, total_steps=steps, tensorboard=False, resume_from=last)
    log.after, log.said = after or log.after, said or log.said
    budget = RestartBudget(config.rollout.max_restarts)
    group = learner_group.LearnerGroup(config, {}, budget)
    fleet = Fleet(config, {}, statistics, budget, greedy_baseline=False, learner=group)
    heldout = Heldout([val[i] for i in range(4)], folder)
    job = grpo.Run(
        config=config,
        folder=folder,
        base=folder,
        skipped=Skipped(folder, config, log.message),
        train_data=data,
        heldout=heldout,
        fleet=fleet,
        learner=group,
        log=log,
        backup=Backup(None, folder, keep=1, say=log.message),
        rounds=Rounds.of_run(
            config,
            build(config.objective, max_tokens=config.sampling.max_tokens).planners,
            data,
            folder,
        ),
        signatures={},
        phases=Phases(),
        tracer=Tracer(None, fleet.workers),
    )
    try:
        start = grpo.restore(job) if saved else 0
        fleet.wait()
        grpo.publish(job, start, first=True)
        fleet.confirm(start)
        assert grpo.train_or_save(job, start) == steps
        return group.checkpoint(
            lambda end: Done(
                weights=end.arrays["values"].tobytes(),
                trained=end.meta["trained"],
                rows=job.log.history(),
                prepared=end.meta["prepared"],
            )
        )
    finally:
        fleet.shutdown()
        group.shutdown()
        log.close()


@cache
def undisturbed(staleness: int) -> Done:
    """What a run ends with when nothing happens, however many workers and machines it has."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        return run(Path(folder), patch, staleness=staleness)


def differences(disturbed: Done, quiet: Done, *, weights: bool = True) -> list[str]:
    """What a run with faults did otherwise than one without: nothing, where all is well."""
    found = []
    if disturbed.trained != quiet.trained:
        found.append(f"trained on {disturbed.trained}, want {quiet.trained}")
    sizes = {len(ids) for ids in disturbed.trained}
    if sizes != {IMAGES_PER_STEP}:
        found.append(f"steps of {sorted(sizes)} groups, want {IMAGES_PER_STEP}")
    in_order = [prompt for ids in disturbed.trained for prompt in ids]
    for epoch in range(0, len(in_order), IMAGES):
        part = in_order[epoch : epoch + IMAGES]
        twice = sorted({prompt for prompt in part if part.count(prompt) > 1})
        if twice:
            found.append(f"trained twice in an epoch: {twice}")
    if weights and disturbed.weights != quiet.weights:
        found.append("the weights differ")
    logged = [row["step"] for row in disturbed.rows]
    if logged != list(range(1, len(quiet.rows) + 1)):
        found.append(f"logged steps {logged}, want 1 to {len(quiet.rows)}")
    dropped = sum(row["groups/dropped"] for row in disturbed.rows)
    if dropped:
        found.append(f"{dropped:.0f} groups were dropped")
    return found


def assert_same(disturbed: Done, quiet: Done) -> None:
    assert differences(disturbed, quiet) == []
