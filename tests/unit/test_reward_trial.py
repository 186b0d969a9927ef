"""What cannot score is known before stage 1: functions of one's own, and terms on a real image."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rayrl import commands
from rayrl.actors import reward
from rayrl.config import Config
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.function import check_functions, load_function
from rayrl.rewards.score import Scorer
from rayrl.rewards.statistics import reward_statistics
from rayrl.rewards.trial import trial_group
from rayrl.types import Prompt

PROMPTS = [
    Prompt(
        prompt_id=f"p{i}",
        image=b"png",
        text="Describe.",
        references=(f"a {colour} cat on a mat", f"the cat is {colour} and sits"),
    )
    for i, colour in enumerate(("red", "green", "blue", "brown"))
]


def one(captions):
    return [1.0] * len(captions)


def words(captions, prompt):
    return [float(len(caption.split())) for caption in captions]


def not_of_red(captions, prompt):
    if "red" in prompt.references[0]:
        raise ValueError("no red ones")
    return words(captions, prompt)


def scalar(captions, prompt):
    return 1.0


def nothing(captions, prompt):
    words(captions, prompt)


def function(name: str) -> dict:
    return {"kind": "function", "path": f"{__name__}:{name}"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such:f", "reward term mine: function 'no_such:f': no module 'no_such'; want it in"),
        (f"{__name__}:no_such", "reward term mine: .* has no 'no_such'"),
        (f"{__name__}:PROMPTS", "it is a list, want a function"),
        (".x:f", "function '.x:f': cannot import '.x': the 'package' argument is required"),
        (f"{__name__}:one", r":one', called with \(captions, prompt\): too many positional"),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_a_function_that_is_not_there_or_takes_something_else_is_refused(path, message, within):
    mine = {"mine": {"kind": "function", "path": path}}
    terms = {"safe": {"kind": "ensemble", "members": mine}} if within else mine
    with pytest.raises(ValueError, match=message):
        check_functions(RewardConfig(terms=terms).terms)


def test_functions_that_fit_are_let_through():
    check_functions(RewardConfig(terms={"cider_d": 1.0, "mine": function("words")}).terms)
    # In C, without a signature.
    assert load_function("builtins:max") is max


def test_a_dry_run_looks_at_the_functions(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_own_reward.py").write_text("def f(captions):\n    return captions\n")
    terms = '{"mine": {"kind": "function", "path": "my_own_reward:f"}}'
    with pytest.raises(SystemExit, match=r"failed: reward term mine: .*too many positional arg"):
        commands.grpo(["--dry-run", "--reward.terms", terms])


def try_out(monkeypatch, terms: dict, *, df: str = "train", prompts=PROMPTS) -> list[str]:
    """The images that were scored, in a process of its own in a run."""
    config = RewardConfig(terms=terms, df=df)
    scorer = Scorer(config, reward_statistics([list(p.references) for p in PROMPTS], config))
    seen = []

    def score(groups, step_df):
        seen.extend(group.prompt.prompt_id for group in groups)
        return scorer.score(groups, step_df)

    monkeypatch.setattr(reward.ray, "get", lambda answer, timeout: answer)
    actor = SimpleNamespace(score=SimpleNamespace(remote=score))
    reward._try_out(actor, Config(reward=config), prompts)
    return seen


@pytest.mark.parametrize("df", ["train", "batch"])
def test_one_image_with_a_reward_is_enough(monkeypatch, df):
    terms = {"cider_d": 1.0, "rouge_l": 1.0, "mine": function("words")}
    assert try_out(monkeypatch, terms, df=df) == ["p0"]


def test_an_image_that_a_term_has_reasons_to_leave_out_is_no_failure(monkeypatch):
    assert try_out(monkeypatch, {"mine": function("not_of_red")}) == ["p0", "p1"]


@pytest.mark.parametrize("name", ["scalar", "nothing"])
def test_a_term_that_scores_no_image_is_said_with_its_reason(monkeypatch, name):
    message = (
        rf"the rewards cannot score any of the first 2 training images; the last, p1: mine: "
        rf"{__name__}:{name} gave scores of shape \(\) for 2 captions"
    )
    with pytest.raises(RuntimeError, match=message):
        try_out(monkeypatch, {"mine": function(name)}, prompts=PROMPTS[:2])


def test_an_answer_that_does_not_come_is_said(monkeypatch):
    def late(answer, timeout):
        raise reward.GetTimeoutError

    actor = SimpleNamespace(score=SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(reward.ray, "get", late)
    with pytest.raises(RuntimeError, match=r"image p0: no answer within train\.reward_timeout_s"):
        reward._try_out(actor, Config(), PROMPTS)


def test_the_captions_of_a_trial_differ():
    """A term may compare the captions of a group."""
    assert trial_group(PROMPTS[0]).captions == list(PROMPTS[0].references)
    alone = Prompt(prompt_id="p", image=b"png", text="", references=("a cat", "a cat"))
    assert trial_group(alone).captions == ["a cat", "a picture"]
