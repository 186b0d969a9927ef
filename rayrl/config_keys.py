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


_SET = "objective.set"
_KL = f"{_SET} kl_coef=VALUE"
_CLIP = f"{_SET} clip_low=VALUE, and clip_high=VALUE"
_STEPS = "train.steps, which counts steps of train.images_per_step images and not epochs"
_ACCUMULATED = "learner.micro_batch_images, the part of a step's images that is computed at once"
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_ELSEWHERE = {
    # TRL
    "model_name_or_path": "model.path",
    "output_dir": "run_folder",
    "dataset_name": "data.path",
    "num_generations": "train.group_size",
    "beta": f"{_KL}, or beta=VALUE for preference objectives",
    "epsilon": _CLIP,
    "epsilon_high": f"{_SET} clip_high=VALUE",
    "loss_type": "objective.preset",
    "reward_weights": "reward.terms",
    "learning_rate": "learner.lr",
    "lr_scheduler_type": "learner.schedule",
    "max_grad_norm": "learner.grad_clip",
    "num_train_epochs": _STEPS,
    "max_steps": "train.steps",
    "num_iterations": "learner.inner_epochs",
    "per_device_train_batch_size": "train.images_per_step, which counts images and not captions",
    "gradient_accumulation_steps": _ACCUMULATED,
    "gradient_checkpointing": "learner.activation_checkpointing",
    "bf16": "model.dtype bfloat16, and engine.dtype",
    "lora_r": "learner.lora.rank",
    "lora_alpha": "learner.lora.alpha",
    "max_completion_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "use_vllm": "engine.backend vllm",
    "vllm_gpu_memory_utilization": "engine.kv_cache_mb",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "train.eval_every",
    # verl
    "actor_rollout_ref.model.path": "model.path",
    f"{_ROLLOUT}.n": "train.group_size",
    f"{_ROLLOUT}.name": "engine.backend",
    f"{_ROLLOUT}.temperature": "sampling.temperature",
    f"{_ROLLOUT}.gpu_memory_utilization": "engine.kv_cache_mb",
    f"{_ACTOR}.kl_loss_coef": _KL,
    f"{_ACTOR}.clip_ratio": _CLIP,
    f"{_ACTOR}.optim.lr": "learner.lr",
    f"{_ACTOR}.ppo_epochs": "learner.inner_epochs",
    f"{_ACTOR}.ppo_mini_batch_size": "learner.minibatches, which is their number",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": _ACCUMULATED,
    "algorithm.adv_estimator": "objective.preset",
    "data.train_files": "data.path, with {split} in it for train and val",
    "data.val_files": "data.val_path",
    "data.train_batch_size": "train.images_per_step",
    "data.max_response_length": "sampling.max_tokens",
    "trainer.total_epochs": _STEPS,
    "trainer.total_training_steps": "train.steps",
    "trainer.default_local_dir": "run_folder",
    "trainer.save_freq": "train.checkpoint_every",
    "trainer.test_freq": "train.eval_every",
    "trainer.n_gpus_per_node": "learner.num_workers, and rollout.num_workers",
    # self-critical.pytorch
    "input_json": "data.path",
    "checkpoint_path": "run_folder",
    "batch_size": "train.images_per_step",
    "max_epochs": _STEPS,
    "self_critical_after": "xe.steps, the steps of cross-entropy before",
    "train_sample_n": "train.group_size",
    "cached_tokens": "reward.df",
    "cider_reward_weight": "reward.terms cider_d=VALUE",
    "bleu_reward_weight": "reward.terms bleu=VALUE",
    "save_checkpoint_every": "train.checkpoint_every",
}
"""What is called otherwise in other programs, where the spelling leads nowhere."""
_LIKE = 0.63
"""How like a key another one must be to be meant: below, words without any sense find some key."""
_CUTS = ("top_k", "top_p", "min_p")
_WHY_NO_CUTS = (
    "captions are drawn from the full vocabulary, because the learner's log-probs are of all of it "
    "and could not correct for what was cut off"
)


def nearest(key: str, keys: Set[str]) -> str:
    """What the key of another program is called here; else the nearest known key: whole, or by its
    last parts alone (`--lr` for `--learner.lr`); or why there is none."""
    if key in _ELSEWHERE:
        return f"; here that is --{_ELSEWHERE[key]}"
    if key.rpartition(".")[2] in _CUTS:
        return f": {_WHY_NO_CUTS}"
    near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.75)
    parts = key.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    near = near or [k for end in ends for k in sorted(keys) if f".{k}".endswith(f".{end}")][:1]
    near = near or difflib.get_close_matches(key, sorted(keys), n=1, cutoff=_LIKE)
    return f"; did you mean {near[0]!r}?" if near else ""
