"""Cross-entropy beside the objective: how good stage 1 was after how long, and what more of it
would have given in the time that the objective took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rayrl.actors.fleet import Fleet
from rayrl.actors.losses import FAILURES
from rayrl.checkpoint import forget_trainer
from rayrl.config import Config
from rayrl.data import Dataset
from rayrl.heldout import Heldout
from rayrl.interrupt import StopRequest
from rayrl.metrics import EVAL_METRIC, EVAL_SET
from rayrl.stage1 import Snapshot
from rayrl.vlm import load_captioner
from rayrl.weights import pack


@dataclass(frozen=True)
class XeCurve:
    """Scores cross-entropy models on the held-out images with a run's own rollout workers."""

    config: Config
    folder: Path
    train_data: Dataset
    fleet: Fleet
    heldout: Heldout
    say: Callable[[str], None]

    def stage1(self, snapshots: Sequence[Snapshot]) -> None:
        """The models of stage 1 over its training time, into ``xe/metrics.jsonl``; nothing where
        it has none but the one that the run starts from, whose score is the run's at step 0."""
        if len(snapshots) == 1:
            return
        self._score(snapshots, self.folder / "xe" / "metrics.jsonl")

    def control(self, stage1: Snapshot, seconds: float, stop: StopRequest) -> dict[str, float]:
        """``cider_d_xe_control``: held-out CIDEr-D (x100) of stage 1's last model after ``seconds``
        more of cross-entropy; and of what came before into ``xe_baseline.jsonl``.  Nothing, and the
        reason is said, where it fails: what it would be compared with is there.

        It trains where the learner did, so that must have ended, and on no more workers.  A signal
        that ``stop`` listens to ends it at once."""
        self.say(f"control: cross-entropy for {seconds:.0f} s more")
        try:
            with stop.at_once():
                return {"cider_d_xe_control": self._control(stage1, seconds)}
        except (*FAILURES, KeyboardInterrupt) as error:
            self.say(f"there is no control: {str(error) or 'interrupted'}")
            shutil.rmtree(self._place, ignore_errors=True)
            self._curve.unlink(missing_ok=True)
            return {}

    def _control(self, stage1: Snapshot, seconds: float) -> float:
        from rayrl.xe import train_xe

        xe = self.config.xe
        most = min(xe.num_workers, self.config.learner.num_workers)
        workers = max(n for n in range(1, most + 1) if xe.images_per_step % n == 0)
        config = self.config.model_copy(
            update={"xe": xe.model_copy(update={"num_workers": workers})}
        )
        snapshots = train_xe(
            config, self.train_data, stage1.folder, self._place, name="xe", seconds=seconds
        )
        for snapshot in snapshots:
            forget_trainer(snapshot.folder)
        start = replace(stage1, steps=0, seconds=0.0)
        return self._score([start, *snapshots], self._curve)[-1]

    @property
    def _place(self) -> Path:
        return self.folder / "control"

    @property
    def _curve(self) -> Path:
        return self.folder / "xe_baseline.jsonl"

    def _score(self, snapshots: Sequence[Snapshot], file: Path) -> list[float]:
        """One line of ``file`` a model; the fleet then holds the last one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        model, scores = self.config.model, []
        with file.open("w", encoding="utf-8") as out:
            for i, snapshot in enumerate(snapshots):
                captioner = load_captioner(
                    snapshot.folder, dtype=model.dtype, trust_remote_code=model.trust_remote_code
                )
                self.fleet.show(i, pack(captioner.model, version=i))
                captions = [c.text for c in self.fleet.greedy(self.heldout.prompts, i)]
                scores.append(self.heldout.score(captions)[0])
                row = {"step": snapshot.steps, "seconds": snapshot.seconds}
                score = {EVAL_METRIC: scores[-1], EVAL_SET: self.heldout.name}
                out.write(json.dumps({**row, **score}) + "\n")
                self.say(f"cross-entropy, step {snapshot.steps}: held-out CIDEr-D {scores[-1]:.1f}")
        return scores
