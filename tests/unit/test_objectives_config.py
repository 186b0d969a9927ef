"""Overrides, what they are refused for, what an objective needs, and a part of one's own."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_toy import (
    MASK,
    OLD,
    POLICY,
    REWARDS,
    advantages_of,
    assert_close,
    loss_of,
    prepared,
    toy_batch,
)
from pydantic import ValidationError

from rayrl.objectives import ObjectiveConfig, build, preset, presets, rehearse
from rayrl.objectives.config import plan_with
from rayrl.objectives.inject import bind
from rayrl.objectives.inputs import INPUTS
from rayrl.objectives.objective import Objective
from rayrl.objectives.override import override
from rayrl.objectives.parts import functions, resolve
from rayrl.objectives.plan import SLOTS, Phases, Plan, part
from rayrl.objectives.presets import (
    ALTERNATIVES,
    PRESETS,
    named_parameters,
    named_parts,
    plans_of,
)
from rayrl.objectives.signature import defaults
from rayrl.own_modules import NotHereError


def test_importing_and_configuring_needs_no_torch() -> None:
    code = (
        "import sys, rayrl.objectives as o; "
        "o.presets(); o.Plan(surrogate=o.part('nll')); o.GroupBatch; "
        "o.ObjectiveConfig(preset='gspo', set={'clip_low': 1e-3}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recommended_presets_come_first() -> None:
    assert presets()[:5] == ["dapo", "dr_grpo", "grpo", "nsc", "scst"]
    assert len(presets()) == len(set(presets())) == len(PRESETS)


def test_a_parameter_is_overridden_wherever_it_is_set() -> None:
    objective = preset("grpo", clip_high="0.28", kl_coef=0)
    assert objective.plan.parameters()["clip_high"] == 0.28
    assert objective.needs == frozenset()
    config = ObjectiveConfig(preset="grpo", set={"clip_high": 0.28, "kl_coef": 0})
    assert build(config, max_tokens=24).plan == objective.plan


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dapo", {}),
        ("dr_grpo", {}),
        ("drpo_decoupled", {}),
        ("grpo", {"reducer": "constant_length"}),
    ],
)
def test_the_longest_caption_is_that_of_the_run_unless_it_is_set(
    name: str, overrides: dict[str, Any]
) -> None:
    def max_tokens(**more: Any) -> int:
        config = ObjectiveConfig(preset=name, set={**overrides, **more})
        return int(build(config, max_tokens=60).plan.parameters()["max_tokens"])

    assert max_tokens() == 60
    assert max_tokens(max_tokens="30") == 30


def test_captions_within_the_runs_length_are_not_punished_by_dapo() -> None:
    long = torch.arange(60).expand(1, 4, 60) < torch.tensor([10, 30, 40, 54])[None, :, None]
    logprobs = torch.where(long, -1.0, 0.0).double()
    same = {"token_ids": long.long(), "rollout_logprobs": logprobs, "old_logprobs": logprobs}
    batch = toy_batch(mask=long, ref_logprobs=None, **same)
    fields = prepared(build(ObjectiveConfig(preset="dapo"), max_tokens=60), batch).fields
    assert_close(fields["rewards"], REWARDS)


def test_a_slot_is_overridden_by_name_by_function_and_by_part() -> None:
    assert_close(
        advantages_of("grpo", toy_batch(), advantage="leave_one_out"), (REWARDS - 0.7) * 4 / 3
    )
    assert_close(
        advantages_of("grpo", toy_batch(), advantage="group_center+over_batch_std", eps=0.0),
        (REWARDS - 0.7) / REWARDS.std(correction=0),
    )

    def centred_on(rewards: torch.Tensor, *, middle: float = 1.0) -> torch.Tensor:
        return rewards - middle

    assert_close(advantages_of("grpo", toy_batch(), advantage=centred_on), REWARDS - 1.0)
    half = part(centred_on, middle=0.5)
    assert_close(advantages_of("grpo", toy_batch(), advantage=half), REWARDS - 0.5)
    assert_close(advantages_of("grpo", toy_batch(), advantage=half, middle="0.25"), REWARDS - 0.25)
    assert preset("grpo", regularizers="").needs == frozenset()


def steep(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    *,
    power: float,
    both: bool = False,
    eps: float = 1.0,
    scale=None,
) -> torch.Tensor:
    weight = power * (scale or 1.0) + eps * both
    return -advantages * log_ratio * weight


OWN = {"surrogate": f"{__name__}:steep", "bounds": ""}


def test_keyword_only_parameters_of_ones_own_part_are_set_in_any_order() -> None:
    settings = {"power": "2", "both": "true", "scale": "0.5", "eps": "1e-1"}
    for overrides in ({**OWN, **settings}, {**settings, **OWN}):
        objective = preset("grpo", **overrides)
        surrogate = objective.plan.surrogate
        assert surrogate.params == {"power": 2.0, "both": True, "scale": 0.5, "eps": 0.1}
        # One name, one value, also where two parts have it.
        assert objective.plan.advantage[0].params["eps"] == 0.1
        spelled = preset(
            "grpo",
            **{**OWN, "surrogate": lambda log_ratio, advantages: -1.1 * advantages * log_ratio},
            eps=0.1,
        )
        assert loss_of(objective) == pytest.approx(loss_of(spelled))


def test_a_parameter_without_a_value_is_refused_until_it_is_set() -> None:
    with pytest.raises(ValueError, match="steep: parameter 'power' has no value; set it, power="):
        preset("grpo", **OWN)
    with pytest.raises(ValueError, match="power: got 'much', want float"):
        preset("grpo", **OWN, power="much")
    with pytest.raises(ValueError, match="unknown slot or parameter 'powr'; did you mean power"):
        preset("grpo", **OWN, powr=1.0)


def longest(rewards: torch.Tensor, *, max_tokens: int) -> torch.Tensor:
    return rewards / max_tokens


def test_the_longest_caption_of_the_run_is_that_of_ones_own_part_too() -> None:
    config = ObjectiveConfig(preset="nsc", set={"aggregate": f"{__name__}:longest"})
    assert build(config, max_tokens=60).plan.parameters()["max_tokens"] == 60


def test_a_length_that_ones_own_part_says_itself_stays() -> None:
    def short(rewards: torch.Tensor, *, max_tokens: int = 50) -> torch.Tensor:
        return rewards / max_tokens

    for own in (short, part(longest, max_tokens=40)):
        said = build(ObjectiveConfig(set={"advantage": own}), max_tokens=16).plan.parameters()
        assert said.get("max_tokens") in (None, 40)


def test_items_of_a_list_for_ones_own_part_keep_their_type() -> None:
    def several(rewards: torch.Tensor, *, sizes: tuple[int, ...] = ()) -> torch.Tensor:
        return rewards

    for given in ([1, 2], (1, 2), "1+2"):
        assert preset("nsc", advantage=several, sizes=given).plan.parameters()["sizes"] == (1, 2)
    assert preset("nsc", advantage=several, sizes="a+0.5").plan.parameters()["sizes"] == ("a", 0.5)
    with pytest.raises(ValueError, match="ddof: got 'inf', want int"):
        preset("grpo", ddof="inf")


def test_every_parameter_of_a_named_part_may_be_set() -> None:
    """Also where the preset leaves it at its default; and it cannot be meant for another part."""
    for slot in SLOTS:
        for name, function in functions(slot).items():
            if name in named_parts()[slot]:
                assert set(named_parameters()[slot][name]) == set(defaults(function)), name
    objective = preset("grpo", dual_clip="3", ratio_cap=4)
    assert objective.plan.surrogate.params == {"dual_clip": 3.0, "ratio_cap": 4.0}
    far = torch.where(MASK, OLD + 3, 0.0)
    assert loss_of("grpo", policy=far, overrides={"dual_clip": 3.0}) < loss_of("grpo", policy=far)


def test_a_run_whose_functions_are_not_here_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ObjectiveConfig(set={"advantage": "no_such:thing", "q": 0.5})
    with pytest.raises(NotHereError, match="slot advantage: no module 'no_such'; want it"):
        build(config, max_tokens=24)
    # Nor where they were changed since, or broken.
    (tmp_path / "my_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_broken:f", "math:no_such"):
        with pytest.raises(
            NotHereError, match=r"cannot import 'my_broken'.*line 1|has no 'no_such'"
        ):
            build(ObjectiveConfig(set={"advantage": name}), max_tokens=24)
    with pytest.raises(NotHereError, match="no module"):
        build(config, max_tokens=24)


PLAN = Plan(advantage=(part("leave_one_out"),), surrogate=part("reinforce"))
TURNS = Phases((PLAN, PLAN), (2, 1))
NSC = replace(PRESETS["nsc"], plan=PLAN)


def test_a_plan_of_ones_own_is_named_as_a_preset_is() -> None:
    for name in ("PLAN", "NSC"):
        objective = preset(f"{__name__}:{name}", reducer="sequence_mean_token_sum")
        assert objective.plan == replace(PLAN, reducer=part("sequence_mean_token_sum"))
    config = ObjectiveConfig(preset=f"{__name__}:TURNS", set={"phase_steps": "1+4"})
    assert len(build(config, max_tokens=24).phases()) == 2
    with pytest.raises(ValueError, match=r"preset 'math:pi' is a float, want a Plan"):
        ObjectiveConfig(preset="math:pi")
    with pytest.raises(ValueError, match="preset: module 'math' has no 'plan'"):
        preset("math:plan")
    # As with its functions: said where the objective is built.
    elsewhere = ObjectiveConfig(preset="no_such:plan")
    with pytest.raises(NotHereError, match="preset: no module 'no_such'"):
        build(elsewhere, max_tokens=24)


def parts_of(name: str, slot: str, **overrides: Any) -> list[str]:
    """What fills a slot in each of the phases."""
    plan = plan_with(name, overrides)
    plans = plan.plans if isinstance(plan, Phases) else (plan,)
    return [", ".join(str(item) for s, item in one.parts() if s == slot) for one in plans]


def test_a_slot_is_overridden_in_the_phases_that_fill_it_or_in_all() -> None:
    def parts(slot: str, **overrides: Any) -> list[str]:
        return parts_of("veripo_schedule", slot, **overrides)

    refill = "refill(min_spread=0.1, refill_rounds=3)"
    assert parts("rollout", min_spread="0.1", rollout="refill") == [refill, refill]
    masked = "token_masked(is_low=0.6, is_high=2.0)"
    assert parts("mismatch", is_low=0.6, mismatch="token_masked") == [masked, ""]
    assert parts("mismatch", mismatch="") == ["", ""]
    assert parts("reducer", reducer="sequence_mean_token_sum") == [
        "sequence_mean_token_sum",
        "token_mean",
    ]
    for overrides in (
        {"rollout": "refill"},
        {"mismatch": "token_masked"},
        {"regularizers": "kl_k1"},
    ):
        rehearse(preset("veripo_schedule", **overrides), ["cider_d"], 4)


def test_a_part_that_is_named_again_keeps_its_parameters() -> None:
    assert preset("grpo_deepseekmath", advantage="group_normalize").plan == (
        preset("grpo_deepseekmath").plan
    )
    more = parts_of("grpo_deepseekmath", "advantage", advantage="group_normalize+over_batch_std")
    assert more == ["group_normalize(eps=0.0001, ddof=1), over_batch_std(eps=1e-06)"]
    own = {"surrogate": part(f"{__name__}:steep", power=3.0), "bounds": ""}
    plan = override(preset("grpo", **own).plan, OWN)
    assert str(plan.surrogate) == f"{__name__}:steep(power=3.0)"


class Baseline:
    def __init__(self, baseline: float) -> None:
        self.baseline = baseline

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        return rewards - self.baseline


def minus(rewards: torch.Tensor, *, baseline: float) -> torch.Tensor:
    return rewards - baseline


def test_a_part_may_be_a_partial_function_or_an_object() -> None:
    bound = preset("nsc", advantage=functools.partial(minus, baseline=0.5))
    assert_close(prepared(bound, toy_batch()).fields["advantages"][0, 0, :, 0], REWARDS[0] - 0.5)
    assert bound.plan.advantage[0].name == "minus"
    other = preset("nsc", advantage=Baseline(0.25))
    assert_close(prepared(other, toy_batch()).fields["advantages"][0, 0, :, 0], REWARDS[0] - 0.25)
    assert other.plan.advantage[0].name == "Baseline"


def test_inputs_that_cannot_be_given_by_name_are_refused() -> None:
    def first(rewards: torch.Tensor, /) -> torch.Tensor:
        return rewards

    with pytest.raises(ValueError, match="advantage first: 'rewards' is positional-only, and inpu"):
        preset("nsc", advantage=first)


def test_values_from_the_command_line_take_the_type_of_the_default() -> None:
    def parameters(name: str, **overrides: Any) -> dict[str, Any]:
        return preset(name, **overrides).plan.parameters()

    assert parameters("constrained_grpo", per_component="false")["per_component"] is False
    got = parameters("constrained_grpo", limits="truncated:0.1+too_long:0.2")["limits"]
    assert got == {"truncated": 0.1, "too_long": 0.2}
    got = parameters("bapo_adaptive_clip", low_range="0.5+0.9")["low_range"]
    assert got == (0.5, 0.9)
    assert parameters("dr_grpo", max_tokens="30")["max_tokens"] == 30
    phases = preset("veripo_schedule", phase_steps="20+5", clip_high="0.3")
    assert phases.initial_state() == {"step": 0}


WRONG: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("grpoo", {}, "unknown preset 'grpoo'; did you mean .*grpo"),
    ("dcpo", {}, "unknown preset 'dcpo'; did you mean dcpo_dynamic_clip, "),
    ("igpo", {}, "did you mean igpo_info_gain, igpo_inpainting, "),
    ("xyz", {}, "unknown preset 'xyz'; 132 are known, docs/objectives.md lists them"),
    ("grpo", {"kl_coeff": 0.1}, "preset grpo: unknown slot or parameter 'kl_coeff'; .* kl_coef"),
    ("nsc", {"kl_coef": 0.1}, "'kl_coef' here: .* to have it, regularizers=kl_k3 kl_coef=0.1"),
    ("grpo", {"entropy_coef": 0.1}, r"to have it, regularizers=kl_k3\+entropy_bonus entropy_coef"),
    ("grpo", {"advantage": "leave_one"}, "part 'leave_one' for slot advantage; .* leave_one_out"),
    ("grpo", {"surrogat": "min_clip"}, "unknown slot or parameter 'surrogat'; .* surrogate"),
    ("grpo", {"clip_low": "low"}, "clip_low: got 'low', want float"),
    ("dr_grpo", {"max_tokens": 3.5}, "max_tokens: got 3.5, want int"),
    ("grpo", {"kl_coef": True}, "kl_coef: got True, want float"),
    ("grpo", {"ratio": "token+sequence"}, "slot ratio holds one part, got token, sequence"),
    ("grpo", {"surrogate": ""}, "slot surrogate is empty"),
    ("red_drop", {"statistics_of": "some"}, "statistics_of 'some': want 'all' or 'kept'"),
    ("grpo", {"advantage": {"a:b": {"q": 1}}}, "slot advantage: got {'a:b': .*, want the name of"),
    ("grpo", {"advantage": "mine.mean"}, "part 'mine.mean' .*; want module:function, mine:mean"),
    ("veripo_schedule", {"phase_step": "1+2"}, "slot or parameter 'phase_step'; .* phase_steps"),
    ("veripo_schedule", {"mismach": ""}, "unknown slot or parameter 'mismach'; .* mismatch"),
    ("veripo_schedule", {"phase_steps": "1+0"}, "want one number a plan, each at least 1"),
    ("bapo_adaptive_clip", {"low_range": "a+b"}, r"low_range: got 'a\+b', want tuple"),
    ("constrained_grpo", {"limits": "truncated"}, "limits: got 'truncated', want dict"),
    ("constrained_grpo", {"per_component": "maybe"}, "per_component: got 'maybe', want bool"),
)


@pytest.mark.parametrize(("name", "overrides", "message"), WRONG)
def test_what_does_not_exist_is_refused_with_what_was_meant(
    name: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name, **overrides)
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig(preset=name, set=overrides)


MISFITS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"bounds": ""}, "surrogate min_clip reads low, high, so the slot bounds must be filled"),
    ({"surrogate": "reinforce"}, "slot ratio is filled with token, but no other part reads"),
    ({"surrogate": "pair_mean"}, "pair_mean reads pair_losses, so the slot link must be filled"),
    ({"labels": "levels"}, "slot labels is filled with levels, but no other part reads"),
    ({"link": "logistic"}, "slot link is filled with logistic, but no other part reads"),
)


@pytest.mark.parametrize(("overrides", "message"), MISFITS)
def test_parts_that_do_not_fit_together_are_refused(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"objective grpo: .*{message}"):
        preset("grpo", **overrides)


def policy(policy_logprobs: torch.Tensor) -> torch.Tensor:
    return policy_logprobs


def test_losses_that_would_have_the_same_name_are_refused() -> None:
    message = r"objective grpo: regularizers kl_k3\+kl_k3: kl_k3 is there 2 times, want once"
    with pytest.raises(ValueError, match=message):
        preset("grpo", regularizers="kl_k3+kl_k3")
    with pytest.raises(ValueError, match="regularizers policy: that name is the policy loss's"):
        preset("grpo", regularizers=policy)
    # One that is switched off counts nothing and reports nothing.
    twice = [part("kl_k3", kl_coef=0.0), part("kl_k3", kl_coef=0.1)]
    assert loss_of("grpo", overrides={"regularizers": twice}) == pytest.approx(
        loss_of("grpo", overrides={"kl_coef": 0.1})
    )


def test_a_pairwise_loss_behind_an_advantage_is_refused() -> None:
    with pytest.raises(ValueError, match="slot advantage is filled with group_center, but no"):
        preset("online_dpo", advantage="group_center")


UNREAD: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("disco_log_likelihood", {"aggregate": "win_rate"}, "slot aggregate is filled with win_rate"),
    ("pacs", {"aggregate": "win_rate"}, "slot aggregate"),
    ("superhf_best_of_n", {"aggregate": "win_rate"}, "slot aggregate"),
    ("trpa_levels", {"aggregate": "win_rate"}, "slot aggregate"),
    ("mah_dpo_heads", {"aggregate": "worst_of"}, "slot aggregate"),
    ("online_dpo", {"mask": "sampled_only"}, "slot mask is filled with sampled_only"),
    ("pmd_mean", {"mask": "sampled_only"}, "slot mask"),
    ("brain_posterior", {"mask": "sampled_only"}, "slot mask"),
    (
        "online_dpo",
        {"reducer": "sequence_mean_token_sum"},
        "slot reducer is filled with sequence_m",
    ),
    ("online_dpo", {"statistics_of": "kept"}, "statistics_of is kept, but no part of labels,"),
)


@pytest.mark.parametrize(("name", "overrides", "message"), UNREAD)
def test_what_is_filled_and_never_read_is_refused(
    name: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"objective {name}: {message}"):
        preset(name, **overrides)


LONG_IS_GOOD = {
    "aggregate": "overlong_penalty",
    "overlong_coef": -50.0,
    "max_tokens": 3,
    "grace_tokens": 1,
}
CUT = {"select": "not_truncated"}
READ: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    # By a regularizer: of tokens, and of a number that it makes of them.
    ("mpo_maximum_preference", {}, {"reducer": "sequence_mean_token_sum"}),
    ("mpo_maximum_preference", {}, {"mask": "sampled_only"}),
    ("disco_log_likelihood", {}, {"mask": "sampled_only"}),
    # By pairs and losses that read rewards, also where captions are selected by those of before.
    ("prdp_reward_difference", {}, {"aggregate": "win_rate"}),
    ("online_dpo", {}, LONG_IS_GOOD),
    ("online_dpo", CUT, CUT | LONG_IS_GOOD),
    # By labels.
    ("pacs", CUT, CUT | {"statistics_of": "kept"}),
)


@pytest.mark.parametrize(("name", "before", "after"), READ)
def test_what_is_filled_and_read_changes_the_loss(
    name: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    best_is_cut = torch.tensor([[False, False, False, True]])
    batch = toy_batch(forced=MASK & (MASK.cumsum(-1) == 1), truncated=best_is_cut)
    # Below the old policy, beyond every trust region.
    moved = OLD - 0.1 * torch.arange(1.0, 4.0, dtype=OLD.dtype)
    losses = [loss_of(name, batch, moved, overrides) for overrides in (before, after)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_the_reducer_that_every_plan_has_is_not_refused_where_nothing_reads_it() -> None:
    assert loss_of("online_dpo", overrides={"reducer": "token_mean"}) == loss_of("online_dpo")
    # Nor where the regularizer that would read it is switched off.
    with_kl, without = (
        loss_of("mpo_maximum_preference", overrides=o) for o in ({}, {"kl_coef": 0.0})
    )
    assert without != pytest.approx(with_kl, rel=1e-6)


def test_an_advantage_part_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="whiten_captions changes the advantages of the part bef"):
        preset("grpo", advantage="whiten_captions")


def test_rewards_of_tokens_and_of_captions_are_not_confused() -> None:
    with pytest.raises(ValueError, match=r"one number a caption, got \(1, 4, 3\)"):
        loss_of("grpo", overrides={"aggregate": "terminal"})
    with pytest.raises(ValueError, match=r"one number a token, \(1, 4, 3\), got \(1, 4\)"):
        loss_of("reinforce_plus_plus", overrides={"aggregate": ""})


def test_token_credit_in_front_of_a_loss_of_captions_is_refused() -> None:
    objective = preset("pmd_mean", advantage="prefix_tree")
    with pytest.raises(ValueError, match="loss of whole captions"):
        loss_of(objective)


def test_weights_of_tokens_on_a_loss_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mismatch token_truncated weighs tokens, but the loss"):
        loss_of("online_dpo", overrides={"mismatch": "token_truncated"})


def test_a_part_says_what_it_cannot_read() -> None:
    def needy(rewards: torch.Tensor, greedy_reward: torch.Tensor) -> torch.Tensor:
        return rewards - greedy_reward

    message = "advantage needy reads 'greedy_reward', which nothing provides; .* greedy_rewards"
    with pytest.raises(ValueError, match=message):
        preset("grpo", advantage=needy)
    with pytest.raises(ValueError, match=r"advantage group_normalize: no parameter 'esp'; .* eps"):
        Objective("x", Plan(advantage=(part("group_normalize", esp=1),), surrogate=part("nll")))
    with pytest.raises(ValueError, match="bounds fixed: parameter 'clip_high' has no value"):
        resolve("bounds", part("fixed", clip_low=0.1))


def test_needs_are_what_the_parts_read() -> None:
    needs = {
        "grpo": {"ref_logprobs"},
        "scst": {"greedy_rewards"},
        "nsc": set(),
        "gdpo": {"terms"},
        "bapo_adaptive_clip": {"whole_minibatch"},
        "xrpo_novelty": {"old_logprobs"},
        "reward_ranker": {"caption_features"},
        "high_entropy_tokens": {"entropy"},
        "rloo": {"ref_logprobs", "old_logprobs"},
        "ppo": {"values", "policy_values"},
        "online_dpo": {"ref_logprobs"},
    }
    for name, want in needs.items():
        assert preset(name).needs == want, name


def needy_planner(take: Any) -> list[Any]:
    return []


def test_a_missing_need_is_explained_in_words() -> None:
    with pytest.raises(ValueError, match=r"scst needs greedy_rewards \(\[P\] reward of the "):
        preset("scst").check({"ref_logprobs"})
    with pytest.raises(ValueError, match=r"micro-batches must be as large .*for bounds balanced"):
        preset("bapo_adaptive_clip").check(set())
    with pytest.raises(ValueError, match=r"rollout needy_planner does not read 'drawn'"):
        preset("grpo", rollout=needy_planner)
    with pytest.raises(ValueError, match="scst needs greedy_rewards"):
        prepared(preset("scst"), toy_batch())
    with pytest.raises(ValueError, match="grpo_entropy: the loss needs entropy"):
        loss_of("grpo_entropy")
    preset("grpo").check({"ref_logprobs", "greedy_rewards"})
    with pytest.raises(ValueError, match="phase 1 needs ref_logprobs"):
        preset("veripo_schedule").check(set())


def test_rewards_that_are_not_finite_name_their_image() -> None:
    rewards = REWARDS.clone()
    rewards[0, 2] = torch.nan
    with pytest.raises(ValueError, match=r"image image 0: rewards \[0.2, 0.5, nan, 1.2\]"):
        prepared(preset("nsc"), toy_batch(rewards))
    hidden = toy_batch(rewards, valid=torch.tensor([[True, True, False, True]]))
    assert torch.isfinite(prepared(preset("nsc"), hidden).fields["advantages"]).all()


def test_a_valid_caption_without_tokens_is_refused() -> None:
    mask = toy_batch().mask.clone()
    mask[0, 1] = False
    with pytest.raises(ValueError, match="image image 0: a valid caption without tokens"):
        prepared(preset("nsc"), toy_batch(mask=mask))


def test_fields_of_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"old_logprobs of shape \(1, 4, 2\), want \(1, 4, 3\)"):
        toy_batch(old_logprobs=torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="greedy_rewards of 2 prompts, want 1"):
        toy_batch(greedy_rewards=torch.zeros(2))
    with pytest.raises(ValueError, match=r"mask of dtype torch.float64, want a tensor of torch.bo"):
        toy_batch(mask=MASK.double())
    with pytest.raises(ValueError, match=r"rewards of dtype float64, want a tensor of torch.float"):
        toy_batch(rewards=REWARDS).__class__(**{**vars(toy_batch()), "rewards": REWARDS.numpy()})
    with pytest.raises(ValueError, match="2 image_ids, want 1"):
        toy_batch(image_ids=("a", "b"))


def test_parameters_of_a_preset_have_names_of_their_own() -> None:
    """So that an override by name alone can only mean one thing (or one thing on purpose)."""
    shared = {"beta", "kl_max", "main_term", "min_spread"}
    for name, one in PRESETS.items():
        for plan in plans_of(one):
            names = [key for _, item in plan.parts() for key in item.params]
            twice = {key for key in names if names.count(key) > 1}
            assert twice <= shared | {"eps", "max_tokens"}, f"{name}: {twice}"


def test_every_part_is_reachable_by_name() -> None:
    """A function that no preset and no alternative names could not be chosen."""
    for slot in SLOTS:
        known = set(functions(slot))
        others = set().union(
            *(named_parts()[other] for other in SLOTS if functions(other) == functions(slot))
        )
        assert known <= others, f"{slot}: {known - others}"
    for slot, parts in ALTERNATIVES.items():
        for item in parts:
            resolve(slot, item)


def test_inputs_of_all_parts_have_known_names() -> None:
    for slot in SLOTS:
        known = {name for name, one in INPUTS.items() if slot in one.slots}
        for name, function in functions(slot).items():
            params = {
                key: value.default
                for key, value in inspect.signature(function).parameters.items()
                if value.kind is value.KEYWORD_ONLY
            }
            bound = bind(slot, part(function, **dict.fromkeys(params, 1)), function)
            assert set(bound.inputs) <= known, f"{slot} {name}"


def test_state_is_flat_json() -> None:
    for name in ("dcpo_dynamic_clip", "constrained_grpo", "grpo_adaptive_kl", "ppo_c_calibrated"):
        objective = preset(name)
        state, ready = objective.prepare(objective.initial_state(), toy_batch())
        objective.loss(ready, POLICY, ready.normalizer())
        state, _ = objective.control(state, {"objective/kl_k3": 0.1})
        back = json.loads(json.dumps(state))
        first = objective.prepare(state, toy_batch())[1].fields["advantages"]
        assert_close(objective.prepare(back, toy_batch())[1].fields["advantages"], first, 0.0)
