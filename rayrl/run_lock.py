"""One driver at a time in a run folder: two would mix their steps and replace each other's
checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rayrl.resume import check_folder

NAME = ".driver"
WAIT_S = 150.0
"""A file system that machines share knows of a lost one after its lease, 90 s with NFS 4."""

_POLL_S = 1.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def sole_driver(
    run_folder: str | Path, say: Callable[[str], None], wait_s: float = WAIT_S
) -> Iterator[None]:
    """Be the only driver in ``run_folder`` while entered; the system lets go for a process that is
    killed.  Another one is waited for up to ``wait_s`` seconds, which is said.

    ValueError where ``run_folder`` cannot be a run folder, OSError where the other driver stays.
    A file system without locks (some object stores that are mounted) is taken as it is."""
    folder = Path(run_folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a+") as file:
        _wait(file, folder, say, wait_s)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            # Nothing is left of a run that was refused before it wrote anything.
            with suppress(OSError):
                if [entry.name for entry in folder.iterdir()] == [NAME]:
                    (folder / NAME).unlink()
                    folder.rmdir()


def _wait(file: IO[str], folder: Path, say: Callable[[str], None], wait_s: float) -> None:
    due, said = time.monotonic() + wait_s, False
    while not _locked(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        if time.monotonic() >= due:
            raise OSError(
                f"--run_folder {folder}: {holder} is still training there: end it, or choose "
                "another folder"
            )
        if not said:
            say(f"{holder} is training in {folder}; waiting up to {wait_s:g} s for its end")
            said = True
        time.sleep(min(_POLL_S, wait_s))


def _locked(file: IO[str]) -> bool:
    """Whether this process has the file to itself now, or nobody can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
