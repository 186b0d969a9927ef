"""A captioner that has begun to speak, small jobs on it, and a Ray to run them on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]


def speak(folder: Path) -> None:
    """A tiny captioner after a few cross-entropy steps on scenes: its rewards differ."""
    from rayrl.config import Config, TinyConfig, XeConfig
    from rayrl.data import load_split
    from rayrl.data.order import prompt_indices
    from rayrl.learner.xe import XeTrainer
    from rayrl.vlm import build_tiny_captioner

    config = Config.model_validate({"data": {"scenes": {"num_train": 200}}})
    data = load_split(config.data, "train")
    tiny = TinyConfig(vision_width=32, vision_layers=1, text_width=64, text_layers=2)
    captions = [text for texts in data.references() for text in texts]
    build_tiny_captioner(tiny, captions, config.data.instruction, folder, seed=0)
    trainer = XeTrainer(
        folder,
        model=config.model,
        config=XeConfig(),
        instruction=config.data.instruction,
        max_tokens=16,
        seed=0,
    )
    steps = 60
    for step in range(steps):
        prompts = [data[i] for _, i in prompt_indices(step, 32, len(data), 0)]
        trainer.step([p.image for p in prompts], [p.references for p in prompts], step / steps)
    trainer.save(folder)


def job_flags(model: Path, run_folder: Path) -> dict[str, object]:
    """Options of a job that takes seconds a step and a few steps."""
    return {
        "run_folder": str(run_folder),
        "model.path": str(model),
        "xe.steps": 0,
        "data.scenes.num_train": 60,
        "data.scenes.num_val": 8,
        "engine.backend": "hf",
        "sampling.max_tokens": 12,
        "train.steps": 4,
        "train.images_per_step": 6,
        "train.group_size": 4,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
        "train.tensorboard": False,
        "learner.lr": 1e-3,
        # A thread for each: several workers share two cores.
        "learner.cpus": 1,
        "rollout.cpus": 1,
    }


def command_line(flags: Mapping[str, object]) -> list[str]:
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def spoken_folder(tmp_path_factory) -> Path:
    """A tiny captioner that has begun to speak."""
    folder = tmp_path_factory.mktemp("spoken")
    speak(folder)
    return folder


@pytest.fixture
def small_job(spoken_folder, tmp_path):
    """Command-line flags of a job that takes seconds a step and a few steps."""
    flags = job_flags(spoken_folder, tmp_path / "run")

    def command(*extra: str, **changes) -> list[str]:
        merged = {**flags, **{key.replace("__", "."): value for key, value in changes.items()}}
        return [*command_line(merged), *extra]

    return command


@pytest.fixture(scope="session")
def faults_folder(tmp_path_factory) -> Path:
    """Where fakes look for what they shall do wrong."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def no_ray():
    """For tests that start a Ray of their own in this process."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of this process for the tests of a file."""
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Done:
    """What became of a job, as of a process."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_here(local_ray, capfd):
    """Runs a job's command in this process, on the Ray that is there: what only a process of its
    own can show is not seen, and its start is saved."""

    def run(command, flags: list[str]) -> Done:
        capfd.readouterr()
        code, reason = 0, ""
        try:
            command(flags)
        except SystemExit as stopped:
            code, reason = (
                (1, stopped.code) if isinstance(stopped.code, str) else (stopped.code or 0, "")
            )
        out, err = capfd.readouterr()
        return Done(code, out, err + reason)

    return run


@pytest.fixture(scope="session")
def environment():
    """Processes that start their own Ray: no token in the home directory, files apart."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}


def run_script(script: str, flags: list[str], environment, *, timeout: int = 500):
    """Run a job script to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / script), *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    """Rows without what a clock measured."""
    # Reward workers import these modules for their terms, and need no PyTorch.
    from rayrl.learner.measure import MEASURED

    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("time", "captions_per_second", *MEASURED)
            and not any(part in k for part in ("seconds/", "queue/"))
        }
        for row in rows
    ]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "latest" / "model.safetensors").read_bytes()
