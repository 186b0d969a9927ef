"""Writes docs/objectives.md from the presets:

python -m rayrl.objectives.table docs/objectives.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rayrl.objectives import preset
from rayrl.objectives.batch import GRAPH_FIELDS, OPTIONAL_FIELDS
from rayrl.objectives.compile import CONFIGURED
from rayrl.objectives.inputs import INPUTS, SERVICES
from rayrl.objectives.plan import SLOTS, Plan
from rayrl.objectives.preset_base import CLIPPED, TRUNCATED_IS, Preset
from rayrl.objectives.presets import ALTERNATIVES, FAMILIES, PRESETS, plans_of
from rayrl.objectives.results import RESULTS
from rayrl.rewards.config import KINDS

MARKER = "<!-- from here on written by: python -m rayrl.objectives.table docs/objectives.md -->"


def with_tables(page: str) -> str:
    """``page`` with everything after the marker written anew; ValueError where it has none."""
    written, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"the page has no line {MARKER!r}")
    return f"{written}{marker}\n\n{tables()}"


def tables() -> str:
    """The presets by family, the alternatives, the needs."""
    recommended = ", ".join(f"`{name}`" for name, one in PRESETS.items() if one.recommended)
    lines = [
        "## The presets",
        "",
        f"{len(PRESETS)} presets; to start with: {recommended}.  Needs are what the trainer must",
        "bring beyond tokens, log-probs and rewards.  *Clipped* stands for ratio: token; bounds:",
        "fixed(clip_low=0.2, clip_high=0.2); surrogate: min_clip.  Status: **ready** runs with",
        "this package as it is; **ready, whole** does when micro-batches are as large as",
        "minibatches, **ready with** a setting or a reward term when that is there.  *Formula",
        "from the abstract only* says that no more of the paper was read, *as commonly given* that",
        "it was taken from no source that was read: check it before you quote it.",
        "",
    ]
    for family, members in FAMILIES.items():
        lines += [f"### {family}", "", *_table(members), ""]
    lines += ["## Parts that no preset has", "", *_alternatives(), ""]
    lines += ["## Needs", "", *_needs(), ""]
    lines += ["## What a part reads and returns", "", *_inputs(), "", *_results(), ""]
    return "\n".join(lines)


def _table(members: Mapping[str, Preset]) -> Iterator[str]:
    yield "| preset | method | slots | needs | limit | status |"
    yield "|---|---|---|---|---|---|"
    for name, one in members.items():
        link = f" ([{one.source}](https://arxiv.org/abs/{one.source}))" if one.source else ""
        needs = preset(name).needs
        cells = (
            f"**`{name}`**" if one.recommended else f"`{name}`",
            one.title + link + (f"; {one.note}" if one.note else ""),
            "; then ".join(_slots(plan) for plan in plans_of(one)),
            ", ".join(f"`{need}`" for need in sorted(needs)) or "–",
            one.limit,
            _status(one, needs),
        )
        yield "| " + " | ".join(cells) + " |"


_CLIP = ("ratio", "bounds", "surrogate")


def _slots(plan: Plan) -> str:
    filled = []
    clipped = all(getattr(plan, slot) == getattr(CLIPPED, slot) for slot in _CLIP)
    for slot in SLOTS:
        if clipped and slot in _CLIP:
            filled += ["*clipped*"] if slot == "surrogate" else []
            continue
        parts = [str(item) for other, item in plan.parts() if other == slot]
        if parts and not (slot == "mismatch" and plan.mismatch == TRUNCATED_IS):
            filled.append(f"{slot}: {', '.join(parts)}")
    if plan.statistics_of != "all":
        filled.append(f"statistics_of: {plan.statistics_of}")
    return "; ".join(filled)


def _status(one: Preset, needs: frozenset[str]) -> str:
    state = "ready, whole" if "whole_minibatch" in needs else "ready"
    wants = sorted({CONFIGURED[need] for need in needs if need in CONFIGURED})
    named = [item.params.get("main_term") for plan in plans_of(one) for _, item in plan.parts()]
    terms = {str(name) for name in named if name is not None and name not in KINDS}
    wants += [f"a reward term {name} of kind function, http or chat" for name in sorted(terms)]
    state += f" with {'; '.join(wants)}" if wants else ""
    return state + _BASES.get(one.basis, "")


_BASES = {
    "abstract": ", formula from the abstract only",
    "recalled": ", formula as commonly given",
}


def _alternatives() -> Iterator[str]:
    yield "Overrides may name them too."
    yield ""
    yield "| slot | parts |"
    yield "|---|---|"
    for slot, parts in ALTERNATIVES.items():
        yield f"| {slot} | {', '.join(str(item) for item in parts)} |"


def _needs() -> Iterator[str]:
    yield "| need | what it is |"
    yield "|---|---|"
    words = {**OPTIONAL_FIELDS, **GRAPH_FIELDS, **SERVICES}
    used = frozenset().union(*(preset(name).needs for name in PRESETS))
    for need in sorted(used):
        yield f"| `{need}` | {words[need]} |"


def _inputs() -> Iterator[str]:
    yield "Axes: P images, G captions of an image, T tokens; floats are float32 in a run.  Parts up"
    yield "to `pairs` see a whole step, those after them a micro-batch of it.  Needs can be read in"
    yield "select to reducer, but those with the policy's gradient in ratio to regularizers:"
    yield f"{', '.join(f'`{name}`' for name in GRAPH_FIELDS)}."
    yield ""
    yield "| input | what it is | in the slots |"
    yield "|---|---|---|"
    for name, one in INPUTS.items():
        if name not in {**OPTIONAL_FIELDS, **GRAPH_FIELDS}:
            yield f"| `{name}` | {one.what} | {_ranges(one.slots)} |"


def _ranges(slots: Sequence[str]) -> str:
    """``a to d, f`` of slots that follow one another but for one."""
    words = ""
    for slot in slots:
        at = SLOTS.index(slot)
        follows = at > 0 and SLOTS[at - 1] in slots
        if follows and at + 1 < len(SLOTS) and SLOTS[at + 1] in slots:
            continue
        words += (" to " if follows else ", ") + slot
    return words.removeprefix(", ")


def _results() -> Iterator[str]:
    yield "| slot | returns |"
    yield "|---|---|"
    for slot in SLOTS:
        yield f"| `{slot}` | {_OTHERS.get(slot) or ' or '.join(RESULTS[slot])} |"


_OTHERS = {
    "rollout": "a list of `rayrl.planning.Request`",
    "advantage": "[P,G] or [P,G,T]; [N,P,G,T] for N losses that are summed; T may be 1",
    "aggregate": "[P,G], [P,G,K] for K terms, or [P,G,T]; each part maps the rewards so far",
    "mask": "[P,G,T]; G and T may be 1",
    "ratio": "[P,G,T], the log-ratio; T may be 1",
    "bounds": "two, the low and the high bound: numbers, or broadcast to [P,G,T]",
    "weights": "[P,G,T]; G and T may be 1",
    "mismatch": "[P,G,T]; G and T may be 1",
    "surrogate": "[P,G,T] of tokens, [P,G] of captions, [P] of groups, or a scalar",
    "regularizers": "the same",
    "reducer": "a scalar",
    "control": "a mapping of decisions: `coefficients`, `stop_epoch`, `scale_lr`, `extrapolate`",
}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
