"""A checkpoint through Ray Data: the engine's own captions, in order, and their score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrl import commands
from tests.ray.conftest import run_script

pytestmark = pytest.mark.ray

NUM_IMAGES = 10
DATA = ("--data.scenes.num_train", "60", "--data.scenes.num_val", str(NUM_IMAGES))


def flags(folder, output, *extra: str) -> list[str]:
    small = ("--engine.backend", "hf", "--engine.max_concurrency", "4")
    tokens = ("--sampling.max_tokens", "12", "--rollout.cpus", "1", "--rollout.num_workers", "2")
    return ["--checkpoint", str(folder), "--output", str(output), *DATA, *small, *tokens, *extra]


def read(folder) -> tuple[dict, dict[str, str]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    entries = json.loads((folder / "captions_val_results.json").read_text())
    return metrics, {entry["image_id"]: entry["caption"] for entry in entries}


def test_a_checkpoint_is_captioned_greedily_sampled_and_scored(
    spoken_folder, environment, tmp_path
):
    from rayrl import cli
    from rayrl.data import load_split
    from rayrl.data.references import load_captions
    from rayrl.engine.base import EngineSetup, make_engine
    from rayrl.rewards import ptb
    from rayrl.rewards.suite import CaptionSet, evaluate
    from rayrl.vlm import load_captioner
    from rayrl.weights import pack

    names = ("--metrics", "cider_d", "health")
    arguments = flags(spoken_folder, tmp_path / "out", *names, "--samples", "3")
    done = run_script("eval_coco.py", arguments, environment)
    assert done.returncode == 0, done.stderr
    metrics, captions = read(tmp_path / "out")

    config = cli.load(None, [*DATA, "--engine.backend", "hf"])
    data = load_split(config.data, "val")
    engine = make_engine(EngineSetup(folder=spoken_folder, config=config.engine, group_size=1))
    weights = pack(load_captioner(spoken_folder).model, 0)
    engine.load_weights(weights, changed=config.model.trainable)
    want = [completion.text for completion in engine.greedy(list(data), 12)]
    # Batches of 4 on two workers come back in the order of the data.
    assert list(captions) == list(data.ids)
    assert list(captions.values()) == want
    assert len(set(want)) > 1
    score = 100 * evaluate(CaptionSet(want, data.references()), ["cider_d"]).scores["cider_d"]
    assert metrics["scores"]["cider_d"] == pytest.approx(score, abs=1e-9)
    assert metrics["decoding"] == {
        "method": "greedy",
        "beams": 1,
        "max_tokens": 12,
        "samples": 3,
        "temperature": 1.0,
        "seed": 0,
    }
    assert metrics["engine"]["backend"] == "hf"
    assert metrics["model"]["instruction"] == config.data.instruction
    assert metrics["checkpoint"] == str(Path(spoken_folder).resolve())
    assert metrics["data"]["fingerprint"] == data.fingerprint()
    samples = metrics["samples"]
    assert 0 < samples["mean_cider_d"] <= samples["oracle_cider_d"]
    assert 0 < samples["div_1"] <= 100
    training = {" ".join(ptb.tokenize(text)) for text in load_captions(config.data, "train")}
    novel = [" ".join(ptb.tokenize(text)) not in training for text in want]
    assert metrics["scores"]["novel"] == pytest.approx(100 * sum(novel) / len(novel))
    table = next(line for line in done.stdout.splitlines() if line.startswith("cider_d"))
    assert table.split() == ["cider_d", f"{score:.2f}"]
    assert f"captioned {NUM_IMAGES}/{NUM_IMAGES} images" in done.stdout


def test_without_room_for_an_engine_it_says_what_is_missing_and_stops(
    spoken_folder, run_here, tmp_path
):
    sizes = ("--rollout.cpus", "50", "--rollout.start_timeout_s", "1")
    done = run_here(commands.evaluate, flags(spoken_folder, tmp_path / "out", *sizes))
    assert done.returncode == 1
    missing = "an engine and its reader: want 50.5 CPU; of the cluster's 8, 8 are free"
    last = done.stderr.splitlines()[-1]
    assert last == f"eval_coco.py: failed: gave up waiting for room for {missing}"
