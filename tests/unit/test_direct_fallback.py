"""When versions are sent, when they are pulled instead, and when a run stops trying.

The ends are threads in place of Ray's actors; the broadcast between them is gloo's own.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import GetTimeoutError, RayError

from rayrl.actors import direct
from rayrl.actors.direct import DirectTransfer
from rayrl.buckets import Received, fill
from rayrl.config import Config


class Failed(RayError):
    """What Ray makes of an error in an actor."""


class FakeRay:
    """Waits for futures as Ray does for references."""

    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    @staticmethod
    def wait(refs, num_returns, timeout, fetch_local):
        done, late = wait(refs, timeout)
        return list(done), list(late)

    @staticmethod
    def get(ref, timeout=None):
        if not ref.done():
            raise GetTimeoutError("no answer")
        try:
            return ref.result()
        except (RuntimeError, ValueError) as error:
            raise Failed(f"in an actor:\n{error}") from error


class End:
    """An actor: its methods run one after the other in a thread of its own."""

    def __init__(self, calls, name):
        self._calls, self._name, self._broken = calls, name, False
        self._transport, self._thread = None, ThreadPoolExecutor(1)
        self.held = -1

    def __getattr__(self, method):
        def remote(*arguments):
            def call():
                given = [a.result() if isinstance(a, Future) else a for a in arguments]
                self._calls.append((self._name, method))
                return getattr(self, f"do_{method}")(*given)

            return self._thread.submit(call)

        return SimpleNamespace(remote=remote)

    def do_join_transfer(self, meeting, rank):
        self._transport = meeting.join(rank, self._transport)

    def do_stage(self, version):
        self.staged = fill({"a": torch.full((50,), float(version))}.items(), version)

    def do_offer(self):
        return self.staged[0]

    def do_send(self):
        self._transport.send(self.staged[1])

    def do_release(self):
        self.staged = None

    def do_wake(self):
        pass

    def do_receive(self, changed, manifest):
        received = Received(manifest=manifest, buckets=self._transport.receive(manifest))
        if self._broken:
            raise ValueError("this engine is broken")
        received.verify()
        self.held = received.version
        return self.held


class Group:
    """What a transfer uses of a learner's group."""

    def __init__(self, first):
        self.first, self.version, self.staged = first, 0, []

    def stage(self, *, trained_only):
        self.staged.append(trained_only)
        self.first.stage.remote(self.version).result()


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setattr(direct, "ray", FakeRay)
    monkeypatch.setattr(direct, "_MARGIN_S", 5.0)
    calls = []
    learner, engines = End(calls, "learner"), [End(calls, f"engine {i}") for i in range(3)]
    return calls, Group(learner), [SimpleNamespace(actor=engine) for engine in engines]


def transfer(group, **changes):
    config = {"rollout": {"sync": "gloo", "sync_timeout_s": 20.0}, **changes}
    return DirectTransfer(Config.model_validate(config), group)


def test_a_group_is_met_anew_only_when_who_takes_part_changes(ends):
    calls, learner, engines = ends
    subject = transfer(learner)
    joins = []
    for version, members in enumerate([(0, 1), (0, 1), (0, 1, 2), (2,)], start=1):
        learner.version = version
        calls.clear()
        assert subject.send([engines[i] for i in members], version)
        assert [engines[i].actor.held for i in members] == [version] * len(members)
        joins.append(sum(method == "join_transfer" for _, method in calls))
        assert calls[-1] == ("learner", "release")
    assert joins == [3, 0, 4, 2]
    assert subject.fallbacks == 0 and learner.staged == [True] * 4


def test_after_a_failure_the_next_version_is_tried_and_after_three_none_is(ends, caplog):
    calls, learner, engines = ends
    subject = transfer(learner)
    first, second = engines[:2]

    def send(version, *, broken) -> bool:
        learner.version, second.actor._broken = version, broken
        return subject.send([first, second], version)

    assert not send(1, broken=True)
    assert second.actor.held == -1
    want = "version 1 did not go through gloo: this engine is broken; engines pull it and no other"
    assert want in caplog.text
    # The group is built anew, and a success starts the count again.
    assert send(2, broken=False) and second.actor.held == 2
    assert [send(version, broken=True) for version in (3, 4, 5)] == [False] * 3
    assert "engines pull it and every later one" in caplog.text
    assert subject.fallbacks == 4
    calls.clear()
    assert not send(6, broken=False)
    assert not calls and subject.fallbacks == 4


def test_an_engine_that_forgets_its_weights_asleep_is_sent_all_of_them(ends):
    calls, learner, engines = ends
    shares = {"gpus": 0.5}
    rollout = {"sync": "ipc", "colocate": True, **shares}
    changes = {"rollout": rollout, "learner": shares, "xe": {"control": False}}
    for trainable in (["vision", "connector", "language"], ["language"]):
        subject = transfer(learner, **changes, model={"trainable": trainable})
        subject._kind = "gloo"
        assert subject.send(engines[:1], learner.version)
        # The cache may need the memory in which the learner had the version ready.
        assert calls[-2:] == [("learner", "release"), ("engine 0", "wake")]
    # Where the vision tower is frozen, it waits in host memory.
    assert learner.staged == [False, True]
