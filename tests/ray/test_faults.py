"""Runs in which workers die, hang and lose their machine, at random moments, again and again.

The driver's loop, the pools and the reward workers are the real ones; rollout workers and learner
are fast fakes whose every answer depends on seeds, versions, groups and their order.  Every run
must end with all its steps done and with the weights of an undisturbed one, bit for bit.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import ray
from ray.exceptions import ObjectLostError, RuntimeEnvSetupError
from ray.util.placement_group import placement_group_table

from rayrl.actors import learner_group, pool, room
from rayrl.actors.batches import Batches
from rayrl.actors.fleet import Fleet
from rayrl.actors.learner_group import LearnerGroup
from rayrl.actors.pool import Pool, PoolSize, RestartBudget, TooFewWorkers, TooManyLost
from rayrl.actors.versions import VersionLost
from rayrl.checkpoint import list_checkpoints
from rayrl.config import Config
from tests.ray.fake_run import assert_same, run, undisturbed
from tests.ray.fakes import BALLAST_MB, HANG, NO_MEMORY, NO_START, SLOW_LEARNER, SLOW_SAMPLING
from tests.ray.fault_kinds import Saboteur, ask, kill
from tests.ray.fault_kinds import local_ray as local

pytestmark = pytest.mark.ray
# A new worker takes seconds.  benchmarks/bench_fault_campaign.py has 20 of every kind and mode.
FAULTS, EVERY = 4, 3


@pytest.fixture(scope="module", autouse=True)
def local_ray(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with local(folder):
        for staleness in (0, 1):
            # Before anything is wrong; later calls only look it up.
            undisturbed(staleness)
        yield folder


@pytest.fixture
def faults(local_ray):
    """The folder in which a fake looks for what it shall do wrong."""
    yield local_ray
    for left in local_ray.iterdir():
        left.unlink()


def test_the_fakes_notice_what_they_should():
    # Another staleness trains on the same prompts with other captions.
    synchronous, ahead = undisturbed(0), undisturbed(1)
    assert synchronous.trained == ahead.trained
    assert synchronous.weights != ahead.weights
    assert {row["staleness/max"] for row in ahead.rows} == {0.0, 1.0}


def test_workers_need_not_wait_for_the_prompts_of_a_step_that_was_expected(tmp_path, monkeypatch):
    found, reference = [], Batches._reference

    def noted(self, prompts):
        there = [ref for _, ref in self._staged.values()]
        found.append(reference(self, prompts) in there)
        return reference(self, prompts)

    monkeypatch.setattr(Batches, "_reference", noted)
    run(tmp_path, monkeypatch, staleness=1, steps=4)
    # In three parts each; nobody expected the two batches that are handed out at the start.
    assert found == [False] * 6 + [True] * 6


def test_the_learner_knows_the_images_of_a_step_before_their_captions_come():
    for done in (undisturbed(0), undisturbed(1)):
        assert done.prepared == [True] * len(done.trained)


@pytest.mark.parametrize(
    ("name", "staleness"),
    [("FakeRollout", 0), ("FakeRollout", 1), ("RewardActor", 1), ("FakeLearner", 0)],
)
def test_killed_workers_change_nothing(name, staleness, faults, tmp_path, monkeypatch):
    saboteur = Saboteur(kill(name), seed=staleness, faults=FAULTS, every=EVERY)
    done = run(tmp_path, monkeypatch, after=saboteur, staleness=staleness)
    assert saboteur.join() == FAULTS
    assert_same(done, undisturbed(staleness))
    # The last fault may come too late to be noticed.
    assert FAULTS - 2 <= done.rows[-1]["workers/replaced"] <= FAULTS


def test_workers_killed_in_later_rounds_of_a_step_change_nothing(faults, tmp_path, monkeypatch):
    planners = {"rollout": "refill+hint_in_context", "min_spread": 0.05, "hint_floor": 0.5}
    several = {"objective": {"preset": "nsc", "set": planners}, "steps": 4}
    quiet = run(tmp_path / "quiet", monkeypatch, **several)
    submit, strike, rounds = Fleet.submit, kill("FakeRollout"), [0]

    def and_kill(self, *arguments, before=None):
        pending = submit(self, *arguments, before=before)
        rounds[0] += before is not None
        if before is not None and rounds[0] <= 3:
            assert strike(random.Random(rounds[0]))
        return pending

    monkeypatch.setattr(Fleet, "submit", and_kill)
    done = run(tmp_path / "killed", monkeypatch, **several)
    # A worker that dies already may be struck once more.
    assert 2 <= done.rows[-1]["workers/replaced"] <= 3
    assert done.trained == quiet.trained
    assert done.weights == quiet.weights
    for name in ("rounds/asked_again", "rounds/captions", "rounds/count", "groups/dropped"):
        assert [row[name] for row in done.rows] == [row[name] for row in quiet.rows], name
    # Images were refilled, and groups extended.
    assert sum(row["rounds/asked_again"] for row in done.rows) > 0
    assert any(row["rounds/captions"] > 3 * (7 + row["rounds/asked_again"]) for row in done.rows)


@pytest.mark.parametrize("staleness", [0, 1])
def test_engines_and_learners_that_stop_answering_change_nothing(
    faults, tmp_path, monkeypatch, staleness
):
    calls = ["generate", "generate", "load", "score", "update"]
    strike = ask(faults, *(f"{HANG}.{call}" for call in calls))
    saboteur = Saboteur(strike, seed=2 + staleness, faults=FAULTS, every=EVERY)
    limits = {"timeout_s": 2.0, "learner": {"timeout_s": 5.0}}
    done = run(tmp_path, monkeypatch, after=saboteur, staleness=staleness, **limits)
    assert saboteur.join() >= FAULTS // 2
    assert_same(done, undisturbed(staleness))
    assert done.rows[-1]["workers/replaced"] >= FAULTS // 2


def test_workers_killed_for_their_nodes_memory_change_nothing(faults, tmp_path, monkeypatch):
    # Calls after which the others of a fake, which lives on, would still be right.
    calls = ("generate", "update", "greedy", "generate")

    def after(step: int, metrics: object) -> None:
        if step % 3 == 1 and calls[step // 3 :]:
            (faults / f"{NO_MEMORY}.{calls[step // 3]}").touch()

    done = run(tmp_path, monkeypatch, after=after)
    assert_same(done, undisturbed(0))
    assert done.rows[-1]["workers/replaced"] == len(calls)


@ray.remote(num_cpus=0)
class Owner:
    """Objects that it holds are lost with it."""

    def hold(self, boxed):
        return [ray.put(ray.get(boxed[0]))]


def vanished(ref):
    """A reference to an object that is lost."""
    owner = Owner.remote()
    (held,) = ray.get(owner.hold.remote([ref]))
    ray.kill(owner)
    for _ in range(100):
        try:
            ray.get(held)
        except ObjectLostError:
            return held
        time.sleep(0.1)
    raise RuntimeError("it is still there")


@pytest.fixture
def vanish(monkeypatch, faults):
    """Has the weights of some versions vanish from Ray as soon as they are published, each once."""
    (faults / BALLAST_MB).write_text("1")  # small ones would travel within Ray's messages
    publish = LearnerGroup.weights
    chosen: set[int] = set()

    def and_vanish(self, *, trained_only):
        ref = publish(self, trained_only=trained_only)
        if not trained_only or self.step not in chosen:
            return ref
        chosen.remove(self.step)
        return vanished(ref)

    def choose(*versions: int) -> set[int]:
        chosen.update(versions)
        monkeypatch.setattr(LearnerGroup, "weights", and_vanish)
        return chosen

    return choose


def test_weights_that_are_lost_before_engines_have_them_are_published_again(
    vanish, tmp_path, monkeypatch
):
    # Version 8 is evaluated before anybody has confirmed it.  The loss of the others is noticed
    # when the learner is at the next version.
    chosen = vanish(0, 3, 8, 9)
    done = run(tmp_path, monkeypatch, staleness=1)
    assert not chosen
    assert_same(done, undisturbed(1))
    assert done.rows[-1]["workers/replaced"] == 0


def test_weights_from_before_a_checkpoint_are_made_from_the_one_before(
    vanish, tmp_path, monkeypatch
):
    chosen = vanish(3, 7)
    done = run(tmp_path, monkeypatch, staleness=1, save_every=4)
    assert not chosen
    assert_same(done, undisturbed(1))
    assert done.rows[-1]["workers/replaced"] == 0


def test_a_run_that_lost_weights_older_than_all_checkpoints_is_saved_and_goes_on_later(
    vanish, tmp_path, monkeypatch
):
    # When all workers are there: one that comes pulls the newest, and has that published again.
    chosen = vanish(9)
    with pytest.raises(VersionLost, match=r"version 9 were lost .*, at version 10, has no check"):
        run(tmp_path, monkeypatch, staleness=1, save_every=1, keep=1)
    assert not chosen
    assert list_checkpoints(tmp_path / "checkpoints")[-1] == 10
    done = run(tmp_path, monkeypatch, staleness=1)
    assert done.trained == undisturbed(1).trained


def test_an_environment_that_cannot_be_set_up_is_tried_until_the_budget_is_spent():
    @ray.remote(num_cpus=0, runtime_env={"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"})
    class Nowhere:
        def started(self) -> None:
            """Never answers: the cluster holds no such package."""

    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", Nowhere.remote, size, RestartBudget(1))
    with pytest.raises(TooManyLost, match="2 workers were lost") as raised:
        workers.wait()
    assert isinstance(raised.value.__cause__, RuntimeEnvSetupError)
    workers.shutdown()


def test_workers_come_while_the_learner_waits_and_go_when_it_does_not(
    faults, tmp_path, monkeypatch
):
    sizes = {"min_workers": 1, "max_workers": 3, "steps": 40}
    quiet = run(tmp_path / "quiet", monkeypatch, num_workers=3, **{**sizes, "min_workers": 3})
    (faults / SLOW_SAMPLING).touch()
    counts = []

    def after(step: int, metrics) -> None:
        counts.append(metrics["workers/rollout"])
        if counts[-1] == 3 and (faults / SLOW_SAMPLING).exists():
            (faults / SLOW_LEARNER).touch()
            (faults / SLOW_SAMPLING).unlink()

    done = run(tmp_path / "elastic", monkeypatch, after=after, num_workers=1, **sizes)
    # How far it goes down in these steps depends on how long a busy machine takes for nothing.
    assert (counts[0], max(counts)) == (1, 3) and counts[-1] < 3
    peak = counts.index(3)
    assert counts[:peak] == sorted(counts[:peak])
    assert counts[peak:] == sorted(counts[peak:], reverse=True)
    # Nobody was lost, and who sampled a caption does not show in the weights.
    assert done.rows[-1]["workers/replaced"] == 0
    assert_same(done, quiet)


def test_without_its_minimum_a_run_says_what_is_missing_and_stops(
    faults, tmp_path, monkeypatch, caplog
):
    missing = (
        "0 rollout workers are ready, want at least 1: another asks for 100 CPU; "
        "of the cluster's 8, "
    )
    assert pool.SAY_EVERY_S == 30.0
    monkeypatch.setattr(pool, "SAY_EVERY_S", 0.5)
    with pytest.raises(TooFewWorkers, match=f"{missing}.*; gave up after"):
        run(tmp_path, monkeypatch, cpus=100.0, start_timeout_s=3.0)
    said = [record for record in caplog.messages if record.startswith(missing)]
    assert 1 <= len(said) <= 6


def test_without_room_for_its_learner_a_run_says_what_is_missing_and_stops(monkeypatch, caplog):
    monkeypatch.setattr(learner_group, "_ROOM_S", 0.1)
    monkeypatch.setattr(room, "SAY_EVERY_S", 0.5)
    sizes = {"learner": {"cpus": 50}, "rollout": {"start_timeout_s": 1.0}}
    learner = LearnerGroup(Config.model_validate(sizes), {}, RestartBudget(0))
    missing = r"room for the learner's 1 rank\(s\): want 50 CPU; of the cluster's 8, "
    with pytest.raises(RuntimeError, match=f"gave up waiting for {missing}"):
        learner.checkpoint(lambda _: None)
    assert any("waiting for room" in message for message in caplog.messages)
    # None was asked for that has no place, which Ray would report as impossible.
    assert learner.workers() == {}
    place = learner.place
    learner.shutdown()
    assert placement_group_table(place)["state"] == "REMOVED"


def test_a_run_whose_workers_do_not_come_back_is_saved_and_goes_on_later(
    faults, tmp_path, monkeypatch
):
    submit = Fleet.submit

    def impatient(self, step, *arguments, **options):
        if step == 3:
            # Only now: on a busy machine the first workers take longer to start than this.
            self._rollout._size = replace(self._rollout._size, deadline_s=5.0)
        return submit(self, step, *arguments, **options)

    def after(step: int, metrics) -> None:
        if step == 3:
            (faults / NO_START).touch()
            assert kill("FakeRollout")(random.Random(0))

    with monkeypatch.context() as patch:
        patch.setattr(Fleet, "submit", impatient)
        with pytest.raises(TooFewWorkers, match="gave up after"):
            run(tmp_path, patch, after=after, num_workers=1, max_workers=3)
    assert list_checkpoints(tmp_path / "checkpoints") == [3]
    (faults / NO_START).unlink()
    assert_same(run(tmp_path, monkeypatch), undisturbed(0))


def test_a_run_that_lost_too_many_workers_is_saved_and_says_the_first_cause(
    faults, tmp_path, monkeypatch
):
    def after(step: int, metrics) -> None:
        if step in (2, 4):
            (faults / f"{HANG}.generate").touch()

    with pytest.raises(RuntimeError, match=r"2 workers were lost, .* allows 1; the first") as e:
        run(tmp_path, monkeypatch, after=after, timeout_s=2.0, max_restarts=1)
    assert "no answer within 2 s" in str(e.value)
    assert isinstance(e.value.__cause__, TimeoutError)
    assert list_checkpoints(tmp_path / "checkpoints") == [4]
    assert_same(run(tmp_path, monkeypatch), undisturbed(0))


def test_a_run_that_lost_its_learner_for_good_ends_with_the_checkpoint_before(
    faults, tmp_path, monkeypatch
):
    def after(step: int, metrics) -> None:
        if step == 3:
            assert kill("FakeLearner")(random.Random(0))

    with pytest.raises(RuntimeError, match=r"1 workers were lost, .* allows 0; the first cause"):
        run(tmp_path, monkeypatch, after=after, save_every=2, max_restarts=0)
    assert list_checkpoints(tmp_path / "checkpoints")[-1] == 2
