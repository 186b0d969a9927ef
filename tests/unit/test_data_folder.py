"""COCO and Karpathy files with an image folder, good and bad."""

import gzip
import io
import json
import logging
import pickle

import pytest
from PIL import Image

from rayrl import commands, prepare
from rayrl.data import DataConfig, folder, load_split, load_train_and_val
from rayrl.data.images import read_file


def write_image(path, colour) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path, "JPEG")


@pytest.fixture
def coco(tmp_path):
    """Three images, of which the second has no captions, and captions_train.json."""
    content = {
        "images": [
            {"id": 7, "file_name": "a.jpg"},
            {"id": 8, "file_name": "b.jpg"},
            {"id": 9, "file_name": "sub/c.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "a blue thing"},
            {"id": 2, "image_id": 7, "caption": " a red\n thing. "},
            {"id": 3, "image_id": 7, "caption": "  "},
            {"id": 4, "image_id": 7, "caption": "something red"},
            {"id": 5, "image_id": 55, "caption": "of nothing"},
        ],
    }
    write_image(tmp_path / "images/a.jpg", "red")
    write_image(tmp_path / "images/b.jpg", "green")
    write_image(tmp_path / "images/sub/c.jpg", "blue")

    def write(change=lambda content: None) -> DataConfig:
        change(content)
        (tmp_path / "captions_train.json").write_text(json.dumps(content), encoding="utf-8")
        return DataConfig(
            source="coco",
            path=str(tmp_path / "captions_{split}.json"),
            images=str(tmp_path / "images"),
            image_size=32,
        )

    return write


def test_coco_keeps_what_has_an_image_and_a_caption_and_counts_the_rest(coco, caplog):
    with caplog.at_level(logging.WARNING):
        data = load_split(coco(), "train")
    assert list(data.ids) == ["7", "9"]
    assert data.references() == [["a red thing.", "something red"], ["a blue thing"]]
    assert data.rejected == {
        "caption of an unlisted image": 1,
        "empty caption": 1,
        "image without captions": 1,
    }
    assert "2 images kept; skipped: 1 caption of an unlisted image (55); " in caplog.text
    picture = Image.open(io.BytesIO(data[1].image))
    assert picture.size == (32, 32)
    assert picture.getpixel((16, 16))[2] > 240


def test_single_bad_images_are_counted_and_skipped(coco, tmp_path):
    config = coco(lambda c: c["annotations"].append({"image_id": 8, "caption": "green"}))
    (tmp_path / "images/a.jpg").write_bytes((tmp_path / "images/a.jpg").read_bytes()[:400])
    (tmp_path / "images/b.jpg").unlink()
    data = load_split(config, "train")
    assert list(data.ids) == ["9"]
    assert data.rejected["corrupt image"] == 1
    assert data.rejected["missing image"] == 1


def test_the_first_of_what_is_skipped_are_named_in_the_log(coco, tmp_path, caplog):
    def many(content) -> None:
        for i in range(20, 25):
            content["images"].append({"id": i, "file_name": f"{i}.jpg"})
            content["annotations"].append({"image_id": i, "caption": "nothing to see"})
            (tmp_path / f"images/{i}.jpg").write_bytes(b"no image")

    with caplog.at_level(logging.WARNING):
        load_split(coco(many), "train")
    assert "5 image of another format (20, 21, 22, …)" in caplog.text


def test_a_source_without_a_usable_image_is_an_error_that_names_the_first(coco, tmp_path):
    config = coco()
    for path in (tmp_path / "images/a.jpg", tmp_path / "images/sub/c.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no usable image: .*2 corrupt image; such as 7 \(no b"):
        load_split(config, "train")


def test_a_pickled_data_set_converts_no_more_than_is_asked_of_it(coco, monkeypatch):
    data = load_split(coco(), "train")
    converted = []
    monkeypatch.setattr(folder, "square_jpeg", lambda *of: converted.append(of) or b"again")
    copy = pickle.loads(pickle.dumps(data))
    assert (copy.ids, copy.fingerprint()) == (data.ids, data.fingerprint())
    assert not converted and data[0].image not in pickle.dumps(data)
    assert [copy[1].image, copy[1].image] == [b"again", b"again"]
    assert len(converted) == 1


def test_the_fingerprint_sees_a_changed_image(coco, tmp_path):
    before = load_split(coco(), "train").fingerprint()
    assert load_split(coco(), "train").fingerprint() == before
    write_image(tmp_path / "images/a.jpg", "orange")
    assert load_split(coco(), "train").fingerprint() != before


def test_the_first_images_are_enough_for_a_limit(coco, monkeypatch):
    config = coco().model_copy(update={"max_train": 1})
    assert list(load_split(config, "train").ids) == ["7"]


def test_images_that_do_not_fit_in_the_cache_are_read_again(coco, monkeypatch):
    monkeypatch.setattr("rayrl.data.folder.CACHE_BYTES", 1)
    reads = []
    monkeypatch.setattr(
        "rayrl.data.folder.read_file",
        lambda path, bounds: reads.append(path.name) or read_file(path, bounds),
    )
    data = load_split(coco(), "train")
    first = [data[i].image for i in (0, 1, 0)]
    assert first[0] == first[2] != first[1]
    assert sorted(reads[:2]) == ["a.jpg", "c.jpg"]
    assert reads[2:] == ["a.jpg", "c.jpg", "a.jpg"]


def name(value):
    return lambda content: content["images"][0].update(file_name=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (name("../secret.jpg"), r"images\[0\]: file name '../secret.jpg' is not inside"),
        (name("sub/../../secret.jpg"), "not inside the image folder"),
        (name("/etc/passwd"), "not inside the image folder"),
        (name("..\\secret.jpg"), "not inside the image folder"),
        (name("C:\\secret.jpg"), "not inside the image folder"),
        (name("a\0.jpg"), "not inside the image folder"),
        (name(""), "not inside the image folder"),
        (name(5), r"images\[0\]\.file_name: 5, want a text"),
        (lambda c: c["images"][1].update(id=7), r"images\[1\]: duplicate id 7"),
        (lambda c: c["images"][1].update(id=None), r"images\[1\]: id is None, want a whole number"),
        (lambda c: c["images"][1].update(id=1.5), r"images\[1\]: id is 1.5, want a whole number"),
        (lambda c: c["images"][1].update(id="a\ud83d"), r"id: 'a\\ud83d' holds half a character"),
        (name("a\ud83d.jpg"), r"images\[0\]: 'a\\ud83d.jpg' holds half a character"),
        (lambda c: c["images"].append(3), r"images\[3\]: 3, want a mapping"),
        (lambda c: c.pop("annotations"), "no annotations; it has images"),
        (lambda c: c.update(images={}), "images: {}, want a list"),
        (lambda c: c["annotations"][2].update(caption=["a"]), r"annotations\[2\].caption: \['a'\]"),
        (lambda c: c["annotations"][2].pop("image_id"), r"annotations\[2\]: image_id is None"),
    ],
)
def test_a_wrong_annotation_file_is_an_error_that_names_the_place(coco, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_split(coco(change), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [], "annotations": [{"caption": "caf\xe9"}]}', "not UTF-8: byte 0xe9 at 47"),
        (b'{"images": [', "not JSON: .*line 1 column 13"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", r"train.json: \[\], want a mapping"),
        (b'{"images": [], "annotations": []}', "no usable image"),
    ],
    ids=["latin-1", "cut", "deep", "list", "empty"],
)
def test_an_unreadable_annotation_file_is_one_clear_line(coco, tmp_path, content, message):
    config = coco()
    (tmp_path / "captions_train.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_split(config, "train")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions_val.json: no such annotation file"):
        load_split(coco(), "val")
    config = coco().model_copy(update={"images": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="nowhere: no such image folder"):
        load_split(config, "train")


def test_a_byte_order_mark_is_no_error(coco, tmp_path):
    config = coco()
    file = tmp_path / "captions_train.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_split(config, "train")) == 2


def test_a_half_of_a_character_is_cut_off_a_caption(coco):
    """What JSON may hold of an emoji that was cut, and no file in UTF-8 can."""
    data = load_split(coco(lambda c: c["annotations"][0].update(caption="smile \ud83d")), "train")
    assert data.references()[1] == ["smile"]
    assert data.fingerprint()


def test_what_vizwiz_says_is_no_caption_is_counted_and_left_out(coco):
    def judged(content) -> None:
        first, second, _, fourth, _ = content["annotations"]
        first.update(is_rejected=False, is_precanned=False)
        second.update(is_rejected=True, is_precanned=False)
        fourth.update(is_rejected=False, is_precanned=True)
        content["annotations"].append({"image_id": 7, "caption": "kept"})

    data = load_split(coco(judged), "train")
    assert data.references() == [["kept"], ["a blue thing"]]
    assert data.rejected["rejected caption"] == data.rejected["canned caption"] == 1


def test_numbers_of_a_column_with_gaps_are_whole(coco):
    def as_pandas_writes_them(content) -> None:
        for image in content["images"]:
            image["id"] = float(image["id"])

    assert list(load_split(coco(as_pandas_writes_them), "train").ids) == ["7", "9"]


def test_annotations_may_be_compressed(coco, tmp_path, monkeypatch):
    config = coco()
    want = load_split(config, "train").fingerprint()
    file = tmp_path / "captions_train.json"
    packed = gzip.compress(file.read_bytes())
    file.write_bytes(packed)
    assert load_split(config, "train").fingerprint() == want
    file.write_bytes(packed[:-30])
    with pytest.raises(ValueError, match=r"captions_train.json: not a whole gzip file: "):
        load_split(config, "train")
    file.write_bytes(packed)
    monkeypatch.setattr("rayrl.data.json_file.MAX_UNPACKED", 100)
    with pytest.raises(ValueError, match=r"captions_train.json: unpacks to more than 100 bytes"):
        load_split(config, "train")


def textcaps(**changes) -> dict:
    """Two images with an entry for each of their captions."""
    captions = {"0a": ["a red sign", "stop"], "0b": ["a clock"]}
    entries = [
        {"image_id": image, "caption_str": text, "reference_strs": texts}
        for image, texts in captions.items()
        for text in texts
    ]
    entries[-1].update(changes)
    return {"dataset_name": "textcaps", "data": entries}


def test_textcaps_says_the_captions_of_an_image_once_for_each(tmp_path):
    write_image(tmp_path / "0a.jpg", "red")
    write_image(tmp_path / "0b.jpg", "white")
    (tmp_path / "train.json").write_text(json.dumps(textcaps()))
    config = DataConfig(source="coco", path=str(tmp_path / "train.json"), images=str(tmp_path))
    data = load_split(config, "train")
    assert list(data.ids) == ["0a", "0b"]
    assert data.references() == [["a red sign", "stop"], ["a clock"]]
    (tmp_path / "train.json").write_text(json.dumps(textcaps(image_id="0a")))
    assert load_split(config, "train").references() == [["a red sign", "stop", "a clock"]]
    for changes, message in (
        ({"image_id": "../0b"}, r"data\[2\]: file name '../0b' is not inside"),
        ({"reference_strs": [3]}, r"data\[2\].reference_strs\[0\]: 3, want a text"),
    ):
        (tmp_path / "train.json").write_text(json.dumps(textcaps(**changes)))
        with pytest.raises(ValueError, match=message):
            load_split(config, "train")


@pytest.fixture
def karpathy(tmp_path):
    """Five images in four splits, and dataset.json."""
    splits = ["train", "restval", "val", "test", "train"]
    images = []
    for i, split in enumerate(splits):
        write_image(tmp_path / f"images/{split}2014/{i}.jpg", (40 * i, 0, 0))
        sentences = [
            {"raw": f"Picture {i}, raw.", "tokens": ["picture", str(i), "raw"]},
            {"tokens": ["only", "tokens", str(i)]},
        ]
        file = {"filepath": f"{split}2014", "filename": f"{i}.jpg", "imgid": i}
        images.append({**file, "cocoid": 100 + i, "split": split, "sentences": sentences})

    def write(change=lambda images: None) -> DataConfig:
        change(images)
        (tmp_path / "dataset.json").write_text(json.dumps({"images": images}), encoding="utf-8")
        return DataConfig(
            source="karpathy", path=str(tmp_path / "dataset.json"), images=str(tmp_path / "images")
        )

    return write


def test_karpathy_restval_trains_along(karpathy):
    config = karpathy()
    ids = {split: list(load_split(config, split).ids) for split in ("train", "val", "test")}
    assert ids == {"train": ["100", "101", "104"], "val": ["102"], "test": ["103"]}


def test_karpathy_takes_raw_sentences_and_else_tokens(karpathy):
    assert load_split(karpathy(), "val").references() == [["Picture 2, raw.", "only tokens 2"]]


def test_karpathy_without_coco_ids_and_folders_is_named_by_file(karpathy, tmp_path):
    def like_flickr(images):
        for image in images:
            del image["cocoid"]
            image["filename"] = f"{image.pop('filepath')}/{image['filename']}"

    assert list(load_split(karpathy(like_flickr), "train").ids) == ["0", "1", "4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda im: im[4].update(cocoid=100), r"images\[4\]: duplicate id 100"),
        (lambda im: im[0].update(filepath="../x"), "file name '../x/0.jpg' is not inside"),
        (lambda im: im[0].update(filename="/0.jpg"), "file name '/0.jpg' is not inside"),
        (lambda im: im[0].pop("split"), r"images\[0\]: no split; it has filepath, filename"),
        (lambda im: im[1].update(sentences="a"), r"images\[1\].sentences: 'a', want a list"),
        (lambda im: im[1]["sentences"][0].update(raw=1), r"sentences\[0\].raw: 1, want a text"),
        (lambda im: [i.update(split="dev") for i in im], "no image of split train; its .* dev"),
    ],
)
def test_a_wrong_karpathy_file_is_an_error_that_names_the_place(karpathy, change, message):
    with pytest.raises(ValueError, match=message):
        load_split(karpathy(change), "train")


def test_a_source_needs_its_paths():
    with pytest.raises(ValueError, match="source parquet needs path: the shards"):
        DataConfig(source="parquet")
    with pytest.raises(ValueError, match="source coco needs images"):
        DataConfig(source="coco", path="captions.json")
    with pytest.raises(ValueError, match="Input should be 'scenes', 'parquet', 'coco' or 'karpa"):
        DataConfig(source="flickr")


def test_pictures_that_are_drawn_have_no_path():
    with pytest.raises(ValueError, match=r"path my\.parquet with source scenes, .*: want source"):
        DataConfig(path="my.parquet")
    with pytest.raises(ValueError, match="images coco with source scenes"):
        DataConfig(images="coco")


@pytest.mark.parametrize(
    ("source", "path", "way_out"),
    [
        ("parquet", "my.parquet", "coco/{split}.parquet"),
        ("coco", "captions.json", "captions_{split}.json"),
    ],
)
def test_one_file_for_training_and_validation_is_refused(source, path, way_out, capsys):
    with pytest.raises(ValueError, match=rf"^data\.path {path}: .* the same images") as raised:
        load_train_and_val(DataConfig(source=source, path=path, images="coco/{split}"))
    assert way_out in str(raised.value) and "data.source karpathy" in str(raised.value)
    flags = ["--data.source", source, "--data.path", path, "--data.images", "coco", "--dry-run"]
    with pytest.raises(SystemExit, match=rf"grpo_coco\.py: failed: data\.path {path}: "):
        commands.grpo(flags)


def test_one_file_that_tells_its_splits_apart_trains_and_validates(karpathy):
    train, val = load_train_and_val(karpathy())
    assert not set(train.ids) & set(val.ids)


def test_one_file_is_not_prepared_as_two_splits(coco, tmp_path, capsys):
    config = coco()
    path = config.path_of("train")
    flags = ["--source", "coco", "--path", path, "--images", config.images]
    with pytest.raises(SystemExit):
        prepare.main([*flags, "--output", str(tmp_path / "out")])
    assert f"--path {path}: train and val would be the same images" in capsys.readouterr().err
    alone = config.model_copy(update={"path": path})
    assert not alone.same_for("train") and alone.same_for("train", "val")


def test_annotations_without_a_caption_are_one_line(karpathy, tmp_path, capsys):
    """Where they are prepared, nothing is started for them."""

    def blank(images) -> None:
        for image in images:
            image["sentences"] = [{"raw": " "}]

    config = karpathy(blank)
    said = f"{config.path}: no usable image: 3 empty caption, 3 image without captions; such as 100"
    with pytest.raises(ValueError) as raised:
        load_split(config, "train")
    assert str(raised.value) == said
    flags = ["--source", "karpathy", "--path", config.path, "--images", config.images]
    with pytest.raises(SystemExit):
        prepare.main([*flags, "--output", str(tmp_path / "out")])
    assert said in capsys.readouterr().err


def test_a_wrong_number_of_images_is_named_by_the_flag_that_was_given(tmp_path, capsys):
    flags = ["--source", "karpathy", "--path", "a", "--images", "b", "--max-images", "-1"]
    with pytest.raises(SystemExit):
        prepare.main([*flags, "--output", str(tmp_path / "out")])
    assert "error: --max-images Input should be greater" in capsys.readouterr().err
