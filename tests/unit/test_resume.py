"""A run that goes on keeps its stage 1, its training data and its configuration."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from rayrl import cli
from rayrl.checkpoint import Checkpoint, save_checkpoint
from rayrl.config import Config
from rayrl.resume import open_run_folder
from rayrl.stage1 import run_stage1

DATA = "fingerprint"


def flags_of(folder, model, *more: str) -> list[str]:
    few = ["--xe.steps", "0", "--data.scenes.num_train", "20", "--train.steps", "7"]
    return ["--run_folder", str(folder), "--model.path", str(model), *few, *more]


def parsed(*argv: str) -> cli.Invocation:
    return cli.parse(argv, program="grpo_coco.py", description="d")


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A model folder of this test's own."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def run(model, tmp_path):
    """The folder of a run that has a checkpoint."""
    folder = tmp_path / "run"
    config = parsed(*flags_of(folder, model)).config
    open_run_folder(folder, config, DATA, resume=False, say=print)
    run_stage1(config, folder)
    files = {"config.json": np.frombuffer(b"{}", np.uint8)}
    meta = {"data": DATA}
    save_checkpoint(
        folder / "checkpoints", Checkpoint(step=3, model_files=files, arrays={}, meta=meta), keep=2
    )
    return folder


def content(folder) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--xe.steps", "60"], r"xe\.steps: 60, was 0"),
        (["--xe.lr", "0.5"], r"xe\.lr: 0\.5, was 0\.002"),
        (["--seed", "4"], r"seed: 4, was 0"),
        (["--model.path", "tiny"], r"model\.path: tiny, was .*/model"),
        (["--model.dtype", "bfloat16"], r"model\.dtype: bfloat16, was float32"),
        (["--sampling.max_tokens", "9"], r"sampling\.max_tokens: 9, was 24"),
    ],
)
def test_another_model_to_start_from_is_refused_before_anything_is_written(run, flags, message):
    before = content(run)
    config = parsed("--run_folder", str(run), "--resume", *flags).config
    with pytest.raises(ValueError, match=f"started from another model .{message}"):
        open_run_folder(run, config, DATA, resume=True, say=print)
    assert content(run) == before


@pytest.mark.parametrize(
    ("had", "flags", "message"),
    [
        ({"rank": 0}, {"rank": 8}, r"rank 0 and alpha 32, want the same, not 8 and 32"),
        ({"rank": 8}, {"rank": 0}, r"rank 8 and alpha 32, want the same, not 0 and 32"),
        ({"rank": 8}, {"rank": 8, "alpha": 16}, r"rank 8 and alpha 32, .* not 8 and 16"),
    ],
)
def test_adapters_of_another_form_or_scale_are_refused_before_anything_is_written(
    run, had, flags, message
):
    text = yaml.safe_load((run / cli.RUN_CONFIG).read_text())
    text["learner"]["lora"] |= had
    (run / cli.RUN_CONFIG).write_text(yaml.safe_dump(text))
    before = content(run)
    given = [word for name, n in flags.items() for word in (f"--learner.lora.{name}", str(n))]
    config = parsed("--run_folder", str(run), "--resume", *given).config
    with pytest.raises(ValueError, match=message):
        open_run_folder(run, config, DATA, resume=True, say=print)
    assert content(run) == before


def test_a_scale_of_adapters_that_there_are_none_of_may_change(run):
    config = parsed("--run_folder", str(run), "--resume", "--learner.lora.alpha", "16").config
    open_run_folder(run, config, DATA, resume=True, say=print)
    assert parsed("--run_folder", str(run), "--resume").config.learner.lora.alpha == 16


def test_other_training_data_are_refused_before_anything_is_written(run):
    before = content(run)
    config = parsed("--run_folder", str(run), "--resume", "--data.scenes.num_train", "9").config
    with pytest.raises(
        ValueError, match=r"since step 3 \(data\.scenes\.num_train: 9, was 20; fingerprint now, was"
    ):
        open_run_folder(run, config, "now", resume=True, say=print)
    assert content(run) == before


def test_a_run_whose_configuration_is_empty_is_held_to_its_receipt(run):
    (run / cli.RUN_CONFIG).write_text("")
    file = run.parent / "job.yaml"
    file.write_text(cli.dump(parsed(*flags_of(run, run.parent / "model")).config))
    config = parsed("--config", str(file), "--resume").config
    open_run_folder(run, config, DATA, resume=True, say=print)
    assert yaml.safe_load((run / cli.RUN_CONFIG).read_text())["run_folder"] == str(run)


def test_without_its_receipt_a_run_is_held_to_its_configuration(run):
    (run / "stage1/stage1.json").unlink()
    config = parsed("--run_folder", str(run), "--resume", "--seed", "4").config
    with pytest.raises(ValueError, match="seed: 4, was 0"):
        open_run_folder(run, config, DATA, resume=True, say=print)
    same = parsed("--run_folder", str(run), "--resume").config
    assert run_stage1(same, run, resume=True)[-1].folder == run / "stage1/final"


def test_a_run_whose_stage_1_is_gone_is_refused_and_does_not_get_another(run):
    shutil.rmtree(run / "stage1/final")
    before = content(run)
    config = parsed("--run_folder", str(run), "--resume").config
    with pytest.raises(FileNotFoundError, match=r"stage1/final, which the run started from, is no"):
        open_run_folder(run, config, DATA, resume=True, say=print)
    assert content(run) == before


def test_what_makes_no_other_model_may_change_and_stage_1_stays(run, model):
    stage1 = content(run / "stage1")
    shutil.rmtree(model)
    said: list[str] = []
    flags = ["--train.steps", "8", "--data.max_val", "5", "--rollout.num_workers", "2"]
    flags += ["--xe.control", "false", "--xe.num_workers", "2", "--sampling.temperature", "0.9"]
    # The same data, as their fingerprint says, wherever they lie.
    flags += ["--data.max_train", "20"]
    config = parsed("--run_folder", str(run), "--resume", *flags).config
    open_run_folder(run, config, DATA, resume=True, say=said.append)
    snapshots = run_stage1(config, run, resume=True)
    assert [(s.steps, s.folder) for s in snapshots] == [(0, run / "stage1/final")]
    assert content(run / "stage1") == stage1
    assert "resuming with another train.steps: 8, was 7" in said and len(said) == 9
    assert cli.load(run / "config.yaml") == config


@pytest.mark.parametrize("resume", [True, False])
def test_what_a_killed_driver_left_half_written_goes_when_a_run_opens_its_folder(run, resume):
    flags = ["--resume"] if resume else []
    if not resume:
        shutil.rmtree(run / "checkpoints")
    config = parsed("--run_folder", str(run), "--xe.steps", "0", *flags).config
    whole = content(run)
    left = ["checkpoints/.step_8.partial", "replay/.step_7.partial", ".fetched.partial/checkpoints"]
    for place in [*left, "stage1/training/.step_5.partial"]:
        (run / place).mkdir(parents=True)
        (run / place / "model.safetensors").write_bytes(b"half")
    open_run_folder(run, config, DATA, resume=resume, say=print)
    assert content(run).keys() == whole.keys()


def test_a_run_that_is_refused_loses_nothing_that_is_half_written(run):
    # Another driver may be at work there.
    (run / "checkpoints/.step_8.partial").mkdir()
    config = parsed("--run_folder", str(run), "--xe.steps", "0").config
    with pytest.raises(ValueError, match="holds a run of 3 steps"):
        open_run_folder(run, config, DATA, resume=False, say=print)
    assert (run / "checkpoints/.step_8.partial").is_dir()


def test_fewer_steps_than_were_done_are_refused_before_anything_is_written(run):
    before = content(run)
    fewer = parsed("--run_folder", str(run), "--resume", "--train.steps", "2").config
    with pytest.raises(ValueError, match=r"run holds step 3, and train\.steps is 2: .*least 3"):
        open_run_folder(run, fewer, DATA, resume=True, say=print)
    assert content(run) == before
    same = parsed("--run_folder", str(run), "--resume", "--train.steps", "3").config
    open_run_folder(run, same, DATA, resume=True, say=print)


def test_a_setting_that_an_earlier_version_did_not_know_is_no_change(run):
    receipt = run / "stage1/stage1.json"
    found = json.loads(receipt.read_text())
    del found["settings"]["xe"]["grad_clip"]
    found["settings"]["xe"]["of_old"] = 1
    receipt.write_text(json.dumps(found))
    before = content(run / "stage1")
    config = parsed("--run_folder", str(run), "--resume").config
    said: list[str] = []
    open_run_folder(run, config, DATA, resume=True, say=said.append)
    assert said == []
    run_stage1(config, run, resume=True)
    assert content(run / "stage1") == before
    # Those that it knew are compared as ever.
    other = parsed(
        "--run_folder", str(run), "--resume", "--xe.grad_clip", "9", "--xe.lr", "9"
    ).config
    with pytest.raises(ValueError, match=r"another model \(xe\.lr: 9\.0, was [^;]*\)"):
        open_run_folder(run, other, DATA, resume=True, say=said.append)


def test_a_run_goes_on_with_its_own_configuration_and_flags_win(run, capsys):
    invocation = parsed("--run_folder", str(run), "--resume", "--learner.lr", "0.5")
    config = invocation.config
    assert (config.train.steps, config.data.scenes.num_train) == (7, 20)
    assert (config.learner.lr, config.run_folder) == (0.5, str(run))
    assert f"configuration: {run}/config.yaml" in capsys.readouterr().out
    assert parsed(f"--run_folder={run}", "--resume", "auto").config.train.steps == 7


def test_a_folder_that_was_moved_goes_on_where_it_is(run, tmp_path, monkeypatch):
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert parsed("--run_folder", "moved", "--resume").config.run_folder == "moved"
    (tmp_path / "runs").mkdir()
    (tmp_path / "moved").rename(tmp_path / "runs/grpo_coco")
    config = parsed("--resume").config
    assert (config.run_folder, config.train.steps) == ("runs/grpo_coco", 7)


def test_a_run_without_a_checkpoint_and_a_given_file_leave_its_configuration_alone(run, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"run_folder: {run}\nseed: 5\n")
    assert parsed("--config", str(other), "--resume").config.train.steps == Config().train.steps
    assert parsed("--run_folder", str(run)).config.train.steps == Config().train.steps
    shutil.rmtree(run / "checkpoints")
    command = ["--run_folder", str(run), "--resume", "auto"]
    assert parsed(*command).config.train.steps == Config().train.steps
    fresh = parsed("--run_folder", str(tmp_path / "fresh"), "--resume", "auto")
    assert fresh.config.run_folder == str(tmp_path / "fresh")


def test_a_file_in_the_place_of_the_run_folder_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(ValueError, match=rf"--run_folder .*{place}: .*/file is a file, want a"):
            open_run_folder(tmp_path / place, Config(), DATA, resume=False, say=print)
