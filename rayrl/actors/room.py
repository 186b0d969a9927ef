"""Waiting until a cluster has room for workers that can only begin together."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rayrl.actors.pool import SAY_EVERY_S
from rayrl.interrupt import StopRequest
from rayrl.scaling import shortage

log = logging.getLogger(__name__)


def wait_for_room(what: str, bundles: Sequence[Mapping[str, float]], *, limit_s: float) -> None:
    """:func:`wait_for_place`, for workers that somebody else starts, and would wait for without a
    word and without an end; ``bundles`` is what each of them asks Ray for."""
    asked = [{name: amount for name, amount in one.items() if amount} for one in bundles]
    place = placement_group(asked, strategy="PACK")
    try:
        wait_for_place(place, what, limit_s=limit_s, stop=StopRequest())
    finally:
        remove_placement_group(place)


def wait_for_place(place: Any, what: str, *, limit_s: float, stop: StopRequest) -> None:
    """Wait until Ray has room for all bundles of a placement group, which ``what`` are to have, and
    say every 30 s what is missing; RuntimeError after ``limit_s``, and once ``stop`` is requested.
    """
    asked: Counter[str] = Counter()
    for bundle in place.bundle_specs:
        asked.update(bundle)
    said = time.monotonic()
    deadline = said + limit_s
    while not place.wait(max(0.0, min(1.0, deadline - time.monotonic()))):
        now = time.monotonic()
        if now < deadline and not stop.requested and now - said < SAY_EVERY_S:
            continue
        said = now
        missing = shortage(asked, ray.cluster_resources(), ray.available_resources(), who="want")
        where = f"waiting for room for {what}"
        if stop.requested:
            raise RuntimeError(f"asked to stop while {where}: {missing}")
        if now >= deadline:
            raise RuntimeError(f"gave up {where}: {missing}")
        log.warning("%s: %s", where, missing)
