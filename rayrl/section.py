"""The base of every configuration section: frozen, and an unknown key is an error.

And paths as they are given, in which ~ stands for the home folder: a shell replaces it where it
begins a word, and so neither in `--run_folder=~/runs` nor in YAML.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A value that can be a path of this machine; what is none stays as it is."""


def local_path(text: str) -> Path:
    """The path that an option of a command names."""
    return Path(os.path.expanduser(text))


class Section(BaseModel):
    """A part of the configuration tree.  Values are immutable; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
