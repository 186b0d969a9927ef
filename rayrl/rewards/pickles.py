"""Document frequencies from the pickle files of self-critical.pytorch and its descendants.

Their ``prepro_ngrams.py`` writes ``{"document_frequency": {("a", "man"): 812.0, ...},
"ref_len": 113287}``, with ``<eos>`` counted as a word.  The files travel by shared drives, and a
pickle can run any code, so these are read with the few types that such a table needs and no other.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rayrl.rewards.document_frequency import EOS, DocumentFrequency

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "defaultdict"): defaultdict,
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in (("float", float), ("int", int), ("long", int), ("dict", dict))
    },
}


class _TableReader(pickle.Unpickler):
    """An unpickler that knows the types of a table of counts; everything else is refused before
    it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read_pickle(path: str | Path, vocabulary: Mapping[str, str] | None = None) -> DocumentFrequency:
    """The document frequencies of a pickle of self-critical.pytorch.

    Files whose names end in ``-idxs`` count word indices; for those, ``vocabulary`` maps an index
    ("1") to its word, and "0" is ``<eos>``.  Nothing in the file is executed.

    FileNotFoundError and ValueError say what to do.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; document frequencies can be counted from any captions with "
            "DocumentFrequency.from_references"
        )
    try:
        table = _TableReader(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path}: not a table of document frequencies ({error}); want a pickle of "
            "{'document_frequency': {n-gram tuple: count}, 'ref_len': number of images}, as "
            "prepro_ngrams.py of self-critical.pytorch writes it"
        ) from error
    return _from_table(str(path), table, vocabulary)


def _from_table(
    path: str, table: object, vocabulary: Mapping[str, str] | None
) -> DocumentFrequency:
    if not isinstance(table, dict) or not {"document_frequency", "ref_len"} <= set(table):
        found = type(table).__name__
        if isinstance(table, dict):
            found = f"{len(table)} entries, such as {', '.join(map(repr, islice(table, 3)))}"
        raise ValueError(
            f"{path}: holds {found:.200}, want 'document_frequency' and 'ref_len', the number of "
            "images, without which counts say nothing"
        )
    counts, num_documents = table["document_frequency"], table["ref_len"]
    if not isinstance(counts, dict) or not isinstance(num_documents, int | float):
        raise ValueError(
            f"{path}: document_frequency is {type(counts).__name__} and ref_len "
            f"{type(num_documents).__name__}, want dict and int"
        )
    for ngram in counts:
        if not isinstance(ngram, tuple) or not all(isinstance(word, str) for word in ngram):
            raise ValueError(f"{path}: n-gram {ngram!r}, want a tuple of words")
    if vocabulary is None and all(word.isdigit() for gram in counts for word in gram):
        raise ValueError(
            f"{path}: counts word indices; take the file that ends in -words.p, or pass the "
            "index-to-word mapping of its vocabulary"
        )
    if vocabulary is not None:
        words = {**vocabulary, "0": EOS}
        unknown = next((w for gram in counts for w in gram if w not in words), None)
        if unknown is not None:
            raise ValueError(f"{path}: word index {unknown} is not in the vocabulary given")
        counts = {tuple(words[word] for word in gram): n for gram, n in counts.items()}
    return DocumentFrequency.from_counts(
        counts, int(num_documents), eos=(EOS,) in counts, source=Path(path).name
    )
