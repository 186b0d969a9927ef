"""The model that a run starts from: found, checked, with other settings of its image processor."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rayrl import cli, eval_cli, stage1, xe
from rayrl.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from rayrl.config import Config, EngineConfig
from rayrl.data import load_split
from rayrl.engine import base
from rayrl.interrupt import StopRequest
from rayrl.receipt import made_of, other_settings
from rayrl.stage1 import Snapshot, run_stage1, start_folder
from rayrl.vlm import load_captioner, prompt_inputs
from rayrl.weights import read_model_files
from rayrl.xe_curve import XeCurve
from tests.conftest import COLOURS, INSTRUCTION, encoded_picture


def started(tiny_folder, tmp_path, **settings):
    model = {"path": str(tiny_folder), "image_processor": settings}
    return start_folder(Config.model_validate({"model": model}), tmp_path / "start", [])


def test_a_setting_changes_the_pictures_and_not_the_weights(tiny_folder, tmp_path):
    picture = encoded_picture(COLOURS["red"])
    before, after = (
        load_captioner(folder)
        for folder in (tiny_folder, started(tiny_folder, tmp_path, image_mean=[0.1, 0.2, 0.3]))
    )
    assert after.processor.image_processor.image_mean == (0.1, 0.2, 0.3)
    one, other = (
        prompt_inputs(captioner.processor, [picture], [INSTRUCTION])
        for captioner in (before, after)
    )
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert (one["pixel_values"] - other["pixel_values"]).abs().max() > 0.1
    want, got = (
        load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "start")
    )
    assert all((got[name] == value).all() for name, value in want.items())
    # The folder that was given is as it was.
    again = load_captioner(tiny_folder).processor.image_processor.image_mean
    assert list(again) == list(before.processor.image_processor.image_mean)


def test_a_model_without_settings_is_taken_as_it_is(tiny_folder, tmp_path):
    assert started(tiny_folder, tmp_path) == tiny_folder


def test_a_setting_that_a_processor_does_not_have_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"Idefics3ImageProcessor\w* has no setting 'max_pixels'"):
        started(tiny_folder, tmp_path, max_pixels=1000)
    with pytest.raises(ValueError, match=r"with path tiny: want model\.tiny"):
        Config.model_validate({"model": {"image_processor": {"do_resize": False}}})


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A model folder of this test's own."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def without_training(model, **changes) -> Config:
    return Config.model_validate({"model": {"path": str(model)}, "xe": {"steps": 0}, **changes})


def final_config(run) -> dict:
    return json.loads((run / "stage1/final/config.json").read_text())


def test_a_finished_stage_1_is_used_for_what_makes_no_other_model(model, tmp_path, capsys):
    run_stage1(without_training(model), tmp_path / "run")
    marked = tmp_path / "run/stage1/final/mark"
    marked.write_text("")
    same = without_training(model, data={"max_val": 3}, sampling={"temperature": 0.5})
    run_stage1(same, tmp_path / "run")
    assert marked.exists() and not capsys.readouterr().out
    run_stage1(without_training(model, seed=3), tmp_path / "run")
    assert not marked.exists()
    assert capsys.readouterr().out == "stage 1 is done again: another seed: 3, was 0\n"


def test_where_validation_lies_makes_no_other_model_and_the_columns_of_training_do():
    data = {"source": "parquet", "path": "train.parquet"}
    made = made_of(Config.model_validate({"data": data}))["settings"]
    moved = Config.model_validate({"data": {**data, "val_path": "dev.parquet"}})
    assert other_settings(made, moved) == []
    renamed = Config.model_validate({"data": {**data, "columns": {"captions": "long"}}})
    assert other_settings(made, renamed) == ["data.columns.captions: long, was captions"]


def test_a_model_that_was_trained_again_in_its_place_is_picked_up(model, tmp_path, capsys):
    run = tmp_path / "run"
    run_stage1(without_training(model), run)
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "again": True}))
    run_stage1(without_training(model), run)
    assert final_config(run)["again"]
    assert f"another content of model.path {model}" in capsys.readouterr().out
    # A time alone says so too: weights of another training have the same size.
    os.utime(model / "model.safetensors", (1, 1))
    run_stage1(without_training(model), run)
    assert "another content" in capsys.readouterr().out
    # But not to a run that has begun, which keeps what it has.
    (model / "config.json").write_text(json.dumps(content))
    run_stage1(without_training(model), run, resume=True)
    assert final_config(run)["again"]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["config.json"], r"no config\.json or adapter_config\.json in"),
        (
            ["processor_config.json", "preprocessor_config.json"],
            r"no processor_config\.json or preprocessor_config\.json in",
        ),
    ],
)
def test_a_folder_that_is_no_captioner_is_refused_under_its_own_name(
    model, tmp_path, gone, message
):
    for name in gone:
        (model / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=rf"^model\.path {model}: {message} {model}, want"):
        run_stage1(without_training(model), tmp_path / "run")
    assert not (tmp_path / "run/stage1/final").exists()


def test_a_name_that_is_no_folder_is_named_with_its_key(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(name):
        raise huggingface_hub.errors.LocalEntryNotFoundError("check your\ninternet connection")

    path = tmp_path / "mistyped"
    with pytest.raises(ValueError, match=rf"^model\.path {path}: no such folder here, and not to"):
        run_stage1(without_training(path), tmp_path / "run")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"^model\.path who/what: .* check your internet"):
        run_stage1(without_training("who/what"), tmp_path / "run")


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_model_whose_captions_would_be_cut_off_is_not_trained(
    model, tmp_path, training, monkeypatch, spare, fits
):
    monkeypatch.setattr(base, "vllm_importable", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    config = in_four_steps(model, sampling={"max_tokens": 9})
    first = load_split(config.data, "train")[0]
    inputs = prompt_inputs(load_captioner(model).processor, [first.image], [first.text])
    length = inputs["input_ids"].shape[1]
    engine = {"backend": "auto", "max_model_len": length + 9 + spare}
    config = in_four_steps(model, sampling={"max_tokens": 9}, engine=engine)
    if fits:
        with pytest.raises(Lost):
            run_stage1(config, tmp_path / "run")
        return
    message = (
        rf"the prompt of image .* \(length {length}\) and a caption of sampling\.max_tokens 9 are "
        rf"longer than engine\.max_model_len {length + 8}, .* --engine\.max_model_len {length + 9} "
    )
    with pytest.raises(ValueError, match=message):
        run_stage1(config, tmp_path / "run")
    assert training.asked == []
    # Cross-entropy alone samples nothing, and transformers has no such limit.
    with pytest.raises(Lost):
        run_stage1(config, tmp_path / "xe", sampled=False)
    with pytest.raises(Lost):
        engine = {**engine, "backend": "hf"}
        run_stage1(config.model_copy(update={"engine": EngineConfig(**engine)}), tmp_path / "hf")


def test_a_copy_that_breaks_off_is_no_stage_1(model, tmp_path, monkeypatch):
    def full(source, target, **_):
        target.mkdir(parents=True)
        raise OSError("no space left")

    run = tmp_path / "run"
    with monkeypatch.context() as broken, pytest.raises(OSError, match="no space"):
        broken.setattr("rayrl.stage1.shutil.copytree", full)
        run_stage1(without_training(model), run)
    assert list((run / "stage1").iterdir()) == []
    run_stage1(without_training(model), run)
    assert final_config(run)


def test_stage_1_alone_leaves_the_configuration_by_which_it_is_evaluated(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(xe, "connect", lambda cpus, gpus, spare_cpus: False)
    run = tmp_path / "run"
    config = without_training(model, run_folder=str(run), data={"instruction": "What is it?"})
    xe.main(config)
    assert cli.load(run / "config.yaml") == config
    options, flags = eval_cli.parse(["--checkpoint", str(run / "stage1/final")])
    assert eval_cli.load_config(options, flags).data == config.data


def test_the_stage_1_of_a_run_that_has_begun_is_not_for_another(model, tmp_path, monkeypatch):
    monkeypatch.setattr(xe, "connect", lambda cpus, gpus, spare_cpus: False)
    run = tmp_path / "run"
    xe.main(without_training(model, run_folder=str(run)))
    (run / "checkpoints/step_2").mkdir(parents=True)
    (run / "checkpoints/step_4").mkdir()
    with pytest.raises(SystemExit, match=r"run holds the checkpoints of a run \(step_2, step_4\)"):
        xe.main(without_training(model, run_folder=str(run), seed=5))
    assert cli.load(run / "config.yaml").seed == 0
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit, match=r"--run_folder .*/file: .*/file is a file"):
        xe.main(without_training(model, run_folder=str(file)))


def test_the_training_data_is_loaded_by_nobody_who_is_given_it(
    model, tmp_path, training, monkeypatch
):
    config = in_four_steps(model, data={"scenes": {"num_train": 20}})
    data = load_split(config.data, "train")
    monkeypatch.setattr(stage1, "load_split", None)
    with pytest.raises(Lost):
        run_stage1(config, tmp_path / "run", data)
    assert training.data is data
    # What readers get of it travels by reference.
    monkeypatch.setattr(xe.ray, "get", {"of the data": data}.__getitem__)
    read = xe._Rows(config, ["of the data"], 0, 0, 4)({"item": np.array([2])})
    assert len(read["image"]) == 2 * config.xe.images_per_step
    prompts = {prompt.prompt_id: prompt for prompt in data}
    found = [prompts[name] for name in read["prompt_id"]]
    assert read["image"] == [prompt.image for prompt in found]
    assert read["captions"] == [list(prompt.references) for prompt in found]


class Lost(Exception):
    """What a driver is killed by, for a test."""


class Training:
    """Stands in for Ray Train: takes two steps in a call, and loses the driver before the last."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, config, data, start, out, *, name, made_of, go_on):
        self.asked.append(go_on)
        self.data = data
        place = out / name
        if not go_on:
            shutil.rmtree(place, ignore_errors=True)
        newest = max(list_checkpoints(place), default=0)
        if newest < config.xe.steps:
            newest += 2
            self._snapshot(place, newest, config, start, made_of)
        if newest < config.xe.steps:
            raise Lost
        return [
            Snapshot(steps=step, seconds=float(step), folder=place / f"step_{step}")
            for step in list_checkpoints(place)
        ]

    def _snapshot(self, place, step, config, start, made_of):
        steps = [*list_checkpoints(place), step]
        meta = {**made_of, "snapshots": [{"steps": n, "seconds": float(n)} for n in steps]}
        files = {**read_model_files(start), "mark": np.frombuffer(b"%d" % config.seed, np.uint8)}
        begun = Checkpoint(step=step, model_files=files, arrays={}, meta=meta)
        save_checkpoint(place, begun, keep=9)


@pytest.fixture
def training(monkeypatch):
    monkeypatch.setattr(xe, "train_xe", training := Training())
    return training


def in_four_steps(model, **changes) -> Config:
    return Config.model_validate({"model": {"path": str(model)}, "xe": {"steps": 4}, **changes})


def test_an_unfinished_stage_1_goes_on_unless_it_would_be_another(
    model, tmp_path, training, capsys
):
    run = tmp_path / "run"
    for seed in (0, 3):
        with pytest.raises(Lost):
            run_stage1(in_four_steps(model, seed=seed), run)
    assert capsys.readouterr().out == ""
    last = run_stage1(in_four_steps(model, seed=3, data={"max_val": 3}), run)[-1]
    assert capsys.readouterr().out == "stage 1 goes on after step 2\n"
    assert training.asked == [False, False, True]
    assert (last.folder / "mark").read_text() == "3"
    # What only who goes on needs is gone.
    assert not list(run.rglob("trainer")) and not (run / "stage1/training").exists()


def test_a_stage_1_of_other_settings_that_ends_early_takes_nothing_of_the_finished_one(
    model, tmp_path, training, capsys
):
    run, settings = tmp_path / "run", in_four_steps(model)
    with pytest.raises(Lost):
        run_stage1(settings, run)
    first = run_stage1(settings, run)
    with pytest.raises(Lost):
        run_stage1(in_four_steps(model, seed=3), run)
    assert run_stage1(settings, run)[1:] == first[1:]
    assert [s.steps for s in first] == [0, 2, 4]
    assert all((s.folder / "mark").read_text() == "0" for s in first[1:])
    # It can still be gone on with.
    assert (run_stage1(in_four_steps(model, seed=3), run)[-1].folder / "mark").read_text() == "3"


@pytest.mark.parametrize("moment", ["write_receipt", "_settle"])
def test_a_driver_that_is_lost_when_stage_1_ends_takes_no_step_again(
    model, tmp_path, training, monkeypatch, moment
):
    def lost(*_, **__):
        raise Lost

    run, settings = tmp_path / "run", in_four_steps(model)
    with pytest.raises(Lost):
        run_stage1(settings, run)
    with monkeypatch.context() as broken, pytest.raises(Lost):
        broken.setattr(stage1, moment, lost)
        run_stage1(settings, run)
    snapshots = run_stage1(settings, run)
    assert [s.steps for s in snapshots] == [0, 2, 4]
    assert all(s.folder.is_dir() for s in snapshots)
    assert not list(run.rglob("trainer")) and not (run / "stage1/training").exists()


@pytest.mark.parametrize(("ranks", "workers", "want"), [(1, 4, 1), (4, 1, 1), (3, 4, 2), (4, 4, 4)])
def test_the_control_has_no_more_workers_than_the_learner_had(
    tmp_path, monkeypatch, ranks, workers, want
):
    asked = []

    def train(config, *_, **__):
        asked.append(config.xe.num_workers)
        raise RuntimeError("asked for workers, which is enough")

    monkeypatch.setattr(xe, "train_xe", train)
    settings = {"learner": {"num_workers": ranks}, "xe": {"num_workers": workers}}
    curve = XeCurve(Config.model_validate(settings), tmp_path, None, None, None, print)
    snapshot = Snapshot(steps=1, seconds=1.0, folder=tmp_path)
    assert curve.control(snapshot, 5.0, StopRequest()) == {}
    assert asked == [want]
