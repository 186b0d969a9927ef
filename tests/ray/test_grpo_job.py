"""The main job on a local Ray: what it leaves behind, exact staleness, resuming, dying, failing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.metric_names import not_listed
from tests.ray.conftest import (
    ROOT,
    command_line,
    job_flags,
    metrics,
    run_script,
    weights,
    without_time,
)
from tests.ray.fault_kinds import children

pytestmark = pytest.mark.ray
SIX_STEPS = {"train.steps": 6}


def test_a_run_with_vllm_leaves_everything_a_person_needs(
    small_job, spoken_folder, environment, tmp_path
):
    pytest.importorskip("vllm")
    flags = small_job(
        "--trace",
        engine__backend="vllm",
        train__tensorboard=True,
        xe__steps=2,
    )
    done = run_script("grpo_coco.py", flags, environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"cider_d_start", "cider_d_end", "captions_per_second", "seconds_by_phase"} <= set(
        summary
    )
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [not_listed(row) for row in rows] == [[]] * 5
    assert summary["cider_d_start"] == rows[0]["eval/cider_d"] > 0
    assert summary["cider_d_end"] == rows[-1]["eval/cider_d"]
    # Cross-entropy went on beside the engines, on the CPUs that the learner left.
    assert summary["cider_d_xe_control"] > 0
    # What both numbers mean: rewards with the end token against the training set, scores without.
    signatures = summary["signatures"]
    assert signatures["reward"].startswith("Cider-D[n4,s6.0]+eos:yes+df:train[60]#")
    assert signatures["eval/cider_d"].startswith("Cider-D[n4,s6.0]+eos:no+df:corpus[8]#")
    meta = json.loads((folder / "checkpoints" / "latest" / "trainer" / "meta.json").read_text())
    assert meta["signatures"] == signatures
    # Engine and learner agree, step by step, whatever the updates moved.
    assert all(row["mismatch_kl"] < 1e-7 for row in rows[1:])
    assert all(row["groups/dropped"] == 0 for row in rows[1:])
    assert all(row["staleness/max"] == 0 for row in rows[1:])
    # Cross-entropy came first, with Ray Train: the run began where it ended.
    stage1 = json.loads((folder / "stage1" / "stage1.json").read_text())
    assert [snapshot["steps"] for snapshot in stage1["snapshots"]] == [0, 2]
    before, after = (
        (place / "model.safetensors").read_bytes()
        for place in (spoken_folder, folder / "stage1" / "final")
    )
    assert before != after
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["captions"]) == 4 and {"text", "reward", "advantage"} <= set(
        sample["captions"][0]
    )
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "config.yaml").is_file()
    assert list(folder.rglob("events.out.tfevents*"))
    check_trace(folder)
    from rayrl.vlm import load_captioner

    assert load_captioner(folder / "checkpoints" / "latest").model is not None


def check_trace(folder) -> None:
    """Every worker's calls lie inside the phase of the driver that waited for them."""
    events = json.loads((folder / "trace.json").read_text())
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"driver", "learner 0", "rollout worker 0", "reward worker 0"} <= set(lanes.values())
    spans = [
        (lanes[e["pid"], e["tid"]], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
        for e in events
        if e["ph"] == "X"
    ]

    def of(lane: str, name: str) -> list[tuple[float, float]]:
        return sorted((a, b) for where, what, a, b in spans if (where, what) == (lane, name))

    for row in metrics(folder)[1:]:
        ((begin, end),) = of("driver", f"step {row['step']}")
        for phase in ("rollout", "reward", "learner", "sync"):
            inside = [
                b - a for a, b in of("driver", phase) if begin - 1e-3 <= a and b <= end + 1e-3
            ]
            assert sum(inside) == pytest.approx(row[f"seconds/{phase}"], abs=1e-5)
    updates, phases = of("learner 0", "update"), of("driver", "learner")
    assert len(updates) == len(phases) == 4
    for (a, b), (begin, end) in zip(updates, phases, strict=True):
        assert begin - 0.05 <= a and b <= end + 0.05
    # Sampling of a step is done before the learner begins with it.
    sampled = of("rollout worker 0", "generate")
    assert len(sampled) == 4
    assert all(b <= a + 0.05 for (_, b), (a, _) in zip(sampled, updates, strict=True))
    assert len(of("reward worker 0", "score_part")) == 4
    assert len(of("rollout worker 0", "load")) >= 5


def test_staleness_is_exactly_what_was_promised(small_job, environment, tmp_path):
    # Two reward workers share the frequencies of a step, however many steps are on their way.
    flags = small_job(train__max_staleness=2, train__reward_workers=2, reward__df="batch")
    done = run_script("grpo_coco.py", flags, environment)
    assert done.returncode == 0, done.stderr
    for row in metrics(tmp_path / "run")[1:]:
        want = min(row["step"] - 1, 2)
        assert (row["staleness/mean"], row["staleness/max"]) == (want, want)


def start(flags, environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "grpo_coco.py"), *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder, step, process, timeout=400):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) > step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def straight(spoken_folder, environment, tmp_path_factory):
    """The folder of an undisturbed run of six steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    flags = {**job_flags(spoken_folder, folder), **SIX_STEPS}
    done = run_script("grpo_coco.py", command_line(flags), environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_ctrl_c_then_resume_equals_an_undisturbed_run_bit_for_bit(
    small_job, environment, tmp_path, straight
):
    flags = small_job(run_folder=tmp_path / "broken", **SIX_STEPS)
    process = start(flags, environment)
    wait_for_step(tmp_path / "broken", 2, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "stopping after this step" in output
    stopped = metrics(tmp_path / "broken")[-1]["step"]
    assert 2 <= stopped < 6
    checkpoint = json.loads(
        (tmp_path / "broken" / "checkpoints" / "latest" / "trainer" / "meta.json").read_text()
    )
    assert checkpoint["step"] == checkpoint["weight_version"] == stopped
    again = run_script("grpo_coco.py", [*flags, "--resume"], environment)
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "broken") == weights(straight)
    one, other = metrics(straight), metrics(tmp_path / "broken")
    for row in other:
        if row["step"] == stopped and stopped % 2:
            # Stopping evaluated at a step that the undisturbed run did not.
            row.pop("eval/cider_d", None)
            row.pop("eval/set", None)
    assert without_time(one) == without_time(other)


def test_killed_workers_are_replaced_and_the_run_ends_as_if_nothing_had_happened(
    small_job, environment, tmp_path, straight
):
    process = start(small_job(run_folder=tmp_path / "killed", **SIX_STEPS), environment)
    for step, name in ((1, "RolloutActor"), (2, "RewardActor")):
        wait_for_step(tmp_path / "killed", step, process)
        victims = children(process.pid, f"ray::{name}")
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "rollout worker 0 was lost and is replaced" in output
    assert "reward worker 0 was lost and is replaced" in output
    assert weights(tmp_path / "killed") == weights(straight)


def test_a_run_whose_machine_is_lost_goes_on_elsewhere_with_no_prompt_twice_and_none_skipped(
    small_job, environment, tmp_path
):
    remote, run = tmp_path / "remote", tmp_path / "run"
    flags = small_job(
        train__steps=8,
        train__max_staleness=1,
        train__images_per_step=4,
        train__samples_every=1,
        train__checkpoint_uri=f"file://{remote}",
    )
    process = start(flags, environment)
    # By then the copy of step 2, of a few megabytes, has long been made.
    wait_for_step(run, 5, process)
    process.kill()
    process.communicate(timeout=300)
    shutil.rmtree(run)
    again = run_script("grpo_coco.py", [*flags, "--resume"], environment)
    assert again.returncode == 0, again.stderr
    assert "fetched step" in again.stdout
    resumed = int(again.stdout.partition("fetched step ")[2].split()[0])
    assert resumed in (2, 4, 6)
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(9))
    for row in rows[1:]:
        begun = resumed if row["step"] > resumed else 0
        assert row["staleness/max"] == row["staleness/mean"] == min(row["step"] - 1 - begun, 1)
    assert trained_prompts(run) == planned_prompts(steps=8, images=4, count=60)
    # The newest two, and the best: there and here.
    scores = {row["step"]: row["eval/cider_d"] for row in rows[1:] if "eval/cider_d" in row}
    best = f"step_{max(scores, key=lambda step: scores[step])}"
    assert (run / "checkpoints" / "best").resolve().name == best
    assert {p.name for p in remote.iterdir()} == {"report", "run", "step_6", "step_8", best}


def trained_prompts(folder) -> list[list[str]]:
    """The prompt ids of each step, from samples of every step."""
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [
        [sample["prompt_id"] for sample in samples if sample["step"] == step]
        for step in range(1, 1 + max(sample["step"] for sample in samples))
    ]


def planned_prompts(steps: int, images: int, count: int) -> list[list[str]]:
    from rayrl.config import Config
    from rayrl.data import load_split
    from rayrl.data.order import prompt_indices

    scenes = {"num_train": count, "num_val": 8}
    data = load_split(Config.model_validate({"data": {"scenes": scenes}}).data, "train")
    return [
        [data[index].prompt_id for _, index in prompt_indices(step, images, count, 0)]
        for step in range(steps)
    ]


def test_a_run_folder_that_holds_a_run_is_not_overwritten(small_job, environment, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_3").mkdir(parents=True)
    done = run_script("grpo_coco.py", small_job(), environment)
    assert done.returncode == 1
    assert "holds a run of 3 steps: continue it with --resume" in done.stderr.splitlines()[-1]
    fresh = run_script(
        "grpo_coco.py", [*small_job(run_folder=tmp_path / "new"), "--resume"], environment
    )
    assert fresh.returncode == 1 and "no checkpoint in" in fresh.stderr.splitlines()[-1]


def test_an_error_in_an_actor_is_the_last_line_and_a_failure(small_job, environment, tmp_path):
    # A model folder whose weights are of another shape than its configuration.
    flags = small_job(engine__max_model_len=4096, model__path=str(tmp_path / "nowhere"))
    done = run_script("grpo_coco.py", flags, environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("grpo_coco.py: failed: ")
    assert "nowhere" in done.stderr
