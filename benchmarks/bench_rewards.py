"""CIDEr-D and PTB tokenization: time a caption, against pycocoevalcap, and the memory of an index.

    python benchmarks/bench_rewards.py --small       # seconds
    python benchmarks/bench_rewards.py               # with an index of the size of COCO

One thread, text in and scores out, tokenized beforehand for all: 512 captions of 64 images with
five references.  Captions come from ../shared/flickr8k where it is, else they are generated; the
captions to be scored are two halves of reference captions.  All methods run in turn ``--repeats``
times on different batches; the median counts.

``new images`` includes the vectors of references that were never seen; in a run they are there, as
in the rows without it.  ``kept frequencies`` is pycocoevalcap's scorer without its count of
documents: what the codes do that load frequencies from a file (pyciderevalcap,
self-critical.pytorch).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pycocoevalcap.cider.cider_scorer import CiderScorer
from record import RESULTS, write

from rayrl.rewards import cider_numba, cider_numpy, ptb
from rayrl.rewards.cider import CiderD, DocumentFrequency, ReferenceIndex

FLICKR8K = Path(__file__).resolve().parents[2] / "shared" / "flickr8k" / "train.parquet"
COCO_IMAGES = 113_287
Batch = tuple[list[str], list[list[str]]]


def raw_captions(images: int) -> tuple[str, list[list[str]]]:
    """Where captions come from, and five of each image."""
    if FLICKR8K.is_file():
        import pyarrow.parquet as parquet

        return "flickr8k", parquet.read_table(FLICKR8K, columns=["captions"])[
            "captions"
        ].to_pylist()[:images]
    rng = random.Random(0)
    vocabulary = [f"w{int(rng.paretovariate(0.6))}" for _ in range(20_000)]
    lengths = (8, 9, 10, 11, 12, 14)
    return "generated", [
        [" ".join(rng.choices(vocabulary, k=rng.choice(lengths))) for _ in range(5)]
        for _ in range(images)
    ]


def crossed(rng: random.Random, one: str, other: str) -> str:
    """The beginning of one caption and the end of another."""
    first, second = one.split(), other.split()
    cut = rng.randint(0, len(first))
    return " ".join(first[:cut] + second[cut:])


def make_batch(rng: random.Random, references: list[list[str]], images: int, group: int) -> Batch:
    chosen = rng.sample(references, images)
    captions = [
        crossed(rng, rng.choice(some), rng.choice(rng.choice(references)))
        for some in chosen
        for _ in range(group)
    ]
    return captions, [some for some in chosen for _ in range(group)]


def pycocoevalcap_scores(batch: Batch) -> np.ndarray:
    scorer = CiderScorer()
    for caption, references in zip(*batch, strict=True):
        scorer += (caption, references)
    return scorer.compute_score()[1]


def kept_frequency_scores(scorer: CiderScorer, batch: Batch) -> list[float]:
    scorer.ctest, scorer.crefs = [], []
    for caption, references in zip(*batch, strict=True):
        scorer += (caption, references)
    return scorer.compute_cider()


def microseconds(call: Callable[[], object], captions: int) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) / captions * 1e6


def time_cider(references: list[list[str]], repeats: int) -> dict[str, float]:
    """Median microseconds a caption of each method."""
    rng = random.Random(1)
    df = DocumentFrequency.from_references(references)
    kept = CiderScorer()
    for some in references:
        kept.cook_append("", some)
    kept.compute_doc_freq()
    batches = [make_batch(rng, references, 64, 8) for _ in range(repeats)]
    paths = {"numba": cider_numba.components, "numpy": cider_numpy.components}
    times: dict[str, list[float]] = {}
    for batch in batches:
        size = len(batch[0])

        def add(name: str, call: Callable[[], object], size: int = size) -> None:
            times.setdefault(name, []).append(microseconds(call, size))

        add("pycocoevalcap", lambda batch=batch: pycocoevalcap_scores(batch))
        add(
            "pycocoevalcap, kept frequencies",
            lambda batch=batch: kept_frequency_scores(kept, batch),
        )
        for name, components in paths.items():
            scorer = CiderD(df)
            scorer._compute = components
            if name == "numba":
                scorer.score(batch[0][:1], batch[1][:1])  # compiled, or read from its cache
            add(f"rayrl {name}, new images", lambda s=scorer, b=batch: s.score(*b))
            add(f"rayrl {name}", lambda s=scorer, b=batch: s.score(*b))
    own = DocumentFrequency.from_references(batches[0][1])
    worst = np.abs(CiderD(own).score(*batches[0]) - pycocoevalcap_scores(batches[0])).max()
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {**medians, "largest difference to pycocoevalcap": float(worst)}


def time_ptb(captions: list[str]) -> dict[str, float]:
    """Microseconds a caption, with no word seen before and with all seen."""
    ptb._tokenize_word.cache_clear()
    new = microseconds(lambda: [ptb.tokenize(caption) for caption in captions], len(captions))
    seen = microseconds(lambda: [ptb.tokenize(caption) for caption in captions], len(captions))
    return {"new": round(new, 2), "words seen before": round(seen, 2)}


def measure_index(references: list[list[str]], images: int) -> dict[str, float]:
    """Megabytes and seconds of the index of ``images`` images with crossed captions."""
    rng = random.Random(2)
    flat = [caption for some in references for caption in some]
    made = [
        [crossed(rng, rng.choice(flat), rng.choice(flat)) for _ in range(5)] for _ in range(images)
    ]
    start = time.perf_counter()
    df = DocumentFrequency.from_references(made)
    middle = time.perf_counter()
    index = ReferenceIndex.build(df, made)
    end = time.perf_counter()
    arrays = (df.vocabulary, df.keys, df.counts, df.first_child)
    return {
        "images": images,
        "frequencies_mb": round(sum(array.nbytes for array in arrays) / 1e6, 1),
        "index_mb": round(index.nbytes / 1e6, 1),
        "frequencies_s": round(middle - start, 1),
        "index_s": round(end - middle, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def reached(cider: dict[str, float], ptb_new: float, index: dict[str, float]) -> dict[str, Any]:
    """What is promised of rewards, and what it is here."""
    exact, kept = cider["pycocoevalcap"], cider["pycocoevalcap, kept frequencies"]
    memory = index["frequencies_mb"] + index["index_mb"]
    return {
        "times faster than pycocoevalcap": _promise(">=", 60, exact / cider["rayrl numba"]),
        "times faster than kept frequencies": _promise(">=", 60, kept / cider["rayrl numba"]),
        "times faster than pycocoevalcap, numpy alone": _promise(
            ">=", 10, exact / cider["rayrl numpy"]
        ),
        "PTB, us a caption with new words": _promise("<=", 15, ptb_new),
        f"index of {index['images']} images, MB": _promise("<=", 500, memory),
        "largest difference to pycocoevalcap": _promise(
            "<=", 1e-9, cider["largest difference to pycocoevalcap"]
        ),
    }


def _promise(relation: str, target: float, value: float) -> dict[str, Any]:
    kept = value >= target if relation == ">=" else value <= target
    return {"target": f"{relation} {target:g}", "here": float(f"{value:.3g}"), "reached": kept}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="1,000 images, two repeats")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of the JSON file; default: results")
    args = parser.parse_args(argv)
    source, raw = raw_captions(1000 if args.small else 6000)
    tokenized = [[" ".join(ptb.tokenize(caption)) for caption in some] for some in raw]
    cider = time_cider(tokenized, 2 if args.small else args.repeats)
    tokenizing = time_ptb([caption for some in raw for caption in some])
    index = measure_index(tokenized, 2000 if args.small else COCO_IMAGES)
    result = {
        "captions": source,
        "threads": 1,
        "cider_d_us_per_caption": cider,
        "times_faster": {
            f"{mine} than {theirs}": round(cider[theirs] / cider[mine], 1)
            for theirs in ("pycocoevalcap", "pycocoevalcap, kept frequencies")
            for mine in cider
            if mine.startswith("rayrl")
        },
        "ptb_us_per_caption": tokenizing,
        "index": index,
        "promised": reached(cider, tokenizing["new"], index),
    }
    print(json.dumps(result, indent=1))
    if args.out or not args.small:
        packages = ("numpy", "numba", "pycocoevalcap")
        write("rewards", argv, result, packages=packages, folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
