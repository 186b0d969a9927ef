"""The charts of a run: which numbers are drawn together, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrl.metrics import EVAL_METRIC
from rayrl.report.charts import Chart, Series, bar_chart, line_chart
from rayrl.report.run_folder import Row, RunFolder
from rayrl.rewards.config import NOT_TERMS


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Metrics that share a chart, with the names of their lines."""

    title: str
    note: str
    metrics: dict[str, str]
    spec: str = ".3f"
    from_zero: bool = False
    only_if_nonzero: bool = False


_PANELS = (
    Panel(
        title="Reward",
        note="mean of a step's captions",
        metrics={"reward/mean": "sampled", "reward/greedy": "greedy"},
    ),
    Panel(
        title="KL to the stage-1 model",
        note="a token",
        metrics={"kl": "KL"},
        spec=".4f",
        from_zero=True,
    ),
    Panel(
        title="Entropy",
        note="a token",
        metrics={"entropy": "exact", "objective/entropy_sampled": "of the samples"},
    ),
    Panel(title="Caption length", note="tokens", metrics={"length/mean": "length"}, spec=".1f"),
    Panel(
        title="Clipped tokens",
        note="fraction",
        metrics={"learner/clip_low_fraction": "low", "learner/clip_high_fraction": "high"},
        spec=".4f",
        from_zero=True,
    ),
    Panel(
        title="Gradient norm",
        note="before clipping",
        metrics={"learner/grad_norm": "norm"},
        from_zero=True,
    ),
    Panel(
        title="Mismatch KL",
        note="engine against learner",
        metrics={"mismatch_kl": "mismatch"},
        spec=".1e",
        from_zero=True,
    ),
    Panel(
        title="Staleness",
        note="weight versions",
        metrics={"staleness/mean": "mean", "staleness/max": "largest"},
        spec=".1f",
        from_zero=True,
        only_if_nonzero=True,
    ),
    Panel(
        title="Dropped groups",
        note="a step",
        metrics={"groups/dropped": "dropped"},
        spec=".0f",
        from_zero=True,
        only_if_nonzero=True,
    ),
    Panel(
        title="Flat groups",
        note="fraction without a spread of rewards",
        metrics={"objective/flat_groups": "flat"},
        from_zero=True,
        only_if_nonzero=True,
    ),
    Panel(
        title="Captions a second",
        note="sampled and trained on",
        metrics={"captions_per_second": "speed"},
        spec=".0f",
        from_zero=True,
    ),
)


def score_charts(run: RunFolder) -> list[Chart]:
    """Held-out CIDEr-D against training time and against steps, with the cross-entropy line."""
    charts = (_score_by_time(run), _score_by_step(run))
    return [chart for chart in charts if chart is not None]


def step_charts(run: RunFolder) -> list[Chart]:
    """What was measured at every step; a chart for whatever the run has measured."""
    panels = [_panel(run.trained, panel) for panel in (*_PANELS, *_term_panels(run.trained))]
    seconds = bar_chart(
        "Time by phase",
        [row["step"] for row in run.trained],
        run.phases,
        x_name="step",
        note="seconds a step",
    )
    return [chart for chart in (*panels, seconds) if chart is not None]


def _score_by_time(run: RunFolder) -> Chart | None:
    before = run.stage1[-1]["seconds"] if run.stage1 else 0.0
    longest = before + max([0.0, *run.training_seconds[-1:], *_column(run.control, "seconds")])
    unit, x_name = (60.0, "minutes") if longest > 300 else (1.0, "seconds")

    def line(
        name: str, start: float, points: Sequence[tuple[float, float]], **style: Any
    ) -> Series:
        return Series(
            name=name,
            x=[(start + seconds) / unit for seconds, _ in points],
            y=[score for _, score in points],
            marks=True,
            **style,
        )

    return line_chart(
        "Held-out CIDEr-D by training time",
        [
            line("cross-entropy", 0.0, _scored(run.stage1), tone=1),
            line("more cross-entropy", before, _scored(run.control), tone=1, dashed=True),
            line(run.objective, before, [(s, score) for _, s, score in run.evaluations]),
        ],
        x_name=x_name,
        note="from the first step of stage 1" if run.stage1 else "",
        most_y_ticks=6,
    )


def _score_by_step(run: RunFolder) -> Chart | None:
    """Cross-entropy counts other steps, so its line stands at the steps of equal training time."""
    steps = _column(run.metrics, "step")
    control = _scored(run.control) if steps else []
    at = np.interp([seconds for seconds, _ in control], run.training_seconds or [0.0], steps or [0])
    return line_chart(
        "Held-out CIDEr-D by step",
        [
            Series(
                name="more cross-entropy",
                x=at.tolist(),
                y=[score for _, score in control],
                tone=1,
                dashed=True,
                marks=True,
            ),
            Series(
                name=run.objective,
                x=[step for step, _, _ in run.evaluations],
                y=[score for _, _, score in run.evaluations],
                marks=True,
            ),
        ],
        x_name="step",
        note="cross-entropy at equal time" if control else "",
        most_y_ticks=6,
    )


def _panel(rows: Sequence[Row], panel: Panel) -> Chart | None:
    series = []
    for tone, (metric, name) in enumerate(panel.metrics.items()):
        known = [row for row in rows if metric in row]
        series.append(
            Series(
                name=name,
                x=_column(known, "step"),
                y=_column(known, metric),
                tone=tone,
                smooth=True,
            )
        )
    if panel.only_if_nonzero and not any(any(one.y) for one in series):
        return None
    return line_chart(
        panel.title,
        series,
        x_name="step",
        note=panel.note,
        spec=panel.spec,
        from_zero=panel.from_zero,
    )


def _term_panels(rows: Sequence[Row]) -> list[Panel]:
    """The terms of the reward, when there is more than one."""
    names = [
        name.removeprefix("reward/")
        for name in dict.fromkeys(name for row in rows for name in row)
        if name.startswith("reward/")
    ]
    terms = {f"reward/{name}": name for name in names if name not in NOT_TERMS}
    if len(terms) < 2:
        return []
    return [Panel(title="Reward terms", note="mean of a step's captions", metrics=terms)]


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _scored(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(seconds, score) of the rows that have a score."""
    return [(float(r["seconds"]), float(r[EVAL_METRIC])) for r in rows if EVAL_METRIC in r]
