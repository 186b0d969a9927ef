"""Settings of the learner that cannot work are refused before anything starts."""

from __future__ import annotations

import pytest

from rayrl import cli
from rayrl.config import Config
from rayrl.learner import provided
from rayrl.learner.provided import check_objective


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--learner.betas", "[1.5, -1.0]"],
            r"learner.betas: \[1.5, -1.0\]: the first moment decays by 1.5 a step",
        ),
        (["--learner.betas", "[0.9, 1]"], "the second moment decays by 1 a step, want at least 0"),
        (["--learner.gpus", "2"], "gpus 2: a rank computes on one GPU"),
        (["--learner.gpus", "1.5"], "want at most 1, and num_workers for more"),
        (
            ["--learner.lora.publish", "adapters"],
            "learner.lora: publish adapters with rank 0, which trains the weights",
        ),
    ],
)
def test_what_no_learner_can_do_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cli.load(None, given)


def test_what_a_learner_can_do_is_not():
    given = {"betas": [0, 0.999], "gpus": 1, "lora": {"rank": 4, "publish": "adapters"}}
    learner = Config.model_validate({"learner": given}).learner
    assert learner.betas == (0, 0.999) and learner.lora.publish == "adapters"


def test_a_run_without_peft_is_told_before_stage_1(monkeypatch):
    asked = []
    monkeypatch.setattr(provided, "find_spec", asked.append)
    check_objective(Config())
    assert not asked
    adapted = Config.model_validate({"learner": {"lora": {"rank": 4}}})
    with pytest.raises(ValueError, match=r"learner.lora.rank 4 needs PEFT: install rayrl\[lora\]"):
        check_objective(adapted)
    assert asked == ["peft"]
    monkeypatch.setattr(provided, "find_spec", lambda name: name)
    check_objective(adapted)
