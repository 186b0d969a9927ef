"""Held-out evaluation during a run: greedy captions, CIDEr-D over the split, before and after."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rayrl.data.images import decode
from rayrl.jsonl import write_atomically
from rayrl.rewards import ptb
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.signature import cider_signature
from rayrl.types import Prompt

_THUMBNAIL = 160

Attempt = Callable[[str, Callable[[], None]], None]


class Heldout:
    """The held-out prompts of a run and what was captioned at which version; ``signature`` says
    what the scores mean.

    Scores are CIDEr-D x100 as pycocoevalcap reports them: PTB tokens, no end token, document
    frequencies of the held-out references themselves."""

    def __init__(self, prompts: Sequence[Prompt], folder: Path) -> None:
        if len(prompts) < 2:
            raise ValueError(
                f"{len(prompts)} held-out image(s): CIDEr-D over fewer than 2 is 0 by definition"
            )
        self.prompts = list(prompts)
        references = [list(prompt.references) for prompt in prompts]
        self._references = [[ptb.tokenize(text) for text in texts] for texts in references]
        df = DocumentFrequency.from_references(self._references, source="corpus")
        self.signature = cider_signature(df)
        self._cider = CiderD(df)
        self._file = folder / "eval_captions.json"
        self._before: list[tuple[str, float]] = []

    def score(self, captions: Sequence[str]) -> tuple[float, list[float]]:
        """Corpus score and each caption's, x100."""
        each = self._cider.score([ptb.tokenize(c) for c in captions], self._references) * 100.0
        return float(each.mean()), each.tolist()

    def record(self, version: int, captions: Sequence[str], *, attempt: Attempt) -> float:
        """Score a version's captions and keep them beside the first ones in eval_captions.json,
        which ``attempt`` (its name, and what writes it) may give up."""
        corpus, each = self.score(captions)
        now = list(zip(captions, each, strict=True))
        if not self._before:
            self._before = self._restored() or now
        images = [
            {
                "prompt_id": prompt.prompt_id,
                "image_base64_jpeg": thumbnail(prompt.image),
                "references": list(prompt.references),
                "before": {"caption": before[0], "cider_d": before[1]},
                "after": {"caption": after[0], "cider_d": after[1]},
            }
            for prompt, before, after in zip(self.prompts, self._before, now, strict=True)
        ]
        text = json.dumps({"version": version, "images": images})
        attempt(self._file.name, lambda: write_atomically(self._file, text))
        return corpus

    def _restored(self) -> list[tuple[str, float]]:
        """The first captions of the run that this one resumes, if they fit."""
        if not self._file.is_file():
            return []
        images = json.loads(self._file.read_text())["images"]
        if [i["prompt_id"] for i in images] != [p.prompt_id for p in self.prompts]:
            return []
        return [(i["before"]["caption"], i["before"]["cider_d"]) for i in images]


def thumbnail(image: bytes) -> str:
    """A small JPEG of an encoded picture, base64."""
    picture = decode(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()
