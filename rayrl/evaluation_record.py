"""metrics.json of an evaluation: the scores, and everything that says what they are scores of.

Another evaluation of the same captions and data adds its scores; one of others takes its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrl import __version__
from rayrl.jsonl import write_atomically
from rayrl.rewards.suite import IN_WORDS, Evaluation

SCALE = f"x100, except {' and '.join(IN_WORDS)}, which count words"

_RESULTS = ("scores", "left_out", "signature")
"""What evaluations by different metrics differ in; everything else says what was scored."""


def scaled(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as tables show them: x100, except for what counts words."""
    return {n: value if n in IN_WORDS else 100 * value for n, value in scores.items()}


def rows(scores: Mapping[str, float]) -> list[str]:
    """Lines of a table of scaled scores."""
    width = max(map(len, scores))
    return [f"{name:<{width}}  {value:8.2f}" for name, value in scores.items()]


def scores_of(evaluation: Evaluation, captions: Sequence[str]) -> dict[str, Any]:
    """What metrics.json says of the scores: the table's numbers, what they mean, and a digest of
    the raw captions that got them."""
    digest = hashlib.blake2b(json.dumps(list(captions)).encode(), digest_size=16)
    return {
        "scale": SCALE,
        "scores": scaled(evaluation.scores),
        "left_out": dict(evaluation.left_out),
        "signature": evaluation.signature,
        "df": "corpus",
        "num_captions": evaluation.num_captions,
        "captions": digest.hexdigest(),
        "rayrl": __version__,
    }


def write_record(file: Path, record: Mapping[str, Any]) -> str:
    """Write metrics.json, and say in a line what became of the one that was there: its further
    scores are kept where they are of the same captions, data and decoding."""
    new = json.loads(json.dumps(record))
    said, old = "written", _read(file)
    if old is not None:
        names = sorted({*old, *new} - {*_RESULTS})
        differing = [name for name in names if old.get(name) != new.get(name)]
        if differing:
            said = f"written in the place of scores that differ in {', '.join(differing)}"
        elif kept := [name for name in old["scores"] if name not in new["scores"]]:
            new = _joined(old, new)
            said = f"written, beside scores of the same captions ({', '.join(kept)})"
    write_atomically(file, json.dumps(new, indent=1) + "\n")
    return f"{said}: {file}"


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the scores of both, the newer of each."""
    scores = {**old["scores"], **new["scores"]}
    left_out = {**old["left_out"], **new["left_out"]}
    # Without CIDEr-D a signature says less.
    meant = old if "cider_d" in old["scores"] else new
    return {
        **new,
        "scores": scores,
        "left_out": {name: why for name, why in left_out.items() if name not in scores},
        "signature": meant["signature"],
    }


def _read(file: Path) -> dict[str, Any] | None:
    """An earlier metrics.json; None where there is none to speak of."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {*_RESULTS} <= found.keys() else None
