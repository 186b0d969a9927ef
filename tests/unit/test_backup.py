"""A run folder that is lost comes back from remote storage as it was at its last checkpoint."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from rayrl import backup, cli
from rayrl.backup import Backup, fetch_newest, remote_steps
from rayrl.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from rayrl.config import Config
from rayrl.remote import RemoteCopies, open_copies
from rayrl.resume import changes, goes_on, open_run_folder

DATA = "fingerprint"


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        model_files={"config.json": np.frombuffer(b"{}", np.uint8)},
        arrays={"optimizer/w/exp_avg": np.full((2, 3), step, np.float32)},
        meta={"weight_version": step, "data": DATA},
    )


def nothing(folder: Path) -> None:
    """No check of what was fetched."""


class Machine:
    """A run folder with ``steps`` done, as the driver leaves and copies it; without an ``own_id``
    as an earlier version did."""

    def __init__(
        self, folder: Path, copies: RemoteCopies | None, *, keep: int = 2, own_id: str = ""
    ) -> None:
        self.folder, self.said, self.scores = folder, [], {}
        (folder / "stage1/final").mkdir(parents=True, exist_ok=True)
        (folder / "stage1/stage1.json").write_text("{}")
        (folder / "stage1/final/model.safetensors").write_bytes(b"stage1")
        (folder / "config.yaml").write_text(cli.dump(Config()))
        if own_id:
            (folder / "run.json").write_text(json.dumps({"id": own_id}))
        self.backup = Backup(copies, folder, keep=keep, say=self.said.append)

    def save(self, step: int, *, keep: int = 1, score: float | None = None) -> None:
        row = {"step": step} if score is None else {"step": step, "eval/cider_d": score}
        with (self.folder / "metrics.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
        if score is not None:
            self.scores[step] = score
        self.backup.wait(60)
        self.save_now(step, keep=keep)

    def save_now(self, step: int, *, keep: int = 1, last: bool = False) -> None:
        """Whether or not the copy before is made."""
        place = self.folder / "checkpoints"
        spare = self.backup.copying()
        save_checkpoint(place, checkpoint(step), keep=keep, spare=spare, scores=self.scores)
        self.backup.checkpoint(step, last=last, scores=self.scores)


@pytest.fixture
def copies(tmp_path):
    return open_copies(f"file://{tmp_path}/remote")


def test_a_lost_run_folder_comes_back_with_its_history_and_stage_1(tmp_path, copies):
    machine = Machine(tmp_path / "lost", copies)
    machine.backup.base(resumed=False)
    for step in (2, 4, 6):
        machine.save(step)
    machine.backup.close()
    machine.backup.close()
    assert remote_steps(copies) == [4, 6], "keep 2 there, though only 1 stays here"
    shutil.rmtree(tmp_path / "lost")
    fresh = tmp_path / "fresh"
    assert fetch_newest(copies, fresh, check=nothing, say=machine.said.append) == 6
    loaded = load_checkpoint(fresh / "checkpoints/latest")
    assert loaded.step == 6 and loaded.arrays["optimizer/w/exp_avg"].tolist() == [[6] * 3] * 2
    assert set(loaded.model_files) == {"config.json"}
    lines = [json.loads(line)["step"] for line in (fresh / "metrics.jsonl").open()]
    assert lines == [2, 4, 6]
    assert (fresh / "stage1/final/model.safetensors").read_bytes() == b"stage1"
    assert machine.said == []
    assert not list(fresh.glob(".*partial"))


def best(folder: Path, tmp_path: Path, **train: object) -> tuple[list[int], list[str]]:
    """The steps that a fresh machine has after it resumes, and what it says of them."""
    said: list[str] = []
    open_run_folder(folder, with_uri(tmp_path, **train), DATA, resume=True, say=said.append)
    return list_checkpoints(folder / "checkpoints"), said


def test_the_best_copy_stays_there_and_comes_back_with_the_newest(tmp_path, copies):
    machine = Machine(tmp_path / "lost", copies)
    for step, score in [(2, 50.0), (4, 70.0), (6, 60.0), (8, 55.0)]:
        machine.save(step, score=score)
    machine.backup.close()
    assert remote_steps(copies) == [4, 6, 8], "keep 2, and the best"
    steps, said = best(tmp_path / "fresh", tmp_path)
    assert steps == [4, 8] and said[0].startswith("fetched step 8")
    assert load_checkpoint(tmp_path / "fresh/checkpoints/latest").step == 8
    # Its history is that of the newest, not the one that came with the best.
    rows = [json.loads(line)["step"] for line in (tmp_path / "fresh/metrics.jsonl").open()]
    assert rows == [2, 4, 6, 8]
    # A run that keeps no best one does not fetch it either; nor does one that has it.
    assert best(tmp_path / "other", tmp_path, keep_best=False)[0] == [8]
    before = (tmp_path / "fresh/checkpoints/step_4/config.json").stat().st_ino
    assert best(tmp_path / "fresh", tmp_path)[0] == [4, 8]
    assert (tmp_path / "fresh/checkpoints/step_4/config.json").stat().st_ino == before


def test_a_best_copy_that_there_was_no_time_for_is_made_later(tmp_path, copies):
    slow = Slow(copies)
    machine = Machine(tmp_path / "run", slow)
    machine.scores = {2: 50.0, 4: 70.0, 6: 60.0}
    for step in (2, 4):
        machine.save_now(step)
    assert machine.said == ["no remote copy of step_4: that of step_2 is still being made"]
    slow.may.set()
    machine.backup.wait(60)
    for step in (6, 8, 10):
        machine.save_now(step)
        machine.backup.wait(60)
    assert list_checkpoints(tmp_path / "run/checkpoints") == [4, 10]
    assert remote_steps(copies) == [4, 8, 10]
    machine.backup.close()


def test_a_damaged_best_copy_is_said_and_does_without(tmp_path, copies):
    machine = Machine(tmp_path / "lost", copies)
    for step, score in [(2, 70.0), (4, 50.0)]:
        machine.save(step, score=score)
    machine.backup.close()
    (tmp_path / "remote/step_2/checkpoints/step_2/config.json").write_text("[]")
    steps, said = best(tmp_path / "fresh", tmp_path)
    assert steps == [4]
    assert any("remote copy of step 2 is damaged and passed over" in line for line in said)


def test_a_damaged_newest_copy_is_said_and_the_one_before_is_taken(tmp_path, copies):
    machine = Machine(tmp_path / "lost", copies)
    machine.save(2)
    machine.save(4)
    machine.backup.close()
    (tmp_path / "remote/step_4/checkpoints/step_4/trainer/meta.json").write_text("{}")
    fresh = tmp_path / "fresh"
    assert fetch_newest(copies, fresh, check=nothing, say=machine.said.append) == 2
    assert list_checkpoints(fresh / "checkpoints") == [2]
    assert len(machine.said) == 1
    assert "step 4 is damaged and passed over: step_4/checkpoints/step_4" in machine.said[0]


def test_a_copy_without_a_checkpoint_in_it_is_passed_over(tmp_path, copies):
    machine = Machine(tmp_path / "lost", copies)
    machine.save(2)
    machine.backup.close()
    copies.put("step_4", tmp_path / "lost", ["metrics.jsonl"])
    assert fetch_newest(copies, tmp_path / "fresh", check=nothing, say=machine.said.append) == 2
    assert "it holds no file of checkpoints/step_4/" in machine.said[0]


def test_what_a_killed_driver_left_of_a_copy_goes_with_the_next_one(tmp_path, copies):
    machine = Machine(tmp_path / "run", copies)
    remote = tmp_path / "remote"
    for name in ("step_3", "step_9", "of_others", "report"):
        (remote / name / "checkpoints").mkdir(parents=True)
        (remote / name / "checkpoints/half").write_text("")
    (remote / "step_5").mkdir()
    # Kept here by hand, as no copy is.
    (remote / "step_7/trainer").mkdir(parents=True)
    # Whole by its manifest's being there, whatever it holds.
    (remote / "step_1").mkdir()
    (remote / "step_1/manifest.json").write_text("{")
    machine.save(6)
    machine.backup.close()
    assert machine.said == []
    assert {place.name for place in remote.iterdir()} == {
        *("run", "step_1", "step_6", "step_7", "of_others", "report")
    }


class Unreachable(RemoteCopies):
    def put(self, name, folder, files):
        raise OSError(f"no route to {name}")


def test_a_failed_copy_costs_that_copy_and_says_so(tmp_path, copies):
    machine = Machine(tmp_path / "run", Unreachable(copies._filesystem, copies._root))
    machine.save(2)
    machine.save(4)
    assert machine.said == ["the remote copy of step_2 failed: no route to run; going on"]
    machine.backup.close()
    assert len(machine.said) == 2 and "step_4" in machine.said[1]
    assert list_checkpoints(tmp_path / "run/checkpoints") == [4]


class Interrupted(RemoteCopies):
    """Storage that refuses the first copy."""

    refused = False

    def put(self, name, folder, files):
        if not self.refused:
            self.refused = True
            raise OSError("storage went away")
        super().put(name, folder, files)


@pytest.mark.parametrize("earlier", [False, True])
def test_what_the_run_started_from_is_copied_with_the_next_step_where_it_failed(
    tmp_path, copies, earlier
):
    if earlier:
        # Of an attempt that left no checkpoint: it stays until this run's own is made.
        attempt = Machine(tmp_path / "attempt", copies)
        (tmp_path / "attempt/stage1/final/model.safetensors").write_bytes(b"other")
        attempt.backup.base(resumed=False)
        attempt.backup.close()
    machine = Machine(tmp_path / "lost", Interrupted(copies._filesystem, copies._root))
    machine.backup.base(resumed=False)
    machine.save(2)
    machine.backup.close()
    assert machine.said == ["the remote copy of run failed: storage went away; going on"]
    assert copies.names() == ["run", "step_2"]
    open_run_folder(tmp_path / "fresh", with_uri(tmp_path), DATA, resume=True, say=print)
    assert (tmp_path / "fresh/stage1/final/model.safetensors").read_bytes() == b"stage1"


def test_a_checkpoint_has_no_copy_where_what_it_started_from_has_none(tmp_path, copies):
    class WithoutBase(RemoteCopies):
        def put(self, name, folder, files):
            if name == "run":
                raise OSError("too large")
            super().put(name, folder, files)

    machine = Machine(tmp_path / "run", WithoutBase(copies._filesystem, copies._root))
    machine.backup.base(resumed=False)
    machine.save(2)
    machine.backup.close()
    assert copies.names() == []
    assert machine.said[-1] == "the remote copy of step_2 failed: too large; going on"


def test_a_run_does_not_go_on_elsewhere_without_what_it_started_from(tmp_path, copies):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("one", "one"))
    copies.remove("run")
    with pytest.raises(ValueError, match=r"no remote copy run/ of what .*fresh holds no stage1/f"):
        open_run_folder(tmp_path / "fresh", with_uri(tmp_path), DATA, resume=True, say=print)
    assert content(tmp_path / "fresh") == {}
    # Where it is, it does, and where it is put.
    for name in ("run.json", "stage1"):
        (shutil.copytree if name == "stage1" else shutil.copy)(
            run / name, tmp_path / "fresh" / name
        )
    open_run_folder(tmp_path / "fresh", with_uri(tmp_path), DATA, resume=True, say=print)
    assert list_checkpoints(tmp_path / "fresh/checkpoints") == [4]
    open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=print)
    assert list_checkpoints(run / "checkpoints") == [2, 4]


@pytest.mark.parametrize("file", ["stage1/final/model.safetensors", "config.yaml"])
def test_where_what_the_run_started_from_is_damaged_no_step_is_blamed(tmp_path, copies, file):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("one", "one"))
    damaged = tmp_path / "remote/run" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said: list[str] = []
    config = with_uri(tmp_path)
    with pytest.raises(ValueError, match=rf"remote copy run/ .* is damaged \(run/{file}: got"):
        open_run_folder(tmp_path / "fresh", config, DATA, resume=True, say=said.append)
    assert said == [] and content(tmp_path / "fresh") == {}
    # A folder that has it itself goes on.
    open_run_folder(run, config, DATA, resume=True, say=said.append)
    assert list_checkpoints(run / "checkpoints") == [2, 4]
    assert [line for line in said if "damaged" in line] == [
        line for line in said if line.startswith("the remote copy run/ of what the run started")
    ]
    assert any("damaged" in line for line in said) == (file == "config.yaml")


class Slow(RemoteCopies):
    """Copies wait until ``may`` is set."""

    def __init__(self, copies: RemoteCopies) -> None:
        super().__init__(copies._filesystem, copies._root)
        self.may = threading.Event()

    def put(self, name, folder, files):
        # What there was at the start must be there when its turn comes.
        files = list(files)
        self.may.wait(60)
        super().put(name, folder, files)


def test_training_does_not_wait_for_a_slow_place_and_what_is_copied_stays_there(tmp_path, copies):
    slow = Slow(copies)
    machine = Machine(tmp_path / "run", slow)
    for step in (2, 4, 6):
        machine.save_now(step)
    assert machine.said == [
        "no remote copy of step_4: that of step_2 is still being made",
        "no remote copy of step_6: that of step_2 is still being made",
    ]
    assert list_checkpoints(tmp_path / "run/checkpoints") == [2, 6], "keep 1, and the one in use"
    # The last waits for its turn.
    machine.save_now(8, last=True)
    machine.backup.report()
    assert not machine.backup.wait(0.01)
    slow.may.set()
    assert machine.backup.wait(60)
    assert remote_steps(copies) == [2, 8] and "report" in copies.names()
    machine.save_now(10)
    assert list_checkpoints(tmp_path / "run/checkpoints") == [10]
    machine.backup.close()
    assert len(machine.said) == 2


def test_the_end_of_a_run_waits_for_a_slow_place_no_longer_than_it_may(
    tmp_path, copies, monkeypatch
):
    monkeypatch.setattr(backup, "_SAY_AFTER_S", 0.01)
    monkeypatch.setattr(backup, "CLOSE_S", 0.05)
    machine = Machine(tmp_path / "run", Slow(copies))
    machine.save_now(2)
    machine.backup.report()
    machine.backup.close()
    assert machine.said == [
        "waiting up to 0 s for the remote copy of step_2, report",
        "gave up the remote copy of step_2, report",
    ]
    machine.backup.close()
    assert len(machine.said) == 2


def test_without_a_remote_place_nothing_is_copied(tmp_path):
    machine = Machine(tmp_path / "run", None)
    machine.backup.base(resumed=False)
    machine.save(2)
    machine.backup.report()
    machine.backup.close()
    assert machine.said == [] and sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_what_a_resumed_run_started_from_is_not_copied_again(tmp_path, copies):
    machine = Machine(tmp_path / "run", copies)
    machine.backup.base(resumed=False)
    machine.backup.wait(60)
    (tmp_path / "run/stage1/final/model.safetensors").write_bytes(b"other")
    machine.backup.base(resumed=True)
    machine.backup.close()
    copy = tmp_path / "remote/run/stage1/final/model.safetensors"
    assert copy.read_bytes() == b"stage1"


def test_what_another_attempt_started_from_is_not_taken_for_the_runs_own(tmp_path, copies):
    attempt = Machine(tmp_path / "attempt", copies, own_id="attempt")
    attempt.backup.base(resumed=False)
    attempt.backup.close()
    Machine(tmp_path / "run", None, own_id="run").save(2)
    open_run_folder(tmp_path / "run", with_uri(tmp_path), DATA, resume=True, say=print)
    machine = Machine(tmp_path / "run", copies)
    machine.backup.base(resumed=True)
    machine.backup.close()
    assert json.loads((tmp_path / "remote/run/run.json").read_text()) == {"id": "run"}


def with_uri(tmp_path, **train) -> Config:
    return Config.model_validate(
        {
            "train": {"checkpoint_uri": f"file://{tmp_path}/remote", **train},
            "xe": {"control": False},
        }
    )


def test_a_fresh_machine_resumes_from_the_remote_place(tmp_path, copies):
    machine = Machine(tmp_path / "lost", copies)
    machine.backup.base(resumed=False)
    machine.save(6)
    machine.backup.close()
    said: list[str] = []
    config = with_uri(tmp_path, steps=120)
    open_run_folder(tmp_path / "fresh", config, DATA, resume=True, say=said.append)
    assert list_checkpoints(tmp_path / "fresh/checkpoints") == [6]
    assert said[0] == f"fetched step 6 from file://{tmp_path}/remote"
    assert "resuming with another train.steps: 120, was 90" in said
    assert "resuming with another xe.control: False, was True" in said
    assert yaml.safe_load((tmp_path / "fresh/config.yaml").read_text())["train"]["steps"] == 120


def test_a_command_that_is_tried_again_starts_the_run_once_and_then_continues_it(tmp_path, copies):
    first = with_uri(tmp_path, steps=120).model_copy(update={"run_folder": str(tmp_path / "run")})
    assert not goes_on(first, "auto") and goes_on(first, "always")
    open_run_folder(tmp_path / "run", first, DATA, resume=goes_on(first, "auto"), say=print)
    machine = Machine(tmp_path / "run", copies)
    machine.backup.base(resumed=False)
    # What the first attempt began to copy is no checkpoint.
    machine.backup.wait(60)
    (tmp_path / "remote/step_3").mkdir()
    assert not goes_on(first, "auto")
    machine.save(6)
    machine.backup.close()
    assert goes_on(first, "auto") and not goes_on(first, "never")
    alone = first.model_copy(update={"train": Config().train})
    assert goes_on(alone, "auto")
    # On another machine only the remote place has something.
    elsewhere = first.model_copy(update={"run_folder": str(tmp_path / "fresh")})
    resume = goes_on(elsewhere, "auto")
    open_run_folder(tmp_path / "fresh", elsewhere, DATA, resume=resume, say=print)
    assert load_checkpoint(tmp_path / "fresh/checkpoints/latest").step == 6


def test_a_place_that_takes_nothing_is_said_before_the_run_begins(tmp_path):
    (tmp_path / "remote").write_text("not a folder")
    config = with_uri(tmp_path, checkpoint_uri=f"file://{tmp_path}/remote/run")
    with pytest.raises(OSError, match=r"--train\.checkpoint_uri file://.*nothing can be written"):
        open_run_folder(tmp_path / "run", config, DATA, resume=False, say=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("here", "there", "wanted"), [(4, 2, 4), (2, 4, 4), (4, 4, 4)])
def test_the_later_checkpoint_wins(tmp_path, copies, here, there, wanted):
    remote = Machine(tmp_path / "other", copies)
    remote.save(there)
    remote.backup.close()
    local = Machine(tmp_path / "run", None)
    local.save(here)
    said: list[str] = []
    open_run_folder(tmp_path / "run", with_uri(tmp_path), DATA, resume=True, say=said.append)
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1] == wanted
    assert load_checkpoint(tmp_path / "run/checkpoints/latest").step == wanted
    assert any(line.startswith("fetched") for line in said) == (there > here)


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def two_runs(tmp_path, copies, *, here: int, there: int, ids: tuple[str, str]) -> Path:
    """The folder of a run, and at its remote place copies of what may be another."""
    remote = Machine(tmp_path / "other", copies, own_id=ids[1])
    remote.backup.base(resumed=False)
    remote.save(there)
    remote.backup.close()
    Machine(tmp_path / "run", None, own_id=ids[0]).save(here)
    return tmp_path / "run"


@pytest.mark.parametrize(("here", "there"), [(2, 4), (4, 2), (4, 4)])
def test_copies_of_another_run_are_refused_before_anything_is_written(
    tmp_path, copies, here, there
):
    run = two_runs(tmp_path, copies, here=here, there=there, ids=("one", "two"))
    before, remote = content(run), content(tmp_path / "remote")
    with pytest.raises(
        ValueError, match=r"remote holds copies of another run .*run \(two, not one\).*own --train"
    ):
        open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=print)
    assert content(run) == before and content(tmp_path / "remote") == remote


def test_copies_of_an_older_version_are_none_of_a_run_that_has_an_id(tmp_path, copies):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("one", ""))
    before = content(run)
    with pytest.raises(ValueError, match=r"another run .*\(one of an older version, not one\)"):
        open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=print)
    assert content(run) == before


@pytest.mark.parametrize("ids", [("one", "one"), ("", "two"), ("", "")])
def test_the_same_run_goes_on_from_its_copies_and_so_does_one_without_an_id(tmp_path, copies, ids):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=ids)
    open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=print)
    assert list_checkpoints(run / "checkpoints") == [2, 4]


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"seed": 4}, DATA, r"remote started from another model \(seed: 4, was 0\)"),
        ({}, "now", r"training data changed since step 4 .*fingerprint now, was fingerprint"),
    ],
)
def test_a_copy_is_compared_before_it_is_moved_into_the_run(
    tmp_path, copies, settings, data, message
):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("", ""))
    # What is here fits: it is the copy that was made of something else.
    (run / "config.yaml").write_text(cli.dump(Config.model_validate(settings)))
    meta = run / "checkpoints/step_2/trainer/meta.json"
    meta.write_text(meta.read_text().replace(DATA, data))
    before = content(run)
    config = with_uri(tmp_path).model_copy(update=settings)
    with pytest.raises(ValueError, match=message):
        open_run_folder(run, config, data, resume=True, say=print)
    assert content(run) == before


def test_a_copy_of_a_later_step_than_the_run_shall_have_is_refused(tmp_path, copies):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("one", "one"))
    before = content(run)
    with pytest.raises(ValueError, match=r"remote holds step 4, and train\.steps is 3"):
        open_run_folder(run, with_uri(tmp_path, steps=3), DATA, resume=True, say=print)
    assert content(run) == before


def test_what_is_here_is_compared_before_a_copy_is_moved_over_it(tmp_path, copies):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("", ""))
    (run / "config.yaml").write_text(cli.dump(Config(seed=4)))
    before = content(run)
    with pytest.raises(ValueError, match=r"/run started from another model \(seed: 0, was 4\)"):
        open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=print)
    assert content(run) == before


def test_a_copy_of_the_best_that_is_of_another_run_is_left(tmp_path, copies):
    run = two_runs(tmp_path, copies, here=2, there=1, ids=("one", "one"))
    copies.remove("run")
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 1, "eval/cider_d": 9.0}\n')
    mixed = Machine(tmp_path / "other", None, own_id="two").folder
    files = [name for name in content(mixed) if "stage1" not in name]
    copies.put("step_1", mixed, files)
    copies.put("step_2", run, content(run))
    said: list[str] = []
    open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=said.append)
    assert list_checkpoints(run / "checkpoints") == [2]
    assert said[0].startswith("the remote copy of step 1, the best, is left there: --resume: file:")


def test_a_first_attempt_without_a_checkpoint_makes_way_for_the_run(tmp_path, copies):
    run = two_runs(tmp_path, copies, here=2, there=4, ids=("attempt", "run"))
    shutil.rmtree(run / "checkpoints")
    (run / "stage1/final/of_the_attempt").write_text("")
    (tmp_path / "other/stage1/final/model.safetensors").write_bytes(b"of the run")
    copies.put("run", tmp_path / "other", backup._files(tmp_path / "other", backup._BASE_FILES))
    open_run_folder(run, with_uri(tmp_path), DATA, resume=True, say=print)
    assert list_checkpoints(run / "checkpoints") == [4]
    assert json.loads((run / "run.json").read_text()) == {"id": "run"}
    final = {file.name: file.read_bytes() for file in (run / "stage1/final").iterdir()}
    assert final == {"model.safetensors": b"of the run"}


def test_a_run_has_an_id_from_its_beginning_which_its_copies_carry(tmp_path, copies):
    config = with_uri(tmp_path)
    ids = set()
    for name in ("one", "run"):
        open_run_folder(tmp_path / name, config, DATA, resume=False, say=print)
        ids.add((tmp_path / name / "run.json").read_text())
    assert len(ids) == 2
    own = (tmp_path / "run/run.json").read_bytes()
    machine = Machine(tmp_path / "run", copies)
    machine.backup.base(resumed=False)
    machine.save(6)
    machine.backup.close()
    for copy in ("run", "step_6"):
        assert (tmp_path / "remote" / copy / "run.json").read_bytes() == own
    for name in ("run", "fresh"):
        open_run_folder(tmp_path / name, config, DATA, resume=True, say=print)
        assert (tmp_path / name / "run.json").read_bytes() == own


def test_steps_do_not_go_on_from_the_stage_1_of_another_run(tmp_path, copies):
    two_runs(tmp_path, copies, here=2, there=4, ids=("", "one"))
    (tmp_path / "other/run.json").write_text('{"id": "two"}')
    copies.put("run", tmp_path / "other", ["run.json", "stage1/stage1.json"])
    with pytest.raises(ValueError, match=r"run/ is of the run two, the steps are of one"):
        open_run_folder(tmp_path / "fresh", with_uri(tmp_path), DATA, resume=True, say=print)
    assert content(tmp_path / "fresh") == {}


def test_runs_are_not_mixed_and_nothing_to_resume_is_said(tmp_path, copies):
    config, say = with_uri(tmp_path), [].append
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints or file://"):
        open_run_folder(tmp_path / "fresh", config, DATA, resume=True, say=say)
    machine = Machine(tmp_path / "run", copies)
    machine.save(6)
    machine.backup.close()
    with pytest.raises(ValueError, match=r"remote holds a run of 6 steps.*--train.checkpoint_uri"):
        open_run_folder(tmp_path / "new", config, DATA, resume=False, say=say)
    with pytest.raises(ValueError, match=r"run holds a run of 6 steps.*another --run_folder"):
        open_run_folder(tmp_path / "run", Config(), DATA, resume=False, say=say)
    assert not (tmp_path / "new").exists()


def test_changes_name_every_leaf():
    before = {"a": {"x": 1, "y": 2}, "b": 3, "gone": 0}
    after = {"a": {"x": 1, "y": 5}, "b": 3, "new": [1]}
    assert list(changes(before, after)) == [
        "a.y: 5, was 2",
        "gone: None, was 0",
        "new: [1], was None",
    ]
