"""A checkpoint is whole or absent."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from rayrl import checkpoint as module
from rayrl.checkpoint import (
    Checkpoint,
    best_of,
    join_state,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    point_at_best,
    save_checkpoint,
    split_state,
)


def make(step):
    return Checkpoint(
        step=step,
        model_files={"config.json": np.frombuffer(b"{}", np.uint8)},
        arrays={"optimizer/w/exp_avg": np.full((2, 3), step, np.float32)},
        meta={"weight_version": step, "objective_state": {"beta": 0.5}},
    )


def test_what_is_saved_is_loaded_and_latest_follows(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, make(step), keep=3)
    loaded = load_checkpoint(tmp_path / "latest")
    assert loaded.step == 20 and loaded.meta["weight_version"] == 20
    assert loaded.arrays["optimizer/w/exp_avg"].tolist() == [[20] * 3] * 2
    assert bytes(loaded.model_files["config.json"]) == b"{}"
    assert set(loaded.model_files) == {"config.json"}
    assert load_checkpoint(tmp_path / "step_10").step == 10


def test_only_the_newest_are_kept_in_numeric_order(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert list_checkpoints(tmp_path) == [10, 11]


def test_the_best_is_the_earliest_of_the_highest_scores_that_there_are():
    scores = {2: 1.0, 4: 3.0, 6: 3.0, 8: 9.0}
    assert best_of(scores, [2, 4, 5, 6]) == [4]
    assert best_of(scores, [5]) == best_of({}, [2]) == []


def test_the_best_stays_and_a_link_leads_to_it(tmp_path):
    scores = {2: 1.0, 4: 3.0, 6: 2.0}
    for step in (2, 4, 6, 8, 10):
        save_checkpoint(tmp_path, make(step), keep=2, scores=scores)
        best = {2: 2}.get(step, 4)
        assert load_checkpoint(tmp_path / "best").step == best
    assert list_checkpoints(tmp_path) == [4, 8, 10]
    (tmp_path / "best").unlink()
    point_at_best(tmp_path, scores)
    assert load_checkpoint(tmp_path / "best").step == 4
    # A run that keeps no best one any more leaves no link that leads nowhere.
    save_checkpoint(tmp_path, make(12), keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["latest", "step_10", "step_12"]


def test_what_the_reading_of_arrays_raises_leaves_nothing_half_written(tmp_path):
    class Gone(dict):
        def __getitem__(self, name):
            raise LookupError("lost with its node")

    save_checkpoint(tmp_path, make(1), keep=2)
    with pytest.raises(LookupError, match="lost with its node"):
        save_checkpoint(tmp_path, replace(make(2), arrays=Gone(a=1)), keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["latest", "step_1"]


def test_arrays_whose_axes_lie_in_another_order_are_kept_as_they_are(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "scalar": np.array(3.0)}
    place = save_checkpoint(tmp_path, replace(make(1), arrays=arrays), keep=1)
    loaded = load_checkpoint(place).arrays
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape and np.array_equal(loaded[name], array)


@pytest.mark.parametrize("files_before_full", [0, 1, 2])
def test_a_full_disk_leaves_the_previous_one_whole_and_nothing_half_written(
    tmp_path, monkeypatch, files_before_full
):
    save_checkpoint(tmp_path, make(1), keep=2)
    written = 0
    real = module._write

    def full(file: Path, content: object) -> None:
        nonlocal written
        if written == files_before_full:
            file.write_bytes(b"{")
            raise OSError(errno.ENOSPC, "No space left on device")
        written += 1
        real(file, content)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, make(2), keep=2)
    assert load_checkpoint(tmp_path / "latest").step == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["latest", "step_1"]


def test_no_room_for_the_tensors_is_an_error_of_the_disk(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(1), keep=2)

    def full(arrays: object, file: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"arrays-1\.safetensors: .*No space left on device"):
        save_checkpoint(tmp_path, make(2), keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["latest", "step_1"]


def test_all_files_of_a_checkpoint_can_be_read_by_the_same_people(tmp_path):
    place = save_checkpoint(tmp_path, make(1), keep=2)
    files = [file for file in place.rglob("*") if file.is_file()]
    assert len(files) == 3 and len({file.stat().st_mode for file in files}) == 1


def test_the_newest_whole_one_counts_where_the_link_was_not_moved_in_time(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, make(step), keep=2)
    module.point_at(tmp_path / "step_1", "latest")
    (tmp_path / ".step_3.partial").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_2"
    assert load_checkpoint(tmp_path / "latest").step == 2
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        newest_checkpoint(tmp_path / "empty")


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        load_checkpoint(tmp_path / "latest")
    place = save_checkpoint(tmp_path, make(1), keep=1)
    arrays, meta = place / "trainer" / "arrays-1.safetensors", place / "trainer" / "meta.json"
    whole = arrays.read_bytes()
    for damaged in (b"garbage", whole[:-1]):
        arrays.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"step_1/trainer/arrays-1\.safetensors: damaged"):
            load_checkpoint(place)
    arrays.unlink()
    with pytest.raises(ValueError, match=r"step_1/trainer/arrays-1\.safetensors: damaged"):
        load_checkpoint(place)
    for damaged in ("{", "[]", "{}"):
        meta.write_text(damaged)
        with pytest.raises(ValueError, match=r"step_1/trainer/meta\.json: damaged"):
            load_checkpoint(place)
    meta.unlink()
    with pytest.raises(FileNotFoundError, match=r"no trainer/meta\.json"):
        load_checkpoint(place)
    (place / "trainer.json").write_text("{}")
    with pytest.raises(ValueError, match="step_1: an earlier version of rayrl wrote it"):
        load_checkpoint(place)


class Counted(dict):
    """Arrays of which it is told which were asked for."""

    def __init__(self, *given):
        super().__init__(*given)
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)


def test_many_arrays_lie_in_files_of_bounded_size_and_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FILE_BYTES", 80)
    written, real = [], module.save_file
    arrays = Counted((str(i), np.full(i, i, np.float64)) for i in (9, 2, 12, 3, 4))

    def save(part, file):
        written.append((list(part), list(arrays.asked)))
        real(part, file)

    monkeypatch.setattr(module, "save_file", save)
    place = save_checkpoint(tmp_path, replace(make(1), arrays=arrays), keep=1)
    # The last one asked for is the first of the next file.
    assert [part for part, _ in written] == [["9"], ["2"], ["12"], ["3", "4"]]
    assert [len(asked) for _, asked in written] == [2, 3, 4, 5]
    monkeypatch.undo()
    loaded = load_checkpoint(place)
    assert list(loaded.arrays) == ["9", "2", "12", "3", "4"] and len(loaded.arrays) == 5
    shutil.rmtree(place)
    assert {k: v.tolist() for k, v in loaded.arrays.items()} == {
        name: [float(name)] * int(name) for name in list(arrays)
    }
    assert loaded.arrays.get("none") is None


def test_an_engine_that_takes_all_tensor_files_of_the_folder_finds_the_captioner_alone(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    given = {name: np.frombuffer(text, np.uint8) for name, text in files.items()}
    place = save_checkpoint(tmp_path, replace(make(1), model_files=given), keep=1)
    assert [file.name for file in place.glob("*.safetensors")] == ["model.safetensors"]


def test_an_objective_state_survives_as_arrays_and_json(tmp_path):
    state = {"beta": 0.5, "seen": [1, 2], "history": np.array([1.5, 2.5])}
    arrays, values = split_state(state)
    assert json.loads(json.dumps(values)) == {"beta": 0.5, "seen": [1, 2]}
    back = join_state(values, {**arrays, "optimizer/w/step": np.zeros(())})
    assert back["history"].tolist() == [1.5, 2.5] and back["beta"] == 0.5
    assert set(back) == set(state)


def test_arrays_within_an_objective_state_keep_their_place(tmp_path):
    inner = {"pairs": np.eye(2), "count": 3, "coco/1": [1, 0.5]}
    state = {"step": 4, "part": inner, "phase_0": {"part": {"x": np.ones(1)}, "empty": {}}}
    arrays, values = split_state(state)
    assert sorted(arrays) == ["objective/part/pairs", "objective/phase_0/part/x"]
    json.dumps(values)
    back = join_state(values, arrays)
    assert back["part"]["pairs"].tolist() == [[1, 0], [0, 1]]
    assert {k: v for k, v in back["part"].items() if k != "pairs"} == {
        "count": 3,
        "coco/1": [1, 0.5],
    }
    assert back["phase_0"]["part"]["x"].tolist() == [1.0]
    assert back["phase_0"]["empty"] == {} and back["step"] == 4
    with pytest.raises(ValueError, match="an array of the name 'coco/1', want one without"):
        split_state({"part": {"coco/1": np.ones(1)}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"seen": {1, 2}}, "state objective/part/seen: Object of type set is not JSON"),
        ({"mean": np.float32(1)}, "part/mean: Object of type float32 .*; want JSON values, arrays"),
        ({1: 2.0}, "state objective/part/1: a key of int, want str"),
    ],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=message):
        split_state({"part": value})
