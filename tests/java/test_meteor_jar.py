"""METEOR with the real jar.  It loads a table of 60 MB: half a minute to start."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from pycocoevalcap.meteor.meteor import Meteor as ReferenceMeteor

from rayrl.rewards.meteor import Meteor
from rayrl.rewards.selftest import meteor_checks

pytestmark = [
    pytest.mark.java,
    pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH"),
]

CAPTIONS = ["a man rides a horse", "", "a ||| b  two  spaces", "größe naïve 犬", "dog"]
REFERENCES = [
    ["a man riding a brown horse", "someone on a horse"],
    ["a cat"],
    ["a b with two spaces"],
    ["a naïve dog"],
    ["two dogs", "a puppy", "dog"],
]


@pytest.fixture(scope="module")
def meteor() -> Iterator[Meteor]:
    with Meteor() as process:
        yield process


def test_equals_pycocoevalcap(meteor: Meteor) -> None:
    corpus, each = meteor.score(CAPTIONS, REFERENCES)
    gts, res = dict(enumerate(REFERENCES)), {i: [c] for i, c in enumerate(CAPTIONS)}
    expected_corpus, expected = ReferenceMeteor().compute_score(gts, res)
    assert corpus == expected_corpus
    np.testing.assert_array_equal(each, expected)
    assert each[0] > 0.3 and each[1] == 0.0


def test_one_process_serves_many_calls_and_leaves_nothing_behind(meteor: Meteor) -> None:
    folder = meteor._process.folder
    first = meteor.score(CAPTIONS[:1], REFERENCES[:1])
    for _ in range(3):
        assert meteor.score(CAPTIONS[:1], REFERENCES[:1])[0] == first[0]
    assert folder.is_dir() and "site-packages" not in str(folder)
    with pytest.raises(ValueError, match="no captions"):
        meteor.score([], [])


def test_published_values() -> None:
    checks = meteor_checks()
    assert len(checks) == 2
    assert [check for check in checks if not check.ok] == []
