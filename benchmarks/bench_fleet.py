"""The driver under load: 1 to 64 rollout workers whose engines only take their time.

    .venv/bin/python benchmarks/bench_fleet.py            # 64 workers take two cores 16 minutes
    .venv/bin/python benchmarks/bench_fleet.py --small    # two workers, to see that it runs

A whole job runs, with its driver, actors, rewards, weights and logs; only the engine (answers
after a fixed time, whatever is asked) and the learner (a step is free) are replaced.  Every worker
samples ``--images`` images with 8 captions each: 64 workers make 4,096 a step.  The slowest takes
``--engine-seconds``, the others up to ``--spread`` less, evenly, as captions differ in length.

Ideal is one step in ``--engine-seconds``.  ``share`` is the part of the ideal throughput that is
reached, ``overhead`` what a step takes beyond the ideal, ``driver`` the processor time that the
driver's process spends on a step.  All workers and the simulation itself share this machine's
cores, so ``overhead`` is an upper bound on what a cluster would see.  ``bare Ray`` are the same
numbers of a loop, in the same run, that makes the same calls and does nothing else
(``bare_ray.py``): what rayrl adds is the difference.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import bare_ray
import promises
from fleet_fakes import FOLDER_VARIABLE, SECONDS_VARIABLE, SHARES_FILE
from local_ray import local_ray
from record import RESULTS, write

from rayrl.config import Config
from rayrl.data import load_split
from rayrl.grpo import run_job
from rayrl.metrics import RunLog

GROUP_SIZE = 8
WARM_UP = 2


def configure(folder: Path, workers: int, staleness: int, args: argparse.Namespace) -> Config:
    """A job of ``workers`` that ask for hardly any CPU, for they sleep."""
    images = args.images * workers
    return Config.model_validate(
        {
            "run_folder": str(folder),
            "data": {"max_train": max(images, 64), "max_val": 2},
            "xe": {"steps": 0},
            "engine": {"backend": "hf"},
            "rollout": {"num_workers": workers, "cpus": 0.01},
            "learner": {"cpus": 0.5},
            "train": {
                "steps": WARM_UP + args.steps + 1,
                "images_per_step": images,
                "group_size": GROUP_SIZE,
                "max_staleness": staleness,
                "eval_every": 10_000,
                "eval_images": 2,
                "checkpoint_every": 10_000,
                "samples_every": 10_000,
                "reward_workers": args.reward_workers,
                "reward_cpus": 0.01,
                "tensorboard": False,
            },
        }
    )


class Watch:
    """When the driver logged each step, and the processor time that it had used by then; with
    ``--profile`` what it did in the steps that count."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.marks: list[tuple[int, float, float]] = []
        self.profile = cProfile.Profile()
        self._first = WARM_UP if args.profile else -1
        self._last = WARM_UP + args.steps

    def __enter__(self) -> Watch:
        self._log = RunLog.step

        def step(log: RunLog, number: int, metrics: Any) -> None:
            self.marks.append((number, time.perf_counter(), time.process_time()))
            self._log(log, number, metrics)
            if number == self._first:
                self.profile.enable()
            elif number == self._last:
                self.profile.disable()

        RunLog.step = step  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        RunLog.step = self._log  # type: ignore[method-assign]


def measure(
    engines: Path, workers: int, staleness: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One job, whose workers find their times in the folder ``engines``; its first steps and its
    last one (which evaluates and saves) do not count."""
    shares = [1.0 - args.spread * k / workers for k in range(workers)]
    for left in engines.iterdir():
        left.unlink()
    (engines / SHARES_FILE).write_text(json.dumps(shares))
    with tempfile.TemporaryDirectory() as folder, Watch(args) as watch:
        started = time.perf_counter()
        config = configure(Path(folder) / "run", workers, staleness, args)
        run_job(config, resume=False)
        wall = time.perf_counter() - started
        sizes = sizes_of(config, args.images)
    if args.profile:
        watch.profile.dump_stats(args.profile)
    marks = [mark for mark in watch.marks if WARM_UP <= mark[0] <= WARM_UP + args.steps]
    pairs = list(pairwise(marks))
    periods = [b[1] - a[1] for a, b in pairs]
    driver = [b[2] - a[2] for a, b in pairs]
    captions = workers * args.images * GROUP_SIZE
    period = statistics.median(periods)
    bare_period, bare_driver = bare_ray.measure(
        [args.engine_seconds * share for share in shares], staleness, args.reward_workers, sizes
    )
    return {
        "workers": workers,
        "max_staleness": staleness,
        "captions_per_step": captions,
        "captions_per_second": captions / period,
        "share_of_ideal": args.engine_seconds / period,
        "overhead_seconds": period - args.engine_seconds,
        "driver_cpu_seconds": statistics.median(driver),
        "bare_ray_overhead_seconds": bare_period - args.engine_seconds,
        "bare_ray_driver_cpu_seconds": bare_driver,
        "all_step_seconds": periods,
        "all_driver_cpu_seconds": driver,
        "wall_seconds": wall,
    }


def sizes_of(config: Config, images: int) -> bare_ray.Sizes:
    """What the workers of a run that is done were given for ``images`` images."""
    data = load_split(config.data, "train")
    model = Path(config.run_folder) / "stage1" / "final" / "model.safetensors"
    return bare_ray.Sizes(
        image_bytes=sum(len(data[i].image) for i in range(images)),
        captions=images * GROUP_SIZE,
        weight_bytes=model.stat().st_size,
    )


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['workers']:3} workers, staleness {row['max_staleness']}  "
        f"{row['captions_per_step']:5} captions  {row['captions_per_second']:6.0f} captions/s  "
        f"share {row['share_of_ideal']:6.1%}  overhead {row['overhead_seconds'] * 1e3:6.1f} ms  "
        f"driver {row['driver_cpu_seconds'] * 1e3:6.1f} ms  "
        f"bare Ray {row['bare_ray_overhead_seconds'] * 1e3:6.1f} and "
        f"{row['bare_ray_driver_cpu_seconds'] * 1e3:6.1f} ms",
        flush=True,
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--images", type=int, default=8, help="images of a worker and step")
    parser.add_argument("--engine-seconds", type=float, default=2.0)
    parser.add_argument("--spread", type=float, default=0.2, help="of the workers' times")
    parser.add_argument("--reward-workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a job")
    parser.add_argument("--profile", type=Path, help="file for the driver's profile, of cProfile")
    parser.add_argument("--small", action="store_true", help="two workers; writes nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the JSON file, by default {RESULTS}")
    args = parser.parse_args(argv)
    if args.small:
        args.workers, args.steps, args.engine_seconds = [2], 3, 0.2
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    rows = []
    with tempfile.TemporaryDirectory() as engines:
        variables = {
            SECONDS_VARIABLE: str(args.engine_seconds),
            FOLDER_VARIABLE: engines,
            "OMP_NUM_THREADS": "1",
        }
        with local_ray("fleet_fakes.install", variables):
            for workers in args.workers:
                for staleness in args.staleness:
                    rows.append(measure(Path(engines), workers, staleness, args))
                    show(rows[-1])
    if not args.small or args.out:
        result = {
            "engine_seconds": args.engine_seconds,
            "engine_spread": args.spread,
            "group_size": GROUP_SIZE,
            "simulated": "engine (answers after a fixed time) and learner (a step is free)",
            "promised": promises.of_fleet(rows),
            "rows": rows,
        }
        write("fleet", argv, result, packages=("ray", "torch"), folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
