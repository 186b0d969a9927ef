"""Captioning a whole split with Ray Data: one stage reads images, the next holds the engines."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import ray
import ray.data
from safetensors import SafetensorError

from rayrl.actors.cluster import READER_CPUS, worker_environment
from rayrl.actors.room import wait_for_room
from rayrl.adapters import base_folder
from rayrl.config import Config, Part
from rayrl.data import Dataset
from rayrl.decoding import Captions, Decoding
from rayrl.engine.base import EngineSetup, Sampling, make_engine, request_seed
from rayrl.progress import open_progress
from rayrl.types import Prompt
from rayrl.vlm import load_captioner
from rayrl.weights import pack, read_model_files, without_weights, write_model_files


def caption_split(config: Config, data: Dataset, checkpoint: Path, decoding: Decoding) -> Captions:
    """Caption a data set with ``config.rollout.num_workers`` engines, of which one is enough to
    begin.  Needs a running Ray; RuntimeError where it has no room for one in time."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rollout, num_images = config.rollout, len(data)
    asked = {"CPU": rollout.cpus, "GPU": rollout.gpus}
    reader = {"CPU": READER_CPUS}
    wait_for_room("an engine and its reader", [asked, reader], limit_s=rollout.start_timeout_s)
    size = min(config.engine.max_concurrency, -(-num_images // rollout.num_workers))
    # Blocks that exist already: reading an index range would take whole CPUs from the engines.
    indices = [np.arange(i, min(i + size, num_images)) for i in range(0, num_images, size)]
    batches: Any = (
        ray.data.from_numpy(indices)
        .map_batches(
            _Reader,
            # As it was loaded: to find out which images can be used may take long.
            fn_constructor_args=([ray.put(data)],),
            batch_size=size,
            num_cpus=READER_CPUS,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .map_batches(
            _Captioner,
            fn_constructor_args=(config, decoding, *share_model(config, checkpoint)),
            batch_size=size,
            batch_format="pyarrow",
            num_cpus=rollout.cpus,
            num_gpus=rollout.gpus,
            compute=ray.data.ActorPoolStrategy(size=rollout.num_workers),
            runtime_env=worker_environment(rollout.cpus, rollout.gpus),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    rows: dict[int, dict[str, Any]] = {}
    progress = open_progress()
    try:
        for batch in batches:
            rows.update((row["index"], row) for row in batch.to_pylist())
            text = f"captioned {len(rows)}/{num_images} images"
            progress.update(len(rows) / num_images, text, stay=False)
    finally:
        progress.close()
    return Captions(
        best=[rows[i]["caption"] for i in range(num_images)],
        samples=[rows[i]["samples"] for i in range(num_images)],
    )


def share_model(config: Config, checkpoint: Path) -> tuple[list[Any], list[Any]]:
    """A model's small files and its weights in the object store, each in a list, in which
    references travel as references.  ValueError where the weights are damaged."""
    try:
        captioner = load_captioner(
            checkpoint,
            dtype=config.model.dtype,
            trust_remote_code=config.model.trust_remote_code,
        )
    except SafetensorError as error:
        raise ValueError(f"{checkpoint}: damaged weights: {error}") from None
    weights = pack(captioner.model, version=0)
    small = without_weights(read_model_files(base_folder(checkpoint)))
    return [ray.put(small)], [ray.put(weights)]


class _Reader:
    """Indices to encoded images."""

    def __init__(self, data: list[Any]) -> None:
        self._prompts: Dataset = ray.get(data[0])

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        indices = [int(index) for index in batch["data"]]
        prompts = [self._prompts[index] for index in indices]
        return pa.table(
            {
                "index": pa.array(indices, pa.int64()),
                "prompt_id": pa.array([prompt.prompt_id for prompt in prompts], pa.string()),
                "image": pa.array([prompt.image for prompt in prompts], pa.large_binary()),
                "captions": pa.array([list(prompt.references) for prompt in prompts]),
            }
        )


class _Captioner:
    """Encoded images to captions: an engine behind Ray Data."""

    def __init__(
        self, config: Config, decoding: Decoding, files: list[Any], weights: list[Any]
    ) -> None:
        self._config, self._decoding = config, decoding
        self._folder = tempfile.TemporaryDirectory(prefix="rayrl-engine-")
        folder = Path(self._folder.name)
        self._engine = make_engine(
            EngineSetup(
                folder=write_model_files(ray.get(files[0]), folder, with_weights=False),
                config=config.engine,
                group_size=max(1, decoding.samples),
                trust_remote_code=config.model.trust_remote_code,
            )
        )
        self._engine.load_weights(ray.get(weights[0]), changed=get_args(Part))

    def __call__(self, batch: pa.Table) -> pa.Table:
        prompts = [
            Prompt(
                prompt_id=row["prompt_id"],
                image=row["image"],
                text=self._config.data.instruction,
                references=tuple(row["captions"]),
            )
            for row in batch.to_pylist()
        ]
        return pa.table(
            {
                "index": batch.column("index"),
                "caption": pa.array(self._best(prompts), pa.string()),
                "samples": pa.array(self._samples(prompts), pa.list_(pa.string())),
            }
        )

    def _best(self, prompts: list[Prompt]) -> list[str]:
        decoding = self._decoding
        if decoding.beams == 1:
            return [c.text for c in self._engine.greedy(prompts, decoding.max_tokens)]
        from rayrl.engine.hf import HfEngine

        assert isinstance(self._engine, HfEngine)
        return self._engine.beam(prompts, decoding.max_tokens, decoding.beams)

    def _samples(self, prompts: list[Prompt]) -> list[list[str]]:
        decoding = self._decoding
        if not decoding.samples:
            return [[] for _ in prompts]
        sampling = Sampling(
            group_size=decoding.samples,
            temperature=decoding.temperature,
            max_tokens=decoding.max_tokens,
        )
        seeds = [request_seed(self._config.seed, 0, prompt.prompt_id) for prompt in prompts]
        return [group.captions for group in self._engine.generate(prompts, sampling, seeds)]
