"""Where prompts come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayrl.credentials import refuse_credentials
from rayrl.section import LocalPath, Section

Source = Literal["scenes", "parquet", "coco", "karpathy"]
Split = Literal["train", "val", "test"]
MAX_PIXELS = 178_956_970
"""What Pillow refuses to decode, as a likely bomb; no limit can be set higher."""


class ScenesConfig(Section):
    """Sizes of the generated data set."""

    num_train: int = Field(default=8000, ge=1)
    """Training pictures."""
    num_val: int = Field(default=240, ge=1)
    """Held-out pictures, each with a combination of objects that training never shows."""
    num_test: int = Field(default=240, ge=1)
    """Further held-out pictures, their combinations disjoint from training and validation."""
    seed: int = Field(default=0, ge=0)
    """Pictures and captions are a function of this seed."""


class ColumnsConfig(Section):
    """What the columns of Parquet shards are called, where it is not what they are here."""

    image_id: str = "image_id"
    """Text or whole numbers that name the images.  Empty where no column does: an image is then
    named by its row's place in the split, as in `00000042`."""
    image: str = Field(default="image", min_length=1)
    """Image files: bytes, or a struct that has them in `bytes`."""
    captions: str = Field(default="captions", min_length=1)
    """Lists of texts, or a text."""


class DataConfig(Section):
    """Images with their reference captions.

    `{split}` in `path`, `val_path` and `images` stands for train, val or test, as in
    `path: flickr8k/{split}.parquet`, or `path: captions_{split}2014.json` with
    `images: coco/{split}2014`.
    """

    source: Source = "scenes"
    """`scenes` (generated), `parquet` (shards), `coco` (captions json and an image folder) or
    `karpathy` (dataset_*.json and an image folder)."""
    path: LocalPath = ""
    """The Parquet file or folder of shards (also `s3://…`, `gs://…`), or the annotation file; with
    `{split}` in it where each split has its own.  `*` in the path of shards stands for any part of
    a name.  Refused with `scenes`."""
    val_path: LocalPath = ""
    """The same for what is held out, validation and test, where it is not called as in `path`:
    with `{split}` in it, or of validation alone.  Empty: `path`."""
    images: LocalPath = ""
    """The image folder of `coco` and `karpathy`."""
    instruction: str = Field(default="Describe the image.", min_length=1)
    """What the model is asked for, with every image."""
    image_size: int = Field(default=48, ge=16, le=4096)
    """Pixels a side of the square that scenes are drawn in and that the images of a folder are
    resized to; shards hold the size they were prepared with."""
    max_train: int = Field(default=0, ge=0)
    """Use this many of the first training images; 0 for all."""
    max_val: int = Field(default=0, ge=0)
    """Use this many of the first validation (or test) images; 0 for all."""
    max_image_bytes: int = Field(default=32 * 1024**2, ge=1)
    """A larger image file is rejected unread."""
    max_image_pixels: int = Field(default=64_000_000, ge=1, le=MAX_PIXELS)
    """An image of more pixels is rejected before it is decoded."""
    columns: ColumnsConfig = ColumnsConfig()
    """The columns of Parquet shards."""
    scenes: ScenesConfig = ScenesConfig()
    """The generated data set."""

    @field_validator("path", "val_path")
    @classmethod
    def _no_credentials(cls, path: str) -> str:
        return refuse_credentials(path)

    @model_validator(mode="after")
    def _source_has_its_paths(self) -> DataConfig:
        if self.source != "scenes" and not self.path:
            what = "the shards" if self.source == "parquet" else "the annotation file"
            raise ValueError(f"source {self.source} needs path: {what}")
        if self.source in ("coco", "karpathy") and not self.images:
            raise ValueError(f"source {self.source} needs images: the folder of the image files")
        return self

    @model_validator(mode="after")
    def _scenes_have_no_paths(self) -> DataConfig:
        for name in ("path", "val_path", "images"):
            value = getattr(self, name)
            if self.source == "scenes" and value:
                raise ValueError(
                    f"{name} {value} with source scenes, which draws its own pictures: want source "
                    f"parquet, coco or karpathy for it, or no {name}"
                )
        return self

    def limit(self, split: Split) -> int:
        """How many images of a split are used at most; 0 for all."""
        return self.max_train if split == "train" else self.max_val

    def path_of(self, split: Split) -> str:
        """The path of a split.  Raises ValueError for a test split that no path is of."""
        if split == "train" or not self.val_path:
            return self.path.replace("{split}", split)
        if split == "test" and "{split}" not in self.val_path:
            raise ValueError(
                f"data.val_path {self.val_path} is of validation alone: for the test split want "
                "{split} in it, which stands for val or test"
            )
        return self.val_path.replace("{split}", split)

    def named(self, split: Split) -> str:
        """The key that says where a split is, with its value, for messages."""
        held_out = split != "train" and self.val_path
        return f"data.val_path {self.val_path}" if held_out else f"data.path {self.path}"

    def same_for(self, *splits: Split) -> bool:
        """Whether different splits would be read from one file that does not tell them apart."""
        paths = {self.path_of(split) for split in splits}
        return self.source in ("parquet", "coco") and len(paths) < len(set(splits))

    def check_validation_apart(self) -> None:
        """ValueError where training and validation would be the same images."""
        if self.same_for("train", "val"):
            raise ValueError(
                f"{self.named('val')}: training and validation would be the same images; want "
                "{split} in it, which stands for train or val, as in "
                f"{'coco/{split}.parquet' if self.source == 'parquet' else 'captions_{split}.json'}"
                ", or another data.val_path, or data.source karpathy, whose one file says which "
                "image is in which split"
            )

    def images_of(self, split: Split) -> str:
        """`images` for a split."""
        return self.images.replace("{split}", split)
