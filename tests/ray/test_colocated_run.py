"""Runs on fakes whose engine and learner share a GPU, which is a number that Ray counts here."""

from __future__ import annotations

import random
import time

import pytest

from tests.ray.fake_run import assert_same, run
from tests.ray.fakes import AWAKE, BESIDE, HANG
from tests.ray.fault_kinds import kill
from tests.ray.fault_kinds import local_ray as local

pytestmark = pytest.mark.ray
ONE = {"num_workers": 1, "min_workers": 1, "max_workers": 1}
SHARED = {**ONE, "colocate": True, "gpus": 0.5}
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def faults(tmp_path_factory):
    """The folder in which a fake looks for what it shall do wrong."""
    folder = tmp_path_factory.mktemp("faults")
    with local(folder, num_gpus=1):
        yield folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("apart"), patch, steps=STEPS, **ONE)


def test_an_engine_that_takes_its_time_to_sleep_is_kept(apart, tmp_path, monkeypatch):
    shared = run(tmp_path, monkeypatch, steps=STEPS, learner={"gpus": 0.5}, **SHARED)
    assert_same(shared, apart)
    assert shared.rows[-1]["workers/replaced"] == 0


def test_an_engine_that_never_sleeps_is_replaced(apart, faults, tmp_path, monkeypatch):
    def strike(step, metrics):
        if step == 2:
            (faults / f"{HANG}.sleep").touch()

    limits = {"timeout_s": 5.0, "sync_timeout_s": 2.0}
    shared = run(
        tmp_path, monkeypatch, steps=STEPS, learner={"gpus": 0.5}, after=strike, **SHARED, **limits
    )
    assert_same(shared, apart)
    assert shared.rows[-1]["workers/replaced"] == 1


def test_an_engine_leaves_a_learner_alone_that_is_built_anew(apart, faults, tmp_path, monkeypatch):
    struck = []

    def after(step, metrics):
        # The engine has its weights for the next step, and a checkpoint is due of every other one.
        if step in (2, 3):
            while not (faults / AWAKE).exists():
                time.sleep(0.01)
            struck.append(kill("FakeLearner")(random.Random(step)))

    # Of runs before this one.
    for left in (AWAKE, BESIDE):
        (faults / left).unlink(missing_ok=True)
    options = {"learner": {"gpus": 0.5}, "save_every": 2, **SHARED}
    shared = run(tmp_path, monkeypatch, steps=STEPS, after=after, **options)
    assert struck == [True, True]
    assert_same(shared, apart)
    # The learner alone: the engine came back with its weights.
    assert shared.rows[-1]["workers/replaced"] == 2
    assert not (faults / BESIDE).exists()
