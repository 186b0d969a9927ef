"""Stage 1: cross-entropy with Ray Train and Ray Data.

Ray Data reads, decodes and orders the images while the workers train.  Every few steps a snapshot
of the model is kept, so that the held-out line of stage 1 can be drawn afterwards.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from rayrl import cli
from rayrl.actors.cluster import connect, failing_in_one_line, worker_environment
from rayrl.actors.pieces import in_pieces
from rayrl.config import Config
from rayrl.data import load_split
from rayrl.data.order import prompt_indices
from rayrl.jsonl import write_atomically
from rayrl.resume import refuse_begun
from rayrl.stage1 import Snapshot, run_stage1
from rayrl.weights import ModelFiles, read_model_files, write_model_files


def train_xe(
    config: Config, start: Path, out: Path, *, name: str, seconds: float | None = None
) -> list[Snapshot]:
    """Train with cross-entropy from ``start`` and keep snapshots under ``out/name``.

    Runs ``config.xe.steps`` steps, or for ``seconds`` of training when given.  Returns the
    snapshots, the finished model last.
    """
    place = out / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    files = in_pieces(read_model_files(start))
    # A run that is bounded by time needs enough data, not an exact amount.
    steps = config.xe.steps if seconds is None else max(config.xe.steps, int(seconds * 50))
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config,
            # By a function, for Ray Train may look at all that is in a mapping.
            "files": lambda: files,
            "seconds": seconds,
            "steps": steps,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.xe.num_workers,
            use_gpu=config.learner.gpus > 0,
            resources_per_worker={"CPU": config.learner.cpus},
        ),
        datasets={"train": _dataset(config, steps)},
        # The checker reads the class of Ray Train's first version, which is not what this is.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=str(out.resolve()),
            # Each attempt begins at the start, and comes to the same model.
            failure_config=ray.train.FailureConfig(max_failures=config.rollout.max_restarts),
            worker_runtime_env=worker_environment(config.learner.cpus, config.learner.gpus),
        ),
    )
    result = trainer.fit()
    if result.error:
        raise RuntimeError(f"stage 1 failed: {result.error}") from result.error
    # One that failed may have left some of the steps that the last attempt took too.
    snapshots: dict[int, Snapshot] = {}
    for checkpoint, metrics in result.best_checkpoints or []:
        folder = place / f"snapshot_{metrics['steps']}"
        with checkpoint.as_directory() as source:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        snapshots[metrics["steps"]] = Snapshot(
            steps=metrics["steps"], seconds=metrics["seconds"], folder=folder
        )
    return [snapshots[steps] for steps in sorted(snapshots)]


def _dataset(config: Config, steps: int) -> ray.data.Dataset:
    """The images and references of all steps, in the order of (seed, epoch, index)."""
    size = config.xe.images_per_step
    count = len(load_split(config.data, "train"))
    indices = [
        index
        for step in range(steps)
        for _, index in prompt_indices(step, size, count, config.seed)
    ]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_numpy(np.asarray(indices)).map_batches(
        _Rows,
        fn_constructor_args=(config,),
        batch_size=size * 4,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=1),
    )


class _Rows:
    """Looks up prompts by index; one reader an actor."""

    def __init__(self, config: Config) -> None:
        self._prompts = load_split(config.data, "train")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        prompts = [self._prompts[int(index)] for index in batch["data"]]
        return {
            "image": [prompt.image for prompt in prompts],
            "captions": [list(prompt.references) for prompt in prompts],
        }


def _train_worker(setup: dict[str, Any]) -> None:
    from rayrl.learner.xe import XeTrainer

    config: Config = setup["config"]
    files: ModelFiles = setup["files"]()
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    with tempfile.TemporaryDirectory(prefix="rayrl-xe-") as folder:
        trainer = XeTrainer(
            write_model_files(files, Path(folder), with_weights=True),
            model=config.model,
            config=config.xe,
            instruction=config.data.instruction,
            max_tokens=config.sampling.max_tokens,
            seed=config.seed * 1000 + rank,
            world_size=world,
        )
    limit, total = setup["seconds"], setup["steps"]
    size = config.xe.images_per_step // world
    elapsed, done, loss = 0.0, 0, float("nan")
    batches = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=size, prefetch_batches=2, batch_format="numpy"
    )
    started = time.perf_counter()
    for done, batch in enumerate(batches, start=1):
        progress = elapsed / limit if limit else (done - 1) / total
        captions = [list(row) for row in batch["captions"]]
        loss = trainer.step(list(batch["image"]), captions, progress)["loss"]
        elapsed += time.perf_counter() - started
        last = done == total or (limit is not None and elapsed >= limit)
        if last or done % config.xe.snapshot_every == 0:
            _report(trainer, done, elapsed, loss, rank)
        started = time.perf_counter()
        if last:
            return


def _report(trainer: Any, steps: int, seconds: float, loss: float, rank: int) -> None:
    metrics = {"steps": steps, "seconds": seconds, "loss": loss}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main(config: Config) -> None:
    """`jobs/xe_coco.py`: train stage 1 alone and leave the model in RUN_FOLDER/stage1/final, and
    beside it the configuration, by which evaluation knows its data."""
    folder = Path(config.run_folder)
    with failing_in_one_line("xe_coco.py"):
        refuse_begun(folder)
        workers, learner = config.xe.num_workers, config.learner
        connect(learner.cpus * workers + 2, learner.gpus * workers)
        final = run_stage1(config, folder)[-1]
        # Not before: until then a model of another configuration may be there.
        write_atomically(folder / cli.RUN_CONFIG, cli.dump(config))
    print(f"{final.steps} steps in {final.seconds:.0f} s; model: {final.folder}")
