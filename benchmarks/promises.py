"""What is promised of speed, and whether a run kept it."""

from __future__ import annotations

from typing import Any

# (model, image tokens, G) of an update with everything trained: times plain transformers.
UPDATES = {
    ("tiny-2.5m", 16, 8): 2.8,
    ("tiny-1m", 256, 8): 7.6,
    ("tiny-1m", 256, 16): 15.9,
    ("smolvlm-256m", 64, 16): 8.0,
    ("smolvlm-500m", 64, 16): 8.0,
    ("qwen2.5-vl-3b", 256, 16): 8.0,
}
UTILISATION = {("qwen2.5-vl-3b", 256, 16): 0.4}
# (shape, G) of whole synchronous steps, with the faster engine: times TRL.
STEPS = {("a", 8): 2.5, ("b", 8): 6.0}
SHARE_OF_IDEAL, OVERHEAD_MS, LARGEST_FLEET = 0.95, 50.0, 64
SYNC_SECONDS, COPIES = 2.0, 1.05

Promises = dict[str, dict[str, Any]]


def promise(relation: str, target: float, value: float) -> dict[str, Any]:
    """One promise: ``relation`` is `>=` or `<=`."""
    reached = value >= target if relation == ">=" else value <= target
    return {
        "target": f"{relation} {target:g}",
        "here": float(f"{value:.3g}"),
        "reached": reached,
    }


def of_updates(cases: list[dict[str, Any]]) -> Promises:
    """Of the cases that bench_learner.py measured."""
    kept: Promises = {}
    for case in cases:
        key = (case["model"], case["image_tokens"], case["group_size"])
        if "methods" not in case or case["frozen_vision"]:
            continue
        shared = case["methods"]["shared"]
        what = f"{case['model']}, {case['image_tokens']} image tokens, G = {case['group_size']}"
        if key in UPDATES and "times_plain" in shared:
            kept[f"{what}: times plain transformers"] = promise(
                ">=", UPDATES[key], shared["times_plain"]
            )
        if key in UTILISATION:
            kept[f"{what}: utilisation"] = promise(
                ">=", UTILISATION[key], shared["useful_utilisation"]
            )
    return kept


def of_steps(cases: list[dict[str, Any]]) -> Promises:
    """Of the cases that bench_against_trl.py measured with weights that all train, by the faster
    engine of the synchronous loop; a larger group gains more.  Random captions share no beginnings,
    which is the worst case, and real ones do."""
    times = {}
    for case in cases:
        if case.get("frozen_vision"):
            continue
        engines = [case["systems"].get(f"rayrl, {engine}") for engine in ("vllm", "hf")]
        if reached := [engine["times_trl"] for engine in engines if engine]:
            weights = "after cross-entropy" if case.get("xe_steps") else "random weights"
            times[case["shape"], case["group_size"], weights] = max(reached)
    kept: Promises = {}
    for (shape, group, weights), value in times.items():
        what = f"({shape}), G = {group}, {weights}: times TRL"
        if (shape, group) in STEPS:
            kept[what] = promise(">=", STEPS[shape, group], value)
        elif group > 8 and (shape, 8, weights) in times:
            kept[what] = promise(">=", times[shape, 8, weights], value)
    return kept


def of_fleet(rows: list[dict[str, Any]]) -> Promises:
    """Of the rows that bench_fleet.py measured."""
    kept: Promises = {}
    for staleness in sorted({row["max_staleness"] for row in rows}):
        same = [row for row in rows if row["max_staleness"] == staleness]
        share = min(row["share_of_ideal"] for row in same)
        what = f"max_staleness {staleness}"
        kept[f"{what}: share of the ideal, lowest"] = promise(">=", SHARE_OF_IDEAL, share)
        for row in same:
            if row["workers"] == LARGEST_FLEET:
                name = f"{what}: at {LARGEST_FLEET} workers, ms a step"
                for key, title in (
                    ("overhead_seconds", "beyond the ideal"),
                    ("driver_cpu_seconds", "driver's processor"),
                ):
                    kept[f"{name}, {title}"] = promise("<=", OVERHEAD_MS, row[key] * 1e3)
    return kept


def of_sync(row: dict[str, Any]) -> Promises:
    """Of what bench_sync.py measured."""
    return {
        "seconds": promise("<=", SYNC_SECONDS, row["sync_seconds"]),
        "copies a worker": promise("<=", COPIES, row["copies_a_worker"]),
    }
