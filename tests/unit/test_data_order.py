"""The order of prompts, and the data set that it indexes."""

import numpy as np
import pytest

from rayrl.data.dataset import Dataset
from rayrl.data.order import epoch_order, prompt_indices


def test_order_is_the_documented_sort_of_philox_output():
    # Golden values: a change here breaks the resuming of every run that is under way.
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(8, 0, 1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert epoch_order(8, 1, 0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_every_epoch_visits_each_item_once_whatever_the_batch_size():
    num_items, seed = 10, 3
    for batch_size in (1, 3, 10, 25):
        steps = 60 // batch_size + 1
        pairs = [
            p for step in range(steps) for p in prompt_indices(step, batch_size, num_items, seed)
        ]
        for epoch in range(6):
            visited = [index for e, index in pairs if e == epoch]
            assert visited == epoch_order(num_items, seed, epoch).tolist()


def test_batches_of_another_size_continue_the_same_sequence():
    by_threes = [p for step in range(20) for p in prompt_indices(step, 3, 7, seed=5)]
    by_fives = [p for step in range(12) for p in prompt_indices(step, 5, 7, seed=5)]
    assert by_threes == by_fives


def test_order_is_uniform_over_places():
    # 4,000 epochs of 4 items: each item stands at each place a quarter of the time (+- 5 sigma).
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[np.arange(4), epoch_order(4, 11, epoch)] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_the_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0), "num_items 0: want at least one"),
        ((-1, 4, 5, 0), "step -1"),
        ((0, 0, 5, 0), "batch_size 0"),
        ((0, 4, 5, -2), "seed -2"),
    ],
)
def test_impossible_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_indices(*arguments)


def dataset(**changes) -> Dataset:
    values = {
        "ids": ["a", "b", "c"],
        "captions": [("one", "two"), ("three",), ("four", "five")],
        "instruction": "Describe.",
        "read_image": lambda index: b"image %d" % index,
        "image_digest": "00",
    }
    return Dataset(**{**values, **changes})


def test_a_dataset_is_a_sequence_of_prompts():
    data = dataset()
    assert len(data) == 3
    assert (data[1].prompt_id, data[1].image, data[1].text) == ("b", b"image 1", "Describe.")
    assert data[-1].prompt_id == "c"
    assert [prompt.references for prompt in data[:2]] == [("one", "two"), ("three",)]
    assert data.references() == [["one", "two"], ["three"], ["four", "five"]]
    assert [prompt.prompt_id for prompt in data] == ["a", "b", "c"]
    with pytest.raises(IndexError, match="prompt 3 of a data set of 3"):
        data[3]


def test_references_and_fingerprint_read_no_image():
    def fail(index: int) -> bytes:
        raise AssertionError(f"read image {index}")

    data = dataset(read_image=fail)
    assert data.fingerprint() == dataset().fingerprint()
    assert len(data.references()) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ["a", "b", "d"]},
        {"captions": [("one", "two"), ("three", "four"), ("five",)]},
        {"captions": [("one two",), ("three",), ("four", "five")]},
        {"instruction": "Caption."},
        {"image_digest": "01"},
    ],
)
def test_the_fingerprint_changes_with_the_content(change):
    assert dataset(**change).fingerprint() != dataset().fingerprint()


def test_ids_and_captions_belong_together():
    with pytest.raises(ValueError, match="2 ids for 3 sets of captions"):
        dataset(ids=["a", "b"])
