"""A loss or gradient that is not finite costs one optimizer step and leaves a replay."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl import cli
from rayrl.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from rayrl.config import Config, LearnerConfig, ModelConfig
from rayrl.learner.examine import examine, examine_folder
from rayrl.learner.replay import read_replay
from rayrl.learner.streak import Streak
from rayrl.skipped import Skipped, save_replay
from rayrl.types import StepReport
from tests.unit.test_learner import batch, largest_difference, learner, parameters

__all__ = ["batch"]


def spoil(subject, prompt):
    """Make one prompt's log-probs NaN, as a model that overflows on one image would."""
    forward = subject.policy.forward
    original = forward._outputs

    def outputs(model, inputs, ids, mask, **options):
        out = original(model, inputs, ids, mask, **options)
        hit = (ids == prompt).flatten(1).all(1)
        return out._replace(logprobs=torch.where(hit[:, None, None], math.nan, out.logprobs))

    forward._outputs = outputs


def spoil_image(subject, batch, row):
    """Have the connector's output overflow for one image, as if its features, known by their size,
    were too large for it."""
    connector = subject.policy.model.get_submodule("model.connector")
    size = []
    handle = connector.register_forward_hook(lambda m, args, out: size.append(args[0].abs().sum()))
    with torch.no_grad():
        subject.policy.model.get_image_features(
            subject.policy.inputs(batch).select([row]).inputs["pixel_values"]
        )
    handle.remove()

    def overflow(module, args, output):
        hit = (args[0].abs().sum((1, 2)) - size[0]).abs() < 1e-3
        return torch.where(hit[:, None, None], math.inf, output)

    return connector.register_forward_hook(overflow)


def marked(batch, row):
    """The batch with a prompt that :func:`spoil` recognises: all its ids are 7."""
    ids, mask = batch.token_ids.copy(), batch.mask.copy()
    ids[row], mask[row] = 7, True
    return replace(batch, token_ids=ids, mask=mask)


def moments(subject):
    return {
        name: array.copy()
        for name, array in subject.checkpoint().arrays.items()
        if name.startswith("optimizer/")
    }


def test_a_skipped_step_leaves_weights_and_moments_and_counts(tiny_folder, batch):
    subject = learner(tiny_folder)
    subject.update(batch)
    before, state = parameters(subject), moments(subject)
    spoil(subject, 7)
    report = subject.update(marked(batch, 4))
    assert (report.step, report.weight_version) == (2, 2)
    assert largest_difference(before, parameters(subject)) == 0.0
    assert all(np.array_equal(state[name], value) for name, value in moments(subject).items())
    assert report.metrics["learner/skipped"] == 1
    assert report.metrics["learner/skipped_in_a_row"] == 1
    assert report.metrics["learner/update_ratio"] == 0.0
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert report.problem.startswith("loss policy nan, kl_k3 nan for prompts red/0, ")
    again = subject.update(marked(batch, 4))
    assert again.metrics["learner/skipped_in_a_row"] == 2
    good = subject.update(batch)
    assert good.problem == "" and subject.replay() is None
    assert good.metrics["learner/skipped_in_a_row"] == 0
    assert largest_difference(before, parameters(subject)) > 1e-5


def test_only_the_minibatch_with_the_bad_prompt_is_skipped(tiny_folder, batch):
    subject = learner(tiny_folder, minibatches=3, micro_batch_images=1)
    spoil(subject, 7)
    report = subject.update(marked(batch, 4))
    assert report.metrics["learner/skipped"] == 1
    assert report.problem == "loss policy nan, kl_k3 nan for prompts green/1"
    assert report.metrics["learner/update_ratio"] > 0


@pytest.mark.parametrize(("factor", "word"), [(math.inf, "infinite"), (math.nan, "nan")])
def test_the_gradient_that_is_not_finite_is_named(tiny_folder, batch, factor, word):
    subject = learner(tiny_folder)
    name = "model.connector.modality_projection.proj.weight"
    subject._named[name].register_hook(lambda gradient: gradient * factor)
    report = subject.update(batch)
    assert report.problem.startswith(f"the loss is finite here, the gradient of {name} is not (of ")
    assert word in report.problem


def test_a_replay_names_the_prompt_the_term_and_the_first_bad_tensor(tiny_folder, batch, tmp_path):
    subject = learner(tiny_folder)
    spoil_image(subject, batch, 4)
    report = subject.update(batch)
    assert report.metrics["learner/skipped"] == 1
    config = Config(model=ModelConfig(path=str(tiny_folder)), learner=LearnerConfig(lr=1e-3))
    place = save_replay(tmp_path, subject.replay(), config)
    assert place == tmp_path / "replay" / "step_0"
    replayed = load_checkpoint(place)
    assert np.array_equal(read_replay(replayed)[0].token_ids, batch.token_ids)
    assert read_replay(replayed)[0].images == batch.images
    lines = list(examine(subject, replayed))
    assert lines[0] == "step 1: 6 prompts x 4 captions of up to 5 tokens"
    assert lines[1] == f"in the run: {report.problem}"
    bad = [line for line in lines if line.startswith("prompt ")]
    assert len(bad) == 1 and bad[0].startswith("prompt green/1: loss policy nan")
    assert "first in the output of model.connector (Idefics3Connector, of " in bad[0]
    # The same batch through the saved weights alone, where nothing overflows.
    assert list(examine_folder(place, config))[-1].startswith("everything is finite here")


def loss_of(subject, replay, images):
    """The loss of some of a replay's images, and the metrics that go with it."""
    given, groups, state = read_replay(replay)
    _, prepared = subject.objective.prepare(state, groups)
    normalizer = prepared.select(images).normalizer()
    out = subject.losses(
        subject.objective, prepared, images, subject.policy.inputs(given), normalizer
    ).detach()
    return float(out.loss), {name: float(value) for name, (value, _) in out.metrics.items()}


@pytest.mark.parametrize("objective", ["ppo", "mah_dpo_heads", "reward_ranker"])
def test_what_trains_beside_the_policy_is_in_a_replay(tiny_folder, batch, tmp_path, objective):
    second = np.random.default_rng(3).random(batch.rewards.shape).astype(np.float32)
    batch = replace(batch, terms={"cider_d": batch.rewards, "length": second})
    sizes = {"objective": objective, "num_terms": 2}
    subject = learner(tiny_folder, **sizes)
    for _ in range(2):
        subject.update(batch)
    spoil(subject, 7)
    assert subject.update(marked(batch, 4)).problem
    config = Config(
        model=ModelConfig(path=str(tiny_folder)),
        learner=LearnerConfig(lr=1e-3),
        objective={"preset": objective},
        reward={"terms": {"cider_d": 1.0, "length": 1.0}},
    )
    place = save_replay(tmp_path, subject.replay(), config)
    want, metrics = loss_of(subject, subject.replay(), [0, 2])
    # Its reference is another, but what that computed is in the groups.
    other = learner(place, **sizes)
    alone = loss_of(other, load_checkpoint(place), [0, 2])[0]
    lines = list(examine(other, load_checkpoint(place)))
    assert all("green/1" in line for line in lines[2:-1])
    got, others = loss_of(other, load_checkpoint(place), [0, 2])
    assert got == pytest.approx(want, abs=1e-9)
    assert others == pytest.approx(metrics, abs=1e-6)
    if objective != "reward_ranker":
        # Without them the loss is another.
        assert abs(alone - want) > 1e-5
        with pytest.raises(ValueError, match="checkpoint of another run"):
            list(examine(learner(place, objective="ppo"), replay_without_heads(place)))


def replay_without_heads(place):
    whole = load_checkpoint(place)
    arrays = {k: v for k, v in whole.arrays.items() if not k.startswith(("critic", "term_heads"))}
    return replace(whole, arrays=arrays)


def test_a_replay_brings_its_configuration_to_the_command_line(tiny_folder, batch, tmp_path):
    subject = learner(tiny_folder)
    spoil(subject, 7)
    subject.update(marked(batch, 0))
    config = Config(model=ModelConfig(path=str(tiny_folder)), seed=11)
    place = save_replay(tmp_path, subject.replay(), config)
    for given in (place, place / cli.REPLAY_CONFIG):
        asked = cli.parse(["--replay", str(given)], program="p", description="d")
        assert asked.replay == place and asked.config == config
    changed = cli.parse(["--replay", str(place), "--learner.lr", "1"], program="p", description="d")
    assert (changed.config.learner.lr, changed.config.seed) == (1.0, 11)
    with pytest.raises(SystemExit):
        cli.parse(["--replay", str(tmp_path)], program="p", description="d")


def test_a_checkpoint_is_no_replay(tiny_folder, tmp_path):
    place = save_checkpoint(tmp_path, learner(tiny_folder).checkpoint(), keep=1)
    with pytest.raises(ValueError, match="not a replay"):
        read_replay(load_checkpoint(place))


def test_the_count_in_a_row_survives_a_checkpoint(tiny_folder, batch):
    subject = learner(tiny_folder)
    spoil(subject, 7)
    subject.update(marked(batch, 0))
    other = learner(tiny_folder)
    other.restore(subject.checkpoint())
    spoil(other, 7)
    assert other.update(marked(batch, 0)).metrics["learner/skipped_in_a_row"] == 2


def scripted(subject, *updates):
    """Have the learner skip those of its next updates that have a text, for that reason."""
    left, original = list(updates), subject._minibatch

    def minibatch(*arguments):
        return left.pop(0) or original(*arguments)

    subject._minibatch = minibatch


def test_the_longest_streak_counts_wherever_it_lies_in_a_step(tiny_folder, batch):
    subject = learner(tiny_folder, minibatches=3)
    scripted(subject, "a", "", "b", "c", "d", "", "", "", "e", "", "f", "", "", "", "")
    seen = [subject.update(batch) for _ in range(5)]
    rows = [report.metrics["learner/skipped_in_a_row"] for report in seen]
    assert rows == [1, 3, 1, 1, 0]
    assert [report.metrics["learner/skipped"] for report in seen] == [2, 2, 1, 1, 0]
    assert [report.problem for report in seen] == ["a", "c", "e", "f", ""]
    assert [report.first_problem for report in seen] == ["a", "b", "e", "f", ""]


def test_the_cause_of_a_streak_survives_a_checkpoint(tiny_folder, batch):
    subject, other = learner(tiny_folder), learner(tiny_folder)
    scripted(subject, "a")
    subject.update(batch)
    other.restore(subject.checkpoint())
    scripted(other, "b", "", "c")
    seen = [other.update(batch) for _ in range(3)]
    assert [report.metrics["learner/skipped_in_a_row"] for report in seen] == [2, 0, 1]
    assert [report.first_problem for report in seen] == ["a", "", "c"]


def reports(*steps):
    """Reports of steps, each by what its updates said: a text where one was skipped."""
    streak = Streak()
    for step, updates in enumerate(steps, start=1):
        streak.begin_step()
        for problem in updates:
            if problem:
                streak.skip(problem)
            else:
                streak.end()
        yield StepReport(
            step=step,
            weight_version=step,
            metrics={"learner/skipped_in_a_row": float(streak.longest)},
            advantages=np.zeros((1, 1), np.float32),
            problem=streak.first,
            first_problem=streak.cause,
        )


@pytest.fixture
def replay(tiny_folder, batch):
    subject = learner(tiny_folder)
    spoil(subject, 7)
    subject.update(marked(batch, 0))
    return subject.replay()


@pytest.mark.parametrize(
    ("most", "last", "first"),
    [
        (2, [["three"]], "two"),
        # In the middle of a step, whose last update is taken.
        (4, [[""], ["four", "five", "six", "seven", ""]], "four"),
    ],
)
def test_too_many_in_a_row_end_the_run_with_the_first_cause(replay, tmp_path, most, last, first):
    said = []
    skipped = Skipped(tmp_path, Config(learner=LearnerConfig(max_skipped=most)), said.append)
    *fine, end = reports(["one"], [""], ["two"], *last)
    for report in fine:
        skipped.check(report, lambda use: use(replay))
    assert [line.split(";")[0][-3:] for line in said] == ["one", "two"]
    words = rf"{most} optimizer steps in a row .* the first: {first}$"
    with pytest.raises(RuntimeError, match=words):
        skipped.check(end, lambda use: use(replay))


def test_the_newest_replays_stay_whatever_their_steps(replay, tmp_path):
    # The run went to step 41, and again from step 10.
    for second, step in enumerate((30, 40, 41, 12, 11, 12)):
        place = save_replay(tmp_path, replace(replay, step=step), Config())
        assert (tmp_path / "replay" / "latest").resolve() == place.resolve()
        assert load_checkpoint(place).step == step
        os.utime(place, (second, second))
    # 41 is older than what came after it.
    assert list_checkpoints(tmp_path / "replay") == [11, 12, 41]


def test_a_full_disk_costs_the_replay_and_not_the_run(tmp_path):
    said = []
    skipped = Skipped(tmp_path, Config(), said.append)

    def full(use):
        raise OSError("no space left")

    skipped.check(next(reports(["one"])), full)
    assert said == [
        "step 1: an optimizer step was skipped: one; its batch could not be kept: no space left"
    ]
