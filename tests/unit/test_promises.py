"""A promise that was not kept is said not to be."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import learner_rows
import promises


def test_both_relations():
    assert promises.promise(">=", 2.5, 2.4999) == {
        "target": ">= 2.5",
        "here": 2.5,
        "reached": False,
    }
    assert promises.promise("<=", 50.0, 41.26)["reached"]
    assert promises.promise("<=", 50.0, 41.26)["here"] == 41.3


def case(model, tokens, group, times_plain, *, frozen=False):
    shared = {"times_plain": times_plain, "useful_utilisation": 0.39}
    return {
        "model": model,
        "image_tokens": tokens,
        "group_size": group,
        "frozen_vision": frozen,
        "methods": {"shared": shared},
    }


def test_updates_are_held_to_the_row_with_everything_trained():
    frozen = case("tiny-1m", 256, 8, 20.0, frozen=True)
    # The same shape again with fewer images, without the peer.
    unmeasured = case("tiny-1m", 256, 8, 0.0)
    del unmeasured["methods"]["shared"]["times_plain"]
    kept = promises.of_updates([case("tiny-1m", 256, 8, 7.5), frozen, unmeasured])
    assert list(kept) == ["tiny-1m, 256 image tokens, G = 8: times plain transformers"]
    assert [one["here"] for one in kept.values()] == [7.5]
    assert [one["reached"] for one in kept.values()] == [False]
    missing = {**case("qwen2.5-vl-3b", 256, 16, 0.0), "not_measured": "no CUDA device at hand"}
    del missing["methods"]
    assert promises.of_updates([missing]) == {}
    kept = promises.of_updates([case("qwen2.5-vl-3b", 256, 16, 9.0)])
    assert [one["reached"] for one in kept.values()] == [True, False]


def test_every_promise_of_an_update_is_measured_by_default():
    rows = {
        (row.model, row.image_tokens, row.group_size)
        for suite in learner_rows.SUITES.values()
        for row in suite
        if row.plain and not row.frozen_vision
    }
    assert promises.UPDATES.keys() <= rows
    assert promises.UTILISATION.keys() <= rows


def test_whole_steps_gain_more_with_a_larger_group():
    def step(shape, group, times, **more):
        systems = {"rayrl, vllm": {"times_trl": times}}
        return {"shape": shape, "group_size": group, "systems": systems, **more}

    others = [step("b", 8, 9.0, xe_steps=150), step("b", 8, 9.0, frozen_vision=True)]
    first = step("a", 8, 2.1)
    # Captions of older weights are another algorithm, and count for nothing here.
    first["systems"] |= {
        "rayrl, hf": {"times_trl": 2.6},
        "rayrl, vllm, staleness 1": {"times_trl": 3.0},
    }
    kept = promises.of_steps([first, step("a", 16, 2.55), step("b", 8, 5.9), *others])
    assert kept["(a), G = 8, random weights: times TRL"]["here"] == 2.6
    assert {name: one["reached"] for name, one in kept.items()} == {
        "(a), G = 8, random weights: times TRL": True,
        "(a), G = 16, random weights: times TRL": False,
        "(b), G = 8, random weights: times TRL": False,
        "(b), G = 8, after cross-entropy: times TRL": True,
    }


def test_the_fleet_is_held_to_its_lowest_share_and_its_largest_size():
    rows = [
        {
            "workers": workers,
            "max_staleness": 0,
            "share_of_ideal": share,
            "overhead_seconds": overhead,
            "driver_cpu_seconds": driver,
        }
        for workers, share, overhead, driver in ((1, 0.99, 0.02, 0.002), (64, 0.94, 0.127, 0.049))
    ]
    kept = promises.of_fleet(rows)
    assert kept["max_staleness 0: share of the ideal, lowest"]["here"] == 0.94
    assert kept["max_staleness 0: at 64 workers, ms a step, beyond the ideal"]["here"] == 127
    assert [one["reached"] for one in kept.values()] == [False, False, True]


def test_a_sync_with_a_second_copy_breaks_its_promise():
    kept = promises.of_sync({"sync_seconds": 1.5, "copies_a_worker": 2.0})
    assert [one["reached"] for one in kept.values()] == [True, False]
