"""Penn Treebank tokenization as the COCO caption evaluation does it, in pure Python.

The COCO evaluation runs Stanford's PTBTokenizer 3.4.1 with ``-preserveLines -lowerCase`` and drops
17 punctuation tokens.  Its quirks are part of the metric and are kept: ``(in red)`` becomes
``-lrb- in red -rrb-``, since the list of what to drop has ``-LRB-`` in capitals; ``!!`` stays,
since the list has ``!`` alone; ``dog.,`` gives ``dog.``.

What remains different, by comparison over 300,000 adversarial strings: the reference looks beyond
the end of a caption (``plan B.`` loses its period when the next caption of the file begins with
"A") and runs tokens together where its 8192-character buffer ends; here a caption stands alone.
It takes carriage returns and the other line ends of Unicode for the end of a caption, which then
shifts all that follow; here they are spaces, as a newline is in both.
The letters \u017f, \u0130, \u0131 and \u212a, which equal s, i and k without regard to case, and
abbreviations in odd mixtures of case (``ptE.``) may keep or lose a period.
"""

from __future__ import annotations

import re
from functools import lru_cache

from rayrl.rewards.ptb_rules import CONTRACTIONS, lex

_QUOTES, _BRACKETS = ["''", "'", "``", "`"], ["-LRB-", "-RRB-", "-LCB-", "-RCB-"]
PUNCTUATION = frozenset([*_QUOTES, *_BRACKETS, ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""The tokens that the COCO evaluation drops."""

_ACROSS_SPACES = re.compile(
    r"[\d).] +\d"  # 5 1/2, (555) 123 4567, No. 5
    r"|(?<![A-Za-z])[A-Za-z]\. +[A-Z<]"  # plan B. The dog
    r"|<[^>]* "  # a tag with attributes
    r"|[^\S ]|\.\[\^"
)
"""Where tokens may depend on what stands beyond a space."""


def tokenize(caption: str) -> list[str]:
    """The tokens of a caption: lower case, contractions split, punctuation dropped.

    They are the words that pycocoevalcap's scorers see: where the reference writes a no-break
    space inside a token (``5 1/2``), the words on both sides are separate here.

    ValueError for what is no str, such as the NaN of a missing caption.
    """
    if not isinstance(caption, str):
        raise ValueError(f"caption {caption!r:.80}, want a str")
    caption = caption.replace("\n", " ")
    if _ACROSS_SPACES.search(caption):
        return _tokenize(caption)
    tokens: list[str] = []
    for word in caption.split(" "):
        tokens += _tokenize_word(word)
    return tokens


def _tokenize(text: str) -> list[str]:
    tokens = (token.lower() for token in lex(text))
    return " ".join(token for token in tokens if token not in PUNCTUATION).split()


@lru_cache(maxsize=1 << 16)
def _tokenize_word(word: str) -> tuple[str, ...]:
    """The tokens of a word whose neighbours do not matter.  Captions have few distinct words."""
    lower = word.lower()
    if word.isascii() and word.isalpha() and lower not in CONTRACTIONS:
        return (lower,)
    return tuple(_tokenize(word))
