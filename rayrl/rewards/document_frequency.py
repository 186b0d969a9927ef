"""Document frequencies: in how many images' references each n-gram occurs (CIDEr's idf)."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from rayrl.rewards.ngrams import (
    ORDER,
    WORD_BITS,
    Caption,
    Int64,
    check_listed,
    check_words,
    encode,
    first_children,
    levels,
    split,
)

EOS = "<eos>"
_FORMAT = 1
# Of zip and zlib, of numpy's headers, of what is no npz at all or has other entries.
_DAMAGE = (
    BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


@dataclass(frozen=True, eq=False)
class DocumentFrequency:
    """Frozen document frequencies over ``num_documents`` images.

    ``vocabulary`` is the sorted words, UTF-8, joined by newlines (uint8); ``keys`` [M] is the trie
    of ``rayrl.rewards.ngrams`` with one root, so word i of the vocabulary is node i + 1;
    ``counts`` [M] says in how many documents the n-gram of a node occurs.  ``eos`` says whether
    every caption ended with the word ``<eos>``; ``source`` says what the documents were.

    All is plain numpy arrays: Ray shares them between the processes of a node without a copy.
    """

    vocabulary: npt.NDArray[np.uint8]
    keys: Int64
    counts: npt.NDArray[np.int32]
    num_documents: int
    eos: bool = False
    source: str = "references"

    def __post_init__(self) -> None:
        if self.num_documents < 2:
            raise ValueError(
                f"{self.source}: document frequencies over {self.num_documents} image(s), want at "
                "least 2: with one image every idf is log(1) = 0 and so is every score; count them "
                "over the training references instead"
            )
        largest = int(self.counts.max(initial=0))
        if largest > self.num_documents:
            raise ValueError(
                f"{self.source}: an n-gram occurs in {largest} documents of {self.num_documents}: "
                "the counts and the number of documents do not belong together"
            )

    @classmethod
    def from_references(
        cls,
        references: Iterable[Sequence[Caption]],
        *,
        eos: bool = False,
        source: str = "references",
    ) -> DocumentFrequency:
        """Count over each image's reference captions, tokenized (words joined by spaces, or lists
        of words).  With ``eos`` every caption ends with the extra word ``<eos>``."""
        documents = []
        for i, captions in enumerate(references):
            check_listed(i, captions)
            documents.append([split(caption) for caption in captions])
        captions = [caption for document in documents for caption in document]
        for caption in captions:
            check_words(caption, caption)
        words = sorted(
            {word for caption in captions for word in caption} | ({EOS} if eos else set())
        )
        _warn_of_raw_text(words)
        ids = {word: i for i, word in enumerate(words, 1)}
        suffix = [EOS] if eos else []
        tokens = encode(([*caption, *suffix] for caption in captions), ids)
        document_of = np.repeat(np.arange(len(documents)), [len(d) for d in documents])[
            tokens.captions
        ]
        keys, counts = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        base = np.int64(0)
        for level in levels(tokens, np.zeros(len(captions), dtype=np.int64)):
            keys.append(level.keys + (base << WORD_BITS))
            base = np.int64(sum(map(len, keys[:-1])))
            pairs = np.sort(level.nodes * len(documents) + document_of[level.positions])
            once = pairs[np.diff(pairs, prepend=-1) > 0]
            counts.append(np.bincount(once // max(1, len(documents)), minlength=len(level.keys)))
        return cls(
            vocabulary=np.frombuffer("\n".join(words).encode(), dtype=np.uint8),
            keys=np.concatenate(keys),
            counts=np.concatenate(counts).astype(np.int32),
            num_documents=len(documents),
            eos=eos,
            source=source,
        )

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[tuple[str, ...], float],
        num_documents: int,
        *,
        eos: bool = False,
        source: str = "counts",
    ) -> DocumentFrequency:
        """From ready counts of n-grams (n = 1..4), each a tuple of words."""
        odd = next((g for g, n in counts.items() if not 1 <= len(g) <= ORDER or n != int(n)), None)
        if odd is not None:
            raise ValueError(
                f"{source}: {odd} -> {counts[odd]}, want n-grams of 1 to {ORDER} words and whole "
                "counts"
            )
        words = sorted({word for ngram in counts for word in ngram})
        ids = {word: i for i, word in enumerate(words, 1)}
        # A trie needs the beginning of every n-gram; one that is not counted counts 0.
        nodes: dict[tuple[str, ...], float] = {(): 0.0}
        for ngram in counts:
            for k in range(1, len(ngram)):
                nodes[ngram[:k]] = 0.0
        nodes |= {(word,): 0.0 for word in words} | dict(counts)
        keys = [0]
        number: dict[tuple[str, ...], int] = {(): 0}
        for k in range(1, ORDER + 1):
            level = [ngram for ngram in nodes if len(ngram) == k]
            level.sort(key=lambda ngram: (number[ngram[:-1]], ids[ngram[-1]]))
            for ngram in level:
                keys.append(number[ngram[:-1]] << WORD_BITS | ids[ngram[-1]])
                number[ngram] = len(number)
        return cls(
            vocabulary=np.frombuffer("\n".join(words).encode(), dtype=np.uint8),
            keys=np.array(keys, dtype=np.int64),
            counts=np.array([nodes[ngram] for ngram in number], dtype=np.int32),
            num_documents=num_documents,
            eos=eos,
            source=source,
        )

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary, sorted."""
        text = self.vocabulary.tobytes().decode()
        return text.split("\n") if text else []

    @cached_property
    def word_ids(self) -> dict[str, int]:
        """Word to id, from 1."""
        return {word: i for i, word in enumerate(self.words, 1)}

    @cached_property
    def first_child(self) -> npt.NDArray[np.int32]:
        """Where each node's children begin, [M + 1]."""
        return first_children(self.keys)

    @cached_property
    def idf_of_count(self) -> npt.NDArray[np.float64]:
        """idf = log(N) - log(max(1, count)) by count, [largest count + 1]."""
        counts = np.arange(int(self.counts.max(initial=0)) + 1, dtype=np.float64)
        return np.log(float(self.num_documents)) - np.log(np.maximum(1.0, counts))

    def idf(self, nodes: Int64) -> npt.NDArray[np.float64]:
        """idf of nodes [Q]; -1 is an n-gram that no document holds, whose idf is log(N)."""
        return self.idf_of_count[np.where(nodes >= 0, self.counts[nodes], 0)]

    @cached_property
    def content_hash(self) -> str:
        """Sixteen hexadecimal digits that identify the content, whatever the file."""
        digest = hashlib.sha256(f"{_FORMAT} {self.num_documents} {self.eos}".encode())
        for array in (self.vocabulary, self.keys, self.counts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: what is derived is cheap to derive again and heavy to send."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def save(self, path: str | Path) -> None:
        """Write one npz file (arrays, and a json header with the content hash)."""
        header = {
            "format": _FORMAT,
            "num_documents": self.num_documents,
            "eos": self.eos,
            "source": self.source,
            "order": ORDER,
            "content_hash": self.content_hash,
        }
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
                vocabulary=self.vocabulary,
                keys=self.keys,
                counts=self.counts,
            )

    @classmethod
    def load(cls, path: str | Path) -> DocumentFrequency:
        """Read what ``save`` wrote; ValueError where it is not that, or is damaged."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: no such file; DocumentFrequency.from_references(...).save(path) "
                "writes one"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                header: Mapping[str, object] = json.loads(file["header"].tobytes())
                arrays = {name: file[name] for name in ("vocabulary", "keys", "counts")}
            loaded = cls(
                **arrays,
                num_documents=int(str(header["num_documents"])),
                eos=bool(header["eos"]),
                source=str(header["source"]),
            )
            said = header["content_hash"]
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: not document frequencies as DocumentFrequency.save writes them "
                f"({reason}); for a pickle use rayrl.rewards.pickles.read_pickle"
            ) from error
        if loaded.content_hash != said:
            raise ValueError(
                f"{path}: content hash {loaded.content_hash}, its header says {said}; "
                "the file is damaged, build it again"
            )
        return loaded


def _warn_of_raw_text(words: list[str]) -> None:
    """Statistics of raw text are silently wrong: "A" and "dog." would be words of their own."""
    odd = [word for word in words if word != word.lower() or word in (".", ",", "!")]
    if odd:
        warnings.warn(
            f"the captions seem not to be tokenized: {len(odd)} words such as {odd[:3]}; "
            "pass them through rayrl.rewards.ptb.tokenize first",
            stacklevel=3,
        )
