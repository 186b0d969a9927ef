"""What goes wrong in the course of a run.

A strike is a function of a random generator that does one thing wrong and says whether it did; a
:class:`Saboteur` calls it at random moments.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster

from tests.ray.conftest import ROOT
from tests.ray.fake_run import STEPS, Done, run

Strike = Callable[[random.Random], bool]
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
HEAD = {
    "num_cpus": 1,
    "num_gpus": 1,
    "object_store_memory": 100 * 2**20,
    "include_dashboard": False,
}
ON_HEAD = {"gpus": 1}
"""A learner that stays on the head, for it has the only GPU (counted, not used)."""
NO_GPU = {**HEAD, "num_gpus": 0}
WITH_GPU = {**NODE, "num_cpus": 5, "num_gpus": 1}
"""A machine for a learner that asks for a GPU, with room for two engines of two CPUs."""


class Saboteur:
    """Does one thing wrong in the course of every step, or of every so many, at a random moment,
    until ``faults`` were done."""

    def __init__(
        self, strike: Strike, seed: int, *, faults: int = 10, until: int = STEPS, every: int = 1
    ):
        self._strike, self._random = strike, random.Random(seed)
        self._faults, self._until, self._every = faults, until, every
        self._threads: list[threading.Thread] = []
        self.done = 0

    def __call__(self, step: int, metrics: object = None) -> None:
        due = step % self._every == 0 and step < self._until
        if due and self.done + self._running() < self._faults:
            thread = threading.Thread(target=self._run, daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self) -> int:
        for thread in self._threads:
            thread.join(60)
        return self.done

    def _running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        time.sleep(self._random.uniform(0.0, 0.05))
        if self._strike(self._random):
            self.done += 1


def kill(name: str) -> Strike:
    """SIGKILL of one of the workers of this process's Ray; waits until there is one."""

    def strike(chance: random.Random) -> bool:
        for _ in range(200):
            victims = children(os.getpid(), f"ray::{name}", constructed=True)
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                return True
            time.sleep(0.05)
        return False

    return strike


def children(driver: int, name: str, *, constructed: bool = False) -> list[int]:
    """Ray workers named ``name`` below the driver's own raylet; those that are ``constructed``, for
    one that dies before that Ray may start again by itself."""
    out = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in out.splitlines()[1:]]
    parents = {int(pid): int(ppid) for pid, ppid, _ in rows}

    def below(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    def meant(args: str) -> bool:
        return args.startswith(name) and not (constructed and args.startswith(f"{name}.__init__"))

    return [int(pid) for pid, _, args in rows if meant(args) and below(int(pid))]


def ask(faults: Path, *names: str) -> Strike:
    """Ask the fakes for one of these faults, unless it was asked for and not done yet."""

    def strike(chance: random.Random) -> bool:
        file = faults / chance.choice(names)
        if file.exists():
            return False
        file.touch()
        return True

    return strike


@contextmanager
def local_ray(faults: Path, **options: object) -> Iterator[None]:
    """A Ray whose fakes look into ``faults``."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "RAYRL_TEST_FAULTS": str(faults),
    }
    ray.init(
        address="local",
        **{"num_cpus": 8, **options},
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    try:
        yield
    finally:
        ray.shutdown()


class Machines:
    """A head and some machines for workers, of which one at a time goes away and comes back."""

    def __init__(
        self, faults: Path, *, count: int = 2, head: object = HEAD, node: object = NODE
    ) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._count, self._node = count, node
        self._nodes = [self._cluster.add_node(**node) for _ in range(count)]
        environment = {"PYTHONPATH": str(ROOT), "RAYRL_TEST_FAULTS": str(faults)}
        ray.init(
            address=self._cluster.address,
            log_to_driver=False,
            runtime_env={"env_vars": environment},
        )

    def lose(self, chance: random.Random) -> bool:
        """A strike: take one away, with what runs and lies on it."""
        return self._lose(self._nodes[chance.randrange(len(self._nodes))])

    def lose_learner(self, chance: random.Random) -> bool:
        """A strike: take the one away whose GPU is taken."""
        free = available_resources_per_node()
        return self._lose(next(n for n in self._nodes if not free[n.node_id].get("GPU")))

    def _lose(self, node: object) -> bool:
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        return True

    def complete(self) -> None:
        """Bring the one back that went, for else none would be left."""
        if len(self._nodes) < self._count:
            self.add()

    def add(self) -> None:
        """One more machine; in the main thread alone, as Ray has it."""
        self._nodes.append(self._cluster.add_node(**self._node))

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def crowd_store(num_bytes: int) -> Strike:
    """Put more into the object store than it has room for, and take it away after a moment."""

    def strike(chance: random.Random) -> bool:
        crowd = [ray.put(np.ones(num_bytes // 4, np.uint8)) for _ in range(4)]
        time.sleep(chance.uniform(0.05, 0.2))
        return len(crowd) == 4

    return strike


class Drivers:
    """Drivers in processes of their own, on one Ray; each goes on from the last checkpoint."""

    def __init__(self, faults: Path) -> None:
        self._faults = str(faults)
        info = ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "RAYRL_TEST_FAULTS": self._faults}},
        )
        self._address = info.address_info["address"]
        # One process imports, and every driver is a copy of it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.ray.fault_kinds"])

    def __enter__(self) -> Drivers:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def start(self, folder: Path, staleness: int):
        """A process, and the file that its result goes to."""
        result = folder / "done.pickle"
        given = (self._address, folder, self._faults, staleness, result)
        process = self._context.Process(target=_drive, args=given)
        process.start()
        return process, result

    def finish(self, folder: Path, staleness: int) -> Done:
        """What a driver that is left alone ends with."""
        process, result = self.start(folder, staleness)
        process.join(120)
        if process.exitcode != 0:
            raise RuntimeError(f"a driver in {folder} ended with status {process.exitcode}")
        return pickle.loads(result.read_bytes())

    def kill(self, folder: Path, staleness: int, step: int, chance: random.Random) -> None:
        """SIGKILL of a driver at a random moment after ``step`` was logged."""
        process, _ = self.start(folder, staleness)
        metrics = folder / "metrics.jsonl"
        while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < step:
            if not process.is_alive():
                raise RuntimeError(f"a driver ended by itself, with status {process.exitcode}")
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"a driver was not killed: status {process.exitcode}")


def _drive(address: str, folder: Path, faults: str, staleness: int, result: Path) -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    environment: Mapping[str, str] = {"PYTHONPATH": str(ROOT), "RAYRL_TEST_FAULTS": faults}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": dict(environment)},
    )
    with pytest.MonkeyPatch.context() as patch:
        done = run(folder, patch, staleness=staleness, save_every=3, num_workers=2)
    partial = result.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(done))
    partial.rename(result)
