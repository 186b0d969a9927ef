"""A version in flat buffers: every value, name and type is found again, damage is noticed."""

from __future__ import annotations

import pickle

import pytest
import torch

from rayrl.buckets import Received, fill
from rayrl.weights import load_into, pack
from tests.unit.test_weights import Tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_a_model_goes_through_buckets_of_any_size(dtype, bucket_bytes):
    source, target = Tied(dtype), Tied(dtype)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
    manifest, buckets = fill(
        source.named_parameters(remove_duplicate=False), 4, bucket_bytes=bucket_bytes
    )
    assert [len(bucket) for bucket in buckets] == list(manifest.sizes)
    received = Received(manifest=pickle.loads(pickle.dumps(manifest)), buckets=buckets)
    received.verify()
    load_into(target, received)
    assert received.version == 4
    for name, parameter in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], parameter), name


def test_pieces_lie_one_after_the_other_at_places_that_any_type_can_be_read_at():
    named = [
        ("a", torch.arange(3, dtype=torch.float32)),  # 12 bytes, and 4 of padding
        ("b", torch.ones(5, dtype=torch.bfloat16)),  # 10, and 6
        ("c", torch.tensor(7.0, dtype=torch.float64)),  # does not fit any more
        ("d", torch.zeros(2, 20)),  # 160 bytes, more than a bucket
    ]
    manifest, buckets = fill(named, 0, bucket_bytes=36)
    places = [(p.name, p.bucket, p.start, p.stop) for p in manifest.pieces]
    assert places == [("a", 0, 0, 12), ("b", 0, 16, 26), ("c", 1, 0, 8), ("d", 2, 0, 160)]
    assert manifest.sizes == (32, 16, 160)
    tensors = dict(Received(manifest=manifest, buckets=buckets).tensors())
    assert tensors["c"].shape == () and float(tensors["c"]) == 7.0
    assert tensors["d"].shape == (2, 20)
    # In place: the engine's copy is the only one.
    assert tensors["a"].data_ptr() == buckets[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_is_that_of_the_same_version_in_host_memory(dtype):
    model = Tied(dtype)
    manifest, _ = fill(model.named_parameters(remove_duplicate=False), 1)
    packed = pack(model, 1)
    assert manifest.checksum == packed.checksum
    assert dict(manifest.tied) == dict(packed.tied) == {"head.weight": "embed.weight"}


def test_a_part_can_be_sent_alone_and_damage_is_found():
    manifest, buckets = fill(Tied().named_parameters(), 7, {"body.bias"})
    received = Received(manifest=manifest, buckets=buckets)
    assert [name for name, _ in received.tensors()] == ["body.bias"]
    buckets[0][0] ^= 1
    with pytest.raises(ValueError, match=r"version 7: checksum \w+, want \w+; they were damaged"):
        received.verify()


def test_a_parameter_that_is_not_finite_is_not_sent():
    model = Tied()
    with torch.no_grad():
        model.body.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"version 2: body\.bias is not finite"):
        fill(model.named_parameters(), 2)
