"""Real photographs: cross-entropy, then GRPO, on Flickr8k with a tiny captioner.

    .venv/bin/python benchmarks/bench_flickr8k_tiny.py

Runs jobs/flickr8k_tiny.yaml and writes benchmarks/results/flickr8k-tiny-<date>-<hardware>.json:
validation CIDEr-D (x100, 1,000 images, greedy) after stage 1 and over the steps of the objective.
No image or caption of the data set is written there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from bench_default_run import PACKAGES
from record import ROOT, write

from rayrl import cli
from rayrl.jsonl import read_jsonl
from rayrl.metrics import EVAL_METRIC


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("extra", nargs="*", help="flags for the job, after --")
    extra = parser.parse_args(argv).extra
    job = ["jobs/grpo_coco.py", "--config", "jobs/flickr8k_tiny.yaml", *extra]
    started = time.perf_counter()
    subprocess.run([sys.executable, *job], cwd=ROOT, check=True)
    wall = time.perf_counter() - started
    config = cli.load(ROOT / "jobs" / "flickr8k_tiny.yaml", extra)
    folder = ROOT / config.run_folder
    result = {
        "unit": "CIDEr-D x100, 1,000 validation images, greedy, PTB tokens, no end token",
        "seeds": [config.seed],
        "wall_seconds": wall,
        "summary": json.loads((folder / "summary.json").read_text()),
        "cross_entropy": read_jsonl(folder / "xe" / "metrics.jsonl"),
        "objective": [
            {"step": row["step"], "cider_d": row[EVAL_METRIC]}
            for row in read_jsonl(folder / "metrics.jsonl")
            if EVAL_METRIC in row
        ],
        "config": cli.dump(config),
    }
    write("flickr8k-tiny", argv, result, packages=PACKAGES)


if __name__ == "__main__":
    main(sys.argv[1:])
