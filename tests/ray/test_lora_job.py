"""A run that trains adapters and publishes them alone, on a local Ray."""

from __future__ import annotations

import pytest

from tests.ray.conftest import metrics, run_script

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def test_workers_add_adapters_to_their_base_and_agree_with_the_learner(
    small_job, environment, tmp_path
):
    pytest.importorskip("peft")
    pytest.importorskip("vllm")
    lora = {"learner__lora__rank": 4, "learner__lora__publish": "adapters", "learner__lr": 1e-2}
    sizes = {"train__steps": 2, "train__checkpoint_every": 1, "engine__backend": "vllm"}
    flags = small_job(**sizes, **lora)
    done = run_script("grpo_coco.py", flags, environment)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    # The second batch was sampled with the adapters of the first update.
    assert rows[2]["kl"] > 0
    assert all(row["mismatch_kl"] < 1e-7 for row in rows[1:])
    measured = ("grad_norm", "lr", "update_ratio", "peak_memory_mb", "tflops_per_second")
    assert all(row[f"learner/{name}"] > 0 for row in rows[1:] for name in measured)
    from rayrl.vlm import load_captioner

    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert (latest / "adapter_model.safetensors").is_file()
    assert not (latest / "model.safetensors").exists()
    assert load_captioner(latest).model is not None
