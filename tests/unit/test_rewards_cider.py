"""CIDEr-D against hand-computed and published values."""

from __future__ import annotations

import numpy as np
import pytest

from rayrl.rewards.cider import CiderD, DocumentFrequency

# From the README example of jmhessel/clipscore ("good captions"), tokenized.


def test_copy_of_a_long_reference_scores_ten_and_of_three_words_seven_and_a_half() -> None:
    df = DocumentFrequency.from_references([["a b c d e"], ["x y z"], ["q"]])
    scores = CiderD(df).score(["a b c d e", "x y z"], [["a b c d e"], ["x y z"]])
    np.testing.assert_allclose(scores, [10.0, 7.5], atol=1e-12)


def test_one_image_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="1 image"):
        DocumentFrequency.from_references([["a dog", "a cat"]])
