"""The dotted keys of a :class:`Config`, and what is said of those that do not exist."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from typing import Any, get_origin

from pydantic import BaseModel

from rayrl.config import Config


class UsageError(ValueError):
    """The command line or the file asks for something that does not exist or cannot be."""


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def mapping_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all mappings whose names are the user's own."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is dict:
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from mapping_keys(field.annotation, f"{prefix}{name}.")


def whole_mappings(flags: Sequence[str]) -> Iterator[str]:
    """The mappings that are given whole: as JSON, and not name by name."""
    for flag, following in pairwise([*flags, ""]):
        key, equals, value = flag.removeprefix("--").partition("=")
        try:
            given = json.loads(value if equals else following)
        except ValueError:
            continue
        if flag.startswith("--") and isinstance(given, dict):
            yield from _mappings_within(given, key)


def _mappings_within(value: Any, key: str) -> Iterator[str]:
    if key in mapping_keys():
        yield key
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _mappings_within(inner, f"{key}.{name}")


def _free_form(key: str) -> bool:
    """Whether ``key`` lies inside a mapping whose keys are the user's own (reward terms …)."""
    model: Any = Config
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return True
        if part not in model.model_fields:
            return False
        model = model.model_fields[part].annotation
    return False


def check_keys(values: dict[str, Any], where: str, prefix: str = "") -> None:
    keys = set(known_keys())
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if dotted not in keys and not _free_form(dotted):
            raise UsageError(f"{where}: unknown key {dotted!r}{nearest(dotted, keys)}")
        if isinstance(value, dict):
            check_keys(value, where, f"{dotted}.")


def check_flags(flags: Sequence[str]) -> None:
    keys = set(known_keys())
    taken = False
    for flag, following in pairwise([*flags, ""]):
        # The value of the option before it may look like anything.
        is_value, taken = taken, flag.startswith("--") and "=" not in flag
        if not flag.startswith("--"):
            _check_bare(flag, keys if not is_value else set())
            continue
        dotted, equals, value = flag[2:].partition("=")
        if dotted in keys:
            continue
        for mapping in mapping_keys():
            name = dotted.removeprefix(f"{mapping}.")
            if name != dotted:
                value = value if equals or following.startswith("--") else following
                raise UsageError(
                    f"unknown option --{dotted}; want --{mapping} {_as_entry(name, value)}"
                )
        raise UsageError(f"unknown option --{dotted}{nearest(dotted, keys)}")


def _check_bare(word: str, keys: Set[str]) -> None:
    """UsageError for a key that is given as Hydra takes it, without dashes."""
    key = word.partition("=")[0]
    if key in keys:
        raise UsageError(f"{word} is no option; write --{word}")
    if keys and key in _ELSEWHERE:
        raise UsageError(f"{word} is no option{nearest(key, keys)}")


def _as_entry(name: str, value: str) -> str:
    """How an entry of a mapping is given, for one who wrote it as an option of its own."""
    value = value or "VALUE"
    if "." not in name:
        return f"{name}={value}"
    for part in reversed(name.split(".")):
        value = f'{{"{part}": {value}}}'
    return f"'{value}', with all its other entries, or the entry in the file"


_KL = "objective.set kl_coef=VALUE"
_ELSEWHERE = {
    # TRL
    "num_generations": "train.group_size",
    "beta": f"{_KL}, or beta=VALUE for preference objectives",
    "learning_rate": "learner.lr",
    "per_device_train_batch_size": "train.images_per_step, which counts images and not captions",
    "max_completion_length": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    # verl
    "actor_rollout_ref.rollout.n": "train.group_size",
    "actor_rollout_ref.rollout.temperature": "sampling.temperature",
    "actor_rollout_ref.actor.kl_loss_coef": _KL,
    "actor_rollout_ref.actor.optim.lr": "learner.lr",
    "data.train_batch_size": "train.images_per_step",
    "data.max_response_length": "sampling.max_tokens",
}
"""What is called otherwise in other programs, where the spelling leads nowhere."""
_CUTS = ("top_k", "top_p", "min_p")
_WHY_NO_CUTS = (
    "captions are drawn from the full vocabulary, because the learner's log-probs are of all of it "
    "and could not correct for what was cut off"
)


def nearest(key: str, keys: Set[str]) -> str:
    """What the key of another program is called here; else the nearest known key: whole, or by its
    last part alone (`--lr` for `--learner.lr`); or why there is none."""
    if key in _ELSEWHERE:
        return f"; here that is --{_ELSEWHERE[key]}"
    if key.rpartition(".")[2] in _CUTS:
        return f": {_WHY_NO_CUTS}"
    near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.75)
    last = key.rpartition(".")[2]
    near = near or [k for k in sorted(keys) if k.rpartition(".")[2] == last][:1]
    near = near or difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
