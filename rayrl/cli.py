"""From YAML and the command line to a :class:`Config`: `--config FILE --learner.lr 1e-5 …`.

Later sources win: defaults, then the file, then the overrides.  A run that is continued has its own
file, where none is given.  Of a mapping whose names are the user's own, as `reward.terms`, the
override `name=value` changes one entry of the file's, and `{"name": value}` takes the place of all
of them, `{}` of whatever there is.  An unknown key, in the file or on the command line, is an error
that names the nearest known one.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from rayrl.config import Config
from rayrl.config_keys import UsageError, check_flags, check_keys, whole_mappings
from rayrl.credentials import CREDENTIAL, redacted
from rayrl.objectives.config import ObjectiveConfig, plan_with
from rayrl.section import local_path
from rayrl.yaml_file import read_yaml

RUN_CONFIG = "config.yaml"
"""The resolved configuration in a run folder."""
REPLAY_CONFIG = "run.yaml"
"""The run's configuration inside a replay, so that the folder can be looked at anywhere."""


Resume = Literal["never", "always", "auto"]
"""Start a run, continue one, or continue it where there is something to continue."""


OPTIONS = {
    "--config": "FILE  read this YAML first",
    "--dry-run": " print the resolved sizes and stop",
    "--resume": " continue from the newest checkpoint of --run_folder, with the configuration "
    "there if no other is given; `--resume auto` starts the run where there is none yet, so that "
    "one command can be tried again",
    "--trace": " write a timeline of all workers to trace.json in the run folder",
    "--replay": "FILE  run the learner alone on a step that a run skipped, with that run's "
    "configuration, and say what is not finite",
}
"""What the main job is told beside its configuration; others take some of it."""
_MAPPINGS = (
    "Of mappings (reward.terms, objective.set, ...) name=value changes one entry, and "
    "'{\"name\": value}' takes the place of the file's; '{}' empties it"
)


class Invocation(NamedTuple):
    """What a job was asked to do."""

    config: Config
    dry_run: bool
    resume: Resume
    replay: Path | None = None
    trace: bool = False


def parse(
    argv: Sequence[str], *, program: str, description: str, options: Sequence[str] = tuple(OPTIONS)
) -> Invocation:
    """Read a job's command line; prints help or an error and exits where one is due.  Of
    :data:`OPTIONS` it takes these."""
    try:
        return _parse(list(argv), program, description, options)
    except UsageError as error:
        _fail(program, str(error))


def load(
    file: Path | None,
    overrides: Sequence[str] = (),
    *,
    program: str = "rayrl",
    resolved: bool = False,
) -> Config:
    """A configuration from a YAML file (or the defaults) and dotted overrides.

    What follows from other keys in a ``resolved`` file follows from overrides of those too.
    Raises UsageError, whose text is one line a problem.
    """
    values = _read_yaml(file) if file else {}
    check_keys(values, str(file))
    if resolved:
        values = _without_what_follows(values)
    check_flags(overrides)
    flags = _overrides(overrides, program, "")
    values = _merged(_with_default_set(values, flags), flags, set(whole_mappings(overrides)))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in e['loc']) or 'config'}: {_message(e)}"
            for e in error.errors()
            # Said of a key whose default follows from one that is wrong itself.
            if e["type"] != "default_factory_not_called"
        ]
        raise UsageError("\n".join(lines)) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, the way `--config` reads it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def describe(config: Config) -> str:
    """The resolved sizes of a run in words, for `--dry-run`."""
    train, learner = config.train, config.learner
    images, captions = train.images_per_step, config.captions_per_step
    per_update = images // learner.minibatches
    ranks = learner.num_workers
    micro = -(-per_update // ranks // learner.micro_batch_images)
    parts = f"in {micro} micro-batch{'es' * (micro > 1)}"
    if learner.micro_batch_tokens:
        parts = f"in micro-batches of up to {learner.micro_batch_tokens} tokens"
    if ranks > 1:
        parts += f" on each of {ranks} ranks ({learner.parallel})"
    updates = learner.inner_epochs * learner.minibatches
    ahead = train.max_staleness
    lines = [
        f"a step: {images} images x {train.group_size} captions = {captions} captions "
        f"of up to {config.sampling.max_tokens} tokens",
        f"the update: {updates} optimizer step{'s' * (updates > 1)} a step, each of {per_update} "
        f"images {parts}",
        f"the run: {train.steps} steps = {train.steps * captions} captions, "
        + (
            "sampled with the newest weights" if not ahead else f"sampled up to {ahead} steps ahead"
        ),
        f"workers: {config.rollout.num_workers} rollout, {train.reward_workers} reward, "
        f"{ranks} learner",
        f"objective: {config.objective.preset}",
        describe_stage1(config),
    ]
    return "\n".join(lines)


def describe_stage1(config: Config) -> str:
    """The same of cross-entropy alone."""
    xe = config.xe
    workers = f"{xe.num_workers} worker{'s' * (xe.num_workers > 1)}"
    return (
        f"stage 1: {xe.steps} cross-entropy steps of {xe.images_per_step} images x "
        f"{xe.captions_per_image} captions at a rate of {xe.lr:g}, by {workers}\n"
        f"data: {config.data.source}; model: {config.model.path}; run folder: {config.run_folder}"
    )


def _parse(argv: list[str], program: str, description: str, options: Sequence[str]) -> Invocation:
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=local_path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--resume", nargs="?", choices=("always", "auto"), default="never", const="always"
    )
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--replay", type=local_path)
    parser.add_argument("--run_folder", type=os.path.expanduser)
    known, rest = parser.parse_known_args(argv)
    if "--help" in rest or "-h" in rest:
        listed = "    ".join(f"{name} {OPTIONS[name]}" for name in options)
        _overrides(["--help"], program, f"{description}\n\n  {listed}    {_MAPPINGS}")
    for name in OPTIONS:
        given = vars(known)[name[2:].replace("-", "_")]
        if name not in options and given not in (None, False, "never"):
            raise UsageError(f"{name} is for grpo_coco.py; {program} would do nothing with it")
    replay = None if known.replay is None else _replay_folder(known.replay)
    run = known.run_folder or Config.model_fields["run_folder"].default
    file = known.config if replay is None or known.config else replay / REPLAY_CONFIG
    own = file is None and _goes_on(Path(run), known.resume)
    if own:
        file = Path(run) / RUN_CONFIG
        print(f"configuration: {file}", flush=True)
        # The folder may have been moved since the file was written.
        known.run_folder = run
    if known.run_folder is not None:
        rest += ["--run_folder", known.run_folder]
    config = load(file, rest, program=program, resolved=own)
    return Invocation(config, known.dry_run, known.resume, replay, known.trace)


def _goes_on(run: Path, resume: Resume) -> bool:
    """Whether a run with a configuration of its own is continued.  Under "auto" only one that has
    come as far as a checkpoint: else it is begun anew."""
    if resume == "auto" and not any((run / "checkpoints").glob("step_*")):
        return False
    return resume != "never" and (run / RUN_CONFIG).is_file()


def _replay_folder(path: Path) -> Path:
    """The folder of a replay, given it or a file in it."""
    folder = path if path.is_dir() else path.parent
    if not (folder / REPLAY_CONFIG).is_file():
        raise UsageError(f"--replay {path}: no {REPLAY_CONFIG} there, so it is not a replay")
    return folder


def _overrides(flags: Sequence[str], program: str, description: str) -> dict[str, Any]:
    """Dotted flags as a nested dictionary, parsed and typed by pydantic-settings."""

    class Flags(BaseSettings, Config):
        model_config = SettingsConfigDict(
            cli_prog_name=program,
            nested_model_default_partial_update=True,
            # With a line that says what is wrong, and not with a page of usage.
            cli_exit_on_error=False,
        )

    Flags.__doc__ = description
    try:
        source = CliSettingsSource[Any](
            Flags, cli_parse_args=list(flags), cli_hide_none_type=True, cli_avoid_json=True
        )
        return dict(source())
    except SettingsError as error:
        raise UsageError(_unread(str(error), flags)) from None


def _unread(error: str, flags: Sequence[str]) -> str:
    """What pydantic-settings says of flags, in words."""
    if key := re.search(r" for ([\w.]+):", error):
        return f"--{key[1]}: cannot be read; a mapping wants name=value, or '{{\"name\": value}}'"
    if error.startswith("error parsing value"):
        given = next((flag for flag in flags if flag.startswith("{")), "a value")
        return (
            f"{given} cannot be read; a section wants a flag for each key, as in --data.image_size "
            "64, or JSON"
        )
    said = error.removeprefix("error parsing CLI: ")
    words = said.removeprefix("unrecognized arguments: ").split()
    if any(Path(word).exists() for word in words):
        said += "; quote a path with * in it, or the shell puts the files in its place"
    return said


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"--config {file}: no such file")
    try:
        values = read_yaml(file)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: want a mapping of sections, got {type(values).__name__}")
    return values


def _without_what_follows(values: dict[str, Any]) -> dict[str, Any]:
    """The values without bounds of the pool that are its size: nobody may have given them."""
    rollout = values.get("rollout")
    if not isinstance(rollout, dict):
        return values
    size, bounds = rollout.get("num_workers"), ("min_workers", "max_workers")
    kept = {key: value for key, value in rollout.items() if key not in bounds or value != size}
    return {**values, "rollout": kept}


def _with_default_set(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The values with what the default objective changes in its preset, where nobody names a preset
    and the file no changes: a flag then changes one thing of it, as of any other default."""
    objective, flagged = values.get("objective", {}), flags.get("objective", {})
    changed = flagged.get("set", {}) if isinstance(flagged, dict) else None
    if not isinstance(objective, dict) or not isinstance(changed, dict):
        return values  # which is said later
    if "preset" in {*objective, *flagged} or "set" in objective:
        return values
    default: ObjectiveConfig = Config.model_fields["objective"].default
    try:
        plan_with(default.preset, {**default.set, **changed})
    except ValueError:
        # A flag takes out what the default changes; or is wrong, which is said later.
        return values
    return {**values, "objective": {**objective, "set": dict(default.set)}}


def _merged(
    base: dict[str, Any], over: dict[str, Any], whole: Set[str], prefix: str = ""
) -> dict[str, Any]:
    """``base`` with what ``over`` changes; of the keys that are ``whole`` nothing is left."""
    out = dict(base)
    for key, value in over.items():
        dotted = f"{prefix}{key}"
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and dotted not in whole
        out[key] = _merged(out[key], value, whole, f"{dotted}.") if both else value
    return out


def _message(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    hidden = error["type"] == CREDENTIAL or isinstance(given, dict | BaseModel)
    shown = "" if hidden else f" (got {given!r})"
    return redacted(message + shown)


def _fail(program: str, text: str) -> NoReturn:
    for line in text.splitlines():
        print(f"{program}: {line}", file=sys.stderr)
    raise SystemExit(2)
