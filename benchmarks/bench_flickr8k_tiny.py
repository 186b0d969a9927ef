"""Real photographs: cross-entropy, then GRPO, on Flickr8k with a tiny captioner.

    .venv/bin/python benchmarks/bench_flickr8k_tiny.py

Runs jobs/flickr8k_tiny.yaml and writes benchmarks/results/flickr8k-tiny-<date>-<cores>-cores.json:
validation CIDEr-D (x100, 1,000 images, greedy) after stage 1 and over the steps of the objective.
No image or caption of the data set is written there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date

from bench_default_run import ROOT, hardware

from rayrl import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("extra", nargs="*", help="flags for the job, after --")
    extra = parser.parse_args().extra
    job = ["jobs/grpo_coco.py", "--config", "jobs/flickr8k_tiny.yaml", *extra]
    started = time.perf_counter()
    subprocess.run([sys.executable, *job], cwd=ROOT, check=True)
    wall = time.perf_counter() - started
    config = cli.load(ROOT / "jobs" / "flickr8k_tiny.yaml", extra)
    folder = ROOT / config.run_folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stage1 = [
        json.loads(line) for line in (folder / "xe" / "metrics.jsonl").read_text().splitlines()
    ]
    result = {
        "command": " ".join(
            ["python benchmarks/bench_flickr8k_tiny.py", *(["--", *extra] if extra else [])]
        ),
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} x {hardware()}",
        "unit": "CIDEr-D x100, 1,000 validation images, greedy, PTB tokens, no end token",
        "seeds": [config.seed],
        "wall_seconds": wall,
        "summary": json.loads((folder / "summary.json").read_text()),
        "cross_entropy": stage1,
        "objective": [
            {"step": row["step"], "cider_d": row["eval/cider_d"]}
            for row in rows
            if "eval/cider_d" in row
        ],
        "config": cli.dump(config),
    }
    name = f"flickr8k-tiny-{date.today().isoformat()}-{os.cpu_count()}-cores.json"
    out = ROOT / "benchmarks" / "results" / name
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
