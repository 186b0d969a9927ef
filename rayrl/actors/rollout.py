"""The rollout actor: an engine behind Ray."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from rayrl.actors.losses import GpuFailed, OtherVersion, lost_its_gpu
from rayrl.adapters import AdapterWeights
from rayrl.buckets import Manifest, Received
from rayrl.canary import Canary
from rayrl.config import EngineConfig, Part
from rayrl.engine.base import EngineSetup, Sampling, make_engine
from rayrl.planning import Draw
from rayrl.readback import ReadBack
from rayrl.shares import Sampled
from rayrl.trace import Traced, traced
from rayrl.transport import Meeting, Transport
from rayrl.types import Completion, FloatArray, Prompt, RolloutGroup
from rayrl.weights import Loadable, ModelFiles, Weights, write_model_files

Method = TypeVar("Method", bound=Callable[..., Any])


def names_gpu_failures(method: Method) -> Method:
    """Have a worker whose GPU fails it say so, that it may be replaced like one that died."""

    @functools.wraps(method)
    def guarded(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except RuntimeError as error:
            if not lost_its_gpu(error):
                raise
            raise GpuFailed(f"its GPU failed it: {error}") from error

    return guarded  # type: ignore[return-value]


@ray.remote
class RolloutActor(Traced):
    """Samples groups with the weights that it pulled last; a fresh one holds none (version -1)."""

    def __init__(
        self,
        files: ModelFiles,
        config: EngineConfig,
        group_size: int,
        trust_remote_code: bool,
        shares_gpu: bool = False,
    ) -> None:
        self._asleep, self._read_back = False, ReadBack()
        self._base: Weights | None = None
        self._transport: Transport | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="rayrl-engine-")
        folder = write_model_files(files, Path(self._folder.name), with_weights=False)
        self._engine = make_engine(
            EngineSetup(
                folder=folder,
                config=config,
                group_size=group_size,
                trust_remote_code=trust_remote_code,
                shares_gpu=shares_gpu,
            )
        )

    def started(self) -> None:
        """Answers once the engine is there."""

    def leave(self) -> None:
        """End this worker; calls before this one have been served."""
        ray.actor.exit_actor()

    @traced
    @names_gpu_failures
    def load(self, changed: Sequence[Part], *versions: Weights | AdapterWeights) -> int:
        """Apply weights in turn (all parameters first, then those that trained); returns the
        version that the engine then holds, read back from it."""
        if isinstance(versions[0], Weights) and isinstance(versions[-1], AdapterWeights):
            # It stays in Ray's shared memory; adapters of later versions go onto it.
            self._base = versions[0]
        if self._asleep:
            self._engine.wake_weights()
        for given in versions:
            weights = given if isinstance(given, Weights) else given.merged(self._base)
            self._apply(weights, changed)
        self.wake()
        return self._engine.weight_version

    def join_transfer(self, meeting: Meeting, rank: int) -> None:
        """Become one end of the way from the learner."""
        self._transport = meeting.join(rank, self._transport)

    @traced
    def receive(self, changed: Sequence[Part], manifest: Manifest) -> int:
        """Apply the weights that the learner sends; returns the version that the engine then
        holds, read back from it.  One that was asleep must :meth:`wake` before it samples.
        TransferFailed, and the engine as it was, where they do not arrive."""
        assert self._transport is not None
        if self._asleep:
            self._engine.wake_weights()
        received = Received(manifest=manifest, buckets=self._transport.receive(manifest))
        self._apply(received, changed)
        del received
        self._transport.done()
        return self._engine.weight_version

    @traced
    @names_gpu_failures
    def sleep(self, level: int) -> None:
        """Give the GPU's memory back until the next version is loaded."""
        self._engine.sleep(level)
        self._asleep = True

    @names_gpu_failures
    def wake(self) -> None:
        """Take the rest of the memory back, once the weights are there and nobody holds a second
        copy of them, beside which the cache might not fit."""
        if self._asleep:
            self._engine.wake_cache()
            self._asleep = False

    def _apply(self, weights: Loadable, changed: Sequence[Part]) -> None:
        self._engine.load_weights(weights, changed=changed)
        self._read_back.check(self._engine.held(weights), weights)

    @traced
    @names_gpu_failures
    def generate(
        self, prompts: Sequence[Prompt], draws: Sequence[Draw], sampling: Sampling, version: int
    ) -> Sampled:
        """A group for each prompt, drawn as the entry of ``draws`` says; refused unless the engine
        holds exactly ``version``."""
        self._check(version)
        started = time.perf_counter()
        groups: dict[int, RolloutGroup] = {}
        for size in sorted({draw.size for draw in draws}):
            places = [i for i, draw in enumerate(draws) if draw.size == size]
            drawn = self._engine.generate(
                [prompts[i] for i in places],
                replace(sampling, group_size=size),
                [draws[i].seed for i in places],
                [draws[i].forced for i in places],
            )
            groups |= dict(zip(places, drawn, strict=True))
        in_order = [groups[i] for i in range(len(prompts))]
        return Sampled.of(in_order, time.perf_counter() - started)

    @traced
    @names_gpu_failures
    def greedy(self, prompts: Sequence[Prompt], max_tokens: int, version: int) -> list[Completion]:
        """The arg-max caption of each prompt, under the same condition."""
        self._check(version)
        return self._engine.greedy(prompts, max_tokens)

    @traced
    @names_gpu_failures
    def score(self, canary: Canary, version: int) -> FloatArray:
        """Log-probs [T] of the canary caption, under the same condition."""
        self._check(version)
        return self._engine.score(canary.prompt, canary.token_ids)

    def _check(self, version: int) -> None:
        held = self._engine.weight_version
        if held != version:
            raise OtherVersion(f"asked for captions of weight version {version}, holding {held}")
