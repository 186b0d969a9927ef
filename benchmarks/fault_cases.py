"""Kinds of faults for bench_fault_campaign.py: each a context in which runs are disturbed.

A case is entered with a folder of its own and gives ``once(staleness, seed)``: one run with faults
at random moments, compared with a run that nothing happened to.  Strikes, fake workers and what is
compared are those of tests/ray.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from record import ROOT

sys.path.insert(0, str(ROOT))

from rayrl.checkpoint import list_checkpoints, load_checkpoint
from rayrl.jsonl import read_jsonl
from tests.ray import fakes
from tests.ray.conftest import command_line, job_flags, speak, weights
from tests.ray.fake_run import STEPS, Done, differences, run
from tests.ray.fault_kinds import (
    ON_HEAD,
    Drivers,
    Machines,
    Saboteur,
    Strike,
    ask,
    children,
    crowd_store,
    kill,
    local_ray,
)

STORE_MB, WEIGHTS_MB, CROWD_MB = 80, 30, 60
DISK = "size=512k"
DRIVER_KILLS = 5
REAL_STEPS, REAL_KILLS = 13, 10


class Ran(NamedTuple):
    """A run with faults: how many, its steps, and what was not as it should be."""

    faults: int
    steps: int
    problems: list[str]


Once = Callable[[int, int], Ran]
Case = Callable[[Path], AbstractContextManager[Once]]


class Runs:
    """Runs on fakes in folders of their own below ``place``; undisturbed ones are kept."""

    def __init__(self, place: Path, **options: Any) -> None:
        self._place, self._options = place, options
        self._numbers = itertools.count()
        self._quiet: dict[int, Done] = {}

    def folder(self) -> Path:
        return self._place / f"run-{next(self._numbers)}"

    def run(self, folder: Path, staleness: int, **more: Any) -> Done:
        with pytest.MonkeyPatch.context() as patch:
            return run(folder, patch, staleness=staleness, **{**self._options, **more})

    def quiet(self, staleness: int) -> Done:
        if staleness not in self._quiet:
            self._quiet[staleness] = self.run(self.folder(), staleness)
        return self._quiet[staleness]


def struck(
    strike_of: Callable[[Path], Strike],
    *,
    store: dict[str, Any] | None = None,
    ballast_mb: int = 0,
    every: int = 1,
    **options: Any,
) -> Case:
    """Runs on one machine in which ``strike_of(faults folder)`` strikes in the course of every so
    many steps; ``store`` are options of its Ray, ``ballast_mb`` megabytes make weights heavy."""

    @contextmanager
    def case(place: Path) -> Iterator[Once]:
        faults = place / "faults"
        faults.mkdir()
        (faults / fakes.BALLAST_MB).write_text(str(ballast_mb))
        runs = Runs(place, **options)
        strike = strike_of(faults)

        def once(staleness: int, seed: int) -> Ran:
            quiet = runs.quiet(staleness)
            saboteur = Saboteur(strike, seed, every=every)
            done = runs.run(runs.folder(), staleness, after=saboteur)
            asked = saboteur.join()
            left = [file for file in faults.iterdir() if ".taken." not in file.name]
            left.remove(faults / fakes.BALLAST_MB)
            for file in left:  # asked for too late to be done
                file.unlink()
            return Ran(asked - len(left), len(done.rows), differences(done, quiet))

        with local_ray(faults, **(store or {})):
            yield once

    return case


@contextmanager
def lost_machines(place: Path) -> Iterator[Once]:
    """A machine goes with its workers and what lies on it, and another comes."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    faults = place / "faults"
    faults.mkdir()
    runs = Runs(place, learner=ON_HEAD, num_workers=2, cpus=1.0)
    machines = Machines(faults)

    def once(staleness: int, seed: int) -> Ran:
        quiet = runs.quiet(staleness)
        saboteur = Saboteur(machines.lose, seed)

        def after(step: int, metrics: object) -> None:
            if step % 2 == 0:
                saboteur.join()
                machines.complete()
                saboteur(step)

        done = runs.run(runs.folder(), staleness, after=after)
        lost = saboteur.join()
        machines.complete()
        return Ran(lost, len(done.rows), differences(done, quiet))

    try:
        yield once
    finally:
        machines.shutdown()


@contextmanager
def killed_drivers(place: Path) -> Iterator[Once]:
    """SIGKILL of the driver, which is started again and goes on from its last checkpoint."""
    faults = place / "faults"
    faults.mkdir()
    quiet: dict[int, Done] = {}
    numbers = itertools.count()
    with Drivers(faults) as drivers:

        def folder() -> Path:
            made = place / f"run-{next(numbers)}"
            made.mkdir()
            return made

        def once(staleness: int, seed: int) -> Ran:
            if staleness not in quiet:
                quiet[staleness] = drivers.finish(folder(), staleness)
            disturbed, chance = folder(), random.Random(seed)
            for number in range(1, DRIVER_KILLS + 1):
                drivers.kill(
                    disturbed, staleness, number * (STEPS - 2) // (DRIVER_KILLS + 1), chance
                )
            done = drivers.finish(disturbed, staleness)
            # After a resume the first batches are sampled with newer weights than otherwise.
            found = differences(done, quiet[staleness], weights=staleness == 0)
            return Ran(DRIVER_KILLS, len(done.rows), found)

        yield once


class Disk:
    """A small file system (tmpfs, for which one must be root) that can be filled."""

    def __init__(self, place: Path) -> None:
        self.place, self._filler = place, place / "filler"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", str(place)], check=True)

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as out:
            try:
                while True:
                    out.write(b"x" * 4096)
            except OSError:
                return

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)


@contextmanager
def small_disk(place: Path, **options: Any) -> Iterator[tuple[Disk, Runs]]:
    (place / "faults").mkdir()
    disk = Disk(place / "disk")
    try:
        with local_ray(place / "faults"):
            yield disk, Runs(disk.place, save_every=1, **options)
    finally:
        disk.close()


def broken_checkpoints(folder: Path) -> list[str]:
    """What of a run's checkpoints is not whole, of which there must be one at least."""
    found = []
    for step in list_checkpoints(folder):
        try:
            load_checkpoint(folder / f"step_{step}")
        except (OSError, ValueError) as error:
            found.append(f"half a checkpoint was taken for whole: {error}")
    return found if list_checkpoints(folder) else ["no checkpoint was left"]


@contextmanager
def disk_full_for_a_while(place: Path) -> Iterator[Once]:
    """The disk under checkpoints and logs is full until a write has been refused."""
    with small_disk(place, steps=3 * STEPS) as (disk, runs):
        refused: list[str] = []

        def said(text: str) -> None:
            if "No space left" in text:
                refused.append(text)

        def strike(chance: random.Random) -> bool:
            before = len(refused)
            disk.fill()
            deadline = time.monotonic() + 10
            while len(refused) == before and time.monotonic() < deadline:
                time.sleep(chance.uniform(0.0, 0.05))
            disk.free()
            return len(refused) > before

        def once(staleness: int, seed: int) -> Ran:
            quiet = runs.quiet(staleness)
            saboteur = Saboteur(strike, seed, until=3 * STEPS - 3)
            folder = runs.folder()
            done = runs.run(folder, staleness, after=saboteur, said=said)
            full = saboteur.join()
            found = differences(done, quiet) + broken_checkpoints(folder / "checkpoints")
            return Ran(full, len(done.rows), found)

        yield once


@contextmanager
def disk_full_to_the_end(place: Path) -> Iterator[Once]:
    """The disk stays full, so that the run cannot end; then there is room, and it is resumed."""
    with small_disk(place, steps=6) as (disk, runs):

        def once(staleness: int, seed: int) -> Ran:
            quiet = runs.quiet(staleness)
            # Step 1 is saved: a run that never had a checkpoint leaves none.
            folder, first = runs.folder(), random.Random(seed).randint(2, 5)
            stopped = ""

            def after(step: int, metrics: object) -> None:
                if step == first:
                    time.sleep(random.Random(seed).uniform(0.0, 0.05))
                    disk.fill()

            try:
                runs.run(folder, staleness, after=after)
            except OSError as error:
                stopped = str(error)
            disk.free()
            found = broken_checkpoints(folder / "checkpoints")
            if "make room and --resume" not in stopped:
                found.append(f"ended without its last checkpoint: {stopped or 'no error'}")
            done = runs.run(folder, staleness)
            found += differences(done, quiet, weights=staleness == 0)
            # There is room for few.
            shutil.rmtree(folder)
            return Ran(1, len(done.rows), found)

        yield once


@contextmanager
def real_engines(place: Path) -> Iterator[Once]:
    """The main job with vLLM, whose rollout worker and learner are killed in turn."""
    model = place / "model"
    model.mkdir()
    speak(model)
    quiet: dict[int, Path] = {}
    numbers = itertools.count()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}

    def start(staleness: int) -> tuple[Path, subprocess.Popen[bytes]]:
        folder = place / f"run-{next(numbers)}"
        flags = {
            **job_flags(model, folder),
            "engine.backend": "vllm",
            "train.steps": REAL_STEPS,
            "train.max_staleness": staleness,
            "train.samples_every": 1,
            "rollout.cpus": 1,
            "rollout.max_restarts": 2 * REAL_KILLS,
            "learner.cpus": 1,
        }
        command = [sys.executable, str(ROOT / "jobs/grpo_coco.py"), *command_line(flags)]
        log = (place / f"{folder.name}.log").open("wb")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        return folder, process

    def end(folder: Path, process: subprocess.Popen[bytes]) -> None:
        if process.wait(600):
            log = (place / f"{folder.name}.log").read_text(errors="replace")
            raise RuntimeError(f"the job ended with status {process.returncode}: {log[-1000:]}")

    def once(staleness: int, seed: int) -> Ran:
        if staleness not in quiet:
            folder, process = start(staleness)
            end(folder, process)
            quiet[staleness] = folder
        chance, killed = random.Random(seed), 0
        folder, process = start(staleness)
        try:
            for step in range(1, REAL_KILLS + 1):
                name = "ray::RolloutActor" if step % 2 else "ray::LearnerActor"
                killed += _kill_after(folder, process, step, name, chance)
            end(folder, process)
        finally:
            process.kill()
        return Ran(killed, REAL_STEPS, _compared(folder, quiet[staleness]))

    yield once


def _kill_after(
    folder: Path, process: subprocess.Popen[bytes], step: int, name: str, chance: random.Random
) -> int:
    """SIGKILL of the worker ``name`` at a random moment after ``step``; how many were killed."""
    while not (folder / "metrics.jsonl").is_file() or _logged(folder)[-1:] < [step]:
        if process.poll() is not None:
            return 0
        time.sleep(0.02)
    time.sleep(chance.uniform(0.0, 0.3))
    victims = children(process.pid, name)
    for victim in victims[:1]:
        os.kill(victim, signal.SIGKILL)
    return len(victims[:1])


def _logged(folder: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(folder / "metrics.jsonl")]


def _compared(folder: Path, quiet: Path) -> list[str]:
    found = []
    if _logged(folder) != list(range(REAL_STEPS + 1)):
        found.append(f"logged steps {_logged(folder)}, want 0 to {REAL_STEPS}")
    groups = [
        [(row["step"], row["prompt_id"]) for row in read_jsonl(place / "samples.jsonl")]
        for place in (folder, quiet)
    ]
    if groups[0] != groups[1]:
        found.append("trained on other groups")
    if weights(folder) != weights(quiet):
        found.append("the weights differ")
    return found


WORDS_TERM = {
    "terms": {
        "cider_d": {"kind": "cider_d"},
        "words": {
            "kind": "function",
            "path": "tests.ray.fakes:words",
            "weight": 0.1,
            "cpus": 0.1,
            "retries": 1,
        },
    }
}
APART = 3
"""Steps between faults of a term: of a batch, which is under way for two, it may fail once.  One
that fails at both attempts drops what it was to score, as it should."""

CASES: dict[str, Case] = {
    "rollout worker killed": struck(lambda faults: kill("FakeRollout")),
    "reward worker killed": struck(lambda faults: kill("RewardActor")),
    "learner killed": struck(lambda faults: kill("FakeLearner"), save_every=5),
    "driver killed, resumed": killed_drivers,
    "node with workers lost": lost_machines,
    "engine hangs": struck(
        lambda faults: ask(faults, *(f"{fakes.HANG}.{c}" for c in ("generate", "load", "score"))),
        timeout_s=3.0,
    ),
    "learner hangs": struck(
        lambda faults: ask(faults, f"{fakes.HANG}.update", f"{fakes.HANG}.weights"),
        learner={"timeout_s": 6.0},
        save_every=5,
    ),
    "reward term fails": struck(
        lambda faults: ask(faults, fakes.TERM_DIES, fakes.TERM_RAISES),
        every=APART,
        reward=WORDS_TERM,
        reward_timeout_s=120.0,
    ),
    "reward term hangs": struck(
        lambda faults: ask(faults, fakes.TERM_HANGS),
        every=APART,
        reward=WORDS_TERM,
        reward_timeout_s=30.0,
    ),
    "object store full": struck(
        lambda faults: crowd_store(CROWD_MB * 2**20),
        store={"object_store_memory": STORE_MB * 2**20, "num_cpus": 4},
        ballast_mb=WEIGHTS_MB,
        num_workers=2,
    ),
    "disk full for a while": disk_full_for_a_while,
    "disk full to the end, resumed": disk_full_to_the_end,
    "rollout worker or learner killed, vLLM": real_engines,
}
