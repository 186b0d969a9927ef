"""The command line of the evaluation job: what to score, how, and the configuration under it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from rayrl import cli, config_keys
from rayrl.config import Config
from rayrl.data.config import Split
from rayrl.rewards.suite import METRICS, metric
from rayrl.section import local_path

PROGRAM = "eval_coco.py"


class Options(NamedTuple):
    """What the job was asked to do; exactly one of the first four is set."""

    checkpoint: Path | None
    results: Path | None
    compare: list[Path] | None
    self_test: bool
    config: Path | None
    references: Path | None
    subset: bool
    split: Split
    metrics: list[str]
    clip: str | None
    beam: int
    samples: int
    output: Path | None

    @property
    def subject(self) -> Path:
        """The checkpoint or results file that is scored."""
        subject = self.checkpoint or self.results
        assert subject is not None
        return subject


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The job's own options, and the flags left for the configuration; prints help or an error
    and exits where one is due."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    options = Options(**vars(args))
    own = [f"--{name}".replace("_", "-") for name in Options._fields]
    for flag in overrides:
        near = get_close_matches(flag, own, n=1, cutoff=0.8)
        if near and flag.removeprefix("--") not in config_keys.known_keys():
            parser.error(f"unknown option {flag}; did you mean {near[0]}?")
    if options.checkpoint is None and (options.beam > 1 or options.samples):
        parser.error("--beam and --samples decode: they need --checkpoint")
    if options.checkpoint and options.references:
        parser.error("--references holds no images to caption: name the data with --data.path")
    if options.checkpoint and options.subset:
        parser.error(
            "--subset is of the images that a results file captions: it needs --results "
            "or --compare"
        )
    if options.clip and options.references:
        parser.error(
            "--clip needs the images, which --references does not hold: name the data "
            "with --data.path"
        )
    if options.samples == 1:
        parser.error("--samples 1: diversity is that of at least 2 captions")
    return options, overrides


def read_config(options: Options, overrides: Sequence[str]) -> Config:
    """:func:`load_config`; prints an error and exits where one is due."""
    try:
        return load_config(options, overrides)
    except (OSError, ValueError) as error:
        refuse(error)


def refuse(error: OSError | ValueError) -> NoReturn:
    """Exit with 2 and what is wrong with the input."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    for line in text.splitlines():
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    raise SystemExit(2)


def load_config(options: Options, overrides: Sequence[str]) -> Config:
    """The configuration that was given, else that of the run that made the checkpoint: with
    another instruction or another data set it would score something else.

    Raises FileNotFoundError where the checkpoint is no model folder, UsageError where nothing says
    which data to take, else as :func:`cli.load`.
    """
    file = options.config
    if options.checkpoint:
        folder = options.checkpoint.resolve()
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(
                f"{options.checkpoint}: no model folder (one with a config.json), such as "
                "RUN_FOLDER/checkpoints/latest"
            )
        of_run = folder.parent.parent / cli.RUN_CONFIG
        if file is None and of_run.is_file():
            print(f"configuration: {of_run}")
            file = of_run
    config = cli.load(file, overrides, program=PROGRAM)
    if file is None and config.data.source == "scenes" and not _names_data(options, overrides):
        raise config_keys.UsageError(_no_data(options))
    return config


def _names_data(options: Options, overrides: Sequence[str]) -> bool:
    """Whether the command line says what is scored, be it the generated scenes."""
    keys = {flag.partition("=")[0] for flag in overrides}
    named = any(re.fullmatch(r"--data(\.(source|scenes\b.*))?", key) for key in keys)
    return named or options.self_test or options.references is not None


def _no_data(options: Options) -> str:
    """What to say where the default, generated scenes, would be taken for somebody's data."""
    if options.checkpoint:
        return (
            f"--checkpoint {options.checkpoint} lies in no run folder with a {cli.RUN_CONFIG}, and "
            "nothing says which images to caption: want --config FILE, or --data.source and "
            "--data.path (--data.source scenes for the generated ones)"
        )
    return (
        "no --references: want a COCO captions file, a Karpathy file, or an object of image id to "
        "captions; or, for a data set with images, --config FILE or --data.source and --data.path"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Score captions as COCO reports them: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE, "
        "CLIPScore. Prints a table (x100) and writes metrics.json and a results file as the COCO "
        "server takes it. METEOR and SPICE need Java; what cannot be computed is left out and "
        "named.",
        epilog="Any key of the configuration can follow, as in --data.path DIR or "
        "--rollout.num_workers 4; grpo_coco.py --help lists them. Captions are decoded up to "
        "--sampling.max_tokens.",
        allow_abbrev=False,
    )
    _add_subject(parser.add_mutually_exclusive_group(required=True).add_argument)
    _add_settings(parser.add_argument)
    return parser


def _add_subject(add: Any) -> None:
    add("--checkpoint", type=local_path, metavar="FOLDER", help="caption a split with this model")
    add("--results", type=local_path, metavar="FILE", help="score this COCO results file")
    add(
        "--compare",
        type=local_path,
        nargs=2,
        metavar=("A", "B"),
        help="is results file B better than A? (paired bootstrap, by each of --metrics)",
    )
    add("--self-test", action="store_true", help="print the golden values; fails if one differs")


def _add_settings(add: Any) -> None:
    add(
        "--config",
        type=local_path,
        metavar="FILE",
        help="YAML; default: that of the run that the checkpoint lies in",
    )
    add(
        "--references",
        type=local_path,
        metavar="FILE",
        help="for --results and --compare, instead of a data set with images: a COCO captions "
        "file, a Karpathy file, or an object of image id to captions",
    )
    add(
        "--subset",
        action="store_true",
        help="score the images alone that the (first) results file captions, where the references "
        "are of more; metrics.json says of how many",
    )
    add("--split", choices=get_args(Split), default="val", help="default: %(default)s")
    add(
        "--metrics",
        nargs="+",
        type=_metric,
        default=list(METRICS),
        metavar="NAME",
        help=f"some of {', '.join(METRICS)}, or your own as module:function; default: all of those",
    )
    add(
        "--clip",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="a local CLIP model, for CLIPScore",
    )
    add(
        "--beam",
        type=_positive,
        default=1,
        metavar="N",
        help="the best of N beams instead of the greedy caption; needs --engine.backend hf",
    )
    add(
        "--samples",
        type=_positive,
        default=0,
        metavar="K",
        help="draw K captions an image as well, and report their diversity",
    )
    add(
        "--output",
        type=local_path,
        metavar="FOLDER",
        help="default: beside the checkpoint or results file, NAME_eval_SPLIT, and _beamN or "
        "_samplesK after it",
    )


def _metric(name: str) -> str:
    """The name of a metric that there is."""
    try:
        metric(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}, want at least 1")
    return value
