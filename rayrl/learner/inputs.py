"""The processor's output, once per image and run, and what a step takes of it."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from rayrl.learner.batches import Tokens
from rayrl.learner.features import image_key
from rayrl.types import TrainBatch
from rayrl.vlm import prompt_inputs

_Entry = dict[str, torch.Tensor]


class _Prompt:
    """An encoded image with its instruction, and the ``key`` that tells both from others."""

    def __init__(self, image: bytes, instruction: str) -> None:
        self.image, self.instruction = image, instruction
        salt = hashlib.blake2b(instruction.encode(), digest_size=32).digest()
        self.key = hashlib.blake2b(image, key=salt, digest_size=16).digest()


class InputCache:
    """Processed prompts, least recently used out first, bounded in bytes: no more than the last
    one is kept beyond the bound.  Pixels are kept in ``dtype``, the model's.  All else is kept for
    longer, in an eighth of the bound that is added to it.

    Decoding and normalizing a picture costs more than a small captioner's update on it, so this
    is also done ahead, for the next step, and in as many threads as PyTorch computes in.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_bytes: int = 512 * 2**20,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._processor = processor
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, dict[str, torch.Tensor]] = OrderedDict()
        self._texts: OrderedDict[bytes, _Entry] = OrderedDict()
        self._text_bytes = 0
        self._unread: set[bytes] = set()
        """Prompts of which nobody asked for pixels, the last time."""
        self._ahead: set[bytes] = set()
        self._at_once = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._at_once, "pictures")
        self._of_thread = threading.local()

    def batch(
        self,
        images: Sequence[bytes],
        instruction: str | Sequence[str],
        prompt_ids: Sequence[str] = (),
    ) -> BatchFeature:
        """Inputs of P prompts, with one instruction for all or one each: input_ids and
        attention_mask [P, S] padded on the left, the rest one after the other along the first
        axis.  ValueError, with its id where that is given, for a picture that the processor
        refuses, as Qwen's does one that is 200 times as long as it is wide."""
        given = [instruction] * len(images) if isinstance(instruction, str) else instruction
        prompts = [_Prompt(*prompt) for prompt in zip(images, given, strict=True)]
        self._unread.difference_update(prompt.key for prompt in prompts)
        begun = self._begin(prompts)
        names = prompt_ids or [""] * len(prompts)
        entries = [self._entry(*one, begun) for one in zip(prompts, names, strict=True)]
        shapes = {tuple((k, v.shape[1:]) for k, v in e.items() if k not in _TEXT) for e in entries}
        if len(shapes) > 1 and "pixel_attention_mask" not in entries[0]:
            # Pictures of different sizes: only the processor knows how its family pads them, where
            # no mask says so.
            return BatchFeature(self._compact(prompt_inputs(self._processor, images, given)))
        return _collate(entries, int(self._processor.tokenizer.pad_token_id))

    def texts(self, images: Sequence[bytes], instruction: str) -> BatchFeature | None:
        """The same without pixels, and without a look at any picture; None where one of them was
        not processed before.  Pictures of which no more is asked for are not prepared again."""
        keys = [_Prompt(image, instruction).key for image in images]
        if not all(key in self._texts for key in keys):
            return None
        for key in keys:
            self._texts.move_to_end(key)
        self._unread.update(keys)
        entries = [self._texts[key] for key in keys]
        return _collate(entries, int(self._processor.tokenizer.pad_token_id))

    def prepare(self, images: Sequence[bytes], instruction: str) -> None:
        """Process prompts of the next step, as many as there is room for.  Nothing pushes them out
        until others are prepared.  One that cannot be processed is left out."""
        self._ahead, waiting = set(), 0
        prompts = [_Prompt(image, instruction) for image in images]
        prompts = [prompt for prompt in prompts if prompt.key not in self._unread]
        for start in range(0, len(prompts), self._at_once):
            some = prompts[start : start + self._at_once]
            begun = self._begin(some)
            for prompt in some:
                with suppress(OSError, ValueError):
                    size = _num_bytes(self._entry(prompt, "", begun))
                    if self._ahead and waiting + size > self._max_bytes:
                        for other in begun.values():
                            other.cancel()
                        return
                    self._ahead.add(prompt.key)
                    waiting += size

    def _begin(self, prompts: Sequence[_Prompt]) -> dict[bytes, Future[_Entry]]:
        """Have threads process what is not there."""
        missing = {prompt.key: prompt for prompt in prompts if prompt.key not in self._entries}
        return {k: self._threads.submit(self._processed, one) for k, one in missing.items()}

    def _entry(
        self, prompt: _Prompt, prompt_id: str, begun: Mapping[bytes, Future[_Entry]]
    ) -> _Entry:
        """What was ``begun`` or is there already."""
        entry = self._entries.get(prompt.key)
        if entry is None:
            # What was there may have been pushed out meanwhile.
            try:
                known = prompt.key in begun
                entry = begun[prompt.key].result() if known else self._processed(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {prompt_id}: {error}" if prompt_id else error) from error
            self._entries[prompt.key] = entry
            self._bytes += _num_bytes(entry)
            self._shrink()
            self._keep_text(prompt.key, entry)
        self._entries.move_to_end(prompt.key)
        return entry

    def _processed(self, prompt: _Prompt) -> _Entry:
        own = self._of_thread
        if not hasattr(own, "processor"):
            # Tokenizers change while they are used.
            own.processor = copy.deepcopy(self._processor)
        return self._compact(prompt_inputs(own.processor, [prompt.image], [prompt.instruction]))

    def _compact(self, inputs: Mapping[str, torch.Tensor]) -> _Entry:
        """The same in fewer bytes: a processor's mask of pixels has eight a pixel."""
        entry = dict(inputs)
        if "pixel_values" in entry:
            entry["pixel_values"] = entry["pixel_values"].to(self._dtype)
        if "pixel_attention_mask" in entry:
            entry["pixel_attention_mask"] = entry["pixel_attention_mask"].bool()
        return entry

    def _keep_text(self, key: bytes, entry: _Entry) -> None:
        """It takes a thousandth of what pixels do, and is kept for longer, in room of its own."""
        if key not in self._texts:
            self._texts[key] = without_pixels(entry)
            self._text_bytes += _num_bytes(self._texts[key])
        while self._text_bytes > self._max_bytes * _TEXT_SHARE:
            oldest, text = self._texts.popitem(last=False)
            self._text_bytes -= _num_bytes(text)
            self._unread.discard(oldest)

    def _shrink(self) -> None:
        """Forget what is not awaited, the last entry excepted, until the rest is small enough."""
        if self._bytes <= self._max_bytes:
            return
        *others, _ = self._entries
        for key in others:
            if self._bytes <= self._max_bytes:
                break
            if key not in self._ahead:
                self._bytes -= _num_bytes(self._entries.pop(key))


_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_PIXELS = ("pixel_values", "pixel_attention_mask")
_TEXT_SHARE = 0.125


def without_pixels(inputs: Mapping[str, torch.Tensor]) -> _Entry:
    return {name: value for name, value in inputs.items() if name not in _PIXELS}


def _num_bytes(entry: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _collate(entries: Sequence[dict[str, torch.Tensor]], pad_id: int) -> BatchFeature:
    width = max(entry["input_ids"].shape[1] for entry in entries)
    data = {}
    for name in entries[0]:
        rows = [entry[name] for entry in entries]
        if name in _TEXT:
            fill = pad_id if name == "input_ids" else 0
            rows = [
                torch.nn.functional.pad(row, (width - row.shape[1], 0), value=fill) for row in rows
            ]
        else:
            rows = _filled_up(rows)
        data[name] = torch.cat(rows)
    return BatchFeature(data)


def _filled_up(pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All of them as large as the largest, along every axis but the first: zeros at the end, where
    the mask of pixels, which is filled up alike, is 0."""
    sizes = [max(axis) for axis in zip(*(each.shape[1:] for each in pictures), strict=True)]

    def filled_up(each: torch.Tensor) -> torch.Tensor:
        gaps = [size - have for size, have in zip(sizes, each.shape[1:], strict=True)]
        # From the last axis to the second, before and after.
        counts = [count for gap in reversed(gaps) for count in (0, gap)]
        return torch.nn.functional.pad(each, counts) if any(gaps) else each

    return [filled_up(each) for each in pictures]


class PromptBatch:
    """The processor's output for some prompts, and what tells their images apart.

    text: all of it but pixels; inputs: all of it, made when first asked for
    """

    def __init__(
        self, text: BatchFeature, image_keys: list[bytes], inputs: Callable[[], BatchFeature]
    ) -> None:
        self.text, self.image_keys = text, image_keys
        self._inputs = inputs

    @cached_property
    def inputs(self) -> BatchFeature:
        return self._inputs()


class StepInputs:
    """The processor's output for any of a step's P prompts, on the model's device."""

    def __init__(self, cache: InputCache, model: Any, batch: TrainBatch, instruction: str) -> None:
        self._cache = cache
        self._model = model
        self._images = batch.images
        self._references = batch.references
        self._instruction = instruction
        self._expected = batch.prompt_token_ids
        self._prompt_ids = batch.prompt_ids
        captions = batch.mask.sum((1, 2)).tolist()
        self.tokens = [Tokens(len(i), n) for i, n in zip(self._expected, captions, strict=True)]
        """Of every image."""

    def select(
        self, indices: Sequence[int], change: Callable[[bytes], bytes] | None = None
    ) -> PromptBatch:
        """Inputs of these prompts, perhaps with a ``change`` of their encoded images.  Raises
        ValueError naming the prompt where the engine used other prompt ids."""
        prompt_ids = [self._prompt_ids[i] for i in indices]
        images = [self._images[i] for i in indices]
        images = images if change is None else [change(image) for image in images]
        device, whole = self._model.device, None
        text = self._cache.texts(images, self._instruction)
        if text is None:
            whole = self._cache.batch(images, self._instruction, prompt_ids)
            text = BatchFeature(without_pixels(whole))
        self._check(text, indices)

        def inputs() -> BatchFeature:
            if whole is None:
                return self._cache.batch(images, self._instruction, prompt_ids).to(device)
            return whole.to(device)

        return PromptBatch(text.to(device), [image_key(image) for image in images], inputs)

    def references(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """The reference captions of these prompts; ValueError where the batch has none."""
        if len(self._references) != len(self._images):
            raise ValueError("the batch has no reference captions, which the objective trains on")
        return [self._references[i] for i in indices]

    def _check(self, inputs: BatchFeature, indices: Sequence[int]) -> None:
        """The learner must see the very ids that the engine sampled after."""
        for row, i in enumerate(indices):
            got = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].numpy()
            if not np.array_equal(got, self._expected[i]):
                raise ValueError(
                    f"prompt {self._prompt_ids[i]}: the engine used {len(self._expected[i])} "
                    f"prompt ids, the learner has {len(got)} or other ones; both must load the "
                    "same processor"
                )
