"""The measuring parts of benchmarks/, against numbers known beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_fleet  # noqa: E402
import bench_learner  # noqa: E402
import learner_cost  # noqa: E402
import learner_step  # noqa: E402
import record  # noqa: E402
from bench_learner import Row  # noqa: E402

from rayrl.config import Config  # noqa: E402
from rayrl.data import load_split  # noqa: E402


def test_flops_and_peak_memory_of_a_product():
    a, b = torch.randn(30, 20), torch.randn(20, 50)
    with learner_cost.counted("cpu") as cost:
        c = a @ b
        del c
        d = a @ b
        e = d + 1.0
    assert cost.flops == 2 * (2 * 30 * 20 * 50)
    # d and e live together, c is gone by then; a and b were there before.
    assert cost.peak_bytes == 2 * 30 * 50 * 4
    assert e.shape == (30, 50)


def test_attention_counts_two_products_of_the_dense_mask():
    q = torch.randn(1, 2, 16, 8)
    with learner_cost.counted("cpu") as cost:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert cost.flops == 2 * (2 * 2 * 16 * 16 * 8)


def test_distance_is_relative_to_the_whole_reference():
    reference = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    moved = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}
    assert learner_cost.distance(reference, reference) == 0.0
    assert learner_cost.distance(moved, reference) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="'b'"):
        learner_cost.distance({"a": moved["a"]}, reference)


def tiny_case(frozen_vision: bool, dtype: str = "float32") -> tuple:
    row = Row(
        model="tiny-1m",
        image_tokens=16,
        group_size=3,
        prompts=2,
        frozen_vision=frozen_vision,
        dtype=dtype,
    )
    model, images = bench_learner.make_model(row, "cpu", small=True)
    return row, model, bench_learner.make_batch(row, model, images, "cpu", row.prompts)


def test_micro_batches_give_the_gradient_of_the_whole():
    row, model, batch = tiny_case(frozen_vision=False)
    naive = bench_learner.methods(row, model, batch)["naive"]
    results = []
    for at_once in (6, 3, 2):  # all; a group at a time; parts of a group
        model.zero_grad()
        logprobs = bench_learner.backward(naive, model, batch, at_once)
        named = model.named_parameters()
        results.append((logprobs, {name: p.grad for name, p in named if p.grad is not None}))
    for logprobs, gradient in results[1:]:
        assert torch.allclose(logprobs, results[0][0], atol=1e-5)
        assert learner_cost.distance(gradient, results[0][1]) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_takes_the_learners_step(dtype, monkeypatch):
    """In bfloat16 on float32 masters: steps of bfloat16 moments cost half, and round away."""
    row, model, batch = tiny_case(frozen_vision=True, dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = learner_step.Step(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert step.masters.named.keys() == trained.keys()
    for name, master in step.masters.named.items():
        assert (master is trained[name]) == (dtype == "float32")
        moments = step.optimizer.state[master]
        assert {moments[each].dtype for each in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    monkeypatch.setitem(step.optimizer.param_groups[0], "lr", 0.1)
    shared = bench_learner.methods(row, model, batch)["shared"]
    bench_learner.backward(shared, model, batch, 2, step.collect)
    step.take()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved and set(moved) <= trained.keys()
    assert all(p.grad is None for p in model.parameters())


def test_every_method_has_the_naive_gradient_and_a_wrong_one_is_refused():
    row, model, batch = tiny_case(frozen_vision=True)
    table = bench_learner.methods(row, model, batch)
    entries = bench_learner.first_passes(row, table, model, batch, "cpu")
    assert list(entries) == ["naive", "shared", "shared, features cached"]
    assert entries["shared, features cached"]["flops"] < entries["shared"]["flops"]
    assert entries["shared"]["flops"] < entries["naive"]["flops"]
    useful = {label: bench_learner.useful_flops(model, batch, label) for label in table}
    assert useful["naive"] == useful["shared"] > useful["shared, features cached"]
    # What runs has filler, and counts attention as if its mask were dense.
    assert 0.6 * entries["shared"]["flops"] < useful["shared"] < entries["shared"]["flops"]
    wrong = {**table, "shared": lambda *args: 1.01 * table["shared"](*args)}
    with pytest.raises(ValueError, match="gradient of 'shared' differs"):
        bench_learner.first_passes(row, wrong, model, batch, "cpu")


def test_rows_for_a_gpu_are_written_down_as_not_measured(tmp_path, capsys):
    models = ["--models", "qwen2.5-vl-3b"]
    argv = ["--suites", "gpu", "--device", "cpu", *models, "--out", str(tmp_path)]
    bench_learner.main(argv)
    (file,) = tmp_path.glob("learner-*.json")
    written = json.loads(file.read_text())
    assert written["command"] == f"python benchmarks/bench_learner.py {' '.join(argv)}"
    assert len(written["cases"]) == 4
    assert {case["not_measured"] for case in written["cases"]} == {"no CUDA device at hand"}


def test_the_learner_benchmark_needs_neither_ray_nor_vllm_nor_pydantic():
    code = (
        "import sys, bench_learner; "
        "print(*[m for m in ('ray', 'vllm', 'pydantic') if m in sys.modules])"
    )
    root = str(BENCHMARKS.parent)
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{root!r}, {str(BENCHMARKS)!r}]; {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == []


def test_a_result_is_named_after_its_hardware():
    cpu = {"processor": "AMD EPYC (7763)", "cores": 2}
    assert (
        record.file_name("sync", "2026-01-02", cpu) == "sync-2026-01-02-2-cores-amd-epyc-7763.json"
    )
    gpu = {**cpu, "gpu": "NVIDIA H200"}
    assert record.file_name("learner", "2026-01-02", gpu) == "learner-2026-01-02-nvidia-h200.json"


def test_bare_ray_gets_objects_as_large_as_the_run_had(tmp_path):
    for file, size in (("stage1/final/model", 1000), ("checkpoints/step_6/trainer", 88)):
        path = tmp_path / f"{file}.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    config = Config.model_validate({"run_folder": str(tmp_path), "data": {"max_train": 8}})
    sizes = bench_fleet.sizes_of(config, images=2)
    assert (sizes.weight_bytes, sizes.captions) == (1000, 16)
    data = load_split(config.data, "train")
    assert sizes.image_bytes == len(data[0].image) + len(data[1].image)
