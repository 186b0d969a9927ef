"""What a run folder holds, read back, and the numbers that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rayrl.jsonl import read_jsonl
from rayrl.metrics import EVAL_METRIC, EVAL_SET
from rayrl.yaml_file import parse_yaml

Row = Mapping[str, Any]
_SECONDS = "seconds/"
_OF_A_RUN = ("config.yaml", "metrics.jsonl")
"""A run writes the one before all else, the other with its first numbers."""


def growth(values: Sequence[float]) -> float:
    """How much a counter grew that begins again at 0 whenever the run is resumed."""
    return sum(
        after - before if after >= before else after for before, after in pairwise([0.0, *values])
    )


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run, whole or partial; a file that it has not written yet is empty here.

    ``metrics`` holds a row a step; ``stage1`` and ``control`` hold held-out scores of
    cross-entropy against its training seconds: the stage before, and more of it instead.  All
    scores are of one held-out set, the last one's; those of the steps ``left_out`` were of another.
    """

    name: str
    config_text: str
    config: Row
    metrics: Sequence[Row]
    samples: Sequence[Row]
    images: Sequence[Row]
    summary: Row
    stage1: Sequence[Row]
    control: Sequence[Row]
    left_out: Sequence[int] = ()

    @property
    def objective(self) -> str:
        """The objective as papers write it, or a neutral word when the configuration is gone."""
        preset = self.config.get("objective", {}).get("preset", "The run")
        return preset if preset == "The run" else preset.upper().replace("_", " ")

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total_steps(self) -> int:
        """Steps asked for; those done when the configuration is gone."""
        return int(self.config.get("train", {}).get("steps", self.steps))

    @cached_property
    def evaluations(self) -> list[tuple[int, float, float]]:
        """(step, training seconds until then, held-out CIDEr-D x100), evaluated steps only."""
        return [
            (int(row["step"]), seconds, float(row[EVAL_METRIC]))
            for row, seconds in zip(self.metrics, self.training_seconds, strict=True)
            if EVAL_METRIC in row
        ]

    @cached_property
    def training_seconds(self) -> list[float]:
        """Seconds of all phases but evaluation, from the first step to each row of metrics."""
        spent = [
            sum(v for k, v in row.items() if k.startswith(_SECONDS) and k != _SECONDS + "eval")
            for row in self.metrics
        ]
        return list(accumulate(spent))

    @cached_property
    def phases(self) -> dict[str, list[float]]:
        """Seconds by phase for each row of :attr:`trained`."""
        names = dict.fromkeys(
            name for row in self.trained for name in row if name.startswith(_SECONDS)
        )
        return {
            name.removeprefix(_SECONDS): [float(row.get(name, 0.0)) for row in self.trained]
            for name in names
        }

    @cached_property
    def trained(self) -> list[Row]:
        """The rows of steps; row 0 is the evaluation before the first."""
        return [row for row in self.metrics if row["step"] > 0]


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises FileNotFoundError when there is no such folder or it is none of a run, and ValueError
    with the file's name for one that is not JSON or YAML.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    if not any((folder / name).is_file() for name in _OF_A_RUN):
        raise FileNotFoundError(f"{folder}: no run folder, which has {' or '.join(_OF_A_RUN)}")
    config_file = folder / "config.yaml"
    config_text = _read_text(config_file)
    # One row alone is the model that was given: no stage 1 was run.
    stage1 = _scores(folder / "xe" / "metrics.jsonl")
    metrics = _scores(folder / "metrics.jsonl")
    control = _scores(folder / "xe_baseline.jsonl")
    left_out = _leave_out_other_sets(metrics, stage1, control)
    return RunFolder(
        name=folder.resolve().name,
        config_text=config_text,
        config=parse_yaml(config_text, str(config_file)) or {},
        metrics=metrics,
        samples=read_jsonl(folder / "samples.jsonl"),
        images=_read_json(folder / "eval_captions.json").get("images", []),
        summary=_read_json(folder / "summary.json"),
        stage1=stage1 if len(stage1) > 1 else [],
        control=control,
        left_out=left_out,
    )


def _leave_out_other_sets(
    metrics: Sequence[dict[str, Any]],
    stage1: Sequence[dict[str, Any]],
    control: Sequence[dict[str, Any]],
) -> list[int]:
    """Take the scores that are not of the last one's held-out set out of the rows; returns their
    steps in ``metrics``.  Where an earlier version did not say of which they are, the models of
    stage 1 were scored as step 0 was, and the control as the last step."""
    scored = [row for row in metrics if EVAL_METRIC in row]
    if not scored:
        return []
    first, last = scored[0].get(EVAL_SET), scored[-1].get(EVAL_SET)
    others = [row for row in scored if row.get(EVAL_SET) != last]
    for rows, unsaid in ((others, None), (stage1, first), (control, last)):
        for row in rows:
            if row.get(EVAL_SET, unsaid) != last:
                row.pop(EVAL_METRIC, None)
    return [int(row["step"]) for row in others]


def _scores(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, without the values that were not finite (null)."""
    return [{k: v for k, v in row.items() if v is not None} for row in read_jsonl(file)]


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(file) or "{}")
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: want an object, got {type(value).__name__}")
    return value
