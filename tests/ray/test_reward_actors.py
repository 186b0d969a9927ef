"""Reward actors: where terms run, what a slow or dying one costs, and that nothing else changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from rayrl.rewards.config import RewardConfig
from rayrl.rewards.score import Dropped, Scorer, reward_document_frequency
from rayrl.types import Completion, Prompt, RolloutGroup
from tests.ray.conftest import ROOT

pytestmark = pytest.mark.ray

CAPTIONS = ("a red cat sits on a mat", "a dog", "a red cat with a")


def words(captions: list[str], prompt: Prompt) -> list[float]:
    return [float(len(caption.split())) for caption in captions]


def words_after_dying_once(captions: list[str], prompt: Prompt) -> list[float]:
    if first_time(prompt):
        os._exit(1)
    return words(captions, prompt)


def words_after_hanging_once(captions: list[str], prompt: Prompt) -> list[float]:
    if first_time(prompt):
        time.sleep(600)
    return words(captions, prompt)


def words_unless_told_to_die(captions: list[str], prompt: Prompt) -> list[float]:
    if prompt.text == "die":
        os._exit(1)
    return words(captions, prompt)


def first_time(prompt: Prompt) -> bool:
    """Whether the file that a prompt's text names was not there yet."""
    marker = Path(prompt.text)
    seen = marker.exists()
    marker.touch()
    return not seen


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,  # counted, not used
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


def groups(text: str = "Describe the image.") -> list[RolloutGroup]:
    def completion(caption: str) -> Completion:
        return Completion(
            token_ids=np.array([1, 2], np.int32),
            logprobs=np.zeros(2, np.float32),
            text=caption,
            finish_reason="stop",
            weight_version=0,
        )

    return [
        RolloutGroup(
            prompt=Prompt(
                prompt_id=f"image/{i}",
                image=b"image",
                text=text,
                references=(f"a {colour} cat on a mat", f"the cat is {colour} and sits"),
            ),
            prompt_token_ids=np.array([1], np.int32),
            completions=tuple(completion(caption) for caption in CAPTIONS),
            group_size=len(CAPTIONS),
            greedy=completion("a red cat"),
        )
        for i, colour in enumerate(("red", "green", "blue"))
    ]


def groups_when_there(file: Path) -> list[RolloutGroup]:
    while not file.exists():
        time.sleep(0.05)
    return groups()


def apart(name: str, **more: object) -> dict[str, object]:
    """A function term that asks for a GPU, so that it gets an actor of its own."""
    path = f"tests.ray.test_reward_actors:{name}"
    return {"kind": "function", "path": path, "needs_gpu": True, "weight": 0.5, **more}


def start(terms: dict, timeout_s: float = 120.0):
    from rayrl.actors.reward import RewardActor

    config = RewardConfig(terms=terms)
    references = [list(group.prompt.references) for group in groups()]
    df = reward_document_frequency(references, config)
    return RewardActor.remote(config, df, timeout_s), Scorer(config, df)


def same(results, expected) -> bool:
    return all(
        got.greedy_reward == want.greedy_reward
        and got.rewards.tobytes() == want.rewards.tobytes()
        and list(got.terms) == list(want.terms)
        and all(got.terms[name].tobytes() == want.terms[name].tobytes() for name in want.terms)
        for got, want in zip(results, expected, strict=True)
    )


def test_only_terms_that_need_something_get_an_actor_of_their_own():
    from rayrl.actors.reward import placements

    assert placements(RewardConfig()) == {}
    terms = {
        "cider_d": 1.0,
        "bad_ending": 0.5,
        "meteor": 0.5,
        "judge": {"kind": "http", "url": "http://judge"},
        "both": {"kind": "ensemble", "members": {"meteor": 1.0, "judge": apart("words")}},
    }
    assert placements(RewardConfig(terms=terms)) == {
        "meteor": {"num_cpus": 0.5},
        "judge": {"num_cpus": 0.0},
        "both": {"num_cpus": 0.5, "num_gpus": 1},
    }


def test_terms_apart_give_the_rewards_of_one_scorer_bit_for_bit():
    terms = {"words": apart("words"), "cider_d": 1.0, "bad_ending": 0.25}
    actor, scorer = start(terms)
    results = ray.get(actor.score.remote(groups()), timeout=120)
    assert same(results, scorer.score(groups()))
    assert list(results[0].terms) == ["words", "cider_d", "bad_ending"]
    others = np.array([7 / 2, 2 / 2, 5 / 2 - 1 / 4])
    np.testing.assert_allclose(results[0].rewards, results[0].terms["cider_d"] + others, rtol=1e-6)
    seconds = ray.get(actor.take_seconds.remote())
    assert set(seconds) == set(terms) and all(value > 0 for value in seconds.values())
    assert ray.get(actor.take_seconds.remote()) == {}


def test_the_seconds_of_a_batch_do_not_wait_for_the_next_one_to_be_sampled(tmp_path):
    # Under the name by which a worker can import it.
    from tests.ray.test_reward_actors import groups_when_there

    sampled = tmp_path / "sampled"
    actor, scorer = start({"cider_d": 1.0})
    ray.get(actor.score.remote(groups()), timeout=120)
    following = actor.score.remote(ray.remote(groups_when_there).remote(sampled))
    assert list(ray.get(actor.take_seconds.remote(), timeout=30)) == ["cider_d"]
    sampled.touch()
    assert same(ray.get(following, timeout=120), scorer.score(groups()))


@pytest.mark.parametrize("name", ["words_after_dying_once", "words_after_hanging_once"])
def test_a_term_that_dies_or_hangs_once_is_tried_again(name, tmp_path):
    actor, _ = start({"cider_d": 1.0, "words": apart(name)}, timeout_s=40.0)
    results = ray.get(actor.score.remote(groups(str(tmp_path / "marker"))), timeout=120)
    assert [result.terms["words"].tolist() for result in results] == [[7, 2, 5]] * 3


def test_a_term_that_keeps_dying_drops_its_batch_and_no_other():
    actor, scorer = start({"cider_d": 1.0, "words": apart("words_unless_told_to_die")})
    first = actor.score.remote(groups("die"))
    second = actor.score.remote(groups())
    reason = "words: its actor died"
    assert ray.get(first, timeout=120) == [Dropped(f"image/{i}", reason) for i in range(3)]
    assert same(ray.get(second, timeout=120), scorer.score(groups()))


def test_a_term_that_cannot_start_ends_the_run_with_its_reason():
    terms = {"cider_d": 1.0, "words": apart("no_such_function")}
    from rayrl.actors.reward import RewardActor

    config = RewardConfig(terms=terms)
    df = reward_document_frequency([["a cat"], ["a dog"]], config)
    actor = RewardActor.remote(config, df)
    with pytest.raises(RuntimeError, match=r"words does not start.*has no function 'no_such_f"):
        ray.get(actor.score.remote(groups()), timeout=120)
