"""Does the objective pay?  The default job over several seeds, against more cross-entropy.

    .venv/bin/python benchmarks/bench_default_run.py --seeds 0 1 2

Every run ends with a control that continues stage 1 for as long as the objective trained, so that
both had the same images, the same start and the same training time.  Writes
benchmarks/results/default-run-<date>-<hardware>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(seed: int, folder: Path, extra: list[str]) -> dict[str, object]:
    """One run of the job; its summary and how long it took from start to end."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--seed", str(seed), "--run_folder", str(folder), *extra]
    started = time.perf_counter()
    subprocess.run([sys.executable, "jobs/grpo_coco.py", *flags], cwd=ROOT, check=True)
    wall = time.perf_counter() - started
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return {**summary, "wall_seconds": wall}


def hardware() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(runs: list[dict[str, float]]) -> str:
    """Markdown: one line a quantity, mean and range over the seeds."""
    rows = [
        ("after cross-entropy (start)", "cider_d_start"),
        ("after GRPO", "cider_d_end"),
        ("after more cross-entropy, same time", "cider_d_xe_control"),
    ]
    lines = ["| held-out CIDEr-D (x100) | mean | lowest | highest |", "|---|---|---|---|"]
    for label, key in rows:
        values = [run[key] for run in runs]
        mean = statistics.mean(values)
        lines.append(f"| {label} | {mean:.1f} | {min(values):.1f} | {max(values):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_default_run")
    parser.add_argument("extra", nargs="*", help="flags for the job, after --")
    args = parser.parse_args()
    runs = [run(seed, args.folder / f"seed_{seed}", args.extra) for seed in args.seeds]
    print(table(runs))
    name = f"default-run-{date.today().isoformat()}-{os.cpu_count()}-cores.json"
    result = {
        "command": "python benchmarks/bench_default_run.py --seeds "
        + " ".join(str(seed) for seed in args.seeds)
        + "".join(f" {flag}" for flag in (["--", *args.extra] if args.extra else [])),
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} x {hardware()}",
        "unit": "CIDEr-D x100, held-out, greedy",
        "runs": runs,
    }
    out = ROOT / "benchmarks" / "results" / name
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
