"""SPICE (Anderson et al. 2016) with the jar that pycocoevalcap ships and the models it needs.

It parses captions to scene graphs: Java, 8 GB of heap, minutes for a test split.  The models
(Stanford CoreNLP 3.6.0, 384 MB) are not part of pycocoevalcap; its ``spice/get_stanford_models.py``
fetches them.  Every call has its own temporary folder and cache: the one cache that the original
keeps beside its code breaks on network file systems and when two processes run at once.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rayrl.rewards.java import (
    MetricUnavailable,
    find_java,
    find_pycocoevalcap,
    java_version,
)
from rayrl.rewards.ngrams import Caption, split

_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# What its serializer reflects on; Java 9 began to hide them.
_OPENED = ("java.lang", "java.math", "java.text", "java.util", "java.util.concurrent")


class Spice:
    """SPICE; MetricUnavailable where Java, the jar or the models are missing."""

    def __init__(self, timeout_s: float = 3600.0, heap: str = "8G") -> None:
        java = find_java()
        jar = find_pycocoevalcap("spice", "spice-1.0.jar")
        missing = [name for name in _MODELS if not (jar.parent / "lib" / name).is_file()]
        if missing:
            raise MetricUnavailable(
                f"no {' and '.join(missing)} in {jar.parent / 'lib'}; "
                "python -m pycocoevalcap.spice.get_stanford_models fetches them"
            )
        opened = [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in _OPENED]
        self._command = [java, f"-Xmx{heap}", *(opened if java_version(java) > 8 else [])]
        self._command += ["-jar", str(jar)]
        self._timeout_s = timeout_s

    def score(
        self, captions: Sequence[Caption], references: Sequence[Sequence[Caption]]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """SPICE (F-score, 0..1) of the corpus and of each caption [N], from tokenized text.

        TimeoutError or ChildProcessError when the program takes too long or fails.
        """
        items = [
            {"image_id": i, "test": " ".join(split(c)), "refs": [" ".join(split(r)) for r in some]}
            for i, (c, some) in enumerate(zip(captions, references, strict=True))
        ]
        with tempfile.TemporaryDirectory(prefix="rayrl-spice-") as folder:
            source, target, cache = (
                Path(folder, name) for name in ("in.json", "out.json", "cache")
            )
            cache.mkdir()
            source.write_text(json.dumps(items))
            command = [*self._command, str(source), "-cache", str(cache), "-out", str(target)]
            command += ["-subset", "-silent"]
            try:
                run = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=self._timeout_s
                )
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"no answer from SPICE within {self._timeout_s:g} s") from None
            if run.returncode:
                said = " / ".join(run.stderr.strip().splitlines()[-3:])
                raise ChildProcessError(f"SPICE ended with status {run.returncode}: {said}")
            results = json.loads(target.read_text())
        scores = {item["image_id"]: item["scores"]["All"]["f"] for item in results}
        each = np.array([scores[i] for i in range(len(items))], dtype=np.float64)
        return float(each.mean()), each
