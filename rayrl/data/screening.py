"""Going through all images once, and keeping what was read lately."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

from rayrl.data.rejections import BadImage, Rejections

T = TypeVar("T")
R = TypeVar("R")
CHUNK = 128


def screen(
    items: Iterable[T],
    check: Callable[[T], R],
    name: Callable[[T], str],
    rejections: Rejections,
    limit: int,
) -> Iterator[tuple[T, R]]:
    """The items that ``check`` does not refuse with BadImage, in order, with what it returned.

    Chunks are checked by one thread a core (decoding leaves the interpreter free); ``limit`` items
    are enough, 0 for all, and what comes after them is not looked at.
    """
    remaining, kept = iter(items), 0
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        while chunk := list(islice(remaining, CHUNK)):
            for item, result in zip(chunk, pool.map(_returning(check), chunk), strict=True):
                if isinstance(result, BadImage):
                    rejections.add(name(item), result.reason, result.detail)
                    continue
                yield item, result
                kept += 1
                if kept == limit:
                    return


def _returning(check: Callable[[T], R]) -> Callable[[T], R | BadImage]:
    def checked(item: T) -> R | BadImage:
        try:
            return check(item)
        except BadImage as error:
            return error

    return checked


class ByteCache(Generic[R]):
    """Values by key, the least recently used dropped when they weigh more than ``max_bytes``."""

    def __init__(self, max_bytes: int, weigh: Callable[[R], int]) -> None:
        self._max_bytes, self._weigh = max_bytes, weigh
        self._values: OrderedDict[Hashable, R] = OrderedDict()
        self._weight = 0

    def get(self, key: Hashable, make: Callable[[], R]) -> R:
        """The value of ``key``, made if it is not held."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self.put(key, value)
        return value

    def put(self, key: Hashable, value: R) -> None:
        """Hold a value that was made elsewhere; the newest value stays, whatever it weighs."""
        self._weight += self._weigh(value) - (
            self._weigh(self._values.pop(key)) if key in self._values else 0
        )
        self._values[key] = value
        while self._weight > self._max_bytes and len(self._values) > 1:
            _, dropped = self._values.popitem(last=False)
            self._weight -= self._weigh(dropped)
