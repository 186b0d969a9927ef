"""Reward actors: where terms run, what a slow or dying one costs, and that nothing else changes."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from rayrl.config import Config
from rayrl.only_logged import only_logged
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.score import Dropped, Scorer
from rayrl.rewards.statistics import Statistics, reward_statistics, step_document_frequency
from rayrl.shares import Sampled
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup
from tests.ray.conftest import ROOT

pytestmark = pytest.mark.ray

CAPTIONS = ("a red cat sits on a mat", "a dog", "a red cat with a")


def words(captions: list[str], prompt: Prompt) -> list[float]:
    return [float(len(caption.split())) for caption in captions]


def one_number(captions: list[str], prompt: Prompt) -> float:
    return 1.0


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
        num_gpus=8,  # counted, not used
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


def prompts() -> list[Prompt]:
    return [group.prompt for group in groups()]


def groups_when_there(file: Path) -> list[RolloutGroup]:
    while not file.exists():
        time.sleep(0.05)
    return groups()


def apart(name: str, **more: object) -> dict[str, object]:
    """A function term that asks for a GPU, so that it gets an actor of its own."""
    path = f"tests.ray.test_reward_actors:{name}"
    return {"kind": "function", "path": path, "gpus": 0.5, "weight": 0.5, **more}


def start(terms: dict, timeout_s: float = 120.0, df: str = "train"):
    from rayrl.actors.reward import RewardActor

    config = RewardConfig(terms=terms, df=df)
    references = [list(group.prompt.references) for group in groups()]
    statistics = reward_statistics(references, config)
    actor = RewardActor.remote(config, (ray.put(statistics),), timeout_s)
    return actor, Scorer(config, statistics)


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
        "meteor": {"num_cpus": 0.5, "num_gpus": 0},
        "judge": {"num_cpus": 0, "num_gpus": 0},
        "both": {"num_cpus": 0.5, "num_gpus": 0.5},
    }


def test_terms_apart_give_the_rewards_of_one_scorer_bit_for_bit():
    terms = {"words": apart("words"), "cider_d": 1.0, "bad_ending": 0.25}
    actor, scorer = start(terms)
    whole = groups()
    prompts = [group.prompt for group in whole]
    part = actor.score_part.remote(prompts, Sampled.of(whole, 1.5))
    scored = ray.get(part, timeout=120)
    results = scored.unpacked(prompts)
    assert same(results, scorer.score(groups()))
    assert list(results[0].terms) == ["words", "cider_d", "bad_ending"]
    others = np.array([7 / 2, 2 / 2, 5 / 2 - 1 / 4])
    np.testing.assert_allclose(results[0].rewards, results[0].terms["cider_d"] + others, rtol=1e-6)
    seconds = scored.term_seconds
    assert set(seconds) == set(terms) and all(value > 0 for value in seconds.values())
    assert scored.sampled.seconds == 1.5


def test_a_part_that_is_sampled_does_not_wait_for_one_that_is_not(tmp_path):
    # Under the name by which a worker can import it.
    from tests.ray.test_reward_actors import groups_when_there

    sampled = tmp_path / "sampled"
    actor, scorer = start({"cider_d": 1.0})
    late = actor.score.remote(ray.remote(groups_when_there).remote(sampled))
    assert same(ray.get(actor.score.remote(groups()), timeout=120), scorer.score(groups()))
    sampled.touch()
    assert same(ray.get(late, timeout=120), scorer.score(groups()))


@pytest.mark.parametrize(
    ("name", "timeout_s"),
    # A death is noticed at once; for who hangs the time must pass in which others start.
    [("words_after_dying_once", 300.0), ("words_after_hanging_once", 55.0)],
)
def test_a_term_that_dies_or_hangs_once_is_tried_again(name, timeout_s, tmp_path):
    actor, _ = start({"cider_d": 1.0, "words": apart(name)}, timeout_s=timeout_s)
    results = ray.get(actor.score.remote(groups(str(tmp_path / "marker"))), timeout=180)
    assert [result.terms["words"].tolist() for result in results] == [[7, 2, 5]] * 3


def test_a_term_that_keeps_dying_drops_its_batch_and_no_other():
    actor, scorer = start({"cider_d": 1.0, "words": apart("words_unless_told_to_die")})
    first = actor.score.remote(groups("die"))
    second = actor.score.remote(groups())
    reason = "words: its actor died"
    assert ray.get(first, timeout=120) == [Dropped(f"image/{i}", reason) for i in range(3)]
    assert same(ray.get(second, timeout=120), scorer.score(groups()))


def arrays(statistics: Statistics) -> list[np.ndarray]:
    df, index = statistics.df, statistics.index
    return [df.vocabulary, df.keys, df.counts, *(c.values for c in index.columns.values())]


def test_what_the_driver_counted_is_read_where_it_lies_and_not_copied():
    references = [[f"a w{i % 50} cat sits on mat {i}"] * 5 for i in range(2000)]
    statistics = reward_statistics(references, RewardConfig())

    def looked_at(received: Statistics) -> list[tuple[bool, bool, int]]:
        from tests.ray.test_reward_actors import arrays

        found = arrays(received)
        return [(a.flags.writeable, a.flags.owndata, a.nbytes) for a in found]

    found = ray.get(ray.remote(looked_at).remote(ray.put(statistics)), timeout=120)
    assert found == [(False, False, a.nbytes) for a in arrays(statistics)]
    assert sum(size for *_, size in found) > 500_000


def test_frequencies_of_the_step_do_not_depend_on_how_many_workers_share_it():
    members = {"cider_d": 1.0, "words": apart("words")}
    terms = {"cider_d": 1.0, "least": {"kind": "ensemble", "members": members}}
    whole, config = groups(), RewardConfig(df="batch", terms=terms)
    references = {group.prompt.prompt_id: group.prompt.references for group in whole}
    step_df = ray.put(step_document_frequency(references, config))

    def shared_by(workers: int) -> list[ScoredGroup]:
        actors = [start(terms, df="batch")[0] for _ in range(workers)]
        parts = [whole[i * 3 // workers : (i + 1) * 3 // workers] for i in range(workers)]
        refs = [
            actor.score.remote(part, step_df) for actor, part in zip(actors, parts, strict=True)
        ]
        return [result for part in ray.get(refs, timeout=120) for result in part]

    one = shared_by(1)
    assert same(shared_by(2), one)
    by_hand = Scorer(RewardConfig(df="batch"), Statistics()).score(whole)
    words = np.array([7, 2, 5], np.float32) / 2  # with its weight in the ensemble
    for result, alone in zip(one, by_hand, strict=True):
        cider = alone.rewards
        np.testing.assert_allclose(result.rewards, cider + np.minimum(cider, words), rtol=1e-6)
    with pytest.raises(ValueError, match=r"reward\.df batch: .* of the step"):
        ray.get(start({"cider_d": 1.0}, df="batch")[0].score.remote(whole[:1]), timeout=120)


JAVA = """
import json, sys
if sys.argv[1] == "-version":
    sys.exit(print('openjdk version "17"', file=sys.stderr))
items = json.load(open(sys.argv[sys.argv.index("-jar") + 2]))
scores = [{"image_id": i["image_id"], "scores": {"All": {"f": len(i["test"])}}} for i in items]
json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


def stand_ins(folder: Path) -> dict[str, str]:
    """An environment with a program in place of Java and a pycocoevalcap with SPICE's models."""
    spice = folder / "pycocoevalcap" / "spice"
    (spice / "lib").mkdir(parents=True)
    models = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    for file in ("../__init__.py", "spice-1.0.jar", *(f"lib/{name}" for name in models)):
        (spice / file).touch()
    java = folder / "java"
    java.write_text(f"#!{sys.executable}{JAVA}")
    java.chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{ROOT}",
    }


def test_spice_and_clip_score_are_rewards_in_actors_of_their_own(tmp_path):
    """SPICE's models are not everywhere: a program in its place scores the letters of a caption."""
    from rayrl.actors.reward import RewardActor
    from rayrl.rewards.model_terms import ClipScoreTerm
    from rayrl.rewards.term import Item
    from tests.unit.test_rewards_clipscore import picture, tiny_clip

    folder = str(tiny_clip(tmp_path / "clip"))
    clip = {"kind": "clip_score", "folder": folder, "cpus": 0.5, "references": True}
    config = RewardConfig(terms={"spice": 0.25, "clip": clip})
    environment = {"env_vars": stand_ins(tmp_path)}
    statistics = (ray.put(Statistics()),)
    # On a busy machine CLIP's libraries take a minute to load.
    actor = RewardActor.options(runtime_env=environment).remote(config, statistics, 600.0)
    pictured = [
        replace(group, prompt=replace(group.prompt, image=picture(i)))
        for i, group in enumerate(groups())
    ]
    results = ray.get(actor.score.remote(pictured), timeout=300)
    term = ClipScoreTerm(folder, "cpu", references=True)
    items = [Item(group.prompt, CAPTIONS, (True,) * 3) for group in pictured]
    for result, want in zip(results, term.score(items), strict=True):
        assert result.terms["spice"].tolist() == [len(caption) for caption in CAPTIONS]
        # In float32, of vectors of length 1.
        np.testing.assert_allclose(result.terms["clip"], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            result.rewards, result.terms["spice"] / 4 + result.terms["clip"], rtol=1e-6
        )


@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")
def test_meteor_is_a_reward_in_an_actor_of_its_own():
    from rayrl.actors.reward import RewardActor

    config = RewardConfig(terms={"cider_d": 1.0, "meteor": 10.0})
    statistics = reward_statistics([group.prompt.references for group in groups()], config)
    actor = RewardActor.remote(config, (ray.put(statistics),), 300.0)
    results = ray.get(actor.score.remote(groups()), timeout=300)
    # pycocoevalcap's values.
    red, green = (0.4996193377772159, 1 / 27, 0.3308534455565891), (0.331280768046896, 1 / 27)
    np.testing.assert_allclose(results[0].terms["meteor"], red, rtol=1e-6)
    for result in results[1:]:
        np.testing.assert_allclose(result.terms["meteor"][:2], green, rtol=1e-6)
    for result in results:
        rewards = result.terms["cider_d"] + 10 * result.terms["meteor"]
        np.testing.assert_allclose(result.rewards, rewards, rtol=1e-6)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"spice": 1.0}, "no stanford-corenlp-3.6.0.jar and .* fetches them|no java on the PATH"),
        ({"mine": {"kind": "function", "path": "no_such:f"}}, "do not start: .*no module 'no_such"),
        ({"clip_score": {"folder": "/nowhere"}}, "do not start: .*no CLIP model at /nowhere"),
        ({"words": apart("one_number")}, "image/2: words: .*one_number gave scores of shape"),
    ],
)
def test_terms_that_cannot_start_or_score_are_found_before_the_training(terms, message):
    from rayrl.actors.reward import check_terms

    with pytest.raises(RuntimeError, match=message):
        check_terms(Config(reward=RewardConfig(terms=terms)), Statistics(), prompts())


def test_terms_that_can_start_pass_the_check_and_leave_nothing_running():
    """Also beside one that nothing but the log reads, and that cannot score."""
    from rayrl.actors.reward import check_terms

    before = ray.available_resources()["GPU"]
    dead = {**apart("one_number"), "weight": 0}
    terms = {"rouge_l": 1.0, "words": apart("words"), "dead": dead}
    config = Config(reward=RewardConfig(terms=terms))
    with pytest.raises(RuntimeError, match=r"dead: .*one_number gave scores of shape"):
        check_terms(config, Statistics(), prompts())
    check_terms(config, Statistics(), prompts(), only_logged(config))
    deadline = time.monotonic() + 60
    while ray.available_resources()["GPU"] < before:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("cpus", "gpus", "message"),
    [
        (50, 0.5, r"room for a reward worker: another asks for 50 CPU; of the cluster's 2, 2 are"),
        (0.25, 20, r"the terms words: another asks for 20 GPU; of the cluster's 8, \S+ are free"),
    ],
)
def test_terms_for_which_there_is_no_room_are_waited_for_aloud_and_not_for_ever(
    monkeypatch, caplog, cpus, gpus, message
):
    from rayrl.actors import reward

    assert reward.SAY_EVERY_S == 30.0
    monkeypatch.setattr(reward, "SAY_EVERY_S", 0.5)
    config = Config.model_validate(
        {
            "reward": {"terms": {"words": apart("words", gpus=gpus)}},
            "train": {"reward_cpus": cpus},
            # Enough for the worker itself to start.
            "rollout": {"start_timeout_s": 2.0 if cpus > 2 else 20.0},
        }
    )
    began = time.monotonic()
    # The actor knows which term it is; of a worker without a place only the driver does.
    reason = rf"gave up waiting for {message}|reward term words does not start: no answer in time"
    with pytest.raises(RuntimeError, match=reason):
        reward.check_terms(config, Statistics(), prompts())
    assert time.monotonic() - began < 60
    assert any(re.search(f"rewards: waiting for {message}", said) for said in caplog.messages)


def test_a_term_that_cannot_start_ends_the_run_with_its_reason():
    terms = {"cider_d": 1.0, "words": apart("no_such_function")}
    from rayrl.actors.reward import RewardActor

    config = RewardConfig(terms=terms)
    statistics = reward_statistics([["a cat"], ["a dog"]], config)
    actor = RewardActor.remote(config, (ray.put(statistics),))
    with pytest.raises(RuntimeError, match=r"words does not start.*has no 'no_such_f"):
        ray.get(actor.score.remote(groups()), timeout=120)
