"""The model that a run starts from, with other settings of its image processor."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from rayrl.config import Config
from rayrl.stage1 import start_folder
from rayrl.vlm import load_captioner, prompt_inputs
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
