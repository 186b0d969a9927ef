"""Benchmarks that need Ray, in little: they run, and what they count is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, out: Path) -> dict:
    """The JSON that `bench_<name>.py --small` writes."""
    script = ROOT / "benchmarks" / f"bench_{name}.py"
    command = [sys.executable, str(script), "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = out.glob(f"{name}-*.json")
    return json.loads(file.read_text())


@pytest.mark.ray
def test_every_worker_reads_weights_in_shared_memory_and_copies_them_once(tmp_path):
    result = run("sync", tmp_path)
    assert (result["workers"], len(result["rounds"])) == (2, 3)
    assert result["bytes"] == pytest.approx(20e6, rel=0.01)
    assert result["shared_fraction"] == 1.0
    # A second copy would make it 2.
    assert 1.0 <= result["copies_a_worker"] < 1.5


def test_pieces_of_the_fault_campaign_add_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_fault_campaign as campaign

    def row(fault: str, staleness: int, faults: int) -> dict:
        return {"fault": fault, "max_staleness": staleness, "faults": faults}

    first, second, *_ = campaign.CASES
    assert campaign.merged([row(second, 1, 3)], tmp_path) == [row(second, 1, 3)]
    for day, rows in (
        ("2026-02-02", [row(first, 0, 1), row(second, 1, 3)]),
        ("2026-02-01", [row(first, 0, 7)]),
    ):
        file = tmp_path / campaign.file_name(campaign.NAME, day, campaign.hardware())
        file.write_text(json.dumps({"rows": rows}))
    again = campaign.merged([row(second, 1, 9), row(second, 0, 8)], tmp_path)
    assert again == [row(first, 0, 1), row(second, 0, 8), row(second, 1, 9)]
    assert list(campaign.chosen(["disk full"])) == [
        "disk full for a while",
        "disk full to the end, resumed",
    ]
    with pytest.raises(SystemExit, match="no such kind; there are rollout worker killed"):
        campaign.chosen(["meteorite"])
