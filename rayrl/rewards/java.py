"""Programs in Java that the metrics need: whether they are there, and how to talk to them."""

from __future__ import annotations

import functools
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
import weakref
from importlib.util import find_spec
from pathlib import Path


class MetricUnavailable(RuntimeError):
    """A metric that this machine cannot compute, and what it would need, in one line."""


def find_java() -> str:
    """The ``java`` program; MetricUnavailable where there is none that runs."""
    java = shutil.which("java")
    if java is None:
        raise MetricUnavailable("no java on the PATH; install a Java runtime, 8 to 17")
    java_version(java)
    return java


@functools.cache
def java_version(java: str) -> int:
    """8, 11, 17, ... from what ``java -version`` says ("1.8.0_392", "17.0.15"); MetricUnavailable
    where it does not run, like the one that macOS has where no Java is installed."""
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MetricUnavailable(f"{java} does not run: {error}") from error
    if run.returncode:
        said = " ".join((run.stderr + run.stdout).split())
        raise MetricUnavailable(f"{java} does not run, status {run.returncode}: {said:.300}")
    numbers = re.search(r'"(?:1\.)?(\d+)', run.stderr)
    if numbers is None:
        raise MetricUnavailable(f"cannot read the version of Java from {run.stderr!r:.300}")
    return int(numbers[1])


def find_pycocoevalcap(*parts: str) -> Path:
    """A file of the installed pycocoevalcap; MetricUnavailable where it is missing."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MetricUnavailable("pycocoevalcap is not installed; its jars are needed")
    path = Path(spec.submodule_search_locations[0], *parts)
    if not path.is_file():
        raise MetricUnavailable(f"pycocoevalcap has no {'/'.join(parts)}; install it again")
    return path


class JavaProcess:
    """A long-lived program that answers lines with lines, in its own temporary folder, so that
    nothing is written where it is installed and many can run at once."""

    def __init__(self, command: list[str], timeout_s: float) -> None:
        folder = tempfile.TemporaryDirectory(prefix="rayrl-java-")
        self.folder = Path(folder.name)
        self._errors = self.folder / "stderr"
        self._timeout_s = timeout_s
        self._unread = b""
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        # Nobody may be left to close it.
        self._end = weakref.finalize(self, _end, self._process, folder)

    def ask(self, line: str, num_answers: int = 1) -> list[str]:
        """Send a line; the lines of the answer.

        TimeoutError when they do not come in time, ChildProcessError when the program has died,
        with what it said last.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        deadline = time.monotonic() + self._timeout_s
        return [self._read_line(deadline) for _ in range(num_answers)]

    def close(self) -> None:
        """End the program and remove its folder."""
        self._end()

    def _read_line(self, deadline: float) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no answer from Java within {self._timeout_s:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._died()
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()

    def _died(self) -> ChildProcessError:
        status = self._process.wait()
        said = self._errors.read_text(errors="replace").strip().splitlines()[-3:]
        return ChildProcessError(f"Java ended with status {status}: {' / '.join(said)}")


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.communicate()
    folder.cleanup()
