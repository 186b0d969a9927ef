"""What is not finite before the first update of a step costs the step and not the run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl.checkpoint import load_checkpoint
from rayrl.config import Config, LearnerConfig, ModelConfig
from rayrl.learner.batches import group_batch
from rayrl.learner.examine import examine, examine_folder
from rayrl.learner.finite import bad_fields
from rayrl.objectives import preset
from rayrl.objectives.objective import Objective
from rayrl.objectives.plan import Phases
from rayrl.objectives.schedule import Schedule
from rayrl.skipped import save_replay
from tests.unit.test_learner import batch, largest_difference, learner, parameters
from tests.unit.test_skipped_steps import moments, spoil_image

__all__ = ["batch"]


@pytest.mark.parametrize(
    ("objective", "field"),
    [
        ("ppo", "values"),
        ("rloo", "ref_logprobs"),
        ("otb", "collision"),
        ("chi_squared_reward", "old_logprobs"),
        ("xrpo_novelty", "old_logprobs"),
    ],
)
def test_a_step_that_cannot_be_prepared_is_skipped(tiny_folder, batch, tmp_path, objective, field):
    subject = learner(tiny_folder, objective=objective, inner_epochs=2, minibatches=3)
    subject.update(batch)
    before, state, carried = parameters(subject), moments(subject), subject._objective_state
    reference = subject.policy.reference
    if field == "ref_logprobs":
        reference.get_submodule("model.connector").register_forward_hook(
            lambda module, args, output: torch.where(
                torch.arange(len(output))[:, None, None] == 4, math.nan, output
            )
        )
    else:
        handle = spoil_image(subject, batch, 4)
    report = subject.update(batch)
    assert (report.step, report.weight_version) == (2, 2)
    assert f"{field} (of " in report.problem and report.problem.endswith(" for prompts green/1")
    assert largest_difference(before, parameters(subject)) == 0.0
    assert all(np.array_equal(state[name], value) for name, value in moments(subject).items())
    assert report.metrics["learner/skipped"] == 1
    assert report.metrics["learner/skipped_in_a_row"] == 1
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert report.advantages.shape == batch.rewards.shape and not report.advantages.any()
    after = subject._objective_state
    assert after["step"] == 2 and {**after, "step": 1} == carried
    config = Config(model=ModelConfig(path=str(tiny_folder)), learner=LearnerConfig(lr=1e-3))
    place = save_replay(tmp_path, subject.replay(), config)
    lines = list(examine(subject, load_checkpoint(place)))
    assert lines[1] == f"in the run: {report.problem}"
    assert any(line.startswith(field) and "first for prompt green/1" in line for line in lines[2:])
    bad = [line for line in lines if line.startswith("prompt ")]
    assert not any(line.startswith("everything") for line in lines)
    if field == "ref_logprobs":
        assert not bad  # the policy itself is whole
        return
    assert len(bad) == 1 and bad[0].startswith("prompt green/1: loss ")
    assert "first in the output of model.connector" in bad[0]
    handle.remove()
    assert subject.update(batch).metrics["learner/skipped_in_a_row"] == 0


def test_what_an_objective_reads_in_the_loss_alone_costs_its_minibatches(tiny_folder, batch):
    subject = learner(tiny_folder, minibatches=3, micro_batch_images=1)
    spoil_image(subject, batch, 4)
    report = subject.update(batch)
    assert report.metrics["learner/skipped"] == 1
    assert report.metrics["learner/update_ratio"] > 0


def test_advantages_that_overflow_name_their_prompts_and_cost_the_step(
    tiny_folder, batch, monkeypatch
):
    subject = learner(tiny_folder)
    original = Objective.prepare

    def overflow(self, state, groups):
        rewards = groups.rewards.clone()
        rewards[[1, 4], :3] = 3e38  # whose sum no float32 holds
        return original(self, state, replace(groups, rewards=rewards))

    monkeypatch.setattr(Objective, "prepare", overflow)
    report = subject.update(batch)
    assert report.problem == (
        "advantages of step 0 are not finite for prompts "
        f"{batch.prompt_ids[1]}, {batch.prompt_ids[4]}"
    )
    assert subject.replay().meta["images"] == list(range(6))
    (line,) = list(examine(subject, subject.replay()))[2:]
    assert line == report.problem


def test_what_each_step_of_a_schedule_reads_before_its_loss():
    schedule = Schedule("two", Phases((preset("grpo").plan, preset("ppo").plan), (2, 1)))
    assert ["values" in schedule.prepare_reads(step) for step in range(4)] == [0, 0, 1, 0]
    assert "ref_logprobs" in preset("grpo").needs - preset("grpo").prepare_reads(0)


def test_captions_that_do_not_exist_may_have_any_value(tiny_folder, batch):
    given = group_batch(batch, "cpu")
    given.valid[0, 1] = False
    values = torch.zeros(batch.mask.shape)
    values[0, 1] = math.nan
    groups = replace(given, values=values)
    assert bad_fields(given, groups, {"values", "rewards"}) == ""
    values[0, 0, 2] = math.inf
    assert bad_fields(given, groups, {"values"}) == (
        f"values (of {values.numel()} values 5 nan, 1 infinite) for prompts {batch.prompt_ids[0]}"
    )
    assert bad_fields(given, groups, {"ref_logprobs"}) == ""


def test_a_broken_policy_is_examined_without_compiling_it(tiny_folder, batch, tmp_path):
    subject = learner(tiny_folder)
    name = "model.connector.modality_projection.proj.weight"
    with torch.no_grad():
        subject._named[name][0, 0] = math.nan
    assert subject.update(batch).problem
    compiled = LearnerConfig(lr=1e-3, compile=True)
    config = Config(model=ModelConfig(path=str(tiny_folder)), learner=compiled)
    place = save_replay(tmp_path, subject.replay(), config)
    lines = list(examine_folder(place, config))
    assert any(line.startswith(f"parameter {name}: ") for line in lines)
    assert sum("first in the output of model.connector" in line for line in lines) == 6
