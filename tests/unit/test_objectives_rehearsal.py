"""Objectives tried on made-up groups: what cannot work is said before a run."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from objectives_toy import REWARDS, assert_close, prepared, toy_batch
from torch import Tensor

from rayrl.config import Config
from rayrl.learner.provided import check_objective
from rayrl.objectives import preset, presets
from rayrl.objectives.rehearsal import learns_from_one, rehearse

# Those that name their terms, or take a number of them.
TERMS = {
    "asr_word_accuracy": ["word_accuracy"],
    "reward_model": ["reward_model"],
}
TWO = ["cider_d", "clip_score"]


def test_every_preset_can_be_rehearsed() -> None:
    refused = {}
    for name in presets():
        for group_size in (2, 5):
            try:
                rehearse(preset(name), TERMS.get(name, TWO), group_size)
            except ValueError as error:
                refused[name, group_size] = str(error)
    assert refused == {}


@pytest.mark.parametrize(
    ("name", "overrides", "terms", "message"),
    [
        ("modpo", {"main_term": "cidr"}, TWO, "main_term: no reward term 'cidr'; did you mean ci"),
        ("reward_model", {}, TWO, "no reward term 'reward_model'; known are cider_d, clip_score"),
        ("harmonic_reward", {}, ["cider_d"], "wants two terms, got cider_d"),
        ("constrained_grpo", {"limits": "long:0.2"}, TWO, "no cost 'long', the batch has cider_d,"),
        ("pmd_mean", {"advantage": "prefix_tree"}, TWO, "advantages of single tokens"),
        ("krpo_kalman", {"scope": "batch"}, TWO, "scope 'batch': want 'group' or 'stream'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(name, overrides, terms, message) -> None:
    objective = preset(name, **overrides)
    with pytest.raises(
        ValueError, match=rf"objective {name}, tried on groups of 4 .*: .*{message}"
    ):
        rehearse(objective, terms, 4)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sso", {"step_size": 0}, "the loss policy is nan, want a finite one"),
        ("sapo", {"gate_positive": 0}, "the loss policy is -inf"),
        ("modpo", {"main_weight": 0}, "the loss policy is inf"),
        ("brain_posterior", {"posterior_temperature": 0}, "its gradient in the policy is not"),
        ("disco_log_likelihood", {"contrast_temperature": 0}, "the loss policy is nan"),
        ("reg_grpo", {"spread_floor": 0}, "the loss policy is nan"),
        ("dr_grpo", {"max_tokens": 0}, "constant_length: max_tokens 0, want at least 1"),
        ("drpo_decoupled", {"max_tokens": 0}, "shorter_good: max_tokens 0, want at least 1"),
        ("grpo_adaptive_kl", {"kl_coef": 0}, "metric objective/kl_k3, which this objective does n"),
        ("grpo_adaptive_entropy", {"entropy_coef": 0}, "the metric objective/entropy, which this"),
    ],
)
def test_an_update_that_could_not_be_taken_is_refused(name, overrides, message) -> None:
    with pytest.raises(ValueError, match=rf"objective {name}, tried on groups of 4 .*{message}"):
        rehearse(preset(name, **overrides), TWO, 4)


def test_a_loss_without_a_gradient_is_refused() -> None:
    def constant(policy_logprobs: Tensor) -> Tensor:
        return torch.ones_like(policy_logprobs)

    alone = {"surrogate": constant, "advantage": "", "mismatch": ""}
    with pytest.raises(ValueError, match="the loss does not depend on the policy"):
        rehearse(preset("nsc", **alone), TWO, 4)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "self_cider_diversity",
            {"rollout": "allocate"},
            "needs similarity, but rollout allocate joins captions to groups, which then have no",
        ),
        (
            "seppo_earlier",
            {"select": "satisfies_judges"},
            "needs earlier and judge_ok, but captions of an earlier checkpoint come without judge_",
        ),
    ],
)
def test_fields_that_joined_captions_do_not_have_are_refused(name, overrides, message) -> None:
    def config(**objective) -> Config:
        reward = {"terms": {"cider_d": 1.0}, "constraints": {"cider_d": ">= 0"}}
        return Config.model_validate({"objective": objective, "reward": reward})

    check_objective(config(preset=name))
    check_objective(config(preset=name, set={"rollout": "refill"}))
    with pytest.raises(ValueError, match=f"objective {name} {message}"):
        check_objective(config(preset=name, set=overrides))


def test_one_caption_is_enough_where_captions_of_a_group_are_not_compared() -> None:
    enough = {n for n in presets() if learns_from_one(preset(n), TERMS.get(n, TWO))}
    assert enough == {
        *("a_star_po", "cgpo_crpg", "clip_reward_scst", "dcpo_dynamic_clip", "krpo_kalman"),
        *("ngrpo_virtual_best", "poad_action_decomposition", "ppo", "ppo_max", "raft_crraft"),
        *("reinforce", "reinforce_plus_plus", "remax", "scst", "seppo_earlier", "t_ppo_truncated"),
        "vgpo_value_anchor",
    }
    assert not learns_from_one(preset("grpo", regularizers="kl_k1"), TWO)
    # What it leaves out depends on how log-probs vary.
    assert learns_from_one(preset("clip_cov", advantage="raw_reward"), TWO)


def test_a_run_with_one_caption_an_image_says_so_before_it_starts() -> None:
    def config(name: str, **overrides) -> Config:
        objective = {"preset": name, "set": overrides}
        return Config.model_validate({"objective": objective, "train": {"group_size": 1}})

    message = "train.group_size 1: objective {} compares the captions of a group, so one caption"
    for name in ("grpo", "rwr_softmax", "superhf_best_of_n", "pass_at_k", "copo_consistency"):
        with pytest.raises(ValueError, match=message.format(name)):
            check_objective(config(name))
    for name in ("ppo", "reinforce_plus_plus", "scst"):
        check_objective(config(name))
    # What is wrong whatever the size is not taken for that.
    with pytest.raises(ValueError, match="limits: no cost 'long'"):
        check_objective(config("constrained_grpo", limits="long:0.2"))


def test_a_part_of_ones_own_is_rehearsed_too() -> None:
    def wrong(rewards: Tensor) -> Tensor:
        return rewards @ torch.ones(2)

    with pytest.raises(ValueError, match=r"objective nsc, tried on groups of 5 .*: size mismatch"):
        rehearse(preset("nsc", advantage=wrong), TWO, 5)


@pytest.mark.parametrize(
    ("slot", "function", "message"),
    [
        ("advantage", lambda rewards: None, "returned None, want a tensor [P,G] or [P,G,T] or"),
        ("advantage", lambda rewards: rewards.numpy(), "returned a numpy.ndarray, want a tensor"),
        ("advantage", lambda rewards: rewards.mean(1), "returned a tensor of shape (3,), want [P"),
        ("advantage", lambda rewards: rewards.T, "(4, 3), want [P,G] or [P,G,T] or [P,G,1] or"),
        ("advantage", lambda rewards: rewards[..., None].expand(3, 4, 7), "P = 3, G = 4, T = 4"),
        ("advantage", lambda rewards, state: rewards, "want (result, new state), for it reads st"),
        ("advantage", lambda rewards: rewards.means(), "AttributeError: 'Tensor' object has no"),
        ("advantage", lambda rewards: rewards + "a", "TypeError: "),
        ("advantage", lambda rewards: rewards @ rewards, "RuntimeError: mat1 and mat2 shapes"),
        ("surrogate", lambda policy_logprobs: policy_logprobs[:, :, :2], "shape (3, 4, 2), want"),
        ("control", lambda metrics: metrics["kl"], "KeyError: 'kl'"),
        ("bounds", lambda old_logprobs: old_logprobs, "want a pair (low, high)"),
        ("reducer", lambda losses: losses.sum(-1), "shape (3, 4), want []"),
    ],
)
def test_what_a_part_returns_is_checked_and_the_part_named(slot, function, message) -> None:
    others = {"ratio": "", "bounds": "", "advantage": ""} if slot == "surrogate" else {}
    said = rf"tried on .* cider_d: {slot} <lambda>.*{re.escape(message)}"
    with pytest.raises(ValueError, match=said):
        rehearse(preset("grpo", **{slot: function, **others}), ["cider_d"], 4)


def test_a_failing_part_is_named_in_a_run_too() -> None:
    def wrong(rewards: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    objective = preset("nsc", advantage=wrong)
    with pytest.raises(RuntimeError, match="out of memory") as failed:
        prepared(objective, toy_batch())
    assert failed.value.__notes__ == ["advantage wrong"]


def counting(rewards: Tensor, state: dict) -> tuple[Tensor, dict]:
    return rewards - state.get("n", 0), {"n": state.get("n", 0) + 1}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"seen": {1, 2}}, "state advantage remembering/seen: Object of type set is not JSON"),
        (
            {"mean": np.float32(3)},
            "state advantage remembering/mean: .* want JSON values, arrays or ten",
        ),
        ({"by": {1: 2.0}}, "state advantage remembering/by/1: a key of int, want str"),
    ],
)
def test_a_state_is_rehearsed_as_a_checkpoint_has_it(new, message) -> None:
    def remembering(rewards: Tensor, state: dict) -> tuple[Tensor, dict]:
        return rewards, new

    with pytest.raises(ValueError, match=f"objective grpo, tried on .*: {message}"):
        rehearse(preset("grpo", advantage=remembering), TWO, 4)


def test_a_state_that_comes_back_as_something_else_is_refused() -> None:
    def follows(rewards: Tensor, state: dict) -> tuple[Tensor, dict]:
        mean = state.get("mean", rewards.mean())
        return rewards, {"mean": mean.detach()}  # an array has none

    with pytest.raises(
        ValueError, match=r"after a checkpoint, .* as arrays: advantage follows: Attr"
    ):
        rehearse(preset("grpo", advantage=follows), TWO, 4)


def test_parts_of_one_name_remember_apart() -> None:
    objective = preset("nsc", aggregate=counting, advantage=counting)
    state, _ = objective.prepare(objective.initial_state(), toy_batch())
    assert state == {"step": 1, "aggregate counting": {"n": 1}, "advantage counting": {"n": 1}}
    with pytest.raises(ValueError, match="aggregate counting is there 2 times and remembers its"):
        preset("nsc", aggregate=[counting, counting])


def test_a_part_may_be_called_as_the_state_is() -> None:
    def step(rewards: Tensor, state: dict) -> tuple[Tensor, dict]:
        return counting(rewards, state)

    objective = preset("nsc", advantage=step)
    state, _ = objective.prepare(objective.initial_state(), toy_batch())
    state, _ = objective.prepare(state, toy_batch())
    assert state == {"step": 2, "advantage step": {"n": 2}}


def test_a_checkpoint_that_has_states_by_the_names_of_parts_goes_on() -> None:
    objective = preset("nsc", advantage=counting)
    state, ready = objective.prepare({"step": 4, "counting": {"n": 4}}, toy_batch())
    assert state == {"step": 5, "advantage counting": {"n": 5}}
    assert_close(ready.fields["advantages"][:, 0, :, 0], REWARDS - 4)


@pytest.mark.parametrize(
    ("decided", "message"),
    [
        (None, "returned None, want a mapping of coefficients, stop_epoch, scale_lr, extrap"),
        ({"stop": True}, "decides 'stop'; did you mean stop_epoch?"),
        ({"lr": 0.1}, "decides 'lr'; did you mean scale_lr?"),
        ({"coefficients": {"kl_coeff": 0}}, "sets 'kl_coeff', which no part of the loss has; did"),
        ({"coefficients": {"eps": 0.0}}, "sets 'eps', which no part of the loss has"),
        ({"coefficients": {"kl_coef": "0"}}, "sets kl_coef to '0', want a number"),
        ({"coefficients": {"kl_coef": float("nan")}}, "sets kl_coef to nan, want a number"),
        ({"coefficients": [0.1]}, "returned coefficients [0.1], want numbers by name"),
        ({"extrapolate": 0.3}, "decides to extrapolate and does not read 'extrapolate'"),
    ],
)
def test_a_decision_that_nothing_carries_out_is_refused(decided, message) -> None:
    def controller(metrics: dict) -> object:
        return decided

    objective = preset("grpo", control=controller)
    with pytest.raises(ValueError, match=f"control controller {re.escape(message)}"):
        objective.control({"step": 1}, {"objective/kl_k3": 0.0})
    with pytest.raises(ValueError, match=f"objective grpo, tried on .*{re.escape(message)}"):
        rehearse(objective, TWO, 4)


def test_a_controller_remembers() -> None:
    def patient(metrics: dict, state: dict, *, patience: int = 2) -> tuple[dict, dict]:
        count = state.get("count", 0) + 1
        return {"stop_epoch": count >= patience}, {"count": count}

    objective = preset("grpo", control=patient)
    rehearse(objective, TWO, 4)
    state, decisions = objective.control({"step": 1}, {})
    assert decisions == {"stop_epoch": False}
    state, decisions = objective.control(state, {})
    assert decisions == {"stop_epoch": True}
    assert state == {"step": 1, "control patient": {"count": 2}}


def test_phases_are_rehearsed_each() -> None:
    with pytest.raises(ValueError, match="objective veripo_schedule, phase 0, tried on"):
        rehearse(preset("veripo_schedule"), TWO, 0)


def test_a_run_rehearses_with_its_own_terms_before_it_starts() -> None:
    check_objective(Config())
    gdpo = {"objective": {"preset": "modpo"}, "reward": {"terms": {"bleu": 1.0, "rouge_l": 1.0}}}
    with pytest.raises(ValueError, match="no reward term 'cider_d'; known are bleu, rouge_l"):
        check_objective(Config.model_validate(gdpo))
