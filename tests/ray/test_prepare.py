"""Preparing shards with Ray Data: what is kept, in which order, and nothing half done."""

import io
import json

import numpy as np
import pytest
import ray
from PIL import Image

from rayrl.data import DataConfig, load_split
from rayrl.prepare import main, prepare_split

pytestmark = pytest.mark.ray
NUM_IMAGES = 150


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def write_images(folder, num_images: int) -> None:
    folder.mkdir(parents=True)
    for i in range(num_images):
        Image.new("RGB", (50, 40), (i, 255 - i, 0)).save(folder / f"{i}.jpg")


@pytest.fixture
def source(tmp_path):
    """150 training images (one corrupt, one missing, one without captions) and 3 for validation."""
    write_images(tmp_path / "images", NUM_IMAGES)
    (tmp_path / "images/20.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / "images/70.jpg").unlink()
    images = [
        {
            "filename": f"{i}.jpg",
            "cocoid": i,
            "split": "train" if i >= 3 else "val",
            "sentences": [{"raw": f"Picture {i}."}] if i != 99 else [],
        }
        for i in range(NUM_IMAGES)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    return tmp_path


def arguments(source, *more: str) -> list[str]:
    return [
        *("--source", "karpathy", "--path", str(source / "dataset.json")),
        *("--images", str(source / "images"), "--output", str(source / "out")),
        *("--image-size", "32", "--splits", "train", "val", *more),
    ]


def test_shards_hold_the_usable_images_in_the_order_of_the_annotations(source, capsys, monkeypatch):
    monkeypatch.setattr("rayrl.prepare.ROWS_PER_SHARD", 60)
    main(arguments(source))

    config = DataConfig(source="parquet", path=str(source / "out/{split}"))
    train, val = load_split(config, "train"), load_split(config, "val")
    assert list(train.ids) == [str(i) for i in range(3, NUM_IMAGES) if i not in (20, 70, 99)]
    assert list(val.ids) == ["0", "1", "2"]
    manifest = json.loads((source / "out/train/dataset.json").read_text())
    sizes = {"shard-00000.parquet": 60, "shard-00001.parquet": 60, "shard-00002.parquet": 24}
    assert manifest["shards"] == sizes
    for prompt in train:
        picture = np.asarray(Image.open(io.BytesIO(prompt.image))).astype(int)
        i = int(prompt.prompt_id)
        assert picture.shape == (32, 32, 3)
        assert np.abs(picture - [i, 255 - i, 0]).max() <= 3
        assert prompt.references == (f"Picture {i}.",)

    rejected = (source / "out/train/rejected.jsonl").read_text().splitlines()
    found = {row["item"]: row["reason"] for row in map(json.loads, rejected)}
    assert found == {"20": "corrupt image", "70": "missing image", "99": "image without captions"}
    assert manifest["rejected"] == dict.fromkeys(found.values(), 1)
    out = capsys.readouterr().out
    assert "train: 144 images; skipped: 1 image without captions, 1 corrupt image" in out


def test_the_same_source_gives_the_same_shards(source):
    main(arguments(source))
    first = (source / "out").rename(source / "first")
    main(arguments(source))
    for file in ("train/shard-00000.parquet", "train/dataset.json", "val/shard-00000.parquet"):
        assert (source / "out" / file).read_bytes() == (first / file).read_bytes()


def test_an_interrupted_split_leaves_nothing_behind(source, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rayrl.prepare.pq.write_table", full)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(source))
    assert stopped.value.code == 2
    assert list((source / "out").iterdir()) == []


def test_what_is_there_is_never_overwritten(source, capsys):
    (source / "out/val").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(arguments(source))
    assert "out/val: already there" in capsys.readouterr().err
    # Noticed before any work was done on the split that comes first.
    assert not (source / "out/train").exists()


def test_a_source_without_a_usable_image_is_one_line(source, capsys):
    for file in (source / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(SystemExit):
        main(arguments(source))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "dataset.json: no usable image: " in line
    assert "145 corrupt image" in line
    assert list((source / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such image folder"),
        (("--path", "nowhere.json"), "nowhere.json: no such annotation file"),
        (("--image-size", "4"), "--image-size Input should be greater than or equal to 16"),
        (("--splits", "test"), "no image of split test; its splits are train, val"),
    ],
)
def test_wrong_arguments_stop_before_any_work(source, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(source, *more))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (source / "out").exists()


def test_a_split_can_be_limited(source):
    main(arguments(source, "--max-images", "10"))
    config = DataConfig(source="parquet", path=str(source / "out/{split}"))
    assert list(load_split(config, "train").ids) == [str(i) for i in range(3, 13)]


def test_coco_files_with_a_folder_a_split(tmp_path):
    from rayrl.data.folder import coco_records

    write_images(tmp_path / "val2014", 2)
    content = {
        "images": [{"id": 5, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 5, "caption": "one"}],
    }
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    config = DataConfig(
        source="coco",
        path=str(tmp_path / "captions_{split}2014.json"),
        images=str(tmp_path / "{split}2014"),
        image_size=48,
    )
    records, rejections = coco_records(config, "val")
    summary = prepare_split(config, "val", records, rejections, tmp_path / "shards")
    assert str(summary) == f"{tmp_path / 'shards'}: 1 images"
    shards = DataConfig(source="parquet", path=str(tmp_path / "shards"))
    folder, prepared = load_split(config, "val"), load_split(shards, "val")
    assert prepared[0].image == folder[0].image
    assert prepared.image_digest == folder.image_digest
