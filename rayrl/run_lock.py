"""One driver at a time in a run folder: two would mix their steps and replace each other's
checkpoints.

The driver holds a lock on a file there, which the system lets go for a process that ends, however
it ends.  Some servers of shared files (NFS 3) keep it for a machine that is lost.  So it also
touches the file while it lives: a lock on one that nobody touches is nobody's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rayrl.resume import check_folder

NAME = ".driver"
WAIT_S = 150.0
"""Servers with leases (NFS 4) let go after 90 s, and a file's times are known within a minute."""

_BEAT_S = 15.0
_POLL_S = 1.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def sole_driver(
    run_folder: str | Path, say: Callable[[str], None], wait_s: float = WAIT_S
) -> Iterator[None]:
    """Be the only driver in ``run_folder`` while entered.  Another one is waited for up to
    ``wait_s`` seconds, which is said.

    ValueError where ``run_folder`` cannot be a run folder, OSError where the other driver stays.
    A file system without locks (some object stores that are mounted) is taken as it is."""
    folder = Path(run_folder)
    check_folder(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    over = threading.Event()
    with _held(folder, say, wait_s):
        threading.Thread(target=_beat, args=(folder / NAME, over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            # Nothing is left of a run that was refused before it wrote anything.
            with suppress(OSError):
                if made and [entry.name for entry in folder.iterdir()] == [NAME]:
                    (folder / NAME).unlink()
                    folder.rmdir()


def _held(folder: Path, say: Callable[[str], None], wait_s: float) -> IO[str]:
    """The folder's file, locked, with who holds it in it."""
    path, due = folder / NAME, time.monotonic() + wait_s
    first: int | None = None
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        if _locked(file):
            if not _is_there(file, path):
                file.close()
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        with file:
            file.seek(0)
            holder = file.read().strip() or "another process"
            touched = os.fstat(file.fileno()).st_mtime_ns
        if first is None:
            first = touched
            say(f"{holder} is training in {folder}; waiting up to {wait_s:g} s for its end")
        if time.monotonic() >= due:
            if touched != first:
                raise OSError(
                    f"--run_folder {folder}: {holder} is still training there: end it, or choose "
                    "another folder"
                )
            say(f"{holder} is gone, though {path} is still locked for it: taking its place")
            path.unlink(missing_ok=True)  # the next one is another file, which nobody has locked
            first, due = None, time.monotonic() + wait_s
            continue
        time.sleep(min(_POLL_S, wait_s))


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(_BEAT_S):
        with suppress(OSError):
            os.utime(path)


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


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at ``path``: who held it may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
