"""What waiting threads cost: one learner's update on all cores, and several at once.

    .venv/bin/python benchmarks/bench_threads.py            # more than three minutes
    .venv/bin/python benchmarks/bench_threads.py --small    # one update each; writes nothing

PyTorch's threads (GNU OpenMP) wait for each other awake, by default for milliseconds.  Where two
processes share the cores, as a learner and an engine on a laptop do, each keeps the other's threads
from running while its own wait.  rayrl's workers (``worker_environment`` in
rayrl/actors/cluster.py) fall asleep after microseconds.

An update is forward and backward on 8 images with 8 captions of 20 tokens, on a captioner of 2.5 M
parameters.  Ways and numbers of processes take turns, each in fresh processes; medians count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, write

from rayrl.actors.cluster import worker_environment

DEFAULT = "by default"


def ways() -> dict[str, dict[str, str]]:
    """Environments by the way in which threads wait, each with a thread for every core."""
    variables: dict[str, str] = worker_environment(os.cpu_count() or 1, 0.0)["env_vars"]
    count = {"OMP_NUM_THREADS": variables["OMP_NUM_THREADS"]}
    return {DEFAULT: count, "as rayrl's workers": variables}


def peer(updates: int) -> None:
    """A process that does updates whenever it is asked to, and answers with their seconds."""
    from bench_learner import backward, make_batch, make_model, methods
    from learner_rows import Row

    row = Row(model="tiny-2.5m", image_tokens=16, group_size=8, prompts=8)
    model, images = make_model(row, "cpu", small=False)
    batch = make_batch(row, model, images, "cpu", row.prompts)
    shared = methods(row, model, batch)["shared"]
    backward(shared, model, batch, row.prompts * row.group_size)
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(updates):
            model.zero_grad(set_to_none=True)
            backward(shared, model, batch, row.prompts * row.group_size)
        print((time.perf_counter() - started) / updates, flush=True)


def together(variables: dict[str, str], processes: int, args: argparse.Namespace) -> list[float]:
    """Seconds of an update in each of some processes that work at the same time."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    command = [sys.executable, __file__, "--peer", "--updates", str(args.updates)]
    peers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": str(ROOT), **variables},
        )
        for _ in range(processes)
    ]
    try:
        for each in peers:
            _answer(each)
        for each in peers:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        return [float(_answer(each)) for each in peers]
    finally:
        for each in peers:
            each.kill()
            each.wait()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process ended with status {process.wait()}")
    return line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5, help="of a process and round")
    parser.add_argument("--small", action="store_true", help="one update each; writes nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the JSON file, by default {RESULTS}")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small:
        args.rounds = args.updates = 1
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.peer:
        peer(args.updates)
        return
    seconds: dict[tuple[int, str], list[float]] = {}
    for _ in range(args.rounds):
        for processes in args.processes:
            for name, variables in ways().items():
                spent = together(variables, processes, args)
                seconds.setdefault((processes, name), []).extend(spent)
    rows: list[dict[str, Any]] = []
    for (processes, name), spent in seconds.items():
        median = statistics.median(spent)
        rows.append(
            {
                "processes": processes,
                "waiting": name,
                "seconds": median,
                "all_seconds": spent,
                "times_default": statistics.median(seconds[processes, DEFAULT]) / median,
            }
        )
        print(f"{processes} at once, {name:20} {median * 1e3:8.1f} ms an update", flush=True)
    if not args.small or args.out:
        result = {"cores": os.cpu_count(), "rows": rows}
        write("threads", argv, result, packages=("torch",), folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
