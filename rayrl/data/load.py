"""From the configuration to a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from rayrl.data.config import DataConfig, Source, Split
from rayrl.data.dataset import Dataset
from rayrl.data.folder import load_coco, load_karpathy
from rayrl.data.parquet import load_parquet
from rayrl.data.scenes import load_scenes

logger = logging.getLogger(__name__)

LOADERS: Mapping[Source, Callable[[DataConfig, Split], Dataset]] = {
    "scenes": load_scenes,
    "parquet": load_parquet,
    "coco": load_coco,
    "karpathy": load_karpathy,
}


def load_split(config: DataConfig, split: Split) -> Dataset:
    """The prompts of one split.

    Raises FileNotFoundError or ValueError, in one line that names the file, where there is nothing
    to learn from; a single bad image or caption is skipped, counted in ``Dataset.rejected``, and
    named in the log if it is among the first of its kind.
    """
    dataset = LOADERS[config.source](config, split)
    if dataset.rejected:
        skipped = "; ".join(_named(dataset, reason) for reason in dataset.rejected)
        logger.warning("data, %s: %d images kept; skipped: %s", split, len(dataset), skipped)
    return dataset


def _named(dataset: Dataset, reason: str) -> str:
    """``5 corrupt image (8, 11, 30, …)``"""
    names = ", ".join(dataset.rejected_names.get(reason, ()))
    return f"{dataset.rejected[reason]} {reason} ({names})"


def load_train_and_val(config: DataConfig) -> tuple[Dataset, Dataset]:
    """What a run trains on and what it is judged by.  Raises as :func:`load_split`, and ValueError
    where both are the same; images that both have are counted in the log."""
    config.check_validation_apart()
    train, val = load_split(config, "train"), load_split(config, "val")
    if train.fingerprint() == val.fingerprint():
        raise ValueError(
            f"{config.path_of('train')} and {config.path_of('val')}: training and validation are "
            f"the same {len(val)} images"
        )
    # The id alone may be a number that each split counts from 0.
    trained = set(zip(train.ids, train.captions, strict=True))
    both = [image for image in zip(val.ids, val.captions, strict=True) if image in trained]
    if both:
        logger.warning(
            "data: %d of %d validation images are in training too, with the same id and "
            "captions, such as %s: validation will be too good",
            *(len(both), len(val), both[0][0]),
        )
    return train, val
