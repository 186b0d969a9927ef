"""The names that parameters have in a checkpoint.

transformers gives some modules other names than their checkpoints have, which it translates back
when it saves.  vLLM reads checkpoints, and knows those names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rayrl.weights import Loadable


def checkpoint_names(config: Any, *, trust_remote_code: bool = False) -> dict[str, str]:
    """The names that published checkpoints of a configuration's model have, by those of its
    parameters; without parameters whose name is the same in both, or that checkpoints do not hold
    each for itself."""
    from transformers import AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    # Without, a model that was not loaded is written without the prefix of its vision tower, which
    # published checkpoints have.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        written = dict(revert_weight_conversion(model, {name: parameter}))
        if len(written) == 1 and name not in written:
            (names[name],) = written
    return names


@dataclass(frozen=True, slots=True)
class Renamed:
    """A version under other names; ``names`` maps those of ``weights`` to them, where they
    differ."""

    weights: Loadable
    names: Mapping[str, str]

    @property
    def version(self) -> int:
        return self.weights.version

    def verify(self) -> None:
        self.weights.verify()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.weights.tensors():
            yield self.names.get(name, name), tensor
