"""The losses of TRL's GRPO trainer on the same random tensors.

TRL is no dependency: these tests are skipped where it is not installed beside this package."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objectives_toy import TinyPolicy, assert_close, prepared, synthetic_batch

from rayrl.objectives import preset

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
MAX_TOKENS = 9

# Name here; preset and overrides; TRL's loss type and settings.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo_deepseekmath", {"kl_coef": 0.0}, {"loss_type": "grpo"}),
    "grpo with KL": ("grpo_deepseekmath", {}, {"loss_type": "grpo", "beta": 0.04}),
    "unbiased KL": (
        "deepseek_v32",
        {},
        {
            "loss_type": "grpo",
            "beta": 0.001,
            "use_bias_correction_kl": True,
            "off_policy_mask_threshold": 0.5,
        },
    ),
    "bnpo": ("grpo_deepseekmath", {"kl_coef": 0.0, "reducer": "token_mean"}, {"loss_type": "bnpo"}),
    "dr_grpo": ("dr_grpo", {"max_tokens": MAX_TOKENS}, {"loss_type": "dr_grpo"}),
    "dapo": (
        "dapo",
        {"overlong_coef": 0.0, "select": ""},
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "gspo": (
        "gspo",
        {},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "luspo": (
        "luspo",
        {"clip_low": 0.2, "clip_high": 0.2},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    # There the cap of CISPO is the bound itself, here 1 + clip_high.
    "cispo": ("cispo", {"clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "sapo": ("sapo", {}, {"loss_type": "sapo"}),
    "vespo": ("vespo", {}, {"loss_type": "vespo"}),
    "two-sided clip": ("intellect2_two_sided", {"ratio_cap": 1.3}, {"delta": 1.3}),
    "truncated importance sampling": ("grpo", {"kl_coef": 0.0}, {"loss_type": "dapo", "tis": 2.0}),
}


def trainer(settings: dict[str, Any]) -> SimpleNamespace:
    """As much of a trainer as its loss reads."""
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction="sum": x,
    )
    args = SimpleNamespace(
        delta=settings.get("delta"),
        use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    own = grpo_trainer.GRPOTrainer
    return SimpleNamespace(
        accelerator=accelerator,
        args=args,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        beta=settings.get("beta", 0.0),
        loss_type=settings.get("loss_type", "grpo"),
        epsilon_low=settings.get("epsilon_low", 0.2),
        epsilon_high=settings.get("epsilon_high", 0.2),
        max_completion_length=MAX_TOKENS,
        use_vllm="tis" in settings,
        vllm_importance_sampling_correction="tis" in settings,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
        get_gamma_weights=own.get_gamma_weights,
        get_off_policy_mask=own.get_off_policy_mask,
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(case: str) -> None:
    name, overrides, settings = CASES[case]
    # TIS is compared in a case of its own, and elsewhere engine and learner agree for TRL.
    objective = preset(name, **overrides, **({} if "tis" in settings else {"mismatch": ""}))
    policy = TinyPolicy(4)
    batch = synthetic_batch(policy, t=MAX_TOKENS)
    ready = prepared(objective, batch)
    draw = torch.Generator().manual_seed(5)
    noise = 0.4 * torch.randn(batch.mask.shape, generator=draw, dtype=torch.float64)
    x = torch.where(batch.mask, batch.old_logprobs + noise, 0.0).requires_grad_()
    ours = objective.loss(ready, x, ready.normalizer()).loss
    ours.backward()

    y = x.detach().clone().requires_grad_()
    rows = y.flatten(0, 1)
    host = trainer(settings)
    host._get_per_token_logps_and_entropies = lambda *_, **__: (rows, torch.zeros_like(rows), None)
    mask = batch.mask.flatten(0, 1)
    is_ratio = (batch.old_logprobs - batch.rollout_logprobs).exp().flatten(0, 1)
    inputs = {
        "prompt_ids": torch.zeros(len(rows), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(rows), 1, dtype=torch.long),
        "completion_ids": batch.token_ids.flatten(0, 1),
        "completion_mask": mask.long(),
        "advantages": ready.fields["advantages"].flatten(),
        "old_per_token_logps": batch.old_logprobs.flatten(0, 1),
        "ref_per_token_logps": batch.ref_logprobs.flatten(0, 1),
        "num_items_in_batch": mask.sum(),
    }
    if "tis" in settings:
        inputs["importance_sampling_ratio"] = is_ratio.clamp(max=settings["tis"])
    theirs = grpo_trainer.GRPOTrainer._compute_loss(host, host.model, inputs)
    theirs.backward()
    assert_close(ours, theirs.detach(), 1e-7)
    assert_close(x.grad, y.grad, 1e-7)
    assert x.grad.abs().max() > 1e-3
