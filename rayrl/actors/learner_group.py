"""The learner as the driver sees it: one or more ranks that take a step together.

Every call goes to every rank.  A rank that dies or hangs takes the group with it, for the others
wait for it in the middle of a sum; the group, which may be a single rank, is then built anew from
the last checkpoint and repeats the updates since then with the same groups, which leads to the same
weights, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrl.actors.cluster import worker_environment
from rayrl.actors.history import History, Update
from rayrl.actors.learner import LearnerActor
from rayrl.actors.losses import DIED, construction_failed, lost_its_gpu, wants_another
from rayrl.actors.pending import Pending
from rayrl.actors.pieces import in_pieces, shipped
from rayrl.actors.pool import RestartBudget
from rayrl.actors.room import wait_for_place
from rayrl.canary import Canary
from rayrl.checkpoint import Checkpoint, load_checkpoint
from rayrl.config import Config
from rayrl.interrupt import StopRequest
from rayrl.outline import Results, whole
from rayrl.shares import Parts, Sampled, Scored
from rayrl.types import Prompt, StepReport
from rayrl.weights import ModelFiles

log = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE_S = 5.0
"""After the first rank has failed, how long the others may take to say why."""
_ROOM_S = 5.0
"""Ray needs less than this to find a place where there is one; a cluster that must grow first
need not keep the other workers waiting for it."""


class RankLost(RuntimeError):
    """A rank died or hangs, so that the group cannot go on."""


class LearnerGroup:
    """``learner.num_workers`` learner actors, on one node where there is room.

    ``files`` are those of the stage-1 model; lost ranks are counted against ``budget``.

    lost: whether a rank was lost and the group could not be built anew since
    midway: whether it is in the middle of a step, as it stays where one raised
    stop: once it is requested, no more room is waited for
    place: the placement group of the ranks, None once it is given back
    alone: entered while the group is built anew, for ranks that share their GPU
    """

    def __init__(self, config: Config, files: ModelFiles, budget: RestartBudget) -> None:
        self._config = config
        self._files = in_pieces(files)
        self._budget = budget
        learner = config.learner
        asked = {"CPU": learner.cpus, "GPU": learner.gpus}
        if config.rollout.colocate:
            # A bundle has its own GPU, of which both then get their shares.
            asked = {"CPU": learner.cpus + config.rollout.cpus, "GPU": 1}
        bundle = {name: amount for name, amount in asked.items() if amount}
        self.place = placement_group([bundle] * learner.num_workers, strategy="PACK")
        self._placed = self.place.wait(_ROOM_S)
        self._history = History(back=config.train.max_staleness)
        self._store: Any = None
        self._built = self._one_could = False
        self.lost = self.midway = False
        self.stop = StopRequest()
        self.alone: Callable[[], AbstractContextManager[None]] = nullcontext
        # Ray tells whoever watches a growing cluster that no machine it knows could ever take a
        # rank whose place is not there yet.
        self._ranks = self._start() if self._placed else []

    @property
    def step(self) -> int:
        """Updates until now, of a run that was resumed those before it included."""
        return self._history.step

    def prepare(self, batch: Pending) -> None:
        """Have the ranks decode the images of the batch that is next, until its captions are there;
        does not wait, and nothing is lost where they do not."""
        prompts = [share.prompts for share in batch.shares]
        for rank in self._ranks:
            rank.prepare.options(num_returns=0).remote(*prompts)

    def update(self, results: Results) -> StepReport:
        """One step on the groups that were not dropped; all ranks read one copy of them on each
        node.  They lie on the driver's node, which outlives the others, for a rebuilt group."""
        parts = _references(results)
        self.midway = True
        report: StepReport = self._surely(lambda: ray.get(self._call("update", *parts)))
        self.midway = False
        self._history.add(parts)
        return report

    def replay(self, use: Callable[[Checkpoint], T]) -> T:
        """What ``use`` makes of what the last step skipped; for a step whose report names a
        problem."""
        return self._surely(lambda: use(ray.get(self._call("replay"))))

    def weights(self, *, trained_only: bool) -> Any:
        """A reference to the current :class:`Weights`, once they are packed."""
        return self._surely(lambda: self._call("weights", trained_only=trained_only))

    def earlier(self, version: int) -> Any:
        """A reference to the :class:`Weights` that train as they were at an earlier version, for
        which the group is built anew and then brought back; None where all checkpoints that are
        left are later."""
        way = self._history.way_to(version)
        if way is None:
            return None

        def passing_by() -> Any:
            self._rebuild(*way)
            weights = self._call("weights", trained_only=True)
            self._repeat(self._history.since(version))
            return weights

        # It is built anew as it is.
        self.lost = False
        return self._surely(passing_by)

    @property
    def shared_place(self) -> Any:
        """Where an engine is to be put that shares the learner's GPU; None where none does."""
        if not self._config.rollout.colocate:
            return None
        return PlacementGroupSchedulingStrategy(self.place, placement_group_bundle_index=0)

    @property
    def first(self) -> Any:
        """Rank 0, the end of every transfer to engines."""
        return self._ranks[0]

    def stage(self, *, trained_only: bool) -> None:
        """Have the current weights ready to be sent by rank 0."""
        self._surely(lambda: self._call("stage", trained_only=trained_only))

    def canary(self, prompt: Prompt) -> Canary:
        """The caption that engines and learner are to score alike."""
        canary: Canary = self._surely(lambda: ray.get(self._call("canary", prompt)))
        return canary

    def score(self, canary: Canary) -> Any:
        """A reference to the canary caption's log-probs [T] under the current weights."""
        return self._surely(lambda: self._call("score", canary))

    def checkpoint(self, use: Callable[[Checkpoint], T]) -> T:
        """What ``use`` makes of everything that a resumed run needs of the learner.  It comes piece
        by piece as it is read; ``use`` is called again where the learner is lost meanwhile."""
        return self._surely(lambda: use(ray.get(self._call("checkpoint"))))

    def restore(self, checkpoint: Checkpoint, folder: Path) -> int:
        """Continue from a checkpoint, which was read from ``folder``; returns its step."""
        self._history.begin(checkpoint.step, folder)
        shared = ray.put(shipped(checkpoint))
        step: int = self._surely(lambda: ray.get(self._call("restore", shared)))
        return step

    def rebuild_from(self, folder: Path) -> None:
        """``folder`` holds a checkpoint of the learner as it is now, from which a lost one can be
        rebuilt: the groups of steps before it are kept while their weights may be asked for."""
        self._history.saved(folder)

    def wait(self) -> None:
        """Wait until the ranks are constructed."""
        self._surely(self._wait_until_built)

    def workers(self) -> dict[str, Any]:
        """The ranks by name."""
        return {f"learner {rank}": actor for rank, actor in enumerate(self._ranks)}

    def shutdown(self) -> None:
        """End every rank and give back what they had, and the groups that were kept for another
        one; a second time does nothing."""
        if self.place is not None:
            self._kill()
            self._history.begin(self.step, None)
            remove_placement_group(self.place)
            self.place = None

    def _start(self) -> list[Any]:
        learner = self._config.learner
        place = ("", 0)
        if learner.num_workers > 1:
            from rayrl.learner.parallel import open_store

            address = ray.util.get_node_ip_address()
            self._store = open_store(address, learner.num_workers, timeout_s=learner.timeout_s)
            place = (address, self._store.port)
        return [
            LearnerActor.options(  # type: ignore[attr-defined]
                num_cpus=learner.cpus,
                num_gpus=learner.gpus,
                runtime_env=worker_environment(learner.cpus, learner.gpus),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.place, placement_group_bundle_index=rank
                ),
            ).remote(self._config, self._files, rank, place)
            for rank in range(learner.num_workers)
        ]

    def _surely(self, call: Callable[[], T]) -> T:
        """The result of ``call``, on a rebuilt group where one was lost, while the budget lasts."""
        while True:
            try:
                if self.lost:
                    self._rebuild(*self._history.way())
                return call()
            except (RankLost, ObjectLostError) as error:
                # A result is lost with its node, and so is the rank that made it.
                self.lost = True
                self._budget.spend("the learner is rebuilt", error)

    def _rebuild(self, origin: Path | None, since: Sequence[Update]) -> None:
        """The group as it was after those updates ``since`` the checkpoint ``origin``."""
        self._kill()
        # Ray looks for another place itself where a machine went with the rank.
        self._placed = False
        with self.alone():
            if origin is not None:
                self._call("restore", ray.put(shipped(load_checkpoint(origin))))
            self._repeat(since)
            # An engine that comes back may want its weights.
            self.lost = False

    def _repeat(self, updates: Sequence[Update]) -> None:
        for parts in updates:
            self._call("update", *parts)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call every rank and wait for all; returns a reference to the last result of rank 0.

        Raises RankLost where a rank died or does not answer, and else what the rank raised that
        failed first."""
        self._wait_until_built()
        answers = [getattr(rank, method).remote(*arguments, **options) for rank in self._ranks]
        results = [answer if isinstance(answer, list) else [answer] for answer in answers]
        ranks = {refs[0]: rank for rank, refs in enumerate(results)}
        # Ranks that wait for another notice it first, and tell which.
        several = 2 if len(ranks) > 1 else 1
        self._check(ranks, method, several * self._config.learner.timeout_s, "learner.timeout_s")
        return results[0][-1]

    def _wait_until_built(self) -> None:
        """Wait for new ranks, whose models may take long to load."""
        if self._built:
            return
        if not self._placed:
            what = f"the learner's {self._config.learner.num_workers} rank(s)"
            limit_s = self._config.rollout.start_timeout_s
            wait_for_place(self.place, what, limit_s=limit_s, stop=self.stop)
            self._placed = True
        self._ranks = self._ranks or self._start()
        ranks = {actor.__ray_ready__.remote(): rank for rank, actor in enumerate(self._ranks)}
        limit_s = self._config.rollout.start_timeout_s
        self._check(ranks, "its construction", limit_s, "rollout.start_timeout_s")
        self._built = self._one_could = True

    def _check(self, waiting: dict[Any, int], what: str, limit_s: float, key: str) -> None:
        """Wait until all ranks have answered; ``key`` names the configuration of the limit."""
        errors: dict[int, RayError] = {}
        deadline = time.monotonic() + limit_s
        while waiting:
            left = _GRACE_S if errors else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(waiting), timeout=left, fetch_local=False)
            for ref in done:
                rank = waiting.pop(ref)
                try:
                    ray.get(ref)
                except RayError as error:
                    errors[rank] = error
            if not done:
                break
        if errors:
            self._raise(errors, silent=sorted(waiting.values()))
        if waiting:
            rank, size = min(waiting.values()), len(self._ranks)
            limit = f"{limit_s:g} s ({key})"
            raise RankLost(f"learner rank {rank} of {size} has not answered {what} within {limit}")

    def _raise(self, errors: dict[int, RayError], silent: Sequence[int]) -> None:
        """Raise for the rank that is to blame: one that died, else one that does not answer while
        another complains, else the first that failed."""
        size = len(self._ranks)
        first, error = next(iter(errors.items()))
        for rank, died in errors.items():
            if isinstance(died, DIED) or lost_its_gpu(getattr(died, "cause", None)):
                if construction_failed(died) and not self._one_could:
                    raise died
                raise RankLost(f"learner rank {rank} of {size} died: {died}") from died
        if silent and wants_another(getattr(error, "cause", None)):
            raise RankLost(
                f"learner rank {silent[0]} of {size} does not answer; rank {first}: {error}"
            ) from error
        raise error

    def _kill(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks, self._built = [], False


def _references(results: Results) -> list[Any]:
    """References to the results of all parts, and to the prompts of each."""
    if isinstance(results, Parts):
        return [ray.put(list(results.scored)), *results.references]
    groups = whole(results.all())
    sampled = Sampled.of([group.group for group in groups], seconds=0.0)
    prompts = [group.group.prompt for group in groups]
    return [ray.put([Scored.of(sampled, groups, {})]), ray.put(prompts)]
