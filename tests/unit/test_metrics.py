"""The run log: files that hold each step once, and the line that a person reads."""

from __future__ import annotations

import io
import json
import math
import resource
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console

from rayrl.config import Config
from rayrl.jsonl import read_jsonl
from rayrl.metrics import Phases, RunLog, write_summary
from rayrl.progress import TerminalProgress, duration, progress_text
from rayrl.rollout_metrics import summarize

# TensorBoard writes in a thread of its own, which ends with the error that it met.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_phases_add_up_until_taken(clock):
    phases = Phases(clock)
    for spent in (2.0, 3.0):
        with phases("rollout"):
            clock.now += spent
    with phases("sync"):
        clock.now += 0.5
    assert phases.take() == {"seconds/rollout": 5.0, "seconds/sync": 0.5}
    assert phases.take() == {}


def test_a_phase_that_raises_is_counted_as_far_as_it_came(clock):
    phases = Phases(clock)
    with pytest.raises(RuntimeError, match="worker died"), phases("rollout"):
        clock.now += 4.0
        raise RuntimeError("worker died")
    assert phases.take() == {"seconds/rollout": 4.0}


def test_one_object_a_step_with_its_time(tmp_path, clock):
    log = RunLog(tmp_path, total_steps=2, tensorboard=False, clock=clock)
    log.step(1, {"reward/mean": 0.25})
    clock.now += 3.0
    log.step(2, {"reward/mean": 0.5})
    assert lines(tmp_path) == [
        {"step": 1, "time": 1000.0, "reward/mean": 0.25},
        {"step": 2, "time": 1003.0, "reward/mean": 0.5},
    ]
    assert log.history() == lines(tmp_path)


def test_a_step_is_on_disk_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path, total_steps=9, tensorboard=False)
    log.step(1, {"kl": 0.125})
    assert lines(tmp_path)[0]["kl"] == 0.125


def test_steps_only_go_up(tmp_path):
    log = RunLog(tmp_path, total_steps=9, tensorboard=False)
    log.step(3, {})
    with pytest.raises(ValueError, match="step 3 after step 3"):
        log.step(3, {})


def test_resuming_holds_each_step_once(tmp_path):
    first = RunLog(tmp_path, total_steps=6, tensorboard=False)
    for step in range(5):
        first.step(step, {"reward/mean": float(step)})
        first.samples([{"step": step, "prompt_id": f"p{step}"}])
    second = RunLog(tmp_path, total_steps=6, tensorboard=False, resume_from=2)
    for step in (3, 4, 5):
        second.step(step, {"reward/mean": 10.0 + step})
        second.samples([{"step": step, "prompt_id": f"q{step}"}])
    assert [(row["step"], row["reward/mean"]) for row in lines(tmp_path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 13.0),
        (4, 14.0),
        (5, 15.0),
    ]
    ids = [row["prompt_id"] for row in lines(tmp_path, "samples.jsonl")]
    assert ids == ["p0", "p1", "p2", "q3", "q4", "q5"]


def test_resuming_after_a_kill_drops_the_line_that_was_broken_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "kl": 0.5}\n{"step": 2, "k')
    log = RunLog(tmp_path, total_steps=3, tensorboard=False, resume_from=2)
    log.step(3, {"kl": 0.75})
    assert [row["step"] for row in lines(tmp_path)] == [1, 3]


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    RunLog(tmp_path, total_steps=3, tensorboard=False).step(1, {"kl": 0.5})
    log = RunLog(tmp_path, total_steps=3, tensorboard=False)
    assert log.history() == []


@contextmanager
def room(num_bytes: int):
    """No file grows beyond so many bytes, as on a full disk: the write that would is cut there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_found_no_room_wait_in_memory_and_leave_no_half_line(tmp_path, clock, capsys):
    log = RunLog(tmp_path, total_steps=6, tensorboard=False, clock=clock)
    log.step(1, {"kl": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with room(size + 10):
        for step in (2, 3):
            log.step(step, {"kl": 0.5})
            log.samples([{"step": step, "text": "a\u2028dog " * 20}])
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        assert [row["step"] for row in log.history()] == [1, 2, 3]
        with pytest.raises(OSError, match="too large"):
            log.flush()
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot be written") == 1
    assert said.count("samples.jsonl cannot be written") == 1
    log.step(4, {"kl": 0.5})
    log.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [2, 3]
    with room(size * 4 + 10):
        log.step(5, {"kl": 0.5})
    # The next outage is said again.
    assert "metrics.jsonl cannot be written" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "metrics.jsonl") == log.history()[:4]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path):
    write_summary(tmp_path, {"steps": 3})
    with room(5), pytest.raises(OSError, match="too large"):
        write_summary(tmp_path, {"steps": 4})
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}


def test_events_that_found_no_room_cost_their_steps_and_nothing_else(tmp_path, capsys):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    log = RunLog(tmp_path, total_steps=4)
    log.step(1, {"kl": 1.0})
    with room(1):
        log.step(2, {"kl": 2.0})
    log.step(3, {"kl": 3.0})
    log.close()
    assert "TensorBoard cannot be written" in capsys.readouterr().out
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("kl")] == [1, 3]


def test_a_file_that_no_run_wrote_is_named_with_its_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nhello\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        RunLog(tmp_path, total_steps=3, tensorboard=False, resume_from=1)
    file.write_text('{"kl": 1.0}\n')
    with pytest.raises(ValueError, match="line 1: want a step, got None"):
        RunLog(tmp_path, total_steps=3, tensorboard=False, resume_from=1)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: want an object, got list"):
        read_jsonl(file)


def test_a_value_that_is_not_finite_is_null_and_said(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=3, tensorboard=False)
    log.step(1, {"learner/loss": math.nan, "kl": 0.5})
    assert lines(tmp_path)[0]["learner/loss"] is None
    assert "learner/loss" not in log.history()[0] and log.history()[0]["kl"] == 0.5
    assert "step 1: learner/loss is nan" in capsys.readouterr().out


def test_samples_keep_every_character(tmp_path):
    text = 'ein "Hund"\n läuft \ud83d 🐕'
    RunLog(tmp_path, total_steps=1, tensorboard=False).samples([{"step": 1, "text": text}])
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "text": text}]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    first = RunLog(tmp_path, total_steps=4, resume_from=None)
    for step in (1, 2, 3):
        first.step(step, {"reward/mean": float(step)})
    first.close()
    second = RunLog(tmp_path, total_steps=4, resume_from=1)
    for step in (2, 3, 4):
        second.step(step, {"reward/mean": 10.0 + step})
    second.close()
    second.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert scalars == [(1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]


def test_the_plain_log_gives_one_line_a_step_with_the_change_since_the_start(
    tmp_path, capsys, clock
):
    log = RunLog(tmp_path, total_steps=150, tensorboard=False, clock=clock)
    log.step(0, {"eval/cider_d": 263.0})
    clock.now += 2.0
    log.step(1, {"reward/mean": 0.8125, "kl": 0.0042, "seconds/rollout": 0.31})
    clock.now += 4.0
    log.step(2, {"reward/mean": 0.9, "eval/cider_d": 261.25, "captions_per_second": 312.4})
    assert capsys.readouterr().out.splitlines() == [
        "step   0/150  CIDEr-D 263.0",
        "step   1/150  reward 0.812  CIDEr-D 263.0 (+0.0)  KL 0.0042  ETA 4:58  rollout 0.31 s",
        # Two steps took 6 s, so 148 more take 444 s.
        "step   2/150  reward 0.900  CIDEr-D 261.2 (-1.8)  312 captions/s  ETA 7:24",
    ]


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left"), RuntimeError("reentrant call")]
)
def test_who_reads_no_more_does_not_end_a_run(tmp_path, monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Gone())
    log = RunLog(tmp_path, total_steps=3, tensorboard=False)
    log.message("stopping after this step")
    log.step(1, {"reward/mean": 0.5})
    log.close()
    assert [row["step"] for row in log.history()] == [1]


def test_a_resumed_run_still_compares_with_the_first_start(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=4, tensorboard=False)
    log.step(0, {"eval/cider_d": 100.0})
    log.step(1, {"eval/cider_d": 105.0})
    resumed = RunLog(tmp_path, total_steps=4, tensorboard=False, resume_from=1)
    capsys.readouterr()
    resumed.step(2, {"reward/mean": 1.0})
    assert capsys.readouterr().out == "step 2/4  reward 1.000  CIDEr-D 105.0 (+5.0)\n"


def resumed(folder, heldout: str, was: str, step: int) -> RunLog:
    log = RunLog(folder, total_steps=9, tensorboard=False, resume_from=step, heldout=heldout)
    log.resumed(was)
    return log


def test_scores_of_another_held_out_set_are_not_compared(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=9, tensorboard=False, heldout="A")
    log.step(0, {"eval/cider_d": 100.0})
    log.step(1, {"reward/mean": 1.0})
    log.step(2, {"eval/cider_d": 120.0})
    assert [row.get("eval/set") for row in lines(tmp_path)] == ["A", None, "A"]
    capsys.readouterr()
    log = resumed(tmp_path, "B", "A", 2)
    assert capsys.readouterr().out == (
        "the held-out set is another, B, was A: its scores are not compared with those before\n"
    )
    # Until there is one of the new set the best is that of the old.
    assert log.scores == {0: 100.0, 2: 120.0}
    log.step(3, {"eval/cider_d": 50.0})
    assert capsys.readouterr().out == "step 3/9  CIDEr-D 50.0 (+0.0)\n"
    log.step(4, {"eval/cider_d": 60.0})
    assert log.scores == {3: 50.0, 4: 60.0}
    summary = summarize(Config(), log.history())
    names = ("cider_d_start", "cider_d_start_step", "cider_d_end", "cider_d_best")
    assert [summary[name] for name in names] == [50.0, 3, 60.0, 60.0]
    # The set from before compares with itself again.
    capsys.readouterr()
    log = resumed(tmp_path, "A", "B", 4)
    assert "another, A, was B" in capsys.readouterr().out
    log.step(5, {"eval/cider_d": 125.0})
    assert log.scores == {0: 100.0, 2: 120.0, 5: 125.0}
    resumed(tmp_path, "A", "A", 5)
    assert "another" not in capsys.readouterr().out


@pytest.mark.parametrize(("was", "scores"), [("A", {3: 50.0}), ("B", {0: 100.0, 3: 50.0})])
def test_scores_of_an_earlier_version_are_of_the_set_that_its_checkpoint_names(
    tmp_path, was, scores
):
    log = RunLog(tmp_path, total_steps=9, tensorboard=False)
    log.step(0, {"eval/cider_d": 100.0, "kl": math.nan})
    log.step(1, {})
    log = resumed(tmp_path, "B", was, 1)
    log.step(3, {"eval/cider_d": 50.0})
    assert log.scores == scores
    # Also when it is resumed a second time, by a checkpoint that names the new one.
    assert resumed(tmp_path, "B", "B", 3).scores == scores
    assert lines(tmp_path)[0]["kl"] is None


def test_scores_that_nothing_is_known_of_are_compared_as_ever(tmp_path, capsys):
    RunLog(tmp_path, total_steps=9, tensorboard=False).step(0, {"eval/cider_d": 100.0})
    log = resumed(tmp_path, "B", "", 0)
    log.step(1, {"eval/cider_d": 50.0})
    assert log.scores == {0: 100.0, 1: 50.0}
    assert "another" not in capsys.readouterr().out


def test_what_is_not_known_is_left_out_of_the_line():
    line = progress_text(3, 10, {}, score=math.nan, gain=math.nan, seconds_left=math.nan)
    assert line == "step  3/10"


def test_phases_are_shown_in_the_order_of_a_batch():
    seconds = {"seconds/warm": 4.0, "seconds/sync": 3.0, "seconds/reward": 2.0, "seconds/eval": 1.0}
    line = progress_text(1, 1, seconds, score=math.nan, gain=math.nan, seconds_left=math.nan)
    assert line == "step 1/1  reward 2.00 sync 3.00 eval 1.00 warm 4.00 s"


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0.4, 7, 754, 3723, 59.6)] == [
        "0:00",
        "0:07",
        "12:34",
        "1:02:03",
        "1:00",
    ]


def test_on_a_terminal_evaluations_and_messages_stay_and_steps_do_not():
    screen = io.StringIO()
    progress = TerminalProgress(Console(file=screen, width=80, force_terminal=True))
    progress.update(0.1, "step 1/3", stay=False)
    progress.update(0.2, "step 2/3  CIDEr-D 1.0", stay=True)
    progress.stay("stopping [after] this step")
    progress.update(0.3, "step 3/3", stay=False)
    progress.close()
    progress.close()
    shown = screen.getvalue()
    assert "stopping [after] this step\n" in shown
    assert "step 2/3  CIDEr-D 1.0\n" in shown
    assert shown.rstrip().endswith("step 3/3"), "the last step stays when the display ends"
    assert "step 1/3\n" not in shown


def test_on_a_narrow_terminal_the_updating_line_is_cut_and_a_staying_line_wraps():
    screen = io.StringIO()
    progress = TerminalProgress(Console(file=screen, width=40, force_terminal=True))
    progress.update(0.5, "x" * 60, stay=True)
    progress.close()
    shown = screen.getvalue()
    assert f"{'x' * 40}\n{'x' * 20}\n" in shown
    assert f" {'x' * 22}…\n" in shown, "16 cells of bar, a space, 23 cells of text"


def test_a_run_is_as_fast_as_the_captions_that_it_sampled():
    """A planner of round 0 asks for fewer than a group, one of later rounds for more."""
    rows = [
        {"step": 0, "eval/cider_d": 1.0, "seconds/eval": 9.0},
        {"step": 1, "rounds/captions": 1024.0, "seconds/rollout": 1.5, "seconds/learner": 0.5},
        {"step": 2, "rounds/captions": 512.0, "seconds/rollout": 1.0, "eval/cider_d": 2.0},
    ]
    assert Config().captions_per_step not in (512, 1024)
    assert summarize(Config(), rows)["captions_per_second"] == 1536 / 3


def test_the_summary_is_whole_json(tmp_path):
    write_summary(tmp_path, {"cider_d_end": 270.5, "worst": math.inf, "by": {"rollout": 1.5}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"cider_d_end": 270.5, "worst": None, "by": {"rollout": 1.5}}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_summary(tmp_path, {"cider_d_end": 1.0})
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"cider_d_end": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"cider_d_end": 1.0}
