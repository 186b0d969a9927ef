"""Values that an engine holds are compared with those that were sent, in its type and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrl.config import EngineConfig
from rayrl.engine.base import EngineSetup, make_engine
from rayrl.readback import ReadBack, differing, parts_of_fused
from rayrl.vlm import load_captioner
from rayrl.weights import pack, pack_tensors

ALL = ("vision", "connector", "language")


def sent(**tensors):
    return pack_tensors(tensors.items(), version=7)


def test_equal_values_are_counted_and_names_that_an_engine_lacks_are_not():
    weights = sent(a=torch.arange(6.0).view(2, 3), b=torch.ones(4), c=torch.ones(1))
    held = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "z": torch.zeros(3)}
    assert not differing(held, weights)
    assert ReadBack().check(held, weights) == 2


def test_what_differs_is_told_by_name_with_both_values():
    weights = sent(a=torch.ones(4), b=torch.tensor([1.0, 2.0, 3.0]), c=torch.ones(2, 3))
    held = {"a": torch.ones(4), "b": torch.tensor([1.0, 2.5, 3.5]), "c": torch.ones(3, 2)}
    assert differing(held, weights) == {
        "b": "2 of 3 values differ, the first is 2.5, want 2",
        "c": "shape (3, 2), want (2, 3)",
    }


def test_what_was_equal_once_must_stay_so_and_what_never_was_is_in_another_layout():
    check = ReadBack()
    turned = torch.arange(4.0).view(2, 2)
    assert check.check({"a": torch.ones(4), "t": turned.T}, sent(a=torch.ones(4), t=turned)) == 1
    later = sent(a=torch.full((4,), 2.0), t=turned + 1)
    held = {"a": torch.full((4,), 2.0), "t": (turned + 1).T}
    assert check.check(held, later) == 1
    held["a"][3] = 1.0
    want = r"version 7: read back of a: 1 of 4 values differ, the first is 1, want 2: the engine"
    with pytest.raises(RuntimeError, match=want):
        check.check(held, later)


def test_an_engine_in_bfloat16_is_compared_after_the_same_rounding():
    exact = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-7])
    # 1 + 2^-8 lies halfway and rounds to the even 1; 1 + 2^-7 is a bfloat16.
    held = torch.tensor([1.0, 1.0, 1.0078125], dtype=torch.bfloat16)
    assert not differing({"a": held}, sent(a=exact))
    held[1] = 1.0078125
    assert differing({"a": held}, sent(a=exact))["a"].startswith("1 of 3 values differ")


def test_rows_that_an_engine_glued_together_are_found_again():
    q, k, v = torch.ones(4, 3), 2 * torch.ones(2, 3), 3 * torch.ones(2, 3)
    parameters = {
        "layer.qkv_proj.weight": torch.cat([q, k, v]),
        "layer.qkv_proj.bias": torch.arange(8.0),
        "layer.norm.weight": torch.full((3,), 5.0),
        "embed.weight": torch.cat([torch.full((5, 3), 6.0), torch.zeros(3, 3)]),
        "packed.weight": torch.empty(0),
    }
    shapes = {f"layer.{p}_proj.weight": (n, 3) for p, n in (("q", 4), ("k", 2), ("v", 2))}
    shapes |= {f"layer.{p}_proj.bias": (n,) for p, n in (("q", 4), ("k", 2), ("v", 2))}
    shapes |= {"layer.norm.weight": (3,), "embed.weight": (5, 3), "packed.weight": (4, 4)}
    found = parts_of_fused(parameters, shapes, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    assert set(found) == set(shapes) - {"packed.weight"}
    assert all(found[name].shape == torch.Size(shapes[name]) for name in found)
    assert torch.equal(found["layer.k_proj.weight"], k)
    assert found["layer.v_proj.bias"].tolist() == [6.0, 7.0]
    assert found["embed.weight"].unique().tolist() == [6.0]
    # Without all its parts in this version, a glued matrix says nothing.
    del shapes["layer.v_proj.weight"]
    partly = parts_of_fused(parameters, shapes, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    assert "layer.q_proj.weight" not in partly and "layer.q_proj.bias" in partly


def test_the_transformers_engine_is_read_back_whole_and_a_lost_update_is_found(tiny_folder):
    model = load_captioner(tiny_folder).model
    config = EngineConfig(backend="hf")
    engine = make_engine(EngineSetup(folder=tiny_folder, config=config, group_size=2))
    weights, check = pack(model, 3), ReadBack()
    engine.load_weights(weights, changed=ALL)
    assert check.check(engine.held(weights), weights) == len(dict(weights.tensors()))
    name = next(n for n, a in weights.arrays.items() if a.ndim == 2)
    with torch.no_grad():
        engine.held(weights)[name][0, 0] += 1
    want = np.asarray(weights.arrays[name])[0, 0]
    with pytest.raises(RuntimeError, match=rf"read back of {name}: 1 of") as error:
        check.check(engine.held(weights), weights)
    assert f"want {want:.6g}" in str(error.value)
