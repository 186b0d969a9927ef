"""Stage 1: cross-entropy with Ray Train and Ray Data.

Ray Data reads, decodes and orders the images while the workers train.  Every few steps a snapshot
of the model is kept, so that the held-out line of stage 1 can be drawn afterwards, and beside the
newest what it takes to go on from there: lost workers, and a lost driver, cost the steps since.
Until stage 1 is done:

    stage1/training/step_100/            a snapshot
    stage1/training/step_200/            the newest one
    stage1/training/step_200/trainer/    the optimizer's state, the snapshots so far
    stage1/training/ray/                 Ray Train's own books
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from rayrl import cli
from rayrl.actors.cluster import (
    READER_CPUS,
    SPARE_CPUS,
    connect,
    failing_in_one_line,
    worker_environment,
    xe_cpus,
)
from rayrl.actors.pieces import in_pieces
from rayrl.actors.pool import RestartBudget
from rayrl.actors.room import wait_for_room
from rayrl.actors.train_failures import failures_of, first_loss, own_failure
from rayrl.checkpoint import (
    Checkpoint,
    forget_trainer,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from rayrl.config import Config
from rayrl.data import Dataset
from rayrl.data.order import item_at
from rayrl.given import check_given
from rayrl.interrupt import own_handler
from rayrl.jsonl import write_atomically
from rayrl.resume import refuse_begun
from rayrl.run_lock import sole_driver
from rayrl.stage1 import Snapshot, run_stage1
from rayrl.types import Prompt
from rayrl.weights import read_model_files, write_model_files

if TYPE_CHECKING:
    from rayrl.learner.xe import XeTrainer

_RAY = "ray"
_STEPS_AT_ONCE = 4


def train_xe(
    config: Config,
    data: Dataset,
    start: Path,
    out: Path,
    *,
    name: str,
    seconds: float | None = None,
    made_of: Mapping[str, Any] | None = None,
    go_on: bool = False,
) -> list[Snapshot]:
    """Train with cross-entropy on ``data`` from ``start`` and keep snapshots under ``out/name``.

    Runs ``config.xe.steps`` steps, or for ``seconds`` of training when given; workers share a step
    that is, to rounding, the one that one alone would take.  Returns the snapshots, the finished
    model last, which keeps its ``trainer`` folder.  A lost worker goes on from the newest snapshot,
    and so does this with ``go_on``; ``made_of`` is written beside it, for who decides that.
    """
    place = (out / name).resolve()
    if not go_on:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    # A run that is bounded by time needs enough data, not an exact amount.
    steps = config.xe.steps if seconds is None else max(config.xe.steps, int(seconds * 50))
    newest = _newest(place)
    if newest < steps:
        files = in_pieces(read_model_files(start))
        setup = {
            "config": config,
            # By a function, for Ray Train may look at all that is in a mapping.
            "files": lambda: files,
            "place": str(place),
            "made_of": dict(made_of or {}),
            "seconds": seconds,
            "steps": steps,
        }
        # As it was loaded: to go through all images again would take each reader as long.
        newest = _fit(config, setup, [ray.put(data)])
    meta = load_checkpoint(place / f"step_{newest}").meta
    return [
        Snapshot(steps=one["steps"], seconds=one["seconds"], folder=place / f"step_{one['steps']}")
        for one in meta["snapshots"]
    ]


def _newest(place: Path) -> int:
    """The step of the newest snapshot, 0 before the first."""
    return max(list_checkpoints(place), default=0)


def _fit(config: Config, setup: dict[str, Any], data: list[Any]) -> int:
    """Train with Ray Train, again where workers are lost; returns the step of the last snapshot.
    ``data`` is a reference to the data set, in a list, in which it travels as one.

    RuntimeError where a worker fails by itself, for another one would too, and where there is no
    room for the workers in time; TooManyLost past the run's ``rollout.max_restarts``."""
    place, workers = Path(setup["place"]), config.xe.num_workers
    budget = RestartBudget(config.rollout.max_restarts)
    while True:
        wait_for_room(
            f"cross-entropy's {workers} worker(s) and their readers",
            [worker_resources(config), {"CPU": READER_CPUS}] * workers,
            limit_s=config.rollout.start_timeout_s,
        )
        try:
            with own_handler():
                result = _torch_trainer(config, setup, data).fit()
        except SystemExit:
            # What Ray Train makes of Ctrl-C, after which it has ended its workers.
            raise KeyboardInterrupt("interrupted") from None
        except ray.train.TrainingFailedError as error:
            if own := own_failure(failures_of(error)):
                raise RuntimeError(f"cross-entropy failed: {type(own).__name__}: {own}") from own
            budget.spend(f"cross-entropy goes on after step {_newest(place)}", first_loss(error))
        else:
            # A listing of a folder that machines share may be older than what a worker has just
            # written.
            return int(result.metrics["steps"]) if result.metrics else _newest(place)


def worker_resources(config: Config) -> dict[str, float]:
    """What a worker of stage 1 asks Ray for."""
    return {"CPU": config.learner.cpus, "GPU": 1.0 if config.learner.gpus else 0.0}


def _torch_trainer(config: Config, setup: dict[str, Any], data: list[Any]) -> TorchTrainer:
    """One attempt: all that is lost ends it."""
    place, workers = Path(setup["place"]), config.xe.num_workers
    shutil.rmtree(place / _RAY, ignore_errors=True)
    # Ray Train hands on what is set here.
    _set_data_context()
    return TorchTrainer(
        _train_worker,
        train_loop_config=setup,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=config.learner.gpus > 0,
            resources_per_worker=worker_resources(config),
        ),
        # One for each worker, and not one that Ray Data deals out as they come: whoever goes on
        # gets what is left.  Made when an attempt begins.
        datasets={
            str(rank): partial(_dataset, config, data, setup["steps"], place, rank)
            for rank in range(workers)
        },
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        # The checker reads classes of Ray Train's first version, which is not what this is.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=_RAY,
            storage_path=str(place),
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            worker_runtime_env=worker_environment(config.learner.cpus, config.learner.gpus),
        ),
    )


def _set_data_context() -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _dataset(
    config: Config, data: list[Any], steps: int, place: Path, rank: int
) -> ray.data.Dataset:
    """A worker's images and references of the steps after the newest snapshot in ``place``, in the
    order of (seed, epoch, index); every row says after how many steps it begins."""
    _set_data_context()
    done = _newest(place)
    # Parts of a few steps, by their numbers alone: a run may have very many steps.  What is made of
    # items takes no task of Ray's, for which there may be no CPU left.
    return ray.data.from_items(list(range(done, steps, _STEPS_AT_ONCE))).map_batches(
        _Rows,
        fn_constructor_args=(config, data, rank, done, steps),
        batch_size=1,
        num_cpus=READER_CPUS,
        compute=ray.data.ActorPoolStrategy(size=1),
    )


class _Rows:
    """Looks up what a worker of this rank trains on in the few steps that begin with a given one;
    an attempt takes those from ``done`` to ``end``."""

    def __init__(self, config: Config, data: list[Any], rank: int, done: int, end: int) -> None:
        self._prompts: Dataset = ray.get(data[0])
        self._size, self._seed = config.xe.images_per_step, config.seed
        self._share = self._size // config.xe.num_workers
        self._rank, self._done, self._end = rank, done, end

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        (first,) = batch["item"]
        steps = range(int(first), min(int(first) + _STEPS_AT_ONCE, self._end))
        prompts = [self._prompt(step, slot) for step in steps for slot in range(self._share)]
        return {
            "done": [self._done] * len(prompts),
            "prompt_id": [prompt.prompt_id for prompt in prompts],
            "image": [prompt.image for prompt in prompts],
            "captions": [list(prompt.references) for prompt in prompts],
        }

    def _prompt(self, step: int, slot: int) -> Prompt:
        place = step * self._size + self._rank * self._share + slot
        _, index = item_at(place, len(self._prompts), self._seed)
        return self._prompts[index]


def _train_worker(setup: dict[str, Any]) -> None:
    config: Config = setup["config"]
    context = ray.train.get_context()
    size = config.xe.images_per_step // context.get_world_size()
    shard = ray.train.get_dataset_shard(str(context.get_world_rank()))
    batches = shard.iter_batches(batch_size=size, prefetch_batches=2, batch_format="numpy")
    ahead = iter(batches)
    first = next(ahead, None)
    if first is None:
        return  # the attempt before was lost after its last snapshot
    trainer, snapshots = _trainer(setup, int(first["done"][0]))
    elapsed = snapshots[-1]["seconds"] if snapshots else 0.0
    limit, total = setup["seconds"], setup["steps"]
    started = time.perf_counter()
    for batch in chain([first], ahead):
        progress = elapsed / limit if limit else trainer.steps / total
        captions = [list(row) for row in batch["captions"]]
        trainer.step(list(batch["image"]), captions, progress, list(batch["prompt_id"]))
        elapsed = trainer.mean(elapsed + time.perf_counter() - started)
        last = trainer.steps == total or (limit is not None and elapsed >= limit)
        if last or trainer.steps % config.xe.snapshot_every == 0:
            snapshots.append({"steps": trainer.steps, "seconds": elapsed})
            if context.get_world_rank() == 0:
                meta = {**setup["made_of"], "snapshots": snapshots}
                _snapshot(Path(setup["place"]), trainer.checkpoint(meta))
        started = time.perf_counter()
        if last:
            break
    ray.train.report({"steps": trainer.steps})


def _trainer(setup: dict[str, Any], done: int) -> tuple[XeTrainer, list[dict[str, Any]]]:
    """A worker's trainer as it was after ``done`` steps, and the snapshots until then.

    OSError where the run folder of the driver is not this machine's too."""
    from rayrl.learner.xe import XeTrainer

    config: Config = setup["config"]
    context, place = ray.train.get_context(), Path(setup["place"])
    if not place.is_dir():
        raise OSError(
            f"{place}: not on the machine of a worker of stage 1, want a --run_folder that all "
            "machines share"
        )
    with tempfile.TemporaryDirectory(prefix="rayrl-xe-") as scratch:
        folder, before = Path(scratch), None
        if done:
            folder = place / f"step_{done}"
            before = load_checkpoint(folder)
        else:
            write_model_files(setup["files"](), folder, with_weights=True)
        trainer = XeTrainer(
            folder,
            model=config.model,
            config=config.xe,
            instruction=config.data.instruction,
            max_tokens=config.sampling.max_tokens,
            seed=config.seed,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
        )
    if before is None:
        return trainer, []
    trainer.restore(before)
    return trainer, list(before.meta["snapshots"])


def _snapshot(place: Path, checkpoint: Checkpoint) -> None:
    """Keep a model, and of the newest one what the optimizer knows."""
    before = list_checkpoints(place)
    save_checkpoint(place, checkpoint, keep=len(before) + 1)
    for step in before:
        forget_trainer(place / f"step_{step}")


def main(config: Config) -> None:
    """`jobs/xe_coco.py`: train stage 1 alone and leave the model in RUN_FOLDER/stage1/final, and
    beside it the configuration, by which evaluation knows its data."""
    folder = Path(config.run_folder)
    with failing_in_one_line("xe_coco.py"), sole_driver(folder, print):
        refuse_begun(folder)
        begins = not (folder / "stage1" / "final").is_dir()
        check_given(config, "train", model=begins)
        gpus = worker_resources(config)["GPU"] * config.xe.num_workers
        connect(xe_cpus(config), gpus, spare_cpus=SPARE_CPUS)
        final = run_stage1(config, folder, sampled=False)[-1]
        # Not before: until then a model of another configuration may be there.
        write_atomically(folder / cli.RUN_CONFIG, cli.dump(config))
    print(f"{final.steps} steps in {final.seconds:.0f} s; model: {final.folder}")
