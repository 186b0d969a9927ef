"""A weight sync on one node: what it costs against copying the same bytes.

    .venv/bin/python benchmarks/bench_sync.py            # 500 MB, 8 workers; about two minutes
    .venv/bin/python benchmarks/bench_sync.py --small    # 20 MB, 2 workers, to see that it runs

An actor that holds a model packs it as the learner does, the fleet publishes the version and
confirms that every rollout worker holds it.  All of that is what a run uses; only the engines have
no model, they copy the values into arrays of their own.  Sync and plain copies take turns.

``copies`` a worker is what it copied or allocated over the size of the weights: 1 where it reads
them in the node's shared memory.  ``over_memcpy`` is the sync's time over that of as many plain
copies, one for the packing, one into shared memory and one for each worker, by one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import promises
import ray
import torch
from local_ray import local_ray
from record import RESULTS, write
from sync_fakes import FOLDER_VARIABLE

from rayrl.actors.fleet import Fleet
from rayrl.actors.pool import RestartBudget
from rayrl.config import Config
from rayrl.rewards.statistics import reward_statistics
from rayrl.weights import Weights, pack

LAYERS = 24


@ray.remote(num_cpus=0.01)
class Publisher:
    """Holds a model and gives out its versions, like the learner."""

    def __init__(self, megabytes: float) -> None:
        width = int((megabytes * 1e6 / 4 / LAYERS) ** 0.5)
        self._model = torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS))
        )
        self._seconds = 0.0

    def num_bytes(self) -> int:
        return sum(p.nbytes for p in self._model.parameters())

    def weights(self, version: int) -> Weights:
        started = time.perf_counter()
        packed = pack(self._model, version)
        self._seconds = time.perf_counter() - started
        return packed

    def pack_seconds(self) -> float:
        return self._seconds


def configure(workers: int) -> Config:
    return Config.model_validate(
        {
            "rollout": {"num_workers": workers, "cpus": 0.01},
            "train": {"reward_cpus": 0.01},
            "engine": {"backend": "hf"},
        }
    )


def memcpy_seconds(num_bytes: int) -> float:
    """One plain copy of as many bytes between arrays that are there already."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def sync_seconds(fleet: Fleet, publisher: Any, version: int) -> float:
    """Publish a version and wait until every worker holds it."""
    started = time.perf_counter()
    fleet.publish(version, publisher.weights.remote(version))
    fleet.confirm(version)
    return time.perf_counter() - started


def rounds(args: argparse.Namespace) -> tuple[int, list[dict[str, float]]]:
    """The bytes of a version, and one entry a round."""
    config = configure(args.workers)
    statistics = reward_statistics([["a picture"], ["another one"]], config.reward)
    publisher = Publisher.remote(args.megabytes)  # type: ignore[attr-defined]
    num_bytes: int = ray.get(publisher.num_bytes.remote())
    fleet = Fleet(
        config, {}, statistics, RestartBudget(config.rollout.max_restarts), greedy_baseline=False
    )
    try:
        fleet.wait()
        first = publisher.weights.remote(0)
        fleet.publish(0, first, frozen=first)
        fleet.confirm(0)
        done = []
        for version in range(1, args.rounds + 1):
            done.append(
                {
                    "memcpy_seconds": memcpy_seconds(num_bytes),
                    "sync_seconds": sync_seconds(fleet, publisher, version),
                    "pack_seconds": ray.get(publisher.pack_seconds.remote()),
                }
            )
        return num_bytes, done
    finally:
        fleet.shutdown()
        ray.kill(publisher)


def worker_loads(folder: Path, workers: int, versions: int) -> list[dict[str, Any]]:
    """What the workers wrote down of the measured versions.  RuntimeError where one is missing."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    loads = [load for load in map(json.loads, lines) if load["version"] > 0]
    if len(loads) != workers * versions:
        raise RuntimeError(f"{len(loads)} loads by {workers} workers of {versions} versions")
    return loads


def summarize(num_bytes: int, done: list[dict[str, float]], loads: list[dict[str, Any]]) -> dict:
    """Medians over rounds; the worst worker where copies are counted.

    Raises ValueError where the workers did not copy the whole of each version."""
    if short := [load for load in loads if load["copied_bytes"] != num_bytes]:
        raise ValueError(f"a worker copied {short[0]['copied_bytes']} of {num_bytes} bytes")
    median = {name: statistics.median(one[name] for one in done) for name in done[0]}
    workers = len(loads) // len(done)
    return {
        "bytes": num_bytes,
        "workers": workers,
        **median,
        "load_seconds": statistics.median(load["seconds"] for load in loads),
        "copies_a_worker": max(
            (load["copied_bytes"] + max(0, load["allocated_bytes"])) / num_bytes for load in loads
        ),
        "shared_fraction": min(load["shared_bytes"] for load in loads) / num_bytes,
        "over_memcpy": median["sync_seconds"] / (median["memcpy_seconds"] * (workers + 2)),
        "rounds": done,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=500.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="in little; writes nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the JSON file, by default {RESULTS}")
    args = parser.parse_args(argv)
    if args.small:
        args.megabytes, args.workers, args.rounds = 20.0, 2, 3
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    store = int(args.megabytes * 1e6 * 5) + 2**28
    with tempfile.TemporaryDirectory() as folder:
        variables = {FOLDER_VARIABLE: folder}
        with local_ray("sync_fakes.install", variables, object_store_bytes=store):
            num_bytes, done = rounds(args)
        loads = worker_loads(Path(folder), args.workers, args.rounds)
    row = summarize(num_bytes, done, loads)
    print(
        f"{num_bytes / 1e6:.0f} MB to {row['workers']} workers: {row['sync_seconds']:.2f} s "
        f"(packing {row['pack_seconds']:.2f} s), {row['copies_a_worker']:.2f} copies a worker, "
        f"{row['shared_fraction']:.0%} read from shared memory; {row['over_memcpy']:.1f} times "
        f"{row['workers'] + 2} plain copies of {row['memcpy_seconds']:.3f} s"
    )
    if not args.small or args.out:
        row["promised"] = promises.of_sync(row)
        write("sync", argv, row, packages=("ray", "numpy", "torch"), folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
