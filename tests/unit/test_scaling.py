"""How many rollout workers: on sequences of measured steps."""

from __future__ import annotations

import pytest

from rayrl.config import RolloutConfig
from rayrl.scaling import WINDOW, StepTimes, shortage, wanted_workers


def simulate(
    start: int, *, work: float, learner: float, overlaps: bool, bounds=(1, 8), steps=100
) -> list[int]:
    """Worker counts of a run whose batches, in as many parts as there may be workers, cost ``work``
    worker-seconds and whose learner takes ``learner`` seconds, the history starting again after
    every change.  Parts are sampled whole, by the worker that is free first."""
    workers, recent, counts = start, [], []
    parts = bounds[1]
    for _ in range(steps):
        busy = [0.0] * workers
        for _ in range(parts):
            busy[busy.index(min(busy))] += work / parts
        waited = max(0.0, work / workers - learner) if overlaps else max(busy)
        recent.append(StepTimes(seconds=learner + waited, waited=waited, sampling=work))
        wanted = wanted_workers(
            recent,
            workers,
            parts=parts,
            minimum=bounds[0],
            maximum=bounds[1],
            overlaps=overlaps,
        )
        if wanted != workers:
            workers, recent = wanted, []
        counts.append(workers)
    return counts


def test_an_asynchronous_run_gets_the_workers_that_hide_sampling_and_no_more():
    # 6 s of sampling hide behind 2 s of training with exactly 3 workers.
    for start in (1, 3, 8):
        counts = simulate(start, work=6.0, learner=2.0, overlaps=True)
        assert counts[-1] == 3
        # It never turns back.
        assert counts in (sorted(counts), sorted(counts, reverse=True))


def test_a_synchronous_run_grows_until_one_more_saves_less_than_a_twentieth_of_a_step():
    # Of 64 parts n workers take ceil(64 / n) one after the other, of 0.094 s each, and the learner
    # takes 1 s: 1.94 s with seven and 1.75 s with eight.  Nine take as long, and ten would save
    # 0.094 s, which for two more workers is less than a twentieth each.
    assert simulate(1, work=6.0, learner=1.0, overlaps=False, bounds=(1, 64))[-1] == 8


def test_a_synchronous_run_has_no_worker_that_waits_while_others_sample_a_part_more():
    # Eight parts of a second: with four to seven workers two after the other.
    assert simulate(4, work=8.0, learner=1.0, overlaps=False)[-1] == 8
    assert simulate(7, work=8.0, learner=20.0, overlaps=False)[-1] == 4
    # The seventh of eight workers would make a step of 32 s one of 34 s.
    assert simulate(8, work=16.0, learner=30.0, overlaps=False)[-1] == 8


def test_workers_without_which_a_step_takes_as_long_are_let_go():
    assert simulate(8, work=0.1, learner=10.0, overlaps=False)[-1] == 1
    assert simulate(8, work=0.1, learner=10.0, overlaps=True, bounds=(2, 8))[-1] == 2


def test_bounds_hold_and_nothing_changes_before_a_window_is_full():
    counts = simulate(1, work=100.0, learner=1.0, overlaps=True, bounds=(1, 3))
    assert counts[: WINDOW - 1] == [1] * (WINDOW - 1)
    assert counts[WINDOW - 1] == 2 and max(counts) == 3 == counts[-1]


def test_the_count_does_not_swing():
    for work in (0.3, 1.0, 2.9, 3.0, 3.1, 5.0, 11.0):
        for overlaps in (True, False):
            counts = simulate(4, work=work, learner=1.0, overlaps=overlaps, steps=300)
            assert len(set(counts[-100:])) == 1, (work, overlaps, counts)


def test_the_shortage_names_the_resource_and_what_there_is():
    asked = {"CPU": 2.0, "GPU": 1.0}
    none = {"CPU": 8.0}
    assert shortage(asked, none, none) == ("another asks for 1 GPU; of the cluster's 0, 0 are free")
    taken = shortage(asked, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 0.5, "GPU": 1.0})
    assert taken == "another asks for 2 CPU; of the cluster's 8, 0.5 are free"
    assert "starting" in shortage(asked, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0})
    assert "starting" in shortage({"CPU": 2.0, "GPU": 0.0}, none, none)


def test_the_bounds_follow_the_number_unless_they_are_given():
    four = RolloutConfig(num_workers=4)
    assert (four.min_workers, four.max_workers) == (4, 4)
    spot = RolloutConfig(num_workers=4, min_workers=1, max_workers=16)
    assert (spot.min_workers, spot.num_workers, spot.max_workers) == (1, 4, 16)
    with pytest.raises(ValueError, match="min_workers 5, num_workers 4, max_workers 4: want"):
        RolloutConfig(num_workers=4, min_workers=5)
