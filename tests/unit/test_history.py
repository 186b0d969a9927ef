"""What is kept of a learner's past: as much as leads to what may be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrl.actors.history import History


def folder(parent: Path, step: int) -> Path:
    place = parent / f"step_{step}"
    place.mkdir()
    return place


@pytest.fixture
def history() -> History:
    return History(back=2)


def test_there_is_a_way_from_the_start_until_there_is_a_checkpoint(history):
    assert history.way() == (None, [])
    for step in (1, 2, 3):
        history.add([step])
    assert history.step == 3
    assert history.way() == (None, [[1], [2], [3]])
    assert history.way_to(1) == (None, [[1]]) and history.since(1) == [[2], [3]]


def test_a_checkpoint_before_the_last_leads_to_the_steps_between_them(history, tmp_path):
    first, second = folder(tmp_path, 2), folder(tmp_path, 4)
    for step in (1, 2, 3, 4):
        history.add([step])
        if step == 2:
            history.saved(first)
    history.saved(second)
    assert history.way() == (second, [])
    assert history.way_to(3) == (first, [[3]]) and history.since(3) == [[4]]
    assert history.way_to(2) == (first, [])
    # Nobody asks for what is more than two steps back.
    assert history.way_to(1) is None
    history.add([5])
    assert history.way_to(3) == (first, [[3]]) and history.way() == (second, [[5]])
    history.add([6])
    assert history.way_to(3) is None
    assert history.way_to(5) == (second, [[5]])


def test_there_is_no_way_from_a_checkpoint_that_was_removed(tmp_path):
    history, first = History(back=1), folder(tmp_path, 1)
    history.add([1])
    history.saved(first)
    history.add([2])
    history.saved(folder(tmp_path, 2))
    assert history.way_to(1) == (first, [])
    first.rmdir()
    assert history.way_to(1) is None


def test_a_run_that_goes_on_has_no_past(history, tmp_path):
    place = folder(tmp_path, 7)
    history.begin(7, place)
    assert history.way() == (place, []) and history.way_to(6) is None
    history.add([8])
    assert history.step == 8 and history.way() == (place, [[8]])


def test_without_staleness_nothing_from_before_a_checkpoint_is_kept(tmp_path):
    history = History(back=0)
    history.add([1])
    history.saved(folder(tmp_path, 1))
    assert history.way_to(0) is None
    assert history.way()[1] == []
