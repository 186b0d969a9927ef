"""Where rewards, metrics and objectives of the user's own lie: functions named as
`package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHERE = (
    "want it in the folder that the job is started from, or on PYTHONPATH; with ray job submit, in "
    "its --working-dir"
)
"""What a message says of a module that is not found."""

_NOTHING = object()


class NotHereError(ValueError):
    """What is named as `module:name` is not to be had here, where the module is missing, broken or
    another one: on another machine, or in another folder, it may be."""


def load(path: str, wanted: str) -> Any:
    """What lies at `module:name`.  NotHereError, which begins with what it is ``wanted`` for, where
    there is no such module or it has nothing of the name."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, _NOTHING)
    except ModuleNotFoundError as error:
        raise NotHereError(f"{wanted}: no module {error.name!r}; {WHERE}") from None
    # TypeError: a path that begins with a dot.
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise NotHereError(f"{wanted}: cannot import {module!r}: {error}") from None
    if found is _NOTHING:
        raise NotHereError(f"{wanted}: module {module!r} has no {name!r}")
    return found


def find_here() -> None:
    """Find modules in the current folder, as workers do: Python looks beside the script alone.
    Last, so that nothing there takes the place of what is installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def imported(path: str) -> Callable[..., Any]:
    """The function at `package.module:function`; ValueError says which part is wrong."""
    if not all(path.partition(":")):
        raise ValueError(f"function {path!r}, want package.module:function")
    function = load(path, f"function {path!r}")
    if not callable(function):
        raise ValueError(f"function {path!r}: it is a {type(function).__name__}, want a function")
    return function  # type: ignore[no-any-return]


def import_path() -> str:
    """PYTHONPATH of workers on this machine: rayrl first, also where it is run from a clone without
    being installed, then what this process was given.  Ray itself adds the current folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [Path(__file__).resolve().parents[1], *(Path(one).absolute() for one in given if one)]
    return os.pathsep.join(dict.fromkeys(str(folder) for folder in folders))
