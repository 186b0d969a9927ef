"""Which arithmetic CIDEr-D takes, and what importing it loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rayrl.rewards import cider, cider_numba, cider_numpy


def test_importing_cider_and_ptb_needs_numpy_alone() -> None:
    code = (
        "import sys, rayrl.rewards.cider, rayrl.rewards.ptb; "
        "print(*sys.modules.keys() & {'numba', 'torch', 'ray', 'pydantic', 'pycocoevalcap'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_without_numba_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cider, "find_spec", lambda name: None)
    assert cider._components.__wrapped__() is cider_numpy.components
    monkeypatch.undo()
    assert cider._components.__wrapped__() is cider_numba.components


def test_where_numba_may_write_nowhere_the_kernel_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, bool]] = []

    def njit(**options: bool) -> object:
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function '_kernel': no locator available")
        return lambda function: function

    monkeypatch.setattr(cider_numba.numba, "njit", njit)
    assert cider_numba._compiled.__wrapped__() is cider_numba._kernel
    assert asked == [{"cache": True, "nogil": True}, {"nogil": True}]
