"""PTB tokenization of captions as the COCO evaluation does it, without Java.

The COCO evaluation lower-cases with Stanford's PTBTokenizer and drops 17 punctuation tokens.
"""

from __future__ import annotations

import re
from functools import lru_cache

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"]
    + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""What the COCO evaluation drops.  The output is lower case, so brackets (``-lrb-``) stay."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKEN = re.compile(
    r"<[^<>\s]*>"
    r"|\d+(?:[.,:]\d+)*"
    r"|[^\W_]+(?:['’](?!(?:s|m|d|re|ve|ll|t)\b)[^\W_]+)*(?:-[^\W_]+)*"
    r"|['’](?:s|m|d|re|ve|ll)\b"
    r"|\S",
    re.IGNORECASE,
)
_SPLIT = {"cannot": ["can", "not"], "gonna": ["gon", "na"], "wanna": ["wan", "na"]}


def tokenize(caption: str) -> list[str]:
    """The tokens of a caption, in lower case and without punctuation."""
    return [token for word in caption.split() for token in _tokenize_word(word)]


@lru_cache(maxsize=65536)
def _tokenize_word(word: str) -> tuple[str, ...]:
    lower = word.lower()
    tokens: list[str] = []
    for token in _TOKEN.findall(re.sub(r"(?<=\w)n['’]t\b", " n't", lower)):
        tokens += _SPLIT.get(token, [_BRACKETS.get(token, token)])
    return tuple(token for token in tokens if token not in PUNCTUATION and token != '"')
