"""What every benchmark writes down beside its numbers: the command, the date, the machine, the
versions.  One JSON file a run, in benchmarks/results, with the hardware in its name."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory; and the GPU where torch was imported and sees one."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory_gib"] = round(memory / 2**30)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed, Python's, and rayrl's commit."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    if commit.returncode == 0:
        found["rayrl commit"] = commit.stdout.strip()
    return found


def file_name(name: str, day: str, machine: Mapping[str, Any]) -> str:
    """`learner-2026-11-21-nvidia-h200.json`; without a GPU the cores and the processor."""
    where = machine.get("gpu") or f"{machine['cores']} cores {machine['processor']}"
    return f"{name}-{day}-{re.sub(r'[^a-z0-9]+', '-', where.lower()).strip('-')}.json"


def write(
    name: str,
    argv: Sequence[str],
    result: Mapping[str, Any],
    *,
    packages: Sequence[str],
    folder: Path = RESULTS,
) -> Path:
    """Write ``result`` of ``benchmarks/bench_<name>.py argv`` and say where."""
    machine, day = hardware(), date.today().isoformat()
    script = f"benchmarks/bench_{name.replace('-', '_')}.py"
    record = {
        "benchmark": name,
        "command": " ".join(["python", script, *argv]),
        "date": day,
        "hardware": machine,
        "versions": versions(packages),
        **result,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name(name, day, machine)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {file}")
    return file
