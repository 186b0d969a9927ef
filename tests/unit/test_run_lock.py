"""One driver at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from rayrl import run_lock
from rayrl.run_lock import sole_driver

HOLD = """
import sys
from rayrl import run_lock
from rayrl.run_lock import sole_driver
run_lock._BEAT_S = 0.01
with sole_driver(sys.argv[1], print):
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another driver, in ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_a_second_driver_is_refused_and_the_first_one_named(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    said: list[str] = []
    with (
        pytest.raises(OSError, match=rf"{tmp_path}: process {other.pid} on .* still training"),
        sole_driver(tmp_path, said.append, wait_s=2.0),
    ):
        pytest.fail("two drivers in one folder")
    assert len(said) == 1 and f"process {other.pid} on" in said[0]


def test_a_driver_that_was_killed_holds_nothing(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    other.kill()
    other.wait()
    said: list[str] = []
    with sole_driver(tmp_path, said.append):
        assert (tmp_path / run_lock.NAME).read_text().startswith(f"process {os.getpid()} on ")
    assert not said


def test_one_that_ends_is_waited_for(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_POLL_S", 0.01)
    assert other.stdin is not None
    # Once it is known that somebody waits.
    waits = threading.Event()
    ends = threading.Thread(target=lambda: waits.wait() and other.stdin.close())
    ends.start()
    with sole_driver(tmp_path, lambda _: waits.set()):
        assert other.wait() == 0
    ends.join()


def test_a_lock_that_is_kept_for_a_lost_machine_is_taken_over(tmp_path: Path) -> None:
    """As by a server of files that was never told: nobody touches the file any more."""
    said: list[str] = []
    with (tmp_path / run_lock.NAME).open("w") as kept:
        kept.write("process 7 on lost")
        kept.flush()
        fcntl.flock(kept, fcntl.LOCK_EX)
        with sole_driver(tmp_path, said.append, wait_s=0.1):
            assert (tmp_path / run_lock.NAME).read_text().startswith(f"process {os.getpid()} on ")
            fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)  # still
    assert said[0].startswith(f"process 7 on lost is training in {tmp_path}; waiting up to 0.1 s")
    assert said[1].startswith("process 7 on lost is gone, though ")


def test_who_waited_for_a_file_that_is_gone_takes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before it was refused, and removed what it had made."""
    path, locked = tmp_path / run_lock.NAME, run_lock._locked
    removed: list[bool] = []

    def lock(file: IO[str]) -> bool:
        if not removed:
            path.unlink()
            removed.append(True)
        return locked(file)

    monkeypatch.setattr(run_lock, "_locked", lock)
    with sole_driver(tmp_path, print), path.open() as there, pytest.raises(BlockingIOError):
        fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_that_is_refused_leaves_no_folder_but_one_that_was_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), sole_driver(tmp_path, print):
        raise ValueError("refused")
    assert tmp_path.is_dir()
    with (
        pytest.raises(ValueError, match="refused"),
        sole_driver(tmp_path / "run", print),
    ):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()
    with sole_driver(tmp_path / "run", print):
        (tmp_path / "run" / "config.yaml").touch()
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_taken_as_it_is(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_driver(tmp_path, print):
        entered = True
    assert entered


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="is a file"),
        sole_driver(tmp_path / "file" / "run", print),
    ):
        pytest.fail("a run in a file")
