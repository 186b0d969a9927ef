"""docs/objectives.md says what the presets are, and its example works as it stands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_toy import (
    REWARDS,
    TinyPolicy,
    assert_close,
    loss_of,
    prepared,
    synthetic_batch,
    toy_batch,
)

from rayrl import cli
from rayrl.objectives import build, preset, rehearse
from rayrl.objectives.compile import CONFIGURED, PROVIDED
from rayrl.objectives.parts import resolve
from rayrl.objectives.plan import Phases
from rayrl.objectives.presets import PRESETS, plans_of
from rayrl.objectives.schedule import Schedule
from rayrl.objectives.table import MARKER, with_tables
from rayrl.rewards.config import KINDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_the_tables_are_those_of_the_presets() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m rayrl.objectives.table docs/objectives.md"
    rows = re.findall(r"^\| (?:\*\*)?`(\w+)`(?:\*\*)? \|.*\| (ready)", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(PRESETS)


def test_the_readme_counts_the_papers_of_the_presets() -> None:
    rows = re.findall(
        r"^\| (?:\*\*)?`\w+`.*ready.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    papers = {number for row in rows for number in re.findall(r"arxiv\.org/abs/([\d.]+)", row)}
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"[objectives of {len(papers)} papers](docs/objectives.md)" in readme


def test_formulas_from_an_abstract_say_so_where_they_stand() -> None:
    """In the table's status, and in the docstring of a part that the preset is made of."""
    text = PAGE.read_text(encoding="utf-8")
    for name, one in PRESETS.items():
        (row,) = re.findall(rf"^\| (?:\*\*)?`{name}`.*$", text, re.MULTILINE)
        assert row.endswith("formula from the abstract only |") == (one.basis == "abstract"), name
        assert row.endswith("formula as commonly given |") == (one.basis == "recalled"), name
        if one.basis == "abstract":
            parts = [resolve(slot, item) for plan in plans_of(one) for slot, item in plan.parts()]
            docs = [part.function.__doc__ or "" for part in parts]
            docs += [Schedule.__doc__ or ""] if isinstance(one.plan, Phases) else []
            assert any("abstract" in some for some in docs), name


def test_a_page_without_the_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has no line"):
        with_tables("# Objectives")
    assert with_tables(f"a\n{MARKER}\nold").startswith(f"a\n{MARKER}\n\n## The presets")


def test_the_example_of_ones_own_objective_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_objective.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_objective", raising=False)
    from my_objective import objective

    ready = prepared(objective, toy_batch())
    # torch takes the lower of the two middle rewards as the median.
    assert_close(ready.fields["advantages"][:, 0, :, 0], REWARDS - 0.5)
    policy = TinyPolicy(4)
    batch = synthetic_batch(policy)
    ready = prepared(objective, batch)
    loss = objective.loss(ready, policy.logprobs(batch), ready.normalizer()).loss
    loss.backward()
    assert policy.out.weight.grad is not None
    assert policy.out.weight.grad.abs().max() > 0

    rehearse(objective, ["cider_d"], group_size=5)

    # The page's commands, read as the job reads them.
    _, _, section = page.replace("\\\n", "").partition("## An objective of your own")
    whole, parts = (
        build(cli.load(None, shlex.split(flags)).objective, max_tokens=24)
        for flags in re.findall("python jobs/grpo_coco.py (.*)", section)
    )

    def same(caution: float) -> Any:
        def moderate(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
            return -advantages * log_ratio + caution * log_ratio.square()

        return moderate

    spelled = {"advantage": objective.plan.advantage, "bounds": "", "kl_coef": 0.04}
    want = preset("grpo", **spelled, surrogate=same(0.2))
    assert loss_of(objective) == pytest.approx(loss_of(want))
    assert loss_of(whole) == pytest.approx(loss_of(preset("grpo", **spelled, surrogate=same(0.5))))
    want = preset("grpo", **{**spelled, "kl_coef": 0.001}, surrogate=same(0.2))
    assert loss_of(parts) == pytest.approx(loss_of(want))


def test_a_function_that_cannot_be_imported_is_refused() -> None:
    message = "slot advantage: no module 'no_such'; want it in the folder"
    with pytest.raises(ValueError, match=message):
        preset("grpo", advantage="no_such:thing")
    with pytest.raises(ValueError, match="slot advantage: module 'math' has no 'thing'"):
        preset("grpo", advantage="math:thing")


def test_a_value_is_no_part() -> None:
    with pytest.raises(ValueError, match="slot advantage: 'math:pi' is a float, want a function"):
        preset("grpo", advantage="math:pi")


def test_what_is_called_ready_needs_only_what_the_trainer_brings() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in PRESETS:
        (row,) = [line for line in text.splitlines() if re.match(rf"\| (\*\*)?`{name}`", line)]
        ready = row.rstrip(" |").rpartition(" | ")[2].startswith("ready")
        given = PROVIDED | CONFIGURED.keys() | {"whole_minibatch"}
        assert ready == (preset(name).needs <= given), name
        # A term that no kind makes by itself is one that somebody writes.
        terms = {
            item.params.get("main_term") for p in plans_of(PRESETS[name]) for _, item in p.parts()
        }
        own = terms - {None, *KINDS}
        assert all(
            f"ready with a reward term {term} of kind function, http or chat" in row for term in own
        )
