"""From characters to tokens: where tokens end, wrong spans, rewards of prefixes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rayrl.learner.spans import token_ends, with_token_fields
from rayrl.objectives.token_reward import wrong_spans
from tests.unit.test_types_and_batch import completion, scored


class Letters:
    """Ids are indices into pieces of text; 9 is the end token."""

    pieces = (" a", " red", " bo", "at", " é", "")

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return "".join(self.pieces[i] for i in ids if i != 9)


def batch_of(ids, text, **changes):
    from rayrl.batch import make_batch

    one = scored("a", [completion(ids), completion([0, 9])], [2.0, 1.0])
    captions = [replace(one.group.completions[0], text=text), one.group.completions[1]]
    captions[1] = replace(captions[1], text="a")
    group = replace(one.group, completions=tuple(captions))
    return make_batch([replace(one, group=group, **changes)])


def test_tokens_end_where_their_text_does():
    # " a red boat" is written without the space in front.
    assert token_ends(Letters(), [0, 1, 2, 3, 9], "a red boat") == [0, 1, 5, 8, 10, 10]
    assert token_ends(Letters(), [5, 9], "") == [0, 0, 0]


def test_tokens_of_wrong_phrases_are_marked():
    batch = batch_of([0, 1, 2, 3, 9], "a red boat", wrong_spans=(((2, 7),), ()))
    credit = with_token_fields(batch, Letters()).fields["token_credit"]
    # Characters 2 to 6 are "red b": the tokens " red" and " bo".
    assert credit.tolist() == [[[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]]
    import torch

    rewards = wrong_spans(
        torch.tensor([[2.0, 1.0]]),
        torch.as_tensor(credit),
        torch.as_tensor(batch.mask),
        outcome_weight=2.0,
        span_penalty=1.0,
    )
    assert rewards.tolist() == [[[4, 3, 3, 4, 4], [2, 2, 0, 0, 0]]]


def test_prefixes_are_worth_what_their_whole_words_are():
    prefixes = (np.array([0.0, 0.1, 0.4], np.float32), np.array([0.0], np.float32))
    batch = batch_of([0, 1, 2, 3, 9], "a red boat", prefix_rewards=prefixes)
    values = with_token_fields(batch, Letters()).fields["prefix_values"]
    # Before " bo" there are two words, and still two before "at"; after it the whole caption.
    np.testing.assert_allclose(values[0, 0], [0, 0.1, 0.4, 0.4, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(values[0, 1], [0, 1, 1, 1, 1, 1])
    # The gains of a caption's tokens add up to its reward over that of the empty caption.
    assert np.diff(values[0, 0]).sum() == pytest.approx(2.0)


def test_a_batch_without_either_stays_as_it_is():
    batch = batch_of([0, 9], "a")
    assert with_token_fields(batch, Letters()) is batch
