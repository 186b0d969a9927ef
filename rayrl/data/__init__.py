"""Images with reference captions: where they come from, and in which order they are used."""

from rayrl.data.config import DataConfig
from rayrl.data.dataset import Dataset
from rayrl.data.load import load_split, load_train_and_val

__all__ = ["DataConfig", "Dataset", "load_split", "load_train_and_val"]
