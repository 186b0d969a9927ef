"""Learner ranks as Ray actors: what a lost one costs, and that nothing else changes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from rayrl.actors.learner_group import LearnerGroup
from rayrl.actors.pending import Pending, Share
from rayrl.actors.pool import RestartBudget
from rayrl.checkpoint import save_checkpoint
from rayrl.config import Config
from rayrl.outline import Here
from rayrl.types import Completion, RolloutGroup, ScoredGroup
from rayrl.vlm import load_captioner, prompt_inputs
from rayrl.weights import read_model_files
from tests.conftest import INSTRUCTION
from tests.ray.conftest import ROOT, metrics, run_script

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def local_ray():
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def scored(tiny_folder, prompts):
    """Five groups of four random captions with random rewards."""
    captioner = load_captioner(tiny_folder)
    rng = np.random.default_rng(0)
    vocabulary = len(captioner.processor.tokenizer)
    allowed = [i for i in range(vocabulary) if i not in captioner.banned_ids]

    def completion():
        ids = rng.choice(allowed, rng.integers(1, 6)).astype(np.int32)
        return Completion(
            token_ids=ids,
            logprobs=np.full(len(ids), -6.0, np.float32),
            text="",
            finish_reason="stop",
            weight_version=0,
        )

    def group(prompt):
        inputs = prompt_inputs(captioner.processor, [prompt.image], [INSTRUCTION])
        rewards = rng.random(4).astype(np.float32)
        rollout = RolloutGroup(
            prompt=prompt,
            prompt_token_ids=inputs["input_ids"][0].numpy().astype(np.int32),
            completions=tuple(completion() for _ in range(4)),
            group_size=4,
        )
        return ScoredGroup(group=rollout, terms={"cider_d": rewards}, rewards=rewards)

    return [group(prompt) for prompt in prompts[:5]]


@pytest.fixture
def start(local_ray, tiny_folder):
    """Starts a group of two ranks that may be rebuilt ``restarts`` times."""
    groups = []

    def begin(restarts=0, **learner):
        options = {"num_workers": 2, "cpus": 1, "lr": 1e-3, **learner}
        config = Config.model_validate({"learner": options, "data": {"instruction": INSTRUCTION}})
        files = read_model_files(tiny_folder)
        groups.append(LearnerGroup(config, files, RestartBudget(restarts)))
        return groups[-1]

    yield begin
    for group in groups:
        group.shutdown()


def weights(group):
    return {k: np.array(v) for k, v in ray.get(group.weights(trained_only=True)).arrays.items()}


def process_of(rank):
    return ray.get(rank.__ray_call__.remote(lambda actor: os.getpid()))


@pytest.fixture(scope="module")
def undisturbed(local_ray, tiny_folder, scored):
    """Weights after three steps of two ranks."""
    config = {"learner": {"num_workers": 2, "cpus": 1, "lr": 1e-3}}
    group = LearnerGroup(
        Config.model_validate({**config, "data": {"instruction": INSTRUCTION}}),
        read_model_files(tiny_folder),
        RestartBudget(0),
    )
    for _ in range(3):
        group.update(Here(scored))
    after = weights(group)
    group.shutdown()
    return after


def test_a_killed_rank_is_rebuilt_from_the_checkpoint_and_repeats_the_steps_since(
    start, scored, undisturbed, tmp_path
):
    group = start(restarts=2)
    group.update(Here(scored))
    os.kill(process_of(group._ranks[0]), signal.SIGKILL)
    assert group.update(Here(scored)).weight_version == 2
    group.rebuild_from(group.checkpoint(lambda it: save_checkpoint(tmp_path, it, keep=1)))
    assert group.update(Here(scored)).weight_version == 3
    os.kill(process_of(group._ranks[1]), signal.SIGKILL)
    after = weights(group)
    assert all(np.array_equal(after[name], undisturbed[name]) for name in undisturbed)


def test_a_rank_that_dies_while_its_checkpoint_is_written_is_rebuilt_and_asked_again(
    start, scored, undisturbed, tmp_path
):
    group = start(restarts=1)
    for _ in range(3):
        group.update(Here(scored))
    tried = []

    def write(checkpoint):
        tried.append(checkpoint.step)
        if len(tried) == 1:
            os.kill(process_of(group._ranks[0]), signal.SIGKILL)
            with pytest.raises(RayActorError):
                process_of(group._ranks[0])
        return save_checkpoint(tmp_path, checkpoint, keep=1)

    model = load_captioner(group.checkpoint(write)).model
    # What had come before may be all of it.
    assert tried in ([3], [3, 3])
    for name, value in model.named_parameters(remove_duplicate=False):
        assert name not in undisturbed or np.array_equal(undisturbed[name], value.detach().numpy())
    assert len(undisturbed) > 10 and weights(group).keys() == undisturbed.keys()


def awaited(rank):
    """How many pictures a rank has decoded for the step to come."""
    return ray.get(
        rank.__ray_call__.remote(lambda actor: len(actor._learner.policy._inputs._ahead))
    )


def test_ranks_decode_their_images_ahead_and_leave_the_rest_to_the_step(start, scored, prompts):
    def batch(*given):
        parts = [Share(index=i, first=0, requests=[], prompts=p) for i, p in enumerate(given)]
        return Pending(step=0, version=0, shares=parts)

    group = start()
    group.prepare(batch(ray.put(prompts[:3]), ray.put(prompts[3:5])))
    assert [awaited(rank) for rank in group._ranks] == [2, 3]
    broken = replace(prompts[0], image=b"no picture")
    group.prepare(batch(ray.put([broken, *prompts[:3]])))
    # The one that cannot be decoded is nobody's business until captions of it come.
    assert [awaited(rank) for rank in group._ranks] == [1, 2]
    assert group.update(Here(scored)).weight_version == 1


def test_a_rank_that_hangs_is_replaced_after_the_timeout(start, scored, undisturbed):
    group = start(restarts=1, timeout_s=5)
    group.update(Here(scored))
    os.kill(process_of(group._ranks[1]), signal.SIGSTOP)
    for _ in range(2):
        report = group.update(Here(scored))
    assert report.weight_version == 3
    after = weights(group)
    assert all(np.array_equal(after[name], undisturbed[name]) for name in undisturbed)


def test_past_the_budget_the_first_cause_names_the_rank(start, scored):
    group = start(restarts=0)
    group.update(Here(scored))
    os.kill(process_of(group._ranks[1]), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="max_restarts allows 0") as raised:
        group.update(Here(scored))
    assert "learner rank 1 of 2 died" in str(raised.value.__cause__)


def test_an_error_in_the_groups_is_not_tried_again(start, scored):
    group = start(restarts=3)
    with pytest.raises(ValueError, match="no group to train on"):
        group.update(Here([]))
    assert group._budget.spent == 0


def test_the_main_job_trains_on_two_ranks(small_job, environment, tmp_path):
    flags = small_job(
        train__steps=2, learner__num_workers=2, learner__parallel="fsdp", learner__cpus=1
    )
    done = run_script("grpo_coco.py", flags, environment)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["mismatch_kl"] < 1e-7 for row in rows[1:])
    assert (tmp_path / "run" / "checkpoints" / "latest" / "model.safetensors").is_file()
