"""Facts of this machine, and imports in processes of their own, where a crash is just a fact."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

TORCH = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "gpus": names}))
"""
VLLM = """
import json, vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
import torch
cpu = current_platform.is_cpu()
print(json.dumps({
    "version": vllm.__version__,
    "device": current_platform.device_type,
    "kernels": not cpu or hasattr(torch.ops._C, "cpu_attention_with_kv_cache"),
}))
"""
TORCHVISION = """
import json, torchvision
print(json.dumps({"version": torchvision.__version__}))
"""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What an interpreter of its own printed: an object, or how it failed."""

    value: Mapping[str, Any]
    error: str = ""


def run_probe(code: str, timeout_s: float = 120.0) -> Probe:
    """Run Python code that prints a JSON object as its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
    except subprocess.TimeoutExpired:
        return Probe(value={}, error=f"not imported within {timeout_s:g} s")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return Probe(value={}, error=f"the import ended with {name}")
    if done.returncode > 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Probe(value={}, error=f"the import failed: {last}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return Probe(value=json.loads(last))
    except ValueError:
        return Probe(value={}, error=f"the import printed {last!r}")


def installed_packages() -> dict[str, str]:
    """Version by normalized name."""
    return {canonicalize_name(one.name): one.version for one in metadata.distributions()}


def compiled(package: str) -> bool:
    """Whether the bytecode of a package's own module lies beside it; does not import it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    return Path(importlib.util.cache_from_source(spec.origin)).is_file()


def required_packages() -> list[str]:
    """What rayrl asks for; empty when it runs from a clone without being installed."""
    try:
        return metadata.requires("rayrl") or []
    except metadata.PackageNotFoundError:
        return []


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets, where the system lists them."""
    if not cpuinfo.is_file():
        return set()
    lines = cpuinfo.read_text().splitlines()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that processes can still take: what the system has, and what a container allows."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():  # not Linux: all of the machine's memory, for want of better
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(rows["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit_file, used_file = (root / "sys/fs/cgroup" / name for name in (limit, used))
        if limit_file.is_file() and limit_file.read_text().strip() != "max":
            left = int(limit_file.read_text()) - int(used_file.read_text())
            available = min(available, max(left, 0))
    return available


def gpu_in_machine() -> bool:
    """Whether an NVIDIA device is there, seen by PyTorch or not."""
    return Path("/dev/nvidia0").exists()


def java_version() -> str:
    """The first line of `java -version`, or nothing."""
    java = shutil.which("java")
    if java is None:
        return ""
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    return (done.stderr.splitlines() or [""])[0] if done.returncode == 0 else ""


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that exists."""
    path = path.expanduser().resolve()
    return path if path.exists() else nearest_existing(path.parent)
