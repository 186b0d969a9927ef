"""The report: numbers that the files bear out, honest choices, nothing that a caption can break."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import random
import re

import pytest
import yaml
from PIL import Image, ImageDraw

from rayrl.progress import duration
from rayrl.report import headline, write_report
from rayrl.report.__main__ import main
from rayrl.report.captions import example_groups, largest_advantage, mark_words, pick_images
from rayrl.report.charts import Series, bar_chart, line_chart, nice_ticks, running_mean
from rayrl.report.curves import score_charts, step_charts
from rayrl.report.run_folder import growth, read_run

COLOURS = {"red": "#d23", "blue": "#25c", "green": "#2a5", "yellow": "#dc2"}
SHAPES = ("circle", "square", "triangle", "cross")


def thumbnail(rng: random.Random) -> tuple[str, str]:
    """A drawn picture as base64 JPEG, and what is in it."""
    picture = Image.new("RGB", (96, 96), (235, 233, 228))
    draw = ImageDraw.Draw(picture)
    (one, other), (left, right) = rng.sample(sorted(COLOURS), 2), rng.sample(SHAPES, 2)
    draw.ellipse((8, 30, 44, 66), fill=COLOURS[one])
    draw.rectangle((54, 30, 88, 66), fill=COLOURS[other])
    out = io.BytesIO()
    picture.save(out, "JPEG")
    encoded = base64.b64encode(out.getvalue()).decode()
    return encoded, f"a {one} {left} left of a {other} {right}"


def metrics_rows(steps: int, every: int = 25) -> list[dict[str, float]]:
    """Metrics that rise and wobble as those of a short run do; row 0 is the first evaluation."""
    rng = random.Random(1)
    rows: list[dict[str, float]] = [{"step": 0, "time": 1e9, "eval/cider_d": 263.1}]
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-step / 60)
        row = {
            "step": step,
            "time": 1e9 + step,
            "reward/mean": 1.9 + 0.45 * progress + rng.gauss(0, 0.06),
            "reward/cider_d": 1.9 + 0.45 * progress,
            "reward/std_in_group": 0.6,
            "kl": 0.02 * progress + abs(rng.gauss(0, 0.001)),
            "entropy": 0.62 - 0.2 * progress + rng.gauss(0, 0.01),
            "length/mean": 11.4 + 0.8 * progress + rng.gauss(0, 0.1),
            "learner/clip_low_fraction": abs(rng.gauss(0.004, 0.002)),
            "learner/clip_high_fraction": abs(rng.gauss(0.006, 0.002)),
            "learner/grad_norm": abs(rng.gauss(0.8, 0.15)),
            "mismatch_kl": abs(rng.gauss(2e-6, 5e-7)),
            "captions_per_second": rng.gauss(318, 12),
            "groups/dropped": 0.0,
            "staleness/mean": 0.0,
            "staleness/max": 0.0,
            "seconds/rollout": 0.31 + rng.gauss(0, 0.01),
            "seconds/reward": 0.02,
            "seconds/learner": 0.42 + rng.gauss(0, 0.02),
            "seconds/sync": 0.05,
        }
        if step % every == 0 or step == steps:
            row["eval/cider_d"] = 263.1 + 11 * progress + rng.gauss(0, 0.5)
            row["seconds/eval"] = 1.9
        rows.append(row)
    return rows


def evaluated_images(count: int) -> list[dict]:
    rng = random.Random(2)
    images = []
    for i in range(count):
        encoded, truth = thumbnail(rng)
        before = rng.gauss(263, 60)
        moved = rng.choice((True, True, False))
        images.append(
            {
                "prompt_id": f"scenes/val/{i}",
                "image_base64_jpeg": encoded,
                "references": [truth, f"there is {truth}", f"{truth} on grey", truth, truth],
                "before": {"caption": truth.replace("left", "right"), "cider_d": before},
                "after": {
                    "caption": truth if moved else truth.replace("left", "right"),
                    "cider_d": before + (rng.gauss(15, 40) if moved else 0.0),
                },
            }
        )
    return images


def sample_group(step: int, prompt_id: str, rewards: list[float]) -> dict:
    mean = sum(rewards) / len(rewards)
    return {
        "step": step,
        "split": "train",
        "prompt_id": prompt_id,
        "references": ["a red circle left of a blue square", "a circle and a square"],
        "captions": [
            {
                "text": f"a red circle near a {'blue' if reward > mean else 'purple'} square",
                "reward": reward,
                "terms": {"cider_d": reward},
                "advantage": reward - mean,
            }
            for reward in rewards
        ],
    }


def write_lines(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_run(folder, steps: int = 150, images: int = 40):
    """A run folder as the main job leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run_folder": str(folder.name),
        "seed": 3,
        "data": {"source": "scenes"},
        "model": {"path": "tiny"},
        "objective": {"preset": "grpo"},
        "train": {"steps": steps, "images_per_step": 32, "group_size": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_lines(folder / "metrics.jsonl", metrics_rows(steps))
    (folder / "eval_captions.json").write_text(
        json.dumps({"version": steps, "images": evaluated_images(images)})
    )
    rng = random.Random(4)
    write_lines(
        folder / "samples.jsonl",
        [
            sample_group(step, f"scenes/train/{p}", [rng.gauss(1.8, 0.8) for _ in range(8)])
            for step in (1, 10, steps)
            for p in range(3)
        ],
    )
    scores = [0.3, 140.0, 222.0, 251.0, 261.0, 263.1]
    write_lines(
        folder / "xe" / "metrics.jsonl",
        [{"step": 100 * i, "seconds": 20.0 * i, "eval/cider_d": s} for i, s in enumerate(scores)],
    )
    control = [263.1, 264.0, 265.9, 264.8, 266.2, 265.4]
    write_lines(
        folder / "xe_baseline.jsonl",
        [{"step": 100 * i, "seconds": 24.0 * i, "eval/cider_d": s} for i, s in enumerate(control)],
    )
    (folder / "summary.json").write_text(
        json.dumps({"captions_per_second": 318.4, "cider_d_xe_control": 265.4})
    )
    return folder


class Page(html.parser.HTMLParser):
    """The tags of a page, its text, and the scripts that a browser would run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._data_island = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._data_island = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_data(self, data):
        inside = self.tags[-1][0] if self.tags else ""
        if inside == "script" and not self._data_island and data.strip():
            self.scripts.append(data)
        if inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "grpo_scenes")


def test_the_headline_and_the_tiles_are_the_numbers_of_the_files(run):
    rows = metrics_rows(150)
    first, last = rows[0]["eval/cider_d"], rows[-1]["eval/cider_d"]
    seconds = sum(
        value
        for row in rows
        for name, value in row.items()
        if name.startswith("seconds/") and name != "seconds/eval"
    )
    text = page_of(run).text
    assert headline(read_run(run)) == f"GRPO raised held-out CIDEr-D from {first:.1f} to {last:.1f}"
    assert f"Held-out CIDEr-D {last:.1f} +{last - first:.1f} since the start" in text
    assert "More cross-entropy instead 265.4 +2.3 in the same time" in text
    assert f"Training time {duration(seconds)} and 0:11 of evaluation" in text
    assert "Captions a second 318 sampled and trained on" in text
    assert "150 steps data scenes model tiny 32 images a step 8 captions an image seed 3" in text


def test_what_was_dropped_and_replaced_is_said_also_over_a_resumed_run(tmp_path):
    folder = fake_run(tmp_path)
    assert not {"dropped", "replaced"} & set(page_of(folder).text.split())
    dropped, replaced = [0, 1, 0, 4, 0], [0, 2, 2, 0, 1]  # resumed before the fourth
    write_lines(
        folder / "metrics.jsonl",
        [
            {"step": step, "groups/dropped": float(a), "workers/replaced": float(b)}
            for step, (a, b) in enumerate(zip(dropped, replaced, strict=True))
        ],
    )
    assert "seed 3 5 groups dropped 3 workers replaced" in page_of(folder).text


@pytest.mark.parametrize(
    ("values", "want"), [([], 0.0), ([0, 1, 1], 1.0), ([2, 3, 0, 1], 4.0), ([1, 1], 1.0)]
)
def test_a_counter_that_begins_again_is_added_up(values, want):
    assert growth(values) == want


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([], "GRPO: no held-out evaluation yet"),
        ([50.0], "GRPO starts from a held-out CIDEr-D of 50.0"),
        ([50.0, 61.2, 48.5], "GRPO lowered held-out CIDEr-D from 50.0 to 48.5"),
        ([50.0, 61.2, 50.04], "GRPO left held-out CIDEr-D at 50.0"),
    ],
)
def test_the_headline_does_not_flatter(tmp_path, scores, said):
    folder = fake_run(tmp_path)
    write_lines(
        folder / "metrics.jsonl",
        [{"step": step, "eval/cider_d": score} for step, score in enumerate(scores)],
    )
    assert headline(read_run(folder)) == said
    assert said.replace("CIDEr-D", "CIDEr\u2011D") in page_of(folder).text


def test_scores_of_another_held_out_set_are_left_out_and_it_is_said(tmp_path):
    folder = fake_run(tmp_path)
    rows = [{"step": s, "eval/cider_d": 50.0 + s, "eval/set": "A"} for s in range(3)]
    rows += [{"step": 3, "eval/cider_d": 20.0, "eval/set": "B"}]
    write_lines(folder / "metrics.jsonl", rows)
    images = json.loads((folder / "eval_captions.json").read_text())
    for image, version in zip(images["images"], [3, 0, 5], strict=False):
        image["before"]["version"] = version
    (folder / "eval_captions.json").write_text(json.dumps(images))
    assert headline(read_run(folder)) == "GRPO is at a held-out CIDEr-D of 20.0"
    write_lines(folder / "metrics.jsonl", [*rows, {**rows[-1], "step": 4, "eval/cider_d": 25.0}])
    run = read_run(folder)
    assert headline(run) == "GRPO raised held-out CIDEr-D from 20.0 to 25.0"
    assert run.evaluations == [(3, 0.0, 20.0), (4, 0.0, 25.0)]
    by_time, _ = score_charts(run)
    # Cross-entropy was scored with the first set, and the control, if nothing is said, as the end.
    assert [shape.name for shape in by_time.shapes] == ["more cross-entropy", "GRPO"]
    text = page_of(folder).text
    assert "scores of 3 evaluations from step 0 to step 2 are of another one and left out" in text
    assert "Held-out CIDEr-D 25.0 +5.0 since step 3" in text
    assert "More cross-entropy instead 265.4 in the same time" in text
    assert "2 of the images were not held out from the start: their first caption is of step 3" in (
        text
    )


def test_nothing_is_loaded_from_outside(run):
    page = page_of(run)
    loads = {
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    }
    assert loads and all(value.startswith("data:image/jpeg;base64,") for value in loads)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    text = (run / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)


def test_captions_cannot_break_out_of_the_page(tmp_path):
    """Everything that a data set, a model or a configuration can say, said by an attacker."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}&lt;"
    folder = fake_run(tmp_path)
    images = evaluated_images(3)
    for image in images:
        image["prompt_id"] = evil
        image["image_base64_jpeg"] = evil
        image["references"] = [evil]
        image["before"]["caption"] = image["after"]["caption"] = evil
    (folder / "eval_captions.json").write_text(json.dumps({"images": images}))
    group = sample_group(1, evil, [0.0, 1.0])
    group["references"] = [evil]
    for caption in group["captions"]:
        caption["text"], caption["terms"] = evil, {evil: 1.0}
    write_lines(folder / "samples.jsonl", [group])
    rows = metrics_rows(3)
    for row in rows[1:]:
        row[f"reward/{evil}"] = row[f"seconds/{evil}"] = 1.0
    write_lines(folder / "metrics.jsonl", rows)
    config = {"objective": {"preset": evil}, "data": {"source": evil}, "seed": evil}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    page = page_of(folder)
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert images and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert "<script>alert(1)</script>" in page.text, "shown as it is, not run"
    assert "{{ 7*7 }}" in page.text


def test_a_report_of_a_run_that_has_written_nothing_says_so(tmp_path):
    (tmp_path / "config.yaml").touch()
    page = page_of(tmp_path)
    assert "no held-out evaluation yet" in page.text
    assert "No step has finished yet" in page.text
    assert "0 steps" in page.text


PARTS = {
    "config.yaml": "Configuration",
    "metrics.jsonl": "Step by step",
    "samples.jsonl": "What the policy learns from",
    "eval_captions.json": "Captions before and after",
    "summary.json": "More cross-entropy instead",
    "xe": "from the first step of stage 1",
    "xe_baseline.jsonl": "cross-entropy at equal time",
}


@pytest.mark.parametrize("missing", PARTS)
def test_a_report_survives_any_file_that_is_not_there_yet(tmp_path, missing):
    folder = fake_run(tmp_path / "run", steps=20, images=3)
    (folder / missing).rename(tmp_path / "elsewhere")
    text = page_of(folder).text
    gone = [file for file, words in PARTS.items() if words not in text]
    # More cross-entropy is shown in comparison with the run, so not without its metrics.
    with_it = ["summary.json", "xe_baseline.jsonl"] if missing == "metrics.jsonl" else []
    assert gone == [missing, *with_it]


def test_a_report_of_one_step(tmp_path):
    folder = fake_run(tmp_path)
    write_lines(folder / "metrics.jsonl", metrics_rows(150)[:2])
    charts = {chart.title: chart for chart in step_charts(read_run(folder))}
    assert charts["Reward"].shapes[0].dots == "M500.0 500.0h0", "one step is one dot in the middle"
    assert "1 of 150 steps so far" in page_of(folder).text


def test_a_report_can_be_made_again_from_the_command_line(tmp_path, capsys):
    folder = fake_run(tmp_path, steps=4, images=3)
    main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    with pytest.raises(SystemExit, match=r"rayrl\.report: .*nowhere: no such run folder"):
        main([str(tmp_path / "nowhere")])
    (other := tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match=rf"^rayrl\.report: {other}: no run folder, which has"):
        main([str(other)])
    assert not any(other.iterdir())


def test_a_broken_file_is_named(tmp_path):
    folder = fake_run(tmp_path, steps=4, images=3)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not JSON"):
        write_report(folder)
    (folder / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary\.json: want an object, got list"):
        write_report(folder)


def test_cross_entropy_and_the_objective_fork_at_the_end_of_stage_1(run):
    by_time, _ = score_charts(read_run(run))
    stage1, control, grpo = by_time.readout["series"]
    assert by_time.x_name == "seconds" and [s.name for s in by_time.shapes][2] == "GRPO"
    assert stage1["x"] == [0, 20, 40, 60, 80, 100]
    assert control["x"] == [100, 124, 148, 172, 196, 220]
    assert grpo["x"][0] == 100 and grpo["text"][0] == "263.1"
    # Evaluation (1.9 s a time) is no training: 25 steps of about 0.8 s.
    assert grpo["x"][1] == pytest.approx(120, abs=1)


def test_by_step_more_cross_entropy_stands_where_the_same_time_had_passed(tmp_path):
    folder = fake_run(tmp_path)
    rows = [{"step": 0, "eval/cider_d": 10.0}]
    rows += [{"step": k, "seconds/learner": 2.0, "seconds/eval": 50.0} for k in (1, 2, 3, 4)]
    rows[-1]["eval/cider_d"] = 20.0
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(
        folder / "xe_baseline.jsonl",
        [{"step": s, "seconds": s / 100, "eval/cider_d": 10.0} for s in (0, 300, 900)],
    )
    _, by_step = score_charts(read_run(folder))
    control, grpo = by_step.readout["series"]
    assert control["x"] == [0, 1.5, 4], "3 s are one and a half steps; 9 s are past the last"
    assert grpo["x"] == [0, 4]


def test_long_runs_are_told_in_minutes(tmp_path):
    folder = fake_run(tmp_path)
    rows = [{"step": k, "seconds/learner": 600.0, "eval/cider_d": 1.0 + k} for k in (1, 2)]
    write_lines(folder / "metrics.jsonl", rows)
    by_time, _ = score_charts(read_run(folder))
    assert by_time.x_name == "minutes"
    assert by_time.readout["series"][2]["x"] == pytest.approx([100 / 60 + 10, 100 / 60 + 20], 1e-3)


def test_charts_of_what_is_always_zero_are_left_out_until_it_is_not(tmp_path):
    folder = fake_run(tmp_path, steps=10)
    titles = [chart.title for chart in step_charts(read_run(folder))]
    assert titles == [
        "Reward",
        "KL to the stage-1 model",
        "Entropy",
        "Caption length",
        "Clipped tokens",
        "Gradient norm",
        "Mismatch KL",
        "Captions a second",
        "Time by phase",
    ]
    rows = metrics_rows(10)
    rows[-1].update({"groups/dropped": 1.0, "reward/length": 0.5})
    write_lines(folder / "metrics.jsonl", rows)
    titles = [chart.title for chart in step_charts(read_run(folder))]
    assert {"Dropped groups", "Reward terms"} <= set(titles) and "Staleness" not in titles


def test_time_by_phase_adds_up(run):
    chart = step_charts(read_run(run))[-1]
    assert [shape.name for shape in chart.shapes] == [
        "rollout",
        "reward",
        "learner",
        "sync",
        "eval",
    ]
    shares = [int(shape.last.removesuffix(" %")) for shape in chart.shapes]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert shares[2] == max(shares), "the learner takes longest in these files"


def image(before: float, after: float, name: str = "x") -> dict:
    return {
        "prompt_id": name,
        "before": {"caption": "", "cider_d": before},
        "after": {"caption": "", "cider_d": after},
    }


def test_images_are_picked_by_what_the_titles_say():
    images = [image(100.0, 100.0 + change, f"{change}") for change in (-30, 5, 0, 40, -10, 0, 20)]
    drawn, gains, losses = pick_images(images, count=2)
    assert [one["prompt_id"] for one in gains.images] == ["40", "20"]
    assert [one["prompt_id"] for one in losses.images] == ["-30", "-10"]
    flipped = [image(one["after"]["cider_d"], 100.0, one["prompt_id"]) for one in images]
    same = [one["prompt_id"] for one in pick_images(flipped, count=2)[0].images]
    assert [one["prompt_id"] for one in drawn.images] == same, "the draw does not see the scores"


def test_there_are_no_largest_losses_where_nothing_was_lost():
    assert [pick.title for pick in pick_images([image(1.0, 2.0)] * 2)] == [
        "Drawn at random",
        "Largest gains",
    ]
    assert [pick.title for pick in pick_images([image(1.0, 1.0)])] == ["Drawn at random"]
    assert pick_images([]) == []


def test_words_are_marked_by_case_folded_words_without_punctuation():
    assert mark_words("A red, cat . ", ["the red dog", "a cat!"]) == [
        ("A", True),
        ("red,", True),
        ("cat", True),
        (".", True),
    ]
    assert mark_words("purple", ["the red dog"]) == [("purple", False)]
    assert mark_words("", ["the red dog"]) == []


def test_the_example_groups_are_the_widest_of_the_first_and_last_logged_step():
    samples = [
        sample_group(1, "a", [1.0, 1.1]),
        sample_group(1, "b", [0.0, 2.0]),
        sample_group(5, "c", [0.0, 9.0]),
        sample_group(9, "d", [1.0, 1.5]),
    ]
    groups = example_groups(samples)
    assert [group["prompt_id"] for group in groups] == ["b", "d"]
    assert largest_advantage(groups) == 1.0
    assert example_groups(samples[:2]) == samples[1:2], "one logged step is shown once"
    assert example_groups([sample_group(1, "alone", [1.0])]) == []


def test_a_group_without_advantages_is_shown_without_bars(tmp_path):
    folder = fake_run(tmp_path, steps=4, images=3)
    group = sample_group(1, "p", [0.0, 1.0])
    for caption in group["captions"]:
        caption["advantage"] = None
    write_lines(folder / "samples.jsonl", [group])
    page = page_of(folder)
    assert not [attributes for _, attributes in page.tags if attributes.get("class") == "bar"]
    assert "1.000 none" in page.text


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (0.0, 1.0, 4, [0, 0.5, 1.0]),
        (-3e-6, 4e-6, 4, [-2e-6, 0, 2e-6, 4e-6]),
        (262.4, 274.1, 6, [264, 266, 268, 270, 272, 274]),
        (0.0, 149.0, 5, [0, 50, 100]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low, high, most, ticks):
    assert nice_ticks(low, high, most) == pytest.approx(ticks, abs=1e-12)


def test_the_running_mean_keeps_constants_and_centres_its_window():
    assert running_mean([2.0] * 100).tolist() == [2.0] * 100
    pulse = [0.0] * 100
    pulse[50] = 5.0
    mean = running_mean(pulse)
    assert mean[47:54].tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert running_mean([1.0, 4.0]).tolist() == [1.0, 4.0], "too few to smooth"


def test_a_line_runs_from_corner_to_corner():
    chart = line_chart(
        "t", [Series(name="s", x=[0, 10], y=[0.0, 1.0])], x_name="step", from_zero=True
    )
    # The top leaves 6 % of the range free: 1 stands 6/106 below it.
    assert chart.shapes[0].line == "M0.0 1000.0L1000.0 56.6"
    assert [(tick.label, tick.at) for tick in chart.x_ticks][::5] == [("0", 0.0), ("10", 100.0)]
    assert chart.summary == "s: 0.0 at step 0, 1.0 at step 10"


def test_a_flat_line_stands_in_the_middle():
    chart = line_chart("t", [Series(name="s", x=[1, 2], y=[5.0, 5.0])], x_name="step")
    assert chart.shapes[0].line == "M0.0 500.0L1000.0 500.0"


def test_nothing_but_zeros_lies_on_the_floor():
    zeros = Series(name="s", x=[1, 2], y=[0.0, 0.0])
    chart = line_chart("t", [zeros], x_name="step", from_zero=True)
    assert chart.shapes[0].line == "M0.0 1000.0L1000.0 1000.0"
    assert [tick.label for tick in chart.y_ticks] == ["0", "0.5", "1.0"]


def test_single_steps_are_drawn_only_where_their_mean_differs():
    steps = range(50)
    smooth = [Series(name="s", x=steps, y=[float(k % 2) for k in steps], smooth=True)]
    assert line_chart("t", smooth, x_name="step").shapes[0].faint
    few = [Series(name="s", x=steps[:20], y=[0.1 * k for k in range(20)], smooth=True)]
    assert not line_chart("t", few, x_name="step").shapes[0].faint


def test_many_points_are_thinned_to_means():
    n = 6000
    chart = line_chart("t", [Series(name="s", x=range(n), y=range(n))], x_name="step")
    reading = chart.readout["series"][0]
    assert len(reading["x"]) == 600
    assert reading["x"][0] == 4.5 and reading["text"][0] == "4.5"


def test_bars_are_stacked_on_each_other():
    chart = bar_chart("t", [1, 2], {"a": [1.0, 1.0], "b": [3.0, 0.0]}, x_name="step")
    low, high = chart.shapes
    assert low.area == "M0.0 750.0H500.0V1000.0H0.0ZM500.0 750.0H1000.0V1000.0H500.0Z"
    assert high.area == "M0.0 0.0H500.0V750.0H0.0ZM500.0 750.0H1000.0V750.0H500.0Z"
    assert (low.last, high.last) == ("40 %", "60 %")


def test_a_series_whose_lengths_differ_is_refused():
    with pytest.raises(ValueError, match="series 'kl': 2 values for 3 places"):
        Series(name="kl", x=[1, 2, 3], y=[1.0, 2.0])
