"""Where rewards and objectives of the user's own lie: modules named as `module:function`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

WHERE = (
    "want it in the folder that the job is started from, or on PYTHONPATH; with ray job submit, in "
    "its --working-dir"
)
"""What a message says of a module that is not found."""


def find_here() -> None:
    """Find modules in the current folder, as workers do: Python looks beside the script alone.
    Last, so that nothing there takes the place of what is installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def import_path() -> str:
    """PYTHONPATH of workers on this machine: rayrl first, also where it is run from a clone without
    being installed, then what this process was given.  Ray itself adds the current folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [Path(__file__).resolve().parents[1], *(Path(one).absolute() for one in given if one)]
    return os.pathsep.join(dict.fromkeys(str(folder) for folder in folders))
