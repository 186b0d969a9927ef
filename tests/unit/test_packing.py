"""Groups travel as a few arrays and arrive as they were."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from rayrl.packing import Joined, pack, unpack
from rayrl.types import Completion, Prompt, RolloutGroup


def completion(ids, version=3, finish="stop"):
    return Completion(
        token_ids=np.array(ids, np.int32),
        logprobs=-np.arange(1, len(ids) + 1, dtype=np.float32),
        text=f"caption {ids}",
        finish_reason=finish,
        weight_version=version,
    )


def group(completions, greedy=None):
    return RolloutGroup(
        prompt=Prompt(prompt_id="coco/1", image=b"png", text="Describe.", references=("a dog",)),
        prompt_token_ids=np.array([1, 2], np.int32),
        completions=tuple(completions),
        group_size=len(completions),
        greedy=greedy,
    )


def test_columns_join_arrays_of_unequal_length():
    columns = pack([completion([5, 6, 7]), completion([8], version=4, finish="length")])
    joined = columns["token_ids"]
    assert isinstance(joined, Joined)
    assert (joined.values.tolist(), joined.bounds) == ([5, 6, 7, 8], (0, 3, 4))
    assert joined.values.dtype == np.int32
    assert columns["weight_version"] == [3, 4]
    assert columns["finish_reason"] == ["stop", "length"]


def test_arrays_of_unequal_types_stay_apart():
    wide = Completion(
        token_ids=np.array([1, 2], np.int64),
        logprobs=np.zeros(2, np.float32),
        text="",
        finish_reason="stop",
        weight_version=0,
    )
    columns = pack([completion([5]), wide])
    assert [ids.dtype for ids in columns["token_ids"]] == [np.int32, np.int64]
    assert [c.token_ids.dtype for c in unpack(Completion, columns)] == [np.int32, np.int64]


@pytest.mark.parametrize("through", [lambda g: pickle.loads(pickle.dumps(g)), copy.deepcopy])
def test_a_group_arrives_as_it_was(through):
    sent = group([completion([5, 6, 7]), completion([8], finish="length")], completion([9]))
    got = through(sent)
    assert got.prompt.prompt_id == "coco/1" and got.group_size == 2
    assert got.prompt_token_ids.tolist() == [1, 2]
    assert got.captions == sent.captions
    for a, b in zip([*got.completions, got.greedy], [*sent.completions, sent.greedy], strict=True):
        assert a.token_ids.dtype == np.int32 and a.logprobs.dtype == np.float32
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.array_equal(a.logprobs, b.logprobs)
        assert (a.finish_reason, a.weight_version) == (b.finish_reason, b.weight_version)


def test_the_number_of_buffers_does_not_grow_with_the_group():
    counts = []
    for size in (2, 32):
        buffers: list = []
        pickle.dumps(
            group([completion([1, 2, 3])] * size), protocol=5, buffer_callback=buffers.append
        )
        counts.append(len(buffers))
    # The prompt's ids, the completions' ids, their log-probs.
    assert counts == [3, 3]


def test_what_was_damaged_on_the_way_is_refused():
    columns = pack([completion([5, 6])])
    columns["logprobs"] = Joined(np.array([0.0, np.nan], np.float32), (0, 2))
    with pytest.raises(ValueError, match="log-prob nan at token 1"):
        unpack(Completion, columns)
