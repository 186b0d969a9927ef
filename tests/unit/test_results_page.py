"""docs/results.md says what the result files say, and nothing else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import result_tables  # noqa: E402
import write_results  # noqa: E402


def test_the_page_is_what_the_result_files_give():
    assert write_results.PAGE.read_text(encoding="utf-8") == write_results.page(), (
        "docs/results.md is not up to date: run python benchmarks/write_results.py"
    )


def test_every_number_names_a_file_that_exists():
    text = write_results.PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+\.json)\)", text)
    assert len(links) >= 2
    assert [link for link in links if not (write_results.PAGE.parent / link).is_file()] == []


def test_every_result_file_is_shown_and_its_script_exists():
    text = write_results.PAGE.read_text(encoding="utf-8")
    shown = {
        file
        for part in write_results.SECTIONS
        for file in write_results.newest(part.name, write_results.RESULTS)
    }
    assert all(file.name in text for file in shown)
    for part in write_results.SECTIONS:
        script = f"bench_{part.name.replace('-', '_')}.py"
        assert (ROOT / "benchmarks" / script).is_file(), script


def test_the_readme_numbers_are_those_of_the_page():
    text = write_results.PAGE.read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| after .*\|$", readme, re.MULTILINE)
    assert len(rows) == 3
    assert [row for row in rows if row not in text] == []
    for number in re.findall(r"went from ([\d.]+) after\s+cross-entropy to ([\d.]+)", readme)[0]:
        assert f"| {number} |" in text


def test_the_readme_says_of_trl_what_was_measured_last():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(
        r"^\| (16|256), (\d+) \| ([\d.]+) times[^|]*\| ([\d.]*)", readme, re.MULTILINE
    )
    (file,) = write_results.newest("against-trl", write_results.RESULTS)
    kept = json.loads(file.read_text())["promised"]
    shapes = {"16": "(a)", "256": "(b)"}
    for tokens, group, *values in said:
        for weights, value in zip(("random weights", "after cross-entropy"), values, strict=True):
            found = kept.get(f"{shapes[tokens]}, G = {group}, {weights}: times TRL")
            assert value == (f"{found['here']:.1f}" if found else ""), (tokens, group, weights)
    assert len(said) == 4


def test_the_newest_file_of_each_machine_counts(tmp_path):
    for name in (
        "sync-2026-01-02-2-cores-x.json",
        "sync-2026-03-01-2-cores-x.json",
        "sync-2026-02-01-nvidia-h200.json",
        "sync_y_2026-02-03.json",
        "synchrony-2026-02-03-z.json",
    ):
        (tmp_path / name).write_text("{}")
    assert {file.name for file in write_results.newest("sync", tmp_path)} == {
        "sync-2026-03-01-2-cores-x.json",
        "sync-2026-02-01-nvidia-h200.json",
        "sync_y_2026-02-03.json",
    }


LEARNER_CASE = {
    "model": "qwen2.5-vl-3b",
    "frozen_vision": False,
    "image_tokens": 256,
    "group_size": 16,
}
METHOD = {
    "seconds": 0.1234,
    "speedup": 8.04,
    "predicted": 9.5,
    "peak_bytes": 3 * 2**20,
    "utilisation": 0.416,
}


def test_the_learner_table_shows_what_was_and_what_was_not_measured():
    counted = {**METHOD, "useful_utilisation": 0.352, "times_plain": 11.26}
    methods = {"shared": METHOD, "shared, all logits at once": counted}
    measured = {**LEARNER_CASE, "prompts": 8, "methods": methods}
    missing = {**LEARNER_CASE, "not_measured": "no CUDA device at hand"}
    lines = result_tables.learner({"cases": [measured, missing]})
    row = "| qwen2.5-vl-3b | trained | 256 | 16 | 8 | shared | 123 |  | 8.0 | 9.5 | 3 | 42% |"
    assert row in lines
    assert lines[lines.index(row) + 1].endswith("| 11.3 | 8.0 | 9.5 | 3 | 42%/35% |")
    assert lines[-1] == "| qwen2.5-vl-3b | trained | 256 | 16 | no CUDA device at hand |"


def test_rows_that_a_gpu_measured_are_not_called_missing(tmp_path):
    head = {"date": "2026-02-01", "command": "python x"}
    missing = {**LEARNER_CASE, "not_measured": "no CUDA device at hand"}
    cpu = {**head, "hardware": {"cores": 2, "processor": "x"}, "cases": [missing]}
    gpu = {**head, "hardware": {"gpu": "NVIDIA H200"}, "cases": []}
    (tmp_path / "learner-2026-02-01-2-cores-x.json").write_text(json.dumps(cpu))
    assert "no CUDA device at hand" in write_results.page(tmp_path)
    (tmp_path / "learner-2026-02-01-nvidia-h200.json").write_text(json.dumps(gpu))
    assert "no CUDA device at hand" not in write_results.page(tmp_path)


def test_tables_of_steps_fleet_and_sync_hold_the_numbers():
    system = {
        "captions_per_second": 151.6,
        "times_trl": 2.96,
        "seconds_by_phase": {"rollout": 0.25, "sync": 0.125},
    }
    case = {"shape": "a", "image_tokens": 16, "group_size": 8, "systems": {"rayrl, vllm": system}}
    assert result_tables.against_trl({"trl": "1.16.0", "cases": [case]})[-1] == (
        "| (a), 16 image tokens | random | 8 | rayrl, vllm | 152 | 3.0 | rollout 0.25, sync 0.12 |"
    )
    row = {
        "workers": 64,
        "max_staleness": 1,
        "captions_per_step": 4096,
        "captions_per_second": 1990.0,
        "share_of_ideal": 0.9712,
        "overhead_seconds": 0.059,
        "bare_ray_overhead_seconds": 0.032,
        "driver_cpu_seconds": 0.041,
        "bare_ray_driver_cpu_seconds": 0.023,
    }
    assert result_tables.fleet({"engine_seconds": 2.0, "rows": [row]})[-1] == (
        "| 64 | 1 | 4096 | 1990 | 97.1% | 59 | 32 | 41 | 23 |"
    )
    sync = {
        "bytes": 500_000_000,
        "workers": 8,
        "sync_seconds": 1.234,
        "pack_seconds": 0.2,
        "copies_a_worker": 1.0004,
        "over_memcpy": 1.5,
    }
    assert result_tables.sync(sync)[-1] == "| 500 | 8 | 1.23 | 0.20 | 1.00 | 1.50 |"


@pytest.mark.parametrize("part", write_results.SECTIONS, ids=lambda part: part.name)
def test_what_has_no_result_is_named_as_not_measured(part, tmp_path):
    text = "\n".join(write_results.section(part, tmp_path))
    assert f"Not measured yet: `python benchmarks/bench_{part.name.replace('-', '_')}.py`" in text


def test_tables_of_rewards_hold_the_numbers_and_the_promises():
    microseconds = {
        "pycocoevalcap": 600.0,
        "rayrl numba": 6.0,
        "largest difference to pycocoevalcap": 1e-15,
    }
    promised = {"times faster than pycocoevalcap": {"target": ">= 60", "here": 1e2, "reached": 1}}
    lines = result_tables.rewards({"cider_d_us_per_caption": microseconds})
    assert "| rayrl numba | 6.0 | 100 |" in lines
    kept = result_tables.promised({"promised": promised})
    assert kept[-1] == "| times faster than pycocoevalcap | >= 60 | 100 | yes |"
    assert result_tables.promised({}) == []
    assert not any("difference" in line for line in lines)
    step = {
        "captions_per_step": 2048,
        "seconds": {"rollout": 6.0, "reward": 0.0512},
        "rewards_percent_of_step": 0.84,
        "target_percent": 3.0,
    }
    assert result_tables.reward_step(step)[-1] == "| 2048 | 6.000 | 0.051 | 0.8 (target 3) |"


def test_the_table_of_faults_counts_by_mode_and_hides_no_failure():
    def row(fault: str, staleness: int, faults: int, failures: list[str]) -> dict:
        counts = {"faults": faults, "runs": 2, "steps": 28}
        return {"fault": fault, "max_staleness": staleness, "failures": failures, **counts}

    rows = [row("disk full", 0, 20, []), row("disk full", 1, 21, ["run 7: lost"])]
    rows.append(row("learner killed", 0, 22, []))
    lines = result_tables.fault_campaign(
        {
            "kinds": ["disk full", "learner killed", "driver killed"],
            "rows": rows,
            "failures": ["run 7: lost"],
        }
    )
    assert "| driver killed | not run | not run | 0 | 0 | 0 |" in lines
    assert "| disk full | 20 | 21 | 4 | 56 | 1 |" in lines
    assert "| learner killed | 22 | not run | 2 | 28 | 0 |" in lines
    assert lines[-1] == "- run 7: lost"
