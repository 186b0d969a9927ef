"""A module of the user's own reaches the workers of a local Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ray

SCRIPT = """
import os, sys
import ray
from rayrl.actors.cluster import connect, worker_environment
from rayrl.own_modules import find_here

find_here()
connect(1.0)

@ray.remote(num_cpus=1, runtime_env=worker_environment(1.0, 0.0))
def found():
    import from_here, from_path, rayrl
    return [from_here.__file__, from_path.__file__, rayrl.__file__]

print(*ray.get(found.remote()), sep="\\n")
"""


def test_workers_find_modules_in_the_current_folder_and_on_pythonpath(tmp_path, environment):
    for folder, name in (("here", "from_here"), ("there", "from_path")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").touch()
    script = tmp_path / "scripts" / "job.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    # Relative, as one types it.
    paths = os.pathsep.join(["../there", environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path / "here",
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    want = [tmp_path / "here/from_here.py", tmp_path / "there/from_path.py"]
    assert done.stdout.split() == [*map(str, want), str(ROOT / "rayrl/__init__.py")]
