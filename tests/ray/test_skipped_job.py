"""A run whose learner explodes ends with the reason, and leaves what it takes to look at it."""

from __future__ import annotations

import pytest

from tests.ray.conftest import metrics, run_script

pytestmark = pytest.mark.ray


def test_a_learner_that_explodes_stops_the_run_and_leaves_a_replay(
    small_job, environment, tmp_path
):
    # The second batch was sampled before the first update, which overflows every product.
    explosive = {"learner__lr": 1e30, "learner__max_skipped": 1}
    flags = small_job(train__max_staleness=1, train__eval_every=9, **explosive)
    done = run_script("grpo_coco.py", flags, environment)
    assert done.returncode != 0
    assert "1 optimizer steps in a row had no finite loss and gradient" in done.stderr
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (rows[1]["learner/skipped"], rows[2]["learner/skipped"]) == (0, 1)
    assert rows[2]["learner/update_ratio"] == 0
    place = tmp_path / "run" / "replay" / "step_1"
    assert f"look at it with --replay {place}" in done.stdout
    seen = run_script("grpo_coco.py", ["--replay", str(place)], environment)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.startswith("step 2: 6 prompts x 4 captions of up to ")
    assert "first in the output of model.vision_model" in seen.stdout
