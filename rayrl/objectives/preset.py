"""A preset: a plan with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from rayrl.objectives.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published objective as a plan.

    title and source: the method's name and the paper
    limit: what it becomes in a limiting case, which a test can check
    continuous: what differs from the paper because captions have continuous rewards, or ""
    basis: what the formula rests on: the authors' or a framework's `code`, the paper's `text`,
        `docs` of a framework, the form that is commonly `recalled`, or its `abstract` alone
    recommended: whether it is one to start with
    """

    title: str
    source: str
    plan: Plan
    limit: str
    basis: str
    continuous: str = ""
    recommended: bool = False
