"""The evaluation suite: what the COCO evaluation reports, CLIPScore, diversity, and a signature.

Scores are on the scale of pycocoevalcap: 0 to 1, CIDEr-D 0 to 10; tables show them times 100, as
papers do.  A metric whose needs are missing is left out with the reason, never 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rayrl.own_modules import imported
from rayrl.rewards import diversity, ptb
from rayrl.rewards.bleu import bleu
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.java import MetricUnavailable
from rayrl.rewards.meteor import Meteor
from rayrl.rewards.ngrams import check_listed
from rayrl.rewards.rouge import rouge_l
from rayrl.rewards.signature import PTB_SIGNATURE, cider_signature
from rayrl.rewards.spice import Spice

Array = npt.NDArray[np.float64]
Result = tuple[float, Array | None]
"""A score of the corpus, and of each caption [N] where there is one."""


@dataclass(frozen=True)
class CaptionSet:
    """One raw caption for each image, and its raw references; for CLIPScore its encoded image and
    a local CLIP folder; for the share of novel captions the raw training captions."""

    captions: Sequence[str]
    references: Sequence[Sequence[str]]
    images: Sequence[bytes] | None = None
    training: Collection[str] = ()
    clip_folder: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("references", "images"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.captions):
                raise ValueError(f"{len(self.captions)} captions but {len(values)} {name}")
        for i, some in enumerate(self.references):
            check_listed(i, some)

    @cached_property
    def tokens(self) -> list[list[str]]:
        return [ptb.tokenize(caption) for caption in self.captions]

    @cached_property
    def reference_tokens(self) -> list[list[list[str]]]:
        return [[ptb.tokenize(text) for text in some] for some in self.references]

    @cached_property
    def df(self) -> DocumentFrequency:
        """The document frequencies of this set's references, as pycocoevalcap takes them."""
        return DocumentFrequency.from_references(self.reference_tokens, source="corpus")


def _bleu(data: CaptionSet) -> dict[str, Result]:
    result = bleu(data.tokens, data.reference_tokens)
    return {
        f"bleu_{n}": (float(result.corpus[n - 1]), result.captions[:, n - 1]) for n in range(1, 5)
    }


def _meteor(data: CaptionSet) -> dict[str, Result]:
    with Meteor() as meteor:
        return {"meteor": meteor.score(data.tokens, data.reference_tokens)}


def _rouge_l(data: CaptionSet) -> dict[str, Result]:
    return _mean("rouge_l", rouge_l(data.tokens, data.reference_tokens))


def _cider_d(data: CaptionSet) -> dict[str, Result]:
    return _mean("cider_d", CiderD(data.df).score(data.tokens, data.reference_tokens))


def _spice(data: CaptionSet) -> dict[str, Result]:
    return {"spice": Spice().score(data.tokens, data.reference_tokens)}


def _clip_score(data: CaptionSet) -> dict[str, Result]:
    if data.images is None or data.clip_folder is None:
        raise MetricUnavailable("CLIPScore needs the images and a local CLIP folder")
    from rayrl.rewards.clipscore import ClipScore

    clip = ClipScore(data.clip_folder, data.device)
    plain, with_references = clip.both(data.images, data.captions, data.references)
    return _mean("clip_score", plain) | _mean("ref_clip_score", with_references)


def _health(data: CaptionSet) -> dict[str, Result]:
    results: dict[str, Result] = {
        **_mean("bad_ending", diversity.bad_ending(data.tokens)),
        **_mean("repetition", diversity.repetition(data.tokens)),
        **_mean("length", np.array([len(words) for words in data.tokens], dtype=np.float64)),
        "vocabulary": (float(diversity.vocabulary_size(data.tokens)), None),
    }
    if data.training:
        results["novel"] = (_novel_share(data.tokens, data.training), None)
    return results


def _novel_share(tokens: Sequence[Sequence[str]], training: Collection[str]) -> float:
    known = {" ".join(ptb.tokenize(caption)) for caption in training}
    return diversity.novel_share(tokens, known)


def _mean(name: str, scores: Array) -> dict[str, Result]:
    return {name: (float(scores.mean()), scores)}


Metric = Callable[[CaptionSet], Mapping[str, Result]]
"""One or more scores of captions, by name."""

METRICS: Mapping[str, Metric] = {
    "bleu": _bleu,
    "meteor": _meteor,
    "rouge_l": _rouge_l,
    "cider_d": _cider_d,
    "spice": _spice,
    "clip_score": _clip_score,
    "health": _health,
}


IN_WORDS = ("length", "vocabulary")
"""Scores that count words; all others are shown times 100."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a corpus; of each of its captions [N], where a metric has such; why metrics are
    missing; and what the CIDEr-D means (``rayrl.rewards.signature``)."""

    scores: Mapping[str, float]
    captions: Mapping[str, Array]
    left_out: Mapping[str, str]
    signature: str
    num_captions: int

    def table(self) -> str:
        """Rows of name and value x100 (length and vocabulary in words), then what was left out,
        and why."""
        width = max(map(len, self.scores), default=0)
        lines = [
            f"{name:<{width}}  {value if name in IN_WORDS else 100 * value:8.2f}"
            for name, value in self.scores.items()
        ]
        lines += [f"{name}: left out, {reason}" for name, reason in self.left_out.items()]
        return "\n".join([f"{self.num_captions} captions, x100", *lines, self.signature])


def metric(name: str) -> Metric:
    """One of ``METRICS``, or one's own function, ``package.module:function``.

    ValueError where there is none of that name."""
    if ":" in name:
        return functools.partial(_own, name, imported(name))
    if name not in METRICS:
        near = get_close_matches(name, METRICS, n=3)
        raise ValueError(
            f"metric {name!r}, want one of {near or sorted(METRICS)}, or package.module:function"
        )
    return METRICS[name]


def _own(path: str, function: Metric, data: CaptionSet) -> dict[str, Result]:
    """What one's own function gives, with the shapes that a metric has; MetricUnavailable where it
    cannot score, which costs no other metric its scores."""
    try:
        return _results(path, function(data), len(data.captions))
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise MetricUnavailable(f"{path} failed: {type(error).__name__}: {error}") from error


def _results(path: str, given: Mapping[str, Result], num_captions: int) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for name, (score, each) in given.items():
        array = None if each is None else np.asarray(each, dtype=np.float64)
        if array is not None and array.shape != (num_captions,):
            raise MetricUnavailable(
                f"{path}: {name} of each caption has shape {array.shape}, want ({num_captions},) "
                "or None"
            )
        results[name] = (float(score), array)
    return results


def evaluate(data: CaptionSet, metrics: Collection[str] = tuple(METRICS)) -> Evaluation:
    """The scores of one caption an image; ``metrics`` are names for :func:`metric`.

    ValueError for an unknown metric, fewer than two images, or an image without references.
    """
    functions = {name: metric(name) for name in metrics}
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    for name, function in functions.items():
        try:
            found = function(data)
        # RuntimeError: what it needs is missing, or a GPU's memory.
        except (RuntimeError, OSError) as reason:
            left_out[name] = " ".join(str(reason).split())
            continue
        if twice := sorted(found.keys() & results.keys()):
            left_out[name] = f"it gives {twice[0]}, which another metric gave"
            continue
        results |= found
    return Evaluation(
        scores={name: corpus for name, (corpus, _) in results.items()},
        captions={name: each for name, (_, each) in results.items() if each is not None},
        left_out=left_out,
        signature=cider_signature(data.df) if "cider_d" in results else PTB_SIGNATURE,
        num_captions=len(data.captions),
    )


def sample_diversity(
    groups: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    training: Collection[str] = (),
) -> dict[str, float]:
    """The diversity of K raw captions for each image, against its raw references; ``novel`` where
    raw ``training`` captions are given.  Names and scales as in ``rayrl.rewards.diversity``."""
    tokens = [[ptb.tokenize(caption) for caption in group] for group in groups]
    data = CaptionSet([group[0] for group in groups], references)
    flat = [caption for group in tokens for caption in group]
    oracle, mean = diversity.oracle_and_mean(tokens, data.reference_tokens, data.df)
    scores = {
        "div_1": diversity.div_n(tokens, 1),
        "div_2": diversity.div_n(tokens, 2),
        "mbleu_4": diversity.mbleu4(tokens),
        "self_cider": float(diversity.self_cider(tokens, data.df).mean()),
        "oracle_cider_d": oracle,
        "mean_cider_d": mean,
        "vocabulary": float(diversity.vocabulary_size(flat)),
    }
    if training:
        scores["novel"] = _novel_share(flat, training)
    return scores
