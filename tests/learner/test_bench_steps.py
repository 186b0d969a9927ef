"""The rayrl side of the benchmark of whole steps, without its peer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_against_trl  # noqa: E402
import grpo_case  # noqa: E402
import grpo_steps_rayrl  # noqa: E402


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> grpo_case.Case:
    folder = str(tmp_path_factory.mktemp("model"))
    made = grpo_case.Case(
        shape="a", group_size=4, images_per_step=2, kl_coef=0.04, lr=1e-4, folder=folder
    )
    grpo_case.build_model(made)
    return made


def test_a_step_samples_scores_updates_and_hands_the_weights_back(case):
    steps = grpo_steps_rayrl.Steps(case, "hf")
    first, second = steps(), steps()
    assert steps._engine.weight_version == 2
    for step in (first, second):
        assert list(step["phases"]) == ["sampling", "reward", "update", "sync"]
        assert step["captions"] == 8
        # Random weights end a caption about once in a thousand tokens.
        assert 8 * grpo_case.MAX_TOKENS * 0.8 < step["tokens"] <= 8 * grpo_case.MAX_TOKENS
    summary = bench_against_trl.summarize(case, [{"seconds": 2.0, **first}] * 3)
    assert summary["captions_per_second"] == 4.0
    assert summary["tokens_per_caption"] == first["tokens"] / 8


def test_a_step_ahead_trains_on_captions_of_the_weights_before(case):
    ahead = grpo_steps_rayrl.StepsAhead(case, "hf")
    versions = []
    update = ahead._learner.update

    def watched(batch):
        versions.append((int(batch.weight_versions.max()), ahead._learner.weight_version))
        return update(batch)

    ahead._learner.update = watched
    for _ in range(3):
        step = ahead()
    assert versions == [(0, 0), (0, 1), (1, 2)]
    assert list(step["phases"]) == ["reward", "update", "sampling", "sync"]
    assert step["captions"] == 8


def test_a_frozen_vision_tower_encodes_the_pictures_of_a_step_once(case):
    frozen = replace(case, pictures=2, trainable=("language",))
    assert grpo_case.load_case(frozen.dump()) == frozen
    steps = grpo_steps_rayrl.Steps(frozen, "hf")
    for _ in range(3):
        steps()
    caches = (steps._engine._features, steps._learner.policy.features)
    # The learner's reference and its policy ask for each picture once a step, the engine once.
    assert [(cache.hits, cache.misses) for cache in caches] == [(4, 2), (10, 2)]


def test_cases_are_random_weights_of_every_group_then_a_frozen_tower_then_cross_entropy(tmp_path):
    (tmp_path / "trl").mkdir()
    args = bench_against_trl.parse(["--trl", str(tmp_path), "--groups", "16", "8"])
    random = bench_against_trl.cases_of(args, "a", 0, "-")
    assert [(c.group_size, c.pictures, c.trainable) for c in random] == [
        (8, 512, grpo_case.EVERY_PART),
        (16, 512, grpo_case.EVERY_PART),
        (8, 8, ("language",)),
    ]
    (taught,) = bench_against_trl.cases_of(args, "a", args.xe_steps, "-")
    assert (taught.group_size, taught.xe_steps, taught.pictures) == (8, 150, 512)


def test_a_step_with_missing_captions_is_refused(case):
    step = {"seconds": 1.0, "captions": 7, "tokens": 140, "phases": {}}
    with pytest.raises(ValueError, match="7 captions, want 8"):
        bench_against_trl.summarize(case, [step])


def test_a_peer_that_ends_shows_the_end_of_its_log(case, tmp_path, monkeypatch):
    monkeypatch.setitem(bench_against_trl.PEERS, "rayrl, hf", ["no_such_script.py"])
    with pytest.raises(RuntimeError, match=r"(?s)rayrl, hf ended.*no_such_script"):
        bench_against_trl.Peer("rayrl, hf", case, tmp_path, tmp_path).wait_until_ready()


def test_shapes_are_those_of_the_learner_benchmark():
    import learner_models

    for letter, name, tokens in (("a", "tiny-2.5m", 16), ("b", "tiny-1m", 256)):
        tiny = grpo_case.SHAPES[letter]
        config, _ = learner_models.MODELS[name](tokens)
        assert tiny.image_tokens == tokens
        assert (config.vision_config.image_size, config.vision_config.patch_size) == (
            tiny.image_size,
            tiny.patch_size,
        )
        assert config.vision_config.hidden_size == tiny.vision_width
        assert config.vision_config.num_hidden_layers == tiny.vision_layers
        assert config.text_config.hidden_size == tiny.text_width
        assert config.text_config.num_hidden_layers == tiny.text_layers
