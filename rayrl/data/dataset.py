"""A data set: a sequence of prompts whose images are read when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from rayrl.types import Prompt

ReadImage = Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset(Sequence[Prompt]):
    """Prompts of one split.

    ``read_image`` gives the encoded image of an index; ids and captions are held, images are not.
    ``read_original`` gives the file that this was made of, where there is one still.
    ``image_digest`` stands for the content of all images.  ``rejected`` counts what the source
    held and the data set does not, by reason, and ``rejected_names`` names some of it.
    """

    ids: Sequence[str]
    captions: Sequence[tuple[str, ...]]
    instruction: str
    read_image: ReadImage
    image_digest: str
    read_original: ReadImage | None = None
    rejected: Mapping[str, int] = field(default_factory=dict)
    rejected_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.captions):
            raise ValueError(f"{len(self.ids)} ids for {len(self.captions)} sets of captions")

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of a data set of {len(self)}")
        index %= len(self)
        return Prompt(
            prompt_id=self.ids[index],
            image=self.read_image(index),
            text=self.instruction,
            references=self.captions[index],
        )

    def references(self) -> list[list[str]]:
        """The reference captions of each prompt, without reading an image."""
        return [list(captions) for captions in self.captions]

    def pictures(self) -> Sequence[bytes]:
        """The encoded image of each prompt, read when asked for: the original file where there is
        one, else what the prompt has."""
        return Pictures(self.read_original or self.read_image, len(self))

    def fingerprint(self) -> str:
        """A hash of ids, captions, instruction and images, in order: 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for text in (self.instruction, self.image_digest):
            _update(digest, text)
        for prompt_id, captions in zip(self.ids, self.captions, strict=True):
            _update(digest, prompt_id)
            for caption in captions:
                _update(digest, caption)
            _update(digest, "")
        return digest.hexdigest()


class Pictures(Sequence[bytes]):
    """Encoded images that are read when asked for, each time."""

    def __init__(self, read: ReadImage, count: int) -> None:
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        chosen = range(self._count)[index]
        return self._read(chosen) if isinstance(chosen, int) else [self._read(i) for i in chosen]


def _update(digest: hashlib.blake2b, text: str) -> None:
    # The length goes first, so that moving a word from one text to the next changes the hash.
    data = text.encode()
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
