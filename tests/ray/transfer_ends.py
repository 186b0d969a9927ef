"""The two ends of a transfer, with a few values in place of models."""

from __future__ import annotations

import os

import ray
import torch

from rayrl.buckets import Received, fill
from rayrl.weights import pack_tensors


def values(version):
    """A frozen tensor and one that trains."""
    return {"frozen": torch.arange(5.0), "trained": torch.full((300, 7), float(version))}


@ray.remote(num_cpus=0.1)
class Sender:
    """A learner of which there is only the way out."""

    def __init__(self):
        self._transport, self._staged = None, None

    def stage(self, version):
        self._staged = fill(values(version).items(), version, ["trained"], bucket_bytes=4096)

    def join_transfer(self, meeting, rank):
        self._transport = meeting.join(rank, self._transport)

    def offer(self):
        manifest, buckets = self._staged
        return manifest.with_handles(self._transport.offer(buckets))

    def send(self):
        self._transport.send(self._staged[1])

    def release(self):
        self._staged = None

    def weights(self, version, names):
        return pack_tensors(values(version).items(), version, names)


@ray.remote
class Holder:
    """An engine that only holds weights."""

    def __init__(self, files, config, group_size, trust_remote_code, shares_gpu):
        self._transport, self._held, self._version = None, {}, -1

    def started(self):
        pass

    def load(self, changed, *versions):
        for weights in versions:
            self._apply(weights)
        return self._version

    def join_transfer(self, meeting, rank):
        self._transport = meeting.join(rank, self._transport)

    def receive(self, changed, manifest):
        try:
            os.rename(os.environ["RAYRL_TEST_DIE"], os.environ["RAYRL_TEST_DIE"] + ".taken")
        except FileNotFoundError:
            pass
        else:
            os._exit(1)
        self._apply(Received(manifest=manifest, buckets=self._transport.receive(manifest)))
        return self._version

    def held(self):
        return self._version, {name: float(tensor.sum()) for name, tensor in self._held.items()}

    def _apply(self, weights):
        weights.verify()
        self._held |= {name: tensor.clone() for name, tensor in weights.tensors()}
        self._version = weights.version


@ray.remote
class Somewhere:
    """An actor of which only the place matters."""

    def __init__(self, *_):
        pass

    def started(self):
        pass

    def gpus(self):
        return ray.get_gpu_ids()
