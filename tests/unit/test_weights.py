"""Weights on the wire: the same values arrive, damage is noticed, a broken policy stays home."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from rayrl.weights import load_into, pack, read_model_files, sampled, write_model_files


class Tied(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(5, 4, dtype=dtype)
        self.body = torch.nn.Linear(4, 4, dtype=dtype)
        self.head = torch.nn.Linear(4, 5, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_through_pickle_restores_every_value(dtype):
    source, target = Tied(dtype), Tied(dtype)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
    weights = pickle.loads(pickle.dumps(pack(source, 4)))
    weights.verify()
    load_into(target, weights)
    for name, parameter in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], parameter), name


def test_a_tied_matrix_travels_once_and_arrives_under_both_names():
    weights = pack(Tied(), 0)
    assert set(weights.arrays) == {"embed.weight", "body.weight", "body.bias"}
    assert dict(weights.tied) == {"head.weight": "embed.weight"}
    assert weights.num_bytes == 4 * (20 + 16 + 4)
    names = [name for name, _ in weights.tensors()]
    assert sorted(names) == ["body.bias", "body.weight", "embed.weight", "head.weight"]


def test_packing_copies_so_that_training_on_does_not_change_a_published_version():
    model = Tied()
    weights = pack(model, 0)
    with torch.no_grad():
        model.body.weight.zero_()
    assert np.abs(weights.arrays["body.weight"]).sum() > 0
    weights.verify()


def test_damage_is_found_by_the_checksum():
    weights = pack(Tied(), 7)
    weights.arrays["body.bias"][0] += 1e-3
    with pytest.raises(ValueError, match=r"version 7: checksum \w+, want \w+"):
        weights.verify()


def test_a_sample_is_spread_over_a_large_tensor_and_ends_with_it():
    size = 100_003
    places = sampled(torch.arange(size))
    assert len(places) == len(set(places.tolist())) == 4096
    assert places[-1] == size - 1
    # Whatever is longer than two steps from block to block holds a sample, wherever it begins.
    gaps = torch.diff(places, prepend=torch.tensor([-1]))
    assert gaps.min() == 1 and gaps.max() <= 2 * (size // 64)
    # Few pages of memory, of 512 such numbers each, are touched.
    assert len(set((places // 512).tolist())) <= 2 * 64
    assert torch.equal(sampled(torch.arange(4000)), torch.arange(4000))


def test_a_parameter_that_is_not_finite_is_not_published():
    model = Tied()
    with torch.no_grad():
        model.body.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"version 2: body\.bias is not finite"):
        pack(model, 2)


def test_a_part_of_the_parameters_can_be_published_alone():
    weights = pack(Tied(), 1, {"body.bias"})
    assert set(weights.arrays) == {"body.bias"} and not weights.tied


def test_weights_of_another_model_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no parameter 'embed\.weight'"):
        load_into(torch.nn.Linear(4, 4), pack(Tied(), 0))


def test_model_files_travel_with_or_without_weights(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"w")
    files = read_model_files(source)
    light = write_model_files(files, tmp_path / "light", with_weights=False)
    assert [f.name for f in light.iterdir()] == ["config.json"]
    whole = write_model_files(files, tmp_path / "whole", with_weights=True)
    assert (whole / "model.safetensors").read_bytes() == b"w"
    with pytest.raises(ValueError, match="bare file name"):
        write_model_files({"../x": np.zeros(1, np.uint8)}, tmp_path / "evil", with_weights=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_model_files(tmp_path)
