"""Fixtures shared by all tests: small pictures, prompts and a tiny captioner."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before any Ray starts: tests leave no token in the home directory.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Workers that no test would use.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before PyTorch is imported: models this small are slower on several threads, and much slower where
# other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WAITING = {
    "test_autoscaler",
    "test_colocated_run",
    "test_direct_transfer",
    "test_faults",
    "test_full_store",
    "test_killed_driver",
    "test_lost_nodes",
    "test_reward_actors",
    "test_stage1_job",
}
INSTRUCTION = "Describe the image."
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}


def encoded_picture(colour: tuple[int, int, int], *, seed: int = 0, size: int = 64) -> bytes:
    """A PNG of noise around one colour, so that no two seeds give the same picture."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where tests run in several processes: files as a whole, and those that start a Ray in two of
    them, for two cores have no room for more.  Runs with faults mostly wait (for what is lost to be
    missed, for processes to start), which is room for the others."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoRays(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if not file.startswith("tests/ray/"):
                return file
            return "ray, waiting" if Path(file).stem in WAITING else "ray, working"

    return TwoRays(config, log)


def pytest_collection_modifyitems(items):
    """The longest first: nothing runs beside what comes last."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/ray/"))


@pytest.fixture(scope="session")
def prompts():
    """Six prompts in three colours, with references that name the colour."""
    from rayrl.types import Prompt

    return [
        Prompt(
            prompt_id=f"{name}/{i}",
            image=encoded_picture(colour, seed=i),
            text=INSTRUCTION,
            references=(f"a {name} picture", f"everything is {name}"),
        )
        for i in range(2)
        for name, colour in COLOURS.items()
    ]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, prompts) -> Path:
    """A tiny captioner of 48x48 pixels and 16 image tokens, as a model folder."""
    from rayrl.config import TinyConfig
    from rayrl.vlm import build_tiny_captioner

    captions = [text for prompt in prompts for text in prompt.references] * 4
    config = TinyConfig(vision_width=32, vision_layers=1, text_width=64, text_layers=2)
    folder = tmp_path_factory.mktemp("tiny")
    return build_tiny_captioner(config, captions, INSTRUCTION, folder, seed=0)
