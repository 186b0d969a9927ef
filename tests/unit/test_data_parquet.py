"""Parquet shards: read lazily, screened, and whole or refused."""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayrl.data import DataConfig, load_split
from rayrl.data.manifest import Manifest
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
        (retyped("image_id", [1, 2], pa.int64()), "column image_id is int64, want string"),
        (retyped("captions", ["a", "b"], pa.string()), "column captions is string, want list"),
        (retyped("image", ["a", "b"], pa.string()), "column image is string, want binary"),
        (retyped("image_id", ["a", "a"], pa.string()), "duplicate image_id 'a'"),
        (retyped("image_id", ["a", None], pa.string()), "row 1 of row group 0: no image_id"),
        (
            retyped("image", [b"", b""], pa.binary()),
            r"no usable image: 2 corrupt image; such as i0 \(no bytes\)",
        ),
        (
            pa.table({"image_id": ["a"], "captions": [["b"]]}),
            "no column image; it has image_id, captions",
        ),
    ],
)
def test_wrong_columns_are_errors_that_name_them(tmp_path, table, message):
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=f"data.parquet: {message}"):
        load_split(config(tmp_path / "data.parquet"), "train")


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
    with pytest.raises(ValueError, match=message):
        load_split(config(folder), "train")


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
