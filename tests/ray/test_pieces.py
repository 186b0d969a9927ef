"""Checkpoints in pieces through a real object store."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from rayrl.actors import pieces
from rayrl.actors.pieces import Pieces, in_pieces, shipped
from rayrl.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.ray
NAMES = ("config.json", "b", "c", "d", "e")
ARRAYS = {name: np.full(10, place, np.float64) for place, name in enumerate(NAMES)}


@pytest.fixture(autouse=True)
def two_arrays_a_piece(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 160)


@ray.remote
def taken_up(files: Pieces, checkpoint: Checkpoint) -> Checkpoint:
    """The same from another process, in pieces of its own."""
    arrays = {name: checkpoint.arrays[name] + files[name] for name in checkpoint.arrays}
    return shipped(Checkpoint(step=2, model_files=files, arrays=arrays, meta=checkpoint.meta))


def test_arrays_travel_in_pieces_of_bounded_size_and_in_their_order(local_ray, tmp_path):
    files = in_pieces(ARRAYS)
    assert [len(ray.get(piece)) for piece in dict.fromkeys(files._where.values())] == [2, 2, 1]
    assert list(files) == list(ARRAYS) and len(files) == 5
    given = Checkpoint(step=1, model_files=ARRAYS, arrays=ARRAYS, meta={"seed": 3})
    got = ray.get(taken_up.remote(files, ray.put(shipped(given))))
    assert (got.step, got.meta) == (2, {"seed": 3})
    assert {name: got.arrays[name].tolist() for name in got.arrays} == {
        name: (2 * array).tolist() for name, array in ARRAYS.items()
    }
    place = save_checkpoint(tmp_path, got, keep=1)
    assert (place / "c").read_bytes() == ARRAYS["c"].tobytes()
    assert load_checkpoint(place).arrays["e"].tolist() == [8] * 10
    with pytest.raises(KeyError):
        files["f"]


def test_one_piece_is_held_at_a_time(local_ray):
    files = in_pieces(ARRAYS)
    for name in ("config.json", "b", "c", "e"):
        assert files[name].tolist() == ARRAYS[name].tolist()
        assert name in files._held[1] and len(files._held[1]) <= 2


def test_what_is_emptied_on_the_way_arrives_whole(local_ray):
    given = Checkpoint(step=1, model_files=dict(ARRAYS), arrays=dict(ARRAYS), meta={})
    sent = shipped(given, emptied=True)
    assert given.arrays == given.model_files == {}
    assert list(sent.arrays) == list(sent.model_files) == list(ARRAYS)
    assert all(np.array_equal(sent.arrays[name], array) for name, array in ARRAYS.items())


def test_nothing_is_as_many_arrays(local_ray):
    assert dict(in_pieces({})) == {}
