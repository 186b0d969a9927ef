"""Planners on a made-up step, before a run."""

from __future__ import annotations

import inspect
import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_rounds import answer, asked, groups_of, rounds

from rayrl.config import Config
from rayrl.joins import extended
from rayrl.learner.provided import check_objective
from rayrl.objectives import preset
from rayrl.objectives.parts import functions
from rayrl.objectives.presets import named_parts
from rayrl.planner_rehearsal import joins_captions
from rayrl.planning import Request


def config(preset_name="grpo", **overrides) -> Config:
    objective = {"preset": preset_name, "set": overrides}
    return Config.model_validate({"objective": objective})


def rehearsed(planner, settings: Config | None = None) -> bool:
    (bound,) = preset("grpo", rollout=planner).planners(0)
    return joins_captions(bound, settings or Config())


def test_which_planners_join_captions_is_seen_from_their_requests():
    joining = set()
    for name in functions("rollout"):
        (planner,) = preset("grpo", rollout=named_parts()["rollout"][name]).planners(0)
        if joins_captions(planner, Config()):
            joining.add(name)
    sources = {name: inspect.getsource(f) for name, f in functions("rollout").items()}
    assert joining == {name for name, source in sources.items() if "join=" in source}
    assert joining == {"allocate", "branch", "hint_in_context", "inject_prefix"}


def test_a_planner_of_ones_own_sees_what_a_run_would_show_it():
    seen = []

    def curious(drawn, take, encode, *, extra: int = 2):
        picture = Image.open(io.BytesIO(drawn.prompts[0].image))
        ids = encode(drawn.prompts[0].references[0])
        seen.append((picture.size, len(ids), [group is None for group in drawn.groups]))
        if drawn.round == 0:
            return [Request(slot=0, prompt=take(1)[0], size=extra)]
        if drawn.round > 1:
            return []
        asked = [slot for slot, group in drawn.free_groups if group.terms["cider_d"].std() > 0]
        return [Request(slot=slot, prompt=take(1)[0], size=2) for slot in asked]

    settings = Config.model_validate({"train": {"images_per_step": 4}})
    assert not rehearsed(curious, settings)
    assert seen == [((32, 32), 7, [True] * 4), *[((32, 32), 7, [False] * 4)] * 2]


def test_a_planner_that_never_has_enough_is_left_alone_after_some_rounds():
    rounds = []

    def again(drawn):
        rounds.append(drawn.round)
        return [Request(slot=0, prompt=drawn.prompts[0], size=drawn.group_size)]

    assert not rehearsed(again)
    assert rounds == [0, 1, 2, 3]


def test_a_planner_that_knows_the_images_by_name_is_not_refused():
    difficulty = {"coco/391895": 0.5}

    def known(drawn):
        return [prompt for prompt in drawn.prompts if difficulty[prompt.prompt_id] > 1]

    assert not rehearsed(known)


def test_a_planner_that_looks_at_names_or_files_of_images_is_not_refused():
    def even(drawn):
        return [prompt for prompt in drawn.prompts if int(prompt.prompt_id) < 0]

    def of_files(drawn):
        return [open(f"/no/hints/{prompt.prompt_id}") for prompt in drawn.prompts]

    assert not rehearsed(even) and not rehearsed(of_files)


def test_a_planner_that_fails_is_named_with_what_it_raised():
    def halves(drawn, *, parts: int = 0):
        return drawn.prompts[: len(drawn.prompts) // parts]

    message = r"^rollout halves, tried on a made-up step of \d+ images: ZeroDivisionError: integer"
    with pytest.raises(ValueError, match=message):
        rehearsed(halves)
    with pytest.raises(ValueError, match=r"rollout \w+, tried .*prompt \d+: 0 captions, want at"):
        check_objective(config("guide_grpo", guided=0))


def test_a_planner_of_ones_own_that_joins_captions_is_refused_where_pairs_are_compared():
    objective = preset("self_cider_diversity")
    assert "similarity" in objective.needs
    check_objective(config("self_cider_diversity", rollout=f"{__name__}:fresh"))
    with pytest.raises(ValueError, match=r"needs similarity, but rollout .*more joins captions"):
        check_objective(config("self_cider_diversity", rollout=f"{__name__}:more"))
    check_objective(config("grpo", rollout=f"{__name__}:more"))


def fresh(drawn, take):
    if drawn.round != 1:
        return []
    return [Request(slot=0, prompt=take(1)[0], size=drawn.group_size)]


def more(drawn):
    if drawn.round != 1:
        return []
    return [Request(slot=0, prompt=drawn.prompts[0], size=2, join=extended)]


def test_the_planner_of_the_guide_looks_again_at_poor_images(tmp_path, monkeypatch):
    page = Path(__file__).resolve().parents[2] / "docs" / "planners.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_planner.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_planner", raising=False)
    overrides = {"rollout": "my_planner:second_chance"}
    check_objective(config(**overrides))
    subject = rounds(planners=preset("grpo", **overrides).planners)
    poor, good = [0.0, 0.25], [0.0, 0.75]
    second = subject.go_on(0, answer(subject.begin(0), lambda r: poor if r.slot else good))
    assert asked(second) == [(1, "p1", 2), (2, "p2", 2)]
    third = subject.go_on(0, answer(second, lambda r: poor if r.slot == 2 else good))
    assert asked(third) == [(2, "p3", 2)]
    assert subject.go_on(0, answer(third, lambda r: poor)) == ()
    groups = groups_of(subject.complete(0))
    assert [g.rewards.tolist() for g in groups] == [good, [*poor, *good], poor]
    # With the flag that the page gives, good is not good enough.
    strict = rounds(planners=preset("grpo", **overrides, wanted=0.8).planners)
    again = strict.go_on(0, answer(strict.begin(0), lambda r: good))
    assert [slot for slot, _, _ in asked(again)] == [0, 1, 2]
    with pytest.raises(ValueError, match="needs similarity, but rollout"):
        check_objective(config("self_cider_diversity", **overrides))


def test_misuse_is_said_before_a_run():
    with pytest.raises(ValueError, match=r"want a divisor of train\.group_size 6"):
        tree = {"preset": "dynamic_tree_rpo", "set": {"tree_depths": (2, 5)}}
        check_objective(Config.model_validate({"objective": tree, "train": {"group_size": 6}}))
    with pytest.raises(ValueError, match="returned None, want a list"):
        check_objective(config(rollout=f"{__name__}:nothing_later"))


def nothing_later(drawn):
    if drawn.round == 0:
        return []


def test_a_planner_reads_what_there_is_for_planners():
    def misspelt(drawn, tak):
        return []

    with pytest.raises(ValueError, match=r"rollout misspelt reads 'tak', .*provides.*take"):
        preset("grpo", rollout=misspelt)

    def of_the_update(drawn, rewards):
        return []

    with pytest.raises(ValueError, match="rollout of_the_update reads 'rewards', which only"):
        preset("grpo", rollout=of_the_update)
