"""A local Ray whose workers run a function of ours before anything else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nothing is left in the home directory

import ray
from record import ROOT


@contextmanager
def local_ray(
    hook: str, variables: Mapping[str, str], *, object_store_bytes: int | None = None
) -> Iterator[None]:
    """``hook`` names a function of a module beside this one, as `fleet_fakes.install`."""
    here = str(Path(__file__).parent)
    ray.init(
        address="local",
        num_cpus=max(8, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        object_store_memory=object_store_bytes,
        runtime_env={
            "worker_process_setup_hook": hook,
            "env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), here]), **variables},
        },
    )
    try:
        yield
    finally:
        ray.shutdown()
