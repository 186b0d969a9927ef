"""The tokenizer against what Stanford's own made of a thousand strings; tests/java runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrl.rewards.ptb import tokenize

GOLDEN = Path(__file__).parents[1] / "golden" / "ptb.json"


def test_recorded_output_of_the_reference() -> None:
    recorded = json.loads(GOLDEN.read_text())
    assert len(recorded) >= 500
    wrong = [(text, want, tokenize(text)) for text, want in recorded if tokenize(text) != want]
    assert not wrong


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man.", "a man"),
        ("It's a dog; don't run!", "it 's a dog do n't run"),
        ("I cannot, gonna", "i can not gon na"),
        ("a man (in red)", "a man -lrb- in red -rrb-"),
        ("a T-shirt for $5.00", "a t-shirt for $ 5.00"),
        ('"quoted" -- text... here', "quoted text here"),
        ("<eos> <unk>", "<eos> <unk>"),
        ("wow!! what?! dog., cat", "wow !! what ?! dog. cat"),
        ("5 1/2 feet on plan B. The end", "5 1/2 feet on plan b the end"),
        ("two\nlines", "two lines"),
        ("a 😀 face", "a face"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_quirks_are_kept(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens.split()


def test_what_stands_beyond_a_space_matters() -> None:
    assert tokenize("plan B. The dog") == ["plan", "b", "the", "dog"]
    assert tokenize("plan B. the dog") == ["plan", "b.", "the", "dog"]
    assert tokenize("no. 5") == ["no.", "5"]
    assert tokenize("no. five") == ["no", "five"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1 " * 3000, ["1"] * 3000),
        ("'" * 5000, []),
        ("<a " * 1000, ["<", "a"] * 1000),
        ("a@" * 3000, ["a@" * 2999 + "a@"]),
        ("a.b" * 3000, ["a.b" * 3000]),
        ("a-" * 3000, ["a-" * 2999 + "a"]),
    ],
)
def test_long_and_odd_input(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@pytest.mark.parametrize("caption", [None, float("nan"), 7, ["a dog"]])
def test_what_is_no_text_is_named(caption: object) -> None:
    with pytest.raises(ValueError, match=r"caption .*, want a str"):
        tokenize(caption)  # type: ignore[arg-type]
