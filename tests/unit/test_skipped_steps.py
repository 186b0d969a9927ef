"""A loss or gradient that is not finite costs one optimizer step and leaves a replay."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrl import cli
from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.config import Config, LearnerConfig, ModelConfig
from rayrl.learner.examine import examine, examine_folder
from rayrl.learner.replay import read_replay
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


def reports(*problems):
    """Reports of steps of which those with a text were skipped."""
    row = 0
    for step, problem in enumerate(problems, start=1):
        row = row + 1 if problem else 0
        yield StepReport(
            step=step,
            weight_version=step,
            metrics={"learner/skipped_in_a_row": float(row)},
            advantages=np.zeros((1, 1), np.float32),
            problem=problem,
        )


def test_too_many_in_a_row_end_the_run_with_the_first_cause(tiny_folder, batch, tmp_path):
    subject = learner(tiny_folder)
    spoil(subject, 7)
    subject.update(marked(batch, 0))
    said = []

    def fetch(use):
        return use(subject.replay())

    skipped = Skipped(tmp_path, Config(learner=LearnerConfig(max_skipped=2)), said.append)
    for report in reports("one", "", "two"):
        skipped.check(report, fetch)
    assert [line.split(";")[0][-3:] for line in said] == ["one", "two"]
    *_, third = reports("one", "", "two", "three")
    with pytest.raises(RuntimeError, match=r"2 optimizer steps in a row .* the first: two"):
        skipped.check(third, fetch)


def test_a_full_disk_costs_the_replay_and_not_the_run(tmp_path):
    said = []
    skipped = Skipped(tmp_path, Config(), said.append)

    def full(use):
        raise OSError("no space left")

    skipped.check(next(reports("one")), full)
    assert said == [
        "step 1: an optimizer step was skipped: one; its batch could not be kept: no space left"
    ]
