"""Weights that are lost with a node: who makes them again, and which cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from rayrl.actors import versions as module
from rayrl.actors.losses import OtherVersion
from rayrl.actors.versions import VersionLost, Versions
from rayrl.config import Config

REFUSED = OtherVersion("asked for captions of weight version 2, holding 1")


class Ref:
    """A reference to ``what``, under a number of its own."""

    def __init__(self, what: str) -> None:
        self.what = what

    def hex(self) -> str:
        return f"{id(self):056x}"

    @property
    def lost(self) -> ObjectLostError:
        return ObjectLostError(self.hex(), None, "")


class Learner:
    """Says what it is asked for.  Its checkpoint is of version 1."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def weights(self, *, trained_only: bool) -> Ref:
        return self._make("trained" if trained_only else "all")

    def earlier(self, version: int) -> Ref | None:
        return self._make(f"trained {version}") if version >= 1 else None

    def _make(self, what: str) -> Ref:
        self.made.append(what)
        return Ref(what)


class Actor:
    """Remembers what it was to load."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.load = SimpleNamespace(remote=self._load)

    def _load(self, changed: Any, *refs: Any) -> str:
        self.given.append(refs)
        return "loaded"


@pytest.fixture
def published(monkeypatch):
    """Versions 0 to 2 by a learner, of a run with staleness 1, and what was published."""
    monkeypatch.setattr(module.ray, "ObjectRef", Ref)
    learner = Learner()
    versions = Versions(Config.model_validate({"train": {"max_staleness": 1}}))
    frozen, trained = Ref("all"), [Ref(f"trained {v}") for v in range(3)]
    for version in range(3):
        first = frozen if version == 0 else None
        versions.publish([], version, trained[version], first, source=learner)
    return versions, learner, frozen, trained


def test_what_is_lost_is_published_again_once_by_whoever_has_it(published):
    versions, learner, frozen, trained = published
    actor = Actor()
    for lost in (frozen, frozen, trained[2], trained[1], trained[2]):
        versions.pull_newest(actor, lost.lost)
    assert learner.made == ["all", "trained", "trained 1"]
    everything, newest = actor.given[-1]
    assert (everything.what, newest.what) == ("all", "trained")
    assert everything is not frozen and newest is not trained[2]
    versions.pull(actor, 1)
    assert actor.given[-1][1].what == "trained 1" and actor.given[-1][1] is not trained[1]


def test_a_version_older_than_the_checkpoint_is_missed_when_it_is_wanted(published):
    versions, learner, _, trained = published
    versions.pull_newest(Actor(), trained[0].lost)
    versions.pull_newest(Actor(), None)
    with pytest.raises(VersionLost, match=r"version 0 were lost .* at version 2, has no check"):
        versions.pull(Actor(), 0)
    assert learner.made == []


def test_a_refusal_is_excused_by_a_version_that_was_lost_and_by_nothing_else(
    published, monkeypatch
):
    versions, _, _, trained = published
    outcome: list[Exception] = []

    def get(ref, timeout):
        for error in outcome:
            raise error
        return 2

    monkeypatch.setattr(module.ray, "get", get)
    worker, said = SimpleNamespace(actor=Actor(), number=0), []
    pool = SimpleNamespace(
        constructed=[worker],
        renew=lambda worker, cause: said.append(cause),
        lost=lambda worker, cause, sent: said.append(cause),
    )
    versions.load(worker, 2)
    with pytest.raises(OtherVersion):
        versions.lost(pool, worker, REFUSED)
    outcome.append(trained[2].lost)
    versions.lost(pool, worker, REFUSED)
    assert said == outcome
    # It was renewed: what it had refused before counts no more.
    pool.constructed.clear()
    versions.lost(pool, worker, REFUSED)
    assert said == [*outcome, REFUSED]
