"""What a prepared folder of shards says of itself, in ``dataset.json``."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from rayrl.section import Section

NAME = "dataset.json"


class Manifest(Section):
    """Written last, when all shards are whole and every image has been decoded."""

    shards: dict[str, int]
    """Rows of each shard."""
    image_size: int
    """Pixels a side of every image."""
    image_digest: str
    """A hash of all images, in order."""
    rejected: dict[str, int]
    """Images and captions of the source that are not in the shards, by reason."""

    @classmethod
    def parse(cls, content: bytes, where: str) -> Manifest:
        """Raises ValueError with the first thing that is wrong."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {key or 'content'}: {first['msg']}") from None

    def check(self, folder: str, rows: Mapping[str, int]) -> None:
        """Raise ValueError unless the folder holds exactly these shards with these rows."""
        for name in sorted(self.shards.keys() | rows.keys()):
            want, got = self.shards.get(name), rows.get(name)
            if want != got:
                have = "is missing" if got is None else f"has {got} rows"
                told = "does not list it" if want is None else f"lists it with {want}"
                raise ValueError(f"{folder}/{name}: {have}, {NAME} {told}")
