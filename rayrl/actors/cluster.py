"""Joining a Ray cluster, or starting a local one."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from rayrl.actors.losses import FAILURES
from rayrl.actors.reward import placements
from rayrl.config import Config
from rayrl.own_modules import import_path

log = logging.getLogger(__name__)

READER_CPUS = 0.5
"""CPUs of what reads the images of one worker of cross-entropy, or of all engines that evaluate."""
SPARE_CPUS = 1.5
"""CPUs of a local Ray beside those of actors: Ray Data looks at what is left."""
_SPIN = "GOMP_SPINCOUNT"
_MANY = 4
"""So many times its cores is more than somebody asks of a laptop on purpose."""


def connect(num_cpus: float, num_gpus: float | None = None, *, spare_cpus: float = 0.0) -> bool:
    """Connect this driver to Ray; returns whether a local Ray was started.

    Inside a Ray job (or wherever RAY_ADDRESS is set) the driver joins that cluster.  Elsewhere it
    starts a Ray of its own, and never joins one that somebody else left on this machine.
    ``num_cpus`` is what the actors will ask for together: a local Ray offers at least that, and
    ``spare_cpus``, for its workers take turns on a small machine, where a cluster would have to
    grow.  ValueError where it lacks some of ``num_gpus``, for which the run would wait for ever;
    None is for what never computes on one, and on any number of CPUs.
    """
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        _say_what_is_unused(num_gpus)
        if num_gpus is not None:
            _say_what_is_missing({"CPU": num_cpus, "GPU": num_gpus})
        return False
    # Else Ray starts a worker for every CPU beforehand, without the environment that ours ask for.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # It has a token by itself, which nobody needs to know of.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus + spare_cpus)),
        include_dashboard=False,
        configure_logging=True,
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": import_path()}},
    )
    found = ray.cluster_resources().get("GPU", 0.0)
    if num_gpus and num_gpus > found:
        ray.shutdown()
        raise ValueError(
            "learner.gpus, rollout.gpus and reward terms, or the workers of cross-entropy, ask for "
            f"{num_gpus:g} GPUs together, and this machine has {found:g}"
        )
    _say_what_is_unused(num_gpus)
    if num_cpus > _MANY * (have := os.cpu_count() or 1):
        log.warning(
            "the run asks for %g CPUs and this machine has %d: its workers will take turns, and "
            "each takes its own memory",
            num_cpus,
            have,
        )
    return True


def _say_what_is_unused(num_gpus: float | None) -> None:
    found = ray.cluster_resources().get("GPU", 0.0)
    if found and num_gpus == 0:
        log.warning(
            "Ray has %g GPUs here, and the run asks for none, so everything runs on CPUs; "
            "learner.gpus and rollout.gpus ask for them, rollout.colocate shares a single one",
            found,
        )


def _say_what_is_missing(asked: Mapping[str, float]) -> None:
    """Before hours of training and not after: a cluster that cannot grow keeps the run waiting."""
    has = ray.cluster_resources()
    for name, amount in asked.items():
        if has.get(name, 0.0) < amount:
            log.warning(
                "the run asks for %g %ss, and Ray has %g here: unless more come, some of it will "
                "wait for room",
                amount,
                name,
                has.get(name, 0.0),
            )


def worker_environment(cpus: float, gpus: float) -> dict[str, Any]:
    """The runtime environment of a worker that computes on ``cpus`` cores: as many threads, which
    wait for each other awake for microseconds and then sleep; and no GPU where it asks for none,
    which Ray would leave in its sight.

    By default they stay awake for milliseconds.  Where two workers want the same cores, each then
    keeps the other's thread from the core while its own waits, at every operation: on two cores an
    update took six times as long as alone, and not twice (``benchmarks/bench_threads.py``)."""
    threads = str(max(1, int(cpus)))
    variables = {"OMP_NUM_THREADS": threads, _SPIN: os.environ.get(_SPIN, "2000")}
    if not gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {"env_vars": variables}


@contextmanager
def failing_in_one_line(program: str) -> Iterator[None]:
    """End the process with status 1 and the reason as the last line of its log, which is read
    first; an actor's error brings its stack along, above that line."""
    try:
        yield
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[:-1]:
            print(*lines[:-1], sep="\n", file=sys.stderr)
        raise SystemExit(f"{program}: failed: {lines[-1]}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def cpus_of(config: Config) -> float:
    """CPUs of all actors of a run at its largest, and of readers while cross-entropy trains, before
    the objective or, as its control, in the learner's place."""
    train, rollout = config.train, config.rollout
    apart = sum(asked["num_cpus"] for asked in placements(config.reward).values())
    workers = rollout.max_workers * rollout.cpus
    workers += train.reward_workers * (train.reward_cpus + apart)
    ranks, xe = config.learner.num_workers, config.xe
    control = READER_CPUS * ranks if xe.steps and xe.control else 0.0
    return max(workers + ranks * config.learner.cpus + control, xe_cpus(config))


def xe_cpus(config: Config) -> float:
    """CPUs of cross-entropy alone: its workers and their readers."""
    return config.xe.num_workers * (config.learner.cpus + READER_CPUS)


def gpus_of(config: Config, *, stage1: bool) -> float:
    """GPUs without which a run cannot begin: of the learner, engines and reward terms together, or
    of cross-entropy before them, where ``stage1`` is still to come."""
    learner, rollout, train = config.learner, config.rollout, config.train
    computing = learner.num_workers * learner.gpus + rollout.min_workers * rollout.gpus
    if rollout.colocate:
        computing = 1.0  # a placement group's, whole
    # A reward worker is enough to go on.
    terms = sum(asked["num_gpus"] for asked in placements(config.reward).values())
    xe = config.xe.num_workers if stage1 and config.xe.steps and learner.gpus else 0
    return max(computing + min(1, train.reward_workers) * terms, float(xe))
