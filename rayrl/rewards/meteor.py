"""METEOR 1.5 (Denkowski and Lavie 2014) with the jar that pycocoevalcap ships.

nltk has a metric of the same name with other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from rayrl.rewards.java import JavaProcess, find_java, find_pycocoevalcap
from rayrl.rewards.ngrams import Caption, split

_SEPARATOR = " ||| "


class Meteor:
    """A METEOR process; about 1 ms a caption.  Use it in a ``with`` block, or ``close`` it.

    MetricUnavailable where Java or the jar is missing.
    """

    def __init__(self, timeout_s: float = 120.0) -> None:
        # English formats: with other ones Java writes numbers that do not parse.
        command = [find_java(), "-Xmx2G", "-Duser.language=en", "-Duser.country=US"]
        command += ["-Dfile.encoding=UTF-8"]
        command += ["-jar", str(find_pycocoevalcap("meteor", "meteor-1.5.jar"))]
        command += ["-", "-", "-stdio", "-l", "en", "-norm"]
        self._process = JavaProcess(command, timeout_s)

    def score(
        self, captions: Sequence[Caption], references: Sequence[Sequence[Caption]]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """METEOR (0..1) of the corpus, and of each caption [N], from tokenized text.

        TimeoutError or ChildProcessError when the process hangs or has died.
        """
        if not captions:
            raise ValueError("no captions, want at least one")
        stats = []
        for caption, some in zip(captions, references, strict=True):
            line = ["SCORE", *map(_line, some), _line(caption)]
            stats.append(self._process.ask(_SEPARATOR.join(line))[0].strip())
        line = ["EVAL", *stats]
        *each, corpus = self._process.ask(_SEPARATOR.join(line), len(stats) + 1)
        return float(corpus), np.array(each, dtype=np.float64)

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Meteor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _line(caption: Caption) -> str:
    """On one line, and without the protocol's separator."""
    return " ".join(word for word in split(caption) if "|||" not in word)
