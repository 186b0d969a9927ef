"""What the driver keeps of a step that the learner could not take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from rayrl import cli
from rayrl.checkpoint import Checkpoint, save_checkpoint
from rayrl.config import Config

_KEEP = 3


def save_replay(folder: Path, replay: Checkpoint, config: Config) -> Path:
    """Write ``replay/step_N`` in a run's folder, of which the newest three stay."""
    text = np.frombuffer(cli.dump(config).encode(), np.uint8)
    whole = replace(replay, model_files={**replay.model_files, cli.REPLAY_CONFIG: text})
    return save_checkpoint(folder / "replay", whole, keep=_KEEP)
