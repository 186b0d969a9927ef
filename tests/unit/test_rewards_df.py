"""Document frequencies: counting, saving, and reading other people's pickles safely."""

from __future__ import annotations

import pickle
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.pickles import read_pickle
from rayrl.rewards.signature import cider_signature, sacreeos_signature

REFERENCES = [
    ["a red dog runs fast", "a dog runs"],
    ["a cat sleeps", "the red cat sleeps on a mat"],
    ["a dog and a cat"],
]


def counted(references: list[list[str]], eos: bool = False) -> Counter[tuple[str, ...]]:
    """Every n-gram once for each image whose references hold it."""
    counts: Counter[tuple[str, ...]] = Counter()
    for captions in references:
        grams = set()
        for caption in captions:
            words = caption.split() + ["<eos>"] * eos
            grams |= {tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words))}
        counts.update(gram for gram in grams if gram)
    return counts


def as_mapping(df: DocumentFrequency) -> dict[tuple[str, ...], int]:
    grams: list[tuple[str, ...]] = [()]
    for key in df.keys[1:]:
        grams.append((*grams[key >> 32], df.words[(key & 0xFFFFFFFF) - 1]))
    return dict(zip(grams[1:], df.counts[1:].tolist(), strict=True))


@pytest.mark.parametrize("eos", [False, True])
def test_counts_of_every_ngram(eos: bool) -> None:
    df = DocumentFrequency.from_references(REFERENCES, eos=eos)
    expected = dict(counted(REFERENCES, eos))
    assert as_mapping(df) == expected
    assert df.num_documents == 3
    assert (("<eos>",) in expected) is eos


def test_words_are_the_first_nodes_and_keys_are_sorted() -> None:
    df = DocumentFrequency.from_references(REFERENCES)
    assert df.word_ids["a"] == 1
    assert (np.diff(df.keys[1:]) > 0).all()
    assert df.keys[1 : len(df.words) + 1].tolist() == list(range(1, len(df.words) + 1))


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    df = DocumentFrequency.from_references(REFERENCES, eos=True, source="train")
    df.save(tmp_path / "df.npz")
    loaded = DocumentFrequency.load(tmp_path / "df.npz")
    assert (loaded.content_hash, loaded.eos, loaded.source) == (df.content_hash, True, "train")
    assert as_mapping(loaded) == as_mapping(df)


def test_content_hash_tells_contents_apart_and_not_orders() -> None:
    df = DocumentFrequency.from_references(REFERENCES)
    again = DocumentFrequency.from_references([item[::-1] for item in REFERENCES[::-1]])
    assert again.content_hash == df.content_hash
    others = [
        DocumentFrequency.from_references(REFERENCES, eos=True),
        DocumentFrequency.from_references([*REFERENCES, ["a"]]),
        DocumentFrequency.from_references([*REFERENCES[:2], ["a dog and a cow"]]),
    ]
    assert len({df.content_hash, *(other.content_hash for other in others)}) == 4


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    df = DocumentFrequency.from_references(REFERENCES)
    df.save(tmp_path / "df.npz")
    with np.load(tmp_path / "df.npz") as file:
        arrays = dict(file)
    arrays["counts"] = arrays["counts"] * 0 + 1
    with (tmp_path / "bad.npz").open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=r"bad.npz: content hash .* build it again"):
        DocumentFrequency.load(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text.npz: not document frequencies .*read_pickle"):
        DocumentFrequency.load(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError, match=r"gone.npz: no such file; .*save\(path\) writes"):
        DocumentFrequency.load(tmp_path / "gone.npz")


def test_damage_anywhere_in_a_file_is_a_value_error(tmp_path: Path) -> None:
    df = DocumentFrequency.from_references(REFERENCES)
    df.save(tmp_path / "df.npz")
    whole = (tmp_path / "df.npz").read_bytes()
    kinds = set()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 0x55
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            # What the archive says of dates, say, is not read.
            assert DocumentFrequency.load(tmp_path / "bad.npz").content_hash == df.content_hash
        except ValueError as error:
            kinds.add(type(error.__cause__).__name__)
    assert {"NotImplementedError", "BadZipFile"} <= kinds


def test_what_is_no_archive_or_has_another_header_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.arange(3))
    df = DocumentFrequency.from_references(REFERENCES)
    header = np.frombuffer(b'{"format": 1}', np.uint8)
    arrays = {"vocabulary": df.vocabulary, "keys": df.keys, "counts": df.counts}
    np.savez(tmp_path / "header.npz", header=header, **arrays)
    np.savez(tmp_path / "list.npz", header=np.frombuffer(b"[]", np.uint8), **arrays)
    for name in ("array.npz", "header.npz", "list.npz"):
        with pytest.raises(ValueError, match=f"{name}: not document frequencies as"):
            DocumentFrequency.load(tmp_path / name)


def test_one_image_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"over 1 image.*every score"):
        DocumentFrequency.from_references([["a dog", "a cat"]])
    with pytest.raises(ValueError, match="over 0 image"):
        DocumentFrequency.from_references([])


def test_more_documents_with_an_ngram_than_documents_is_refused() -> None:
    with pytest.raises(ValueError, match="occurs in 5 documents of 4"):
        DocumentFrequency.from_counts({("a",): 5, ("b",): 1}, 4)


def test_every_caption_a_document() -> None:
    """The way of meshed-memory transformer: N is the number of captions."""
    captions = [[caption] for item in REFERENCES for caption in item]
    df = DocumentFrequency.from_references(captions, source="caption")
    assert df.num_documents == 5
    assert as_mapping(df)[("a",)] == 5


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["a dog", "a cat"], "item 0: references 'a dog', want a list of captions"),
        ({7: ["a dog"], 8: ["a cat"]}, "item 0: references 7, want .* pass the values"),
        ([["a dog"], [None]], "caption None, want a str or a list of words"),
        ([["a dog"], [["a cat"]]], "has the word 'a cat', want a caption as one str"),
        ([["a dog"], [[1, 2]]], "has the word 1"),
    ],
)
def test_references_of_wrong_types_are_named(references: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentFrequency.from_references(references)  # type: ignore[arg-type]


def test_raw_text_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"not to be tokenized: .*'\.'.*ptb.tokenize"):
        DocumentFrequency.from_references([["a dog ."], ["a cat ."]])


def write(path: Path, table: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(table, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_self_critical_give_the_same_scores(tmp_path: Path, protocol: int) -> None:
    table = defaultdict(float, {g: float(n) for g, n in counted(REFERENCES, eos=True).items()})
    path = write(
        tmp_path / "coco-train-words.p",
        {"document_frequency": table, "ref_len": len(REFERENCES)},
        protocol,
    )
    df = read_pickle(path)
    own = DocumentFrequency.from_references(REFERENCES, eos=True)
    assert df.content_hash == own.content_hash
    assert (df.eos, df.source) == (True, "coco-train-words.p")
    captions, references = ["a red cat runs"] * 2, [REFERENCES[1], ["never counted words"]]
    assert (
        CiderD(df).score(captions, references).tolist()
        == CiderD(own).score(captions, references).tolist()
    )


def test_index_pickles_want_their_vocabulary(tmp_path: Path) -> None:
    table = {("1",): 2.0, ("0",): 3.0, ("1", "0"): 1.0}
    path = write(tmp_path / "coco-train-idxs.p", {"document_frequency": table, "ref_len": 3})
    with pytest.raises(ValueError, match=r"counts word indices; take .*-words\.p"):
        read_pickle(path)
    df = read_pickle(path, vocabulary={"1": "dog"})
    assert as_mapping(df) == {("<eos>",): 3, ("dog",): 2, ("dog", "<eos>"): 1}
    assert df.eos
    with pytest.raises(ValueError, match="word index 1 is not in the vocabulary"):
        read_pickle(path, vocabulary={"2": "dog"})


def test_an_ngram_without_its_beginning_is_kept() -> None:
    df = DocumentFrequency.from_counts({("b", "c", "d"): 2, ("d",): 1}, 4)
    counts = as_mapping(df)
    assert {gram: n for gram, n in counts.items() if n} == {("b", "c", "d"): 2, ("d",): 1}


class Exploit:
    """What an attacker would put in a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x07getattr\x94\x93.",
        b"\x82\x01.",
        b"Ppersistent\n.",
    ],
)
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "evil.p"
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=r"evil.p: not a table of document frequencies"):
        read_pickle(path)


def test_an_object_hidden_in_a_table_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    table = {"document_frequency": {("a",): Exploit(target)}, "ref_len": 3}
    with pytest.raises(ValueError, match=r"it asks for \w+\.getattr|it asks for pathlib"):
        read_pickle(write(tmp_path / "evil.p", table))
    assert not target.exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1, 2], r"holds list, want 'document_frequency' and 'ref_len'"),
        ({"idf": {}}, r"holds 1 entries, such as 'idf', want 'document_frequency'"),
        (
            {(f"w{i}", "b"): 1.0 for i in range(1000)},
            r"x.p: holds 1000 entries, such as \('w0', 'b'\), \('w1', 'b'\), \('w2', 'b'\), want "
            "'document_frequency' and 'ref_len', the number of images",
        ),
        ({"document_frequency": [], "ref_len": 3}, "document_frequency is list"),
        ({"document_frequency": {"a": 1.0}, "ref_len": 3}, "n-gram 'a', want a tuple"),
        ({"document_frequency": {("a",): 9.0}, "ref_len": 3}, "occurs in 9 documents of 3"),
        ({"document_frequency": {("a",): 0.5}, "ref_len": 3}, "want n-grams of 1 to 4 words"),
        ({"document_frequency": {("a",) * 5: 1.0}, "ref_len": 3}, "want n-grams of 1 to 4 words"),
    ],
)
def test_other_pickles_are_refused_with_what_is_wanted(
    tmp_path: Path, table: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_pickle(write(tmp_path / "x.p", table))


def test_a_missing_or_unreadable_pickle_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*from_references"):
        read_pickle(tmp_path / "coco-train-words.p")
    (tmp_path / "cut.p").write_bytes(pickle.dumps({"document_frequency": {}})[:-3])
    (tmp_path / "noise.p").write_bytes(zlib.compress(b"not a pickle"))
    for name in ("cut.p", "noise.p"):
        with pytest.raises(ValueError, match=r"not a table .*prepro_ngrams.py"):
            read_pickle(tmp_path / name)


def test_signatures_declare_what_a_number_depends_on() -> None:
    df = DocumentFrequency.from_references(REFERENCES, eos=True, source="train")
    signature = cider_signature(df)
    assert signature.startswith(f"Cider-D[n4,s6.0]+eos:yes+df:train[3]#{df.content_hash}+tok:ptb")
    assert sacreeos_signature(df, "average", 5) == (
        "STANDARD_wInit+Cider-D[n4,s6.0]+average[nspi5]+1.0.0"
    )
    without = DocumentFrequency.from_references(REFERENCES)
    assert sacreeos_signature(without, "greedy", 1).startswith("NO<EOS>_wInit+Cider-D")
    with pytest.raises(ValueError, match="'greedy' or 'average'"):
        sacreeos_signature(df, "mean", 5)
