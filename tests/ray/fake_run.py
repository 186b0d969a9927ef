"""Whole runs of the driver's loop on fakes, and what goes wrong in their course."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass

import ray

from rayrl import grpo
from rayrl.actors import workers
from rayrl.actors.fleet import Fleet
from rayrl.actors.pool import RestartBudget
from rayrl.actors.tracing import Tracer
from rayrl.backup import Backup
from rayrl.canary import Canary
from rayrl.checkpoint import list_checkpoints
from rayrl.config import Config
from rayrl.data import load_split
from rayrl.heldout import Heldout
from rayrl.metrics import Phases, RunLog
from rayrl.objectives import build
from rayrl.outline import whole
from rayrl.rewards.statistics import reward_statistics
from rayrl.rounds import Rounds
from rayrl.skipped import Skipped
from tests.ray.fakes import FakeLearner, FakeRollout
from tests.ray.test_grpo_job import children

FAULTS = 10  # in a run
STEPS = FAULTS + 4
IMAGES = 60  # to train on


@dataclass
class Done:
    """What a run left behind."""

    weights: bytes
    trained: list[list[str]]
    rows: list[dict]


class OneLearner:
    """Answers as a LearnerGroup does, with one actor that is not rebuilt."""

    def __init__(self, actor) -> None:
        self._actor = actor

    def update(self, results):
        return ray.get(self._actor.update.remote(whole(results.all())))

    def weights(self, *, trained_only):
        return self._actor.weights.remote(trained_only=trained_only)

    def score(self, canary):
        return self._actor.score.remote(canary)

    def replay(self):
        return ray.get(self._actor.replay.remote())

    def checkpoint(self):
        return ray.get(self._actor.checkpoint.remote())

    def restore(self, checkpoint, folder):
        return ray.get(self._actor.restore.remote(checkpoint))

    def rebuild_from(self, folder) -> None:
        pass


class Watched(RunLog):
    """Calls ``after`` with every step that is logged and its metrics."""

    after = staticmethod(lambda step, metrics: None)

    def step(self, step, metrics) -> None:
        super().step(step, metrics)
        self.after(step, metrics)


def run(
    folder,
    monkeypatch,
    *,
    after=None,
    staleness=0,
    steps=STEPS,
    save_every=1000,
    learner_options=None,
    objective=None,
    **rollout,
) -> Done:
    """A whole run of the driver's loop on fakes; goes on from the folder's last checkpoint."""
    monkeypatch.setattr(workers, "RolloutActor", FakeRollout)
    config = Config.model_validate(
        {
            "run_folder": str(folder),
            "objective": objective or {},
            "data": {"scenes": {"num_train": IMAGES, "num_val": 8}},
            "rollout": {
                "num_workers": 3,
                "min_workers": 1,
                "cpus": 0.5,
                "canary_every": 1,
                "timeout_s": 60.0,
                "max_restarts": 10 * FAULTS,
                **rollout,
            },
            "train": {
                "steps": steps,
                "images_per_step": 7,
                "group_size": 3,
                "max_staleness": staleness,
                "eval_every": 8,
                "checkpoint_every": save_every,
                "reward_workers": 2,
                "reward_cpus": 0.1,
                "tensorboard": False,
            },
        }
    )
    data, val = load_split(config.data, "train"), load_split(config.data, "val")
    statistics = reward_statistics(data.references(), config.reward)
    saved = list_checkpoints(folder / "checkpoints")
    last = saved[-1] if saved else None
    log = Watched(folder, total_steps=steps, tensorboard=False, resume_from=last)
    log.after = after or log.after
    learner = FakeLearner.options(**{"num_cpus": 0.1, **(learner_options or {})}).remote()
    fleet = Fleet(
        config, {}, statistics, RestartBudget(config.rollout.max_restarts), greedy_baseline=False
    )
    heldout = Heldout([val[i] for i in range(4)], folder)
    canary = Canary(prompt=val[0], token_ids=[1, 2, 3])
    job = grpo.Run(
        config=config,
        folder=folder,
        base=folder,
        skipped=Skipped(folder, config, log.message),
        train_data=data,
        heldout=heldout,
        fleet=fleet,
        learner=OneLearner(learner),
        log=log,
        backup=Backup(None, folder, keep=1, say=log.message),
        rounds=Rounds.of_run(config, build(config.objective).planners, data, folder),
        signatures={},
        phases=Phases(),
        tracer=Tracer(None, fleet.workers),
        canary=canary,
    )
    try:
        start = grpo.restore(job) if saved else 0
        fleet.wait()
        grpo.publish(job, start, first=True)
        fleet.confirm(start)
        assert grpo.train_or_save(job, start) == steps
        state, trained = ray.get(learner.history.remote())
        return Done(state, trained, job.log.history())
    finally:
        fleet.shutdown()
        ray.kill(learner)
        log.close()


class Saboteur:
    """Does one thing wrong in the course of every step, at a random moment."""

    def __init__(self, fault, seed: int) -> None:
        self._fault, self._random = fault, random.Random(seed)
        self._threads: list[threading.Thread] = []
        self.done = 0

    def __call__(self, step: int, metrics: object = None) -> None:
        if self.done + self._running() < FAULTS and step < STEPS:
            thread = threading.Thread(target=self._strike, daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self) -> int:
        for thread in self._threads:
            thread.join(60)
        return self.done

    def _running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def _strike(self) -> None:
        time.sleep(self._random.uniform(0.0, 0.05))
        if self._fault(self._random):
            self.done += 1


def kill(name: str):
    """SIGKILL of one of the workers of this process's Ray; waits until there is one."""

    def strike(chance: random.Random) -> bool:
        for _ in range(200):
            victims = children(os.getpid(), f"ray::{name}")
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                return True
            time.sleep(0.05)
        return False

    return strike


def assert_same(disturbed: Done, quiet: Done) -> None:
    assert disturbed.trained == quiet.trained
    assert {len(ids) for ids in disturbed.trained} == {7}
    in_order = [prompt for ids in disturbed.trained for prompt in ids]
    for epoch in range(0, len(in_order), IMAGES):
        part = in_order[epoch : epoch + IMAGES]
        assert len(set(part)) == len(part)
    assert disturbed.weights == quiet.weights
    assert [row["step"] for row in disturbed.rows] == list(range(1, len(quiet.rows) + 1))
    assert all(row["groups/dropped"] == 0 for row in disturbed.rows)
