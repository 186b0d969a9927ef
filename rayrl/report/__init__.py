"""report.html: a run on one page, self-contained and readable offline.

Everything shown is read from the run folder, so a report can be made again at any time, also of a
run that is going on or was cut short: what is not there yet is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from rayrl.jsonl import write_atomically
from rayrl.progress import duration
from rayrl.report.captions import change, example_groups, largest_advantage, mark_words, pick_images
from rayrl.report.charts import number
from rayrl.report.curves import score_charts, step_charts
from rayrl.report.run_folder import RunFolder, growth, read_run


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from what the run has left there so far; returns its path.

    Raises FileNotFoundError when there is no such folder or it is none of a run, and ValueError
    with the file's name for one that is not JSON or YAML.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(marked=mark_words, number=number)
    page = environment.get_template("report.html").render(_view(read_run(folder)))
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def headline(run: RunFolder) -> str:
    """What happened, in one sentence that the numbers bear out."""
    scores = [score for _, _, score in run.evaluations]
    if not scores:
        return f"{run.objective}: no held-out evaluation yet"
    first, last = f"{scores[0]:.1f}", f"{scores[-1]:.1f}"
    if len(scores) == 1 and run.left_out:
        return f"{run.objective} is at a held-out CIDEr-D of {first}"
    if len(scores) == 1:
        return f"{run.objective} starts from a held-out CIDEr-D of {first}"
    if first == last:
        return f"{run.objective} left held-out CIDEr-D at {first}"
    verb = "raised" if scores[-1] > scores[0] else "lowered"
    return f"{run.objective} {verb} held-out CIDEr-D from {first} to {last}"


def _view(run: RunFolder) -> dict[str, Any]:
    """Everything that the template shows."""
    changes = [change(image) for image in run.images]
    groups = example_groups(run.samples)
    steps = step_charts(run)
    return {
        "run": run,
        "headline": headline(run),
        "facts": _facts(run),
        "tiles": _tiles(run),
        "score_charts": score_charts(run),
        "step_charts": steps,
        "smoothed": any(shape.faint for chart in steps for shape in chart.shapes),
        "outcomes": {
            "better": sum(one > 0 for one in changes),
            "the same": sum(one == 0 for one in changes),
            "worse": sum(one < 0 for one in changes),
        },
        "picks": pick_images(run.images),
        "joined_later": [i for i in run.images if i["before"].get("version", 0) > 0],
        "groups": groups,
        "advantage_limit": largest_advantage(groups),
        "thumbnails": {image["prompt_id"]: image["image_base64_jpeg"] for image in run.images},
    }


def _facts(run: RunFolder) -> list[str]:
    """The run in a line: data, model, sizes, seed, how far it came."""
    config = {name: section for name, section in run.config.items() if isinstance(section, dict)}
    train = config.get("train", {})
    facts = [
        ("data {}", config.get("data", {}).get("source")),
        ("model {}", config.get("model", {}).get("path")),
        ("{} images a step", train.get("images_per_step")),
        ("{} captions an image", train.get("group_size")),
        ("seed {}", run.config.get("seed")),
    ]
    done, total = run.steps, run.total_steps
    steps = f"{total} steps" if done == total else f"{done} of {total} steps so far"
    losses = [
        (sum(row.get("groups/dropped", 0.0) for row in run.metrics), "group", "dropped"),
        (growth([row.get("workers/replaced", 0.0) for row in run.metrics]), "worker", "replaced"),
    ]
    return [
        steps,
        *(text.format(value) for text, value in facts if value is not None),
        *(f"{n:.0f} {what}{'s' * (n > 1)} {fate}" for n, what, fate in losses if n),
    ]


def _tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """Headline numbers: name, value, remark."""
    tiles = []
    scores = [score for _, _, score in run.evaluations]
    if scores:
        gain = number(scores[-1] - scores[0], "+.1f")
        start = f"step {run.evaluations[0][0]}" if run.left_out else "the start"
        remark = f"{gain} since {start}" if scores[1:] else f"at {start}"
        tiles.append(("Held-out CIDEr-D", f"{scores[-1]:.1f}", remark))
    control = run.summary.get("cider_d_xe_control")
    if scores and control is not None:
        # Where the held-out set was changed the first score is not of the model that it began with.
        gain = "" if run.left_out else f"{number(control - scores[0], '+.1f')} "
        remark = f"{gain}in the same time"
        tiles.append(("More cross-entropy instead", f"{control:.1f}", remark))
    seconds = run.training_seconds[-1] if run.metrics else 0.0
    if seconds:
        remark = f"and {duration(sum(run.phases.get('eval', [])))} of evaluation"
        tiles.append(("Training time", duration(seconds), remark))
    speed = run.summary.get("captions_per_second")
    if speed is not None:
        tiles.append(("Captions a second", f"{speed:,.0f}", "sampled and trained on"))
    return tiles
