"""Tables in Markdown from what the benchmarks wrote: one function a benchmark, from the content of
one JSON file to lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def promised(result: Result) -> list[str]:
    """What the run promised and kept, where its benchmark promises anything."""
    rows = [
        [name, one["target"], f"{one['here']:g}", "yes" if one["reached"] else "no"]
        for name, one in result.get("promised", {}).items()
    ]
    return ["", *table(["promised", "target", "here", "reached"], rows)] if rows else []


def default_run(result: Result) -> list[str]:
    rows = []
    for label, key in (
        ("after cross-entropy (start)", "cider_d_start"),
        ("after GRPO", "cider_d_end"),
        ("after more cross-entropy, same time", "cider_d_xe_control"),
    ):
        values = [run[key] for run in result["runs"]]
        numbers = (statistics.mean(values), min(values), max(values))
        rows.append([label, *(f"{value:.1f}" for value in numbers)])
    seeds = f"held-out CIDEr-D (x100), {len(result['runs'])} seeds"
    return table([seeds, "mean", "lowest", "highest"], rows)


def flickr8k_tiny(result: Result) -> list[str]:
    summary = result["summary"]
    rows = [
        [f"after cross-entropy, {result['cross_entropy'][-1]['step']} steps", "cider_d_start"],
        [f"after GRPO, {summary['steps']} steps", "cider_d_end"],
        ["best on the way", "cider_d_best"],
    ]
    header = [f"validation CIDEr-D (x100), {len(result['seeds'])} seed", ""]
    return table(header, [[label, f"{summary[key]:.1f}"] for label, key in rows])


_UTILISATION = ("utilisation", "useful_utilisation")
"""Of all operations that ran and, where that was counted, of those that an update needs."""


def learner(result: Result) -> list[str]:
    measured = [case for case in result["cases"] if "methods" in case]
    plain = any("times_plain" in m for case in measured for m in case["methods"].values())
    header = ["model", "vision", "image tokens", "G", "P", "method", "ms"]
    header += ["times plain"] * plain + ["times naive", "by FLOPs", "MiB", "utilisation"]
    rows = []
    for case in measured:
        for label, method in case["methods"].items():
            times = [f"{method['times_plain']:.1f}" if "times_plain" in method else ""] * plain
            rows.append(
                [
                    *_row_of(case),
                    str(case["prompts"]),
                    label,
                    f"{method['seconds'] * 1e3:.0f}",
                    *times,
                    f"{method['speedup']:.1f}",
                    f"{method['predicted']:.1f}",
                    f"{method['peak_bytes'] / 2**20:.0f}",
                    "/".join(f"{method[name]:.0%}" for name in _UTILISATION if name in method),
                ]
            )
    missing = [
        [*_row_of(case), case["not_measured"]] for case in result["cases"] if "not_measured" in case
    ]
    lines = table(header, rows) if rows else []
    if missing:
        lines += ["", "Not measured:", "", *table([*header[:4], "why"], missing)]
    return lines


def _row_of(case: dict[str, Any]) -> list[str]:
    """What tells a learner's case from the others."""
    vision = "frozen" if case["frozen_vision"] else "trained"
    return [case["model"], vision, str(case["image_tokens"]), str(case["group_size"])]


def _weights(case: dict[str, Any]) -> str:
    if case.get("frozen_vision"):
        return "random, vision frozen, pictures seen before"
    return "cross-entropy" if case.get("xe_steps") else "random"


def against_trl(result: Result) -> list[str]:
    rows = []
    for case in result["cases"]:
        for name, system in case["systems"].items():
            rows.append(
                [
                    f"({case['shape']}), {case['image_tokens']} image tokens",
                    _weights(case),
                    str(case["group_size"]),
                    f"TRL {result['trl']}" if name == "trl" else name,
                    f"{system['captions_per_second']:.0f}",
                    f"{system['times_trl']:.1f}",
                    ", ".join(f"{k} {v:.2f}" for k, v in system["seconds_by_phase"].items()),
                ]
            )
    header = ["model", "weights", "G", "system", "captions/s", "times TRL", "seconds of a step"]
    return table(header, rows)


def fleet(result: Result) -> list[str]:
    rows = [
        [
            str(row["workers"]),
            str(row["max_staleness"]),
            str(row["captions_per_step"]),
            f"{row['captions_per_second']:.0f}",
            f"{row['share_of_ideal']:.1%}",
            *(
                f"{row[key] * 1e3:.0f}" if key in row else "not measured"
                for key in (
                    "overhead_seconds",
                    "bare_ray_overhead_seconds",
                    "driver_cpu_seconds",
                    "bare_ray_driver_cpu_seconds",
                )
            ),
        ]
        for row in result["rows"]
    ]
    return table(
        [
            "workers",
            "max_staleness",
            "captions a step",
            "captions/s",
            f"of the ideal ({result['engine_seconds']} s a step)",
            "beyond it, ms a step",
            "bare Ray beyond it",
            "driver's processor, ms a step",
            "bare Ray's",
        ],
        rows,
    )


def threads(result: Result) -> list[str]:
    rows = [
        [
            str(row["processes"]),
            row["waiting"],
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['times_default']:.1f}",
        ]
        for row in result["rows"]
    ]
    return table(["processes at once", "threads wait", "ms an update", "times the default"], rows)


def sync(result: Result) -> list[str]:
    return table(
        ["MB", "workers", "seconds", "of these packing", "copies a worker", "times plain copies"],
        [
            [
                f"{result['bytes'] / 1e6:.0f}",
                str(result["workers"]),
                f"{result['sync_seconds']:.2f}",
                f"{result['pack_seconds']:.2f}",
                f"{result['copies_a_worker']:.2f}",
                f"{result['over_memcpy']:.2f}",
            ]
        ],
    )


def rewards(result: Result) -> list[str]:
    microseconds = {
        name: us
        for name, us in result["cider_d_us_per_caption"].items()
        if not name.startswith("largest difference")
    }
    slowest = max(microseconds.values())
    rows = [[name, f"{us:.1f}", f"{slowest / us:.0f}"] for name, us in microseconds.items()]
    return table(["CIDEr-D", "µs a caption", "times the slowest"], rows)


def reward_step(result: Result) -> list[str]:
    header = ["captions a step", *(f"{name}, s" for name in result["seconds"])]
    seconds = [f"{value:.3f}" for value in result["seconds"].values()]
    percent = f"{result['rewards_percent_of_step']:.1f} (target {result['target_percent']:g})"
    row = [str(result["captions_per_step"]), *seconds, percent]
    return table([*header, "rewards, % of the step"], [row])


def fault_campaign(result: Result) -> list[str]:
    modes = sorted({row["max_staleness"] for row in result["rows"]})
    by_key = {(row["fault"], row["max_staleness"]): row for row in result["rows"]}
    lines = []
    for kind in result["kinds"]:
        rows = [by_key.get((kind, mode)) for mode in modes]
        counts = [str(row["faults"]) if row else "not run" for row in rows]
        done = [row for row in rows if row]
        totals = [sum(row[name] for row in done) for name in ("runs", "steps")]
        failures = sum(len(row["failures"]) for row in done)
        lines.append([kind, *counts, *(str(total) for total in totals), str(failures)])
    header = ["fault", *(f"times, max_staleness {mode}" for mode in modes)]
    shown = table([*header, "runs", "steps", "not well"], lines)
    if result["failures"]:
        shown += ["", "What was not well:", "", *(f"- {text}" for text in result["failures"])]
    return shown
