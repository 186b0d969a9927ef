"""Held-out evaluation during a run: greedy captions, CIDEr-D over the split, before and after."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rayrl.data.images import decode
from rayrl.jsonl import write_atomically
from rayrl.rewards import ptb
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.signature import cider_signature, statistics_in
from rayrl.types import Prompt

_THUMBNAIL = 160

Attempt = Callable[[str, Callable[[], None]], None]


class Heldout:
    """The held-out prompts of a run and what was captioned at which version; ``signature`` says
    what the scores mean, and ``name`` which prompts they are of.

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
        self.name = statistics_in(self.signature)
        self._cider = CiderD(df)
        self._file = folder / "eval_captions.json"
        self._before: list[dict[str, Any]] = []

    @classmethod
    def first(cls, count: int, data: Sequence[Prompt], folder: Path) -> Heldout:
        """The first ``count`` prompts, or all where there are fewer."""
        return cls([data[i] for i in range(min(count, len(data)))], folder)

    def score(self, captions: Sequence[str]) -> tuple[float, list[float]]:
        """Corpus score and each caption's, x100."""
        each = self._cider.score([ptb.tokenize(c) for c in captions], self._references) * 100.0
        return float(each.mean()), each.tolist()

    def record(self, version: int, captions: Sequence[str], *, attempt: Attempt) -> float:
        """Score a version's captions and keep them beside the first ones in eval_captions.json,
        which ``attempt`` (its name, and what writes it) may give up."""
        corpus, each = self.score(captions)
        if not self._before:
            self._before = self._first_captions(version, captions)
        images = [
            {
                "prompt_id": prompt.prompt_id,
                "image_base64_jpeg": small,
                "references": list(prompt.references),
                "before": before,
                "after": {"caption": caption, "cider_d": score},
            }
            for prompt, small, before, caption, score in zip(
                self.prompts, self._thumbnails, self._before, captions, each, strict=True
            )
        ]
        text = json.dumps({"version": version, "images": images})
        attempt(self._file.name, lambda: write_atomically(self._file, text))
        return corpus

    @cached_property
    def _thumbnails(self) -> list[str]:
        """Of every prompt; what the driver does in each evaluation keeps the workers waiting."""
        return [thumbnail(prompt.image) for prompt in self.prompts]

    def _first_captions(self, version: int, captions: Sequence[str]) -> list[dict[str, Any]]:
        """Of each prompt the first caption in the run, the version that it is of and its score by
        these references; for one that was not held out before, of those at ``version``."""
        kept = self._kept() if version > 0 else {}
        first = [
            kept.get(_key(prompt.prompt_id, prompt.references), (caption, version))
            for prompt, caption in zip(self.prompts, captions, strict=True)
        ]
        _, each = self.score([caption for caption, _ in first])
        return [
            {"caption": caption, "cider_d": score, "version": begun}
            for (caption, begun), score in zip(first, each, strict=True)
        ]

    def _kept(self) -> Mapping[str, tuple[str, int]]:
        """The first captions in the run that this one resumes, and their versions."""
        if not self._file.is_file():
            return {}
        return {
            _key(image["prompt_id"], image["references"]): (
                image["before"]["caption"],
                image["before"].get("version", 0),
            )
            for image in json.loads(self._file.read_text())["images"]
        }


def _key(prompt_id: str, references: Sequence[str]) -> str:
    """Tells an image of one data set from one of the same id in another."""
    return json.dumps([prompt_id, *references])


def thumbnail(image: bytes) -> str:
    """A small JPEG of an encoded picture, base64."""
    picture = decode(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()
