"""Parquet shards: read lazily, screened, and whole or refused."""

import io
import pickle
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from rayrl.data import DataConfig, load_split, load_train_and_val, parquet
from rayrl.data.manifest import Manifest
from rayrl.data.references import load_captions
from rayrl.data.shards import PREPARED, SCHEMA

FLICKR8K = Path(__file__).resolve().parents[3] / "shared/flickr8k"


def jpeg(shade: int, size: int = 40) -> bytes:
    rng = np.random.default_rng(shade)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def rows(start: int, stop: int) -> list[dict]:
    return [
        {"image_id": f"i{i}", "image": jpeg(i), "captions": [f"caption {i}", f"number {i}"]}
        for i in range(start, stop)
    ]


def write(path: Path, content: list[dict], *, prepared: bool = False) -> None:
    schema = SCHEMA.with_metadata(PREPARED) if prepared else SCHEMA
    pq.write_table(pa.Table.from_pylist(content, schema=schema), path, row_group_size=4)


def config(path: Path, **changes) -> DataConfig:
    return DataConfig(source="parquet", path=str(path), **changes)


def manifest(shards: dict[str, int]) -> str:
    return Manifest(shards=shards, image_size=40, image_digest="ab", rejected={}).model_dump_json()


@pytest.fixture
def folder(tmp_path):
    """Ten and three rows in two shards, in row groups of four."""
    write(tmp_path / "shard-0.parquet", rows(0, 10))
    write(tmp_path / "shard-1.parquet", rows(10, 13))
    (tmp_path / "_notes.parquet").write_bytes(b"not for us")
    return tmp_path


def test_shards_are_one_sequence(folder):
    data = load_split(config(folder), "train")
    assert list(data.ids) == [f"i{i}" for i in range(13)]
    for index in (12, 0, 9, 3, 10):
        assert data[index].image == jpeg(index)
        assert data[index].references == (f"caption {index}", f"number {index}")
    assert data.rejected == {}
    assert len(load_split(config(folder, max_train=5), "train")) == 5
    assert len(load_split(config(folder, max_train=5), "val")) == 13


def test_one_file_and_a_split_in_its_name(tmp_path):
    write(tmp_path / "val.parquet", rows(3, 6))
    assert list(load_split(config(tmp_path / "{split}.parquet"), "val").ids) == ["i3", "i4", "i5"]
    with pytest.raises(FileNotFoundError, match=r"train.parquet: no such Parquet file or folder"):
        load_split(config(tmp_path / "{split}.parquet"), "train")
    uri = DataConfig(source="parquet", path=(tmp_path / "val.parquet").as_uri())
    assert load_split(uri, "val")[1].image == jpeg(4)


def test_only_the_row_group_of_an_image_is_read(folder, monkeypatch):
    data = load_split(config(folder), "train")
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: (
            reads.append((group, columns)) or original(self, group, columns)
        ),
    )
    assert [data[i].prompt_id for i in (5, 6, 5, 9)] == ["i5", "i6", "i5", "i9"]
    assert reads == [(1, ["image"]), (2, ["image"])]


def test_a_pickled_dataset_reads_the_same_images(folder):
    data = load_split(config(folder), "train")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint() == data.fingerprint()
    assert [prompt.image for prompt in copy] == [prompt.image for prompt in data]
    assert len(pickle.dumps(data)) < sum(len(prompt.image) for prompt in data)


def test_bad_rows_are_counted_and_skipped(tmp_path):
    content = rows(0, 9)
    content[1]["image"] = content[1]["image"][:300]
    content[2]["image"] = None
    content[3]["captions"] = []
    content[4]["captions"] = None
    content[5]["captions"] = ["", "kept", None]
    content[6]["image"] = jpeg(6, size=70)
    write(tmp_path / "data.parquet", content)
    data = load_split(config(tmp_path / "data.parquet", max_image_pixels=4000), "train")
    assert list(data.ids) == ["i0", "i5", "i7", "i8"]
    assert data[1].references == ("kept",)
    assert data[1].image == jpeg(5)
    assert data.rejected == {
        "image without captions": 2,
        "empty caption": 2,
        "corrupt image": 2,
        "image of too many pixels": 1,
    }


def test_the_fingerprint_sees_images_captions_and_order(tmp_path):
    def fingerprint(content: list[dict]) -> str:
        write(tmp_path / "data.parquet", content)
        return load_split(config(tmp_path / "data.parquet"), "train").fingerprint()

    before = fingerprint(rows(0, 4))
    assert fingerprint(rows(0, 4)) == before
    other_image, other_caption = rows(0, 4), rows(0, 4)
    other_image[2]["image"] = jpeg(99)
    other_caption[2]["captions"][1] += "!"
    assert len({before, *map(fingerprint, (other_image, other_caption, rows(0, 4)[::-1]))}) == 4


def retyped(column: str, values: list, kind: pa.DataType) -> pa.Table:
    table = pa.Table.from_pylist(rows(0, 2), schema=SCHEMA)
    return table.set_column(SCHEMA.get_field_index(column), column, pa.array(values, kind))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            retyped("image_id", [1.5, 2], pa.float64()),
            "column image_id is double, want text or who",
        ),
        (
            retyped("captions", [[1], [2]], pa.list_(pa.int8())),
            "column captions is list<.*, want lists of",
        ),
        (retyped("image", ["a", "b"], pa.string()), "column image is string, want bytes, or"),
        (
            retyped("image", [{"path": "a"}] * 2, pa.struct({"path": pa.string()})),
            "column image is struct<path: string>, want bytes, or a struct",
        ),
        (retyped("image_id", ["a", "a"], pa.string()), "duplicate image_id 'a'"),
        (retyped("image_id", ["a", None], pa.string()), "row 1 of row group 0: no image_id"),
        (
            retyped("image", [b"", b""], pa.binary()),
            r"no usable image: 2 corrupt image; such as i0 \(no bytes\)",
        ),
        (
            pa.table({"image_id": ["a"], "captions": [["b"]]}),
            "no column image; it has image_id, captions: say which .* by data.columns.image$",
        ),
    ],
)
def test_wrong_columns_are_errors_that_name_them(tmp_path, table, message):
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=f"data.parquet: {message}"):
        load_split(config(tmp_path / "data.parquet"), "train")


LISTS = [pa.large_list(pa.string_view()), pa.list_view(pa.large_string())]
WORDS = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        *[("image_id", kind) for kind in (pa.large_string(), pa.string_view(), WORDS)],
        *[("image", kind) for kind in (pa.large_binary(), pa.binary_view())],
        ("image", pa.dictionary(pa.int32(), pa.binary())),
        *[("captions", kind) for kind in (*LISTS, pa.list_(pa.string(), 2), pa.list_(WORDS))],
    ],
    ids=str,
)
def test_a_column_may_be_encoded_as_arrow_pleases(tmp_path, column, kind):
    write(tmp_path / "want.parquet", rows(0, 2))
    values = [row[column] for row in rows(0, 2)]
    pq.write_table(retyped(column, values, kind), tmp_path / "data.parquet")
    want, data = (
        load_split(config(tmp_path / name), "train") for name in ("want.parquet", "data.parquet")
    )
    assert data.fingerprint() == want.fingerprint()
    assert [prompt.image for prompt in data] == [jpeg(0), jpeg(1)]


def hub_rows() -> pa.Table:
    """As data sets on the Hugging Face hub are written, one image without bytes."""
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(6)]
    images[2]["bytes"] = None
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table(
        {
            "img_id": pa.array(range(6), pa.int32()),
            "picture": pa.array(images, picture),
            "caption": [f"caption {i}" for i in range(6)],
        }
    )


def test_shards_of_a_hub_are_read_by_the_names_of_their_columns(tmp_path):
    pq.write_table(hub_rows(), tmp_path / "data.parquet", row_group_size=2)
    names = {"image_id": "img_id", "image": "picture", "captions": "caption"}
    data = load_split(config(tmp_path / "data.parquet", columns=names), "train")
    assert list(data.ids) == ["0", "1", "3", "4", "5"]
    assert data.rejected == {"corrupt image": 1}
    copy = pickle.loads(pickle.dumps(data))
    assert copy[3].image == data[3].image == jpeg(4)
    assert copy[3].references == ("caption 4",)
    with pytest.raises(ValueError, match="no column caption_0; it has img_id, picture, caption"):
        names["captions"] = "caption_0"
        load_split(config(tmp_path / "data.parquet", columns=names), "train")


def test_without_ids_an_image_is_named_by_its_place_among_all_rows(tmp_path):
    shards = {"val-00000-of-00002.parquet": (0, 4), "val-00001-of-00002.parquet": (4, 6)}
    for name, (begin, end) in shards.items():
        table = hub_rows().slice(begin, end - begin)
        pq.write_table(table, tmp_path / name, row_group_size=3)
    names = {"image_id": "", "image": "picture", "captions": "caption"}
    data = load_split(config(tmp_path / "{split}-*.parquet", columns=names), "val")
    assert list(data.ids) == [f"0000000{i}" for i in (0, 1, 3, 4, 5)]
    assert data[4].image == jpeg(5)


def test_a_star_is_any_part_of_a_name(folder, tmp_path, monkeypatch):
    (tmp_path / "deep/er").mkdir(parents=True)
    write(tmp_path / "deep/er/shard-2.parquet", rows(20, 22))
    write(tmp_path / "deep/shard-3.parquet", rows(30, 32))
    (tmp_path / "deep/._shard-3.parquet").write_bytes(b"what a Mac writes beside it")
    first = [f"i{i}" for i in range(13)]
    for path, ids in {
        tmp_path / "shard-*.parquet": first,
        tmp_path / "*-1.parquet": first[10:],
        tmp_path / "d*p/*.parquet": ["i30", "i31"],
        tmp_path / "*/*/sh*.parquet": ["i20", "i21"],
    }.items():
        assert list(load_split(config(path), "train").ids) == ids
        uri = f"file://{path}"
        assert list(load_split(config(path).model_copy(update={"path": uri}), "val").ids) == ids
    monkeypatch.chdir(tmp_path)
    for path in ("*-1.parquet", "./*-1.parquet", "d*/../*-1.parquet"):
        at = config(Path("x")).model_copy(update={"path": path})
        assert list(load_split(at, "train").ids) == first[10:]
    (tmp_path / "as*it").mkdir()
    write(tmp_path / "as*it/one.parquet", rows(40, 42))
    assert list(load_split(config(tmp_path / "as*it"), "train").ids) == ["i40", "i41"]
    for nothing in ("no-*.parquet", "none/*.parquet", "[s]hard-*.parquet"):
        with pytest.raises(FileNotFoundError, match=r"\*\.parquet: no such Parquet file"):
            load_split(config(tmp_path / nothing), "train")


def test_a_star_goes_by_hidden_folders_and_those_that_cannot_be_read(tmp_path):
    for name in ("one", ".hidden", "lost+found"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.parquet", rows(0, 2))

    class Files(LocalFileSystem):
        """One of a user who is not root."""

        listed: ClassVar[list[str]] = []

        def get_file_info(self, asked):
            if isinstance(asked, FileSelector):
                self.listed.append(Path(asked.base_dir).name)
                if "lost+found" in asked.base_dir:
                    raise PermissionError(13, "Permission denied")
            return super().get_file_info(asked)

    found = parquet._matching(Files(), f"{tmp_path}/*/t*.parquet", FileType.File)
    assert found == [f"{tmp_path}/one/train.parquet"]
    assert sorted(Files.listed) == ["lost+found", "one", tmp_path.name]


def test_prepared_shards_are_named_by_their_folder(folder):
    write(folder / "shard-2.parquet", rows(20, 22), prepared=True)
    with pytest.raises(
        ValueError, match=r"shard-\*.parquet: shards that were prepared; want their"
    ):
        load_split(config(folder / "shard-*.parquet"), "train")


def test_validation_may_lie_elsewhere(tmp_path):
    for name, (begin, end) in {"train": (0, 4), "validation": (4, 6), "val": (6, 9)}.items():
        write(tmp_path / f"{name}.parquet", rows(begin, end))
    one = config(tmp_path / "train.parquet", val_path=str(tmp_path / "validation.parquet"))
    train, val = load_train_and_val(one)
    assert (list(train.ids), list(val.ids)) == (["i0", "i1", "i2", "i3"], ["i4", "i5"])
    with pytest.raises(ValueError, match=r"val_path .*validation.parquet is of validation alone"):
        load_split(one, "test")
    each = one.model_copy(update={"val_path": str(tmp_path / "{split}.parquet")})
    assert list(load_split(each, "val").ids) == ["i6", "i7", "i8"]
    assert each.path_of("test").endswith("/test.parquet")
    same = one.model_copy(update={"val_path": one.path})
    with pytest.raises(
        ValueError, match=r"val_path .*train.parquet: .* the same images; .*, or another"
    ):
        load_train_and_val(same)
    with pytest.raises(ValueError, match=r"val_path val\.parquet with source scenes"):
        DataConfig(val_path="val.parquet")
    with pytest.raises(ValueError, match="carries a credential"):
        config(tmp_path, val_path="s3://key:secret@bucket/val")


def test_a_copy_of_training_is_no_validation(tmp_path, caplog):
    here = config(tmp_path / "{split}.parquet")
    write(tmp_path / "train.parquet", rows(0, 4))
    write(tmp_path / "val.parquet", rows(0, 4))
    with pytest.raises(ValueError, match=r"train.parquet and .*val.parquet: .* the same 4 images"):
        load_train_and_val(here)
    write(tmp_path / "val.parquet", rows(2, 7))
    load_train_and_val(here)
    assert "2 of 5 validation images are in training too" in caplog.text and "i2" in caplog.text
    caplog.clear()
    numbered = [dict(row, image_id=f"i{i}") for i, row in enumerate(rows(4, 7))]
    write(tmp_path / "val.parquet", numbered)
    load_train_and_val(here)
    assert not caplog.text


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    class HTTPError(Exception):
        """What the hub's client raises; not an OSError."""

    class Hub:
        def get_file_info(self, path):
            raise HTTPError("[Errno -2] Name or\nservice not known")

    client = types.SimpleNamespace(HTTPError=HTTPError)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", client)
    monkeypatch.setattr("rayrl.data.parquet.filesystem", lambda location: (Hub(), location))
    there = config(Path("x")).model_copy(update={"path": "hf://datasets/a/b.parquet"})
    for read in (load_split, load_captions):
        with pytest.raises(ValueError, match=r"^hf://datasets/a/b\.parquet: \[Errno -2\] Name or"):
            read(there, "val")


def test_captions_alone_are_those_of_as_many_images_and_of_whole_folders(folder):
    two = config(folder, max_train=2)
    assert len(load_captions(two, "train")) == sum(map(len, load_split(two, "train").captions))
    assert len(load_captions(two, "train")) < len(load_captions(config(folder), "train"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    binary = pa.array([b"fine", b"caf\xe9"], pa.binary())
    broken = pa.StringArray.from_buffers(2, *binary.buffers()[1:])
    pq.write_table(retyped("image_id", broken, pa.string()), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"row group 0, column image_id: .*[Uu][Tt][Ff]"):
        load_split(config(tmp_path / "data.parquet"), "train")


def test_a_cut_off_shard_is_refused(folder):
    shard = folder / "shard-1.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-1.parquet: not a Parquet file"):
        load_split(config(folder), "train")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*.parquet file in this folder"):
        load_split(config(tmp_path), "train")


def test_an_unknown_address_is_refused():
    with pytest.raises(ValueError, match="ftp://host/data"):
        load_split(config(Path("x")).model_copy(update={"path": "ftp://host/data"}), "train")


def test_a_manifest_replaces_the_screening_and_vouches_for_the_whole(folder, monkeypatch):
    (folder / "dataset.json").write_text(manifest({"shard-0.parquet": 10, "shard-1.parquet": 3}))
    monkeypatch.setattr("rayrl.data.shards.check_decodes", None)
    data = load_split(config(folder), "train")
    assert (len(data), data.image_digest) == (13, "ab")
    assert data[11].image == jpeg(11)


def test_bounds_hold_for_prepared_shards_too(folder):
    (folder / "dataset.json").write_text(manifest({"shard-0.parquet": 10, "shard-1.parquet": 3}))
    data = load_split(config(folder, max_image_pixels=1599), "train")
    with pytest.raises(
        ValueError, match=r"shard-1.parquet: row 1 of row group 0: image of too many"
    ):
        data[11]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (manifest({"shard-0.parquet": 10}), "shard-1.parquet: has 3 rows, .* does not list it"),
        (
            manifest({f"shard-{i}.parquet": n for i, n in enumerate((10, 3, 5))}),
            "shard-2.parquet: is missing, dataset.json lists it with 5",
        ),
        (
            manifest({"shard-0.parquet": 9, "shard-1.parquet": 3}),
            "shard-0.parquet: has 10 rows, dataset.json lists it with 9",
        ),
        ("{}", "dataset.json: shards: Field required"),
        ("{", "dataset.json: content: Invalid JSON"),
    ],
)
def test_shards_that_differ_from_their_manifest_are_refused(folder, content, message):
    (folder / "dataset.json").write_text(content)
    for read in (load_split, load_captions):
        with pytest.raises(ValueError, match=message):
            read(config(folder), "train")


def test_prepared_shards_without_their_manifest_are_a_partial_copy(tmp_path):
    write(tmp_path / "shard-0.parquet", rows(0, 3), prepared=True)
    with pytest.raises(ValueError, match=r"prepared shards without their dataset.json; copied in"):
        load_split(config(tmp_path), "train")
    assert len(load_split(config(tmp_path / "shard-0.parquet"), "train")) == 3


@pytest.mark.flickr8k
@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="no ../shared/flickr8k")
def test_flickr8k_works_as_it_is():
    data = load_split(config(FLICKR8K / "{split}.parquet"), "val")
    assert len(data) == 1000
    assert data.rejected == {}
    assert all(len(captions) == 5 for captions in data.references())
    assert Image.open(io.BytesIO(data[999].image)).size == (160, 160)
