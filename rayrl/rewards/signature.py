"""What a CIDEr-D number means, in one line, to stand beside it in every result.

Omitting ``<eos>`` from the reward is worth up to 4.1 CIDEr-D of trivial sentence fragments
(SacreEOS, arXiv:2305.12254), and document frequencies of a batch, a split or a training set give
different numbers; a score without these declarations compares with nothing.
"""

from __future__ import annotations

import re

from rayrl import __version__
from rayrl.rewards.cider_numpy import SIGMA
from rayrl.rewards.document_frequency import DocumentFrequency
from rayrl.rewards.ngrams import ORDER

PTB_SIGNATURE = f"tok:ptb+rayrl:{__version__}"
"""Of scores that depend on the tokenizer alone."""

_METRIC = f"Cider-D[n{ORDER},s{SIGMA}]"


def cider_signature(df: DocumentFrequency) -> str:
    """For example ``Cider-D[n4,s6.0]+eos:no+df:corpus[5000]#1f0c...+tok:ptb+rayrl:0.1.0``."""
    eos = "yes" if df.eos else "no"
    return (
        f"{_METRIC}+eos:{eos}+df:{df.source}[{df.num_documents}]#{df.content_hash}+{PTB_SIGNATURE}"
    )


def statistics_in(signature: str) -> str:
    """What a signature says of its document frequencies, ``corpus[5000]#1f0c...``, or "".  Where
    they are those of the references themselves it tells one held-out set from others."""
    found = re.search(r"\+df:([^+]*)", signature)
    return found[1] if found else ""


def batch_signature(eos: bool) -> str:
    """Of rewards against the document frequencies of each step, which compare with nothing."""
    return f"{_METRIC}+eos:{'yes' if eos else 'no'}+df:batch+{PTB_SIGNATURE}"


def sacreeos_signature(df: DocumentFrequency, baseline: str, samples_per_image: int) -> str:
    """The signature of SacreEOS for self-critical training against frozen document frequencies:
    ``STANDARD_wInit+Cider-D[n4,s6.0]+average[nspi5]+1.0.0``.

    ``baseline`` is "greedy" or "average" (the mean of the samples).
    """
    if baseline not in ("greedy", "average"):
        raise ValueError(f"baseline {baseline!r}, want 'greedy' or 'average'")
    mode = "STANDARD" if df.eos else "NO<EOS>"
    return f"{mode}_wInit+{_METRIC}+{baseline}[nspi{samples_per_image}]+1.0.0"
