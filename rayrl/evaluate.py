"""Captions scored as COCO reports them: a checkpoint's, a results file's, or two files compared.

Run by ``jobs/eval_coco.py``.  Everything that can be wrong with the input is found before an engine
starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from rayrl.actors.cluster import READER_CPUS, SPARE_CPUS, connect, failing_in_one_line
from rayrl.config import Config
from rayrl.data import Dataset, load_split
from rayrl.data.images import decode
from rayrl.data.references import load_captions, load_references, only
from rayrl.decoding import Captions, Decoding
from rayrl.engine.base import chosen_backend
from rayrl.eval_cli import PROGRAM, Options, refuse
from rayrl.evaluation_record import SCALE, rows, scaled, scores_of, write_record
from rayrl.jsonl import write_atomically
from rayrl.prompt_length import check_first_prompt
from rayrl.rewards.bootstrap import compare, comparison_table
from rayrl.rewards.bootstrap import scaled as scaled_comparison
from rayrl.rewards.java import MetricUnavailable
from rayrl.rewards.results import ImageId, match, read_results, write_results
from rayrl.rewards.selftest import meteor_checks, selftest
from rayrl.rewards.signature import cider_signature
from rayrl.rewards.suite import (
    CaptionSet,
    Evaluation,
    evaluate,
    sample_diversity,
)


def main(options: Options, config: Config) -> None:
    """Do what :func:`rayrl.commands.evaluate` was asked for: exits with 2 and a line where the
    input is wrong, with 1 where a check or a worker fails."""
    with failing_in_one_line(PROGRAM):
        try:
            _run(options, config)
        except RayError:
            raise
        except (OSError, ValueError) as error:
            refuse(error)


def _run(options: Options, config: Config) -> None:
    if options.self_test:
        raise SystemExit(0 if self_test() else 1)
    if options.clip is not None:
        _check_clip(options.clip)
    if options.compare:
        compare_results(options.compare, options, config)
    elif options.results:
        evaluate_results(options, config)
    else:
        evaluate_checkpoint(options, config)


def _check_clip(folder: str) -> None:
    """ValueError where CLIPScore cannot be had: before captions are made for it."""
    from rayrl.rewards.clipscore import check_clip_folder

    try:
        check_clip_folder(folder)
    except MetricUnavailable as reason:
        raise ValueError(f"--clip: {reason}") from None


def evaluate_checkpoint(options: Options, config: Config) -> None:
    """Caption a split with a model folder, and write and print what that scores."""
    # Imported late: scoring a results file needs neither Ray Data nor PyTorch.
    from rayrl.actors.captioner import caption_split

    # A run that goes on moves its links.
    options = options._replace(checkpoint=options.subject.resolve())
    decoding = Decoding(
        beams=options.beam,
        max_tokens=config.sampling.max_tokens,
        samples=options.samples,
        temperature=config.sampling.temperature,
    )
    config = _with_backend(config, decoding, options.subject)
    data = _at_least_two(load_split(config.data, options.split))
    _say_data(options, config, data)
    print(f"instruction: {config.data.instruction}", flush=True)
    check_first_prompt(config, options.subject, data[0])
    workers, rollout = config.rollout.num_workers, config.rollout
    cpus = workers * rollout.cpus + READER_CPUS
    local = connect(cpus, workers * rollout.gpus, spare_cpus=SPARE_CPUS)
    try:
        captions = caption_split(config, data, options.subject, decoding)
    finally:
        if local:
            ray.shutdown()
    described = {
        "checkpoint": str(options.subject.resolve()),
        "model": {"dtype": config.model.dtype, "instruction": config.data.instruction},
        "decoding": {
            "method": "greedy" if decoding.beams == 1 else "beam",
            **asdict(decoding),
            "seed": config.seed,
        },
        "engine": {"backend": config.engine.backend, "dtype": config.engine.dtype},
    }
    _report(options, config, data, captions, described)


def evaluate_results(options: Options, config: Config) -> None:
    """Write and print what the captions of a results file score."""
    data, part = _references(options, config, options.subject)
    best = _matched(options.subject, data)
    described = {"results": str(options.subject.resolve()), **part}
    _report(options, config, data, Captions(best, []), described)


def compare_results(files: Sequence[Path], options: Options, config: Config) -> None:
    """Print by how much the second results file is better than the first, and how surely; write
    it where an output folder was named."""
    data, part = _references(options, config, files[0])
    a, b = (_caption_set(options, data, _matched(file, data)) for file in files)
    found, left_out = compare(a, b, options.metrics)
    print(f"{len(data)} images, x100; the first is {files[0]}, the second {files[1]}")
    print(comparison_table(found, left_out))
    print("p: the share of 10000 resampled sets of images in which the second is not higher")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        written = {
            "files": [str(file.resolve()) for file in files],
            **part,
            "scale": SCALE,
            "metrics": {name: asdict(scaled_comparison(name, one)) for name, one in found.items()},
            "left_out": left_out,
            "signature": cider_signature(a.df),
            "data": _described_data(options, config, data),
        }
        target = options.output / "comparison.json"
        write_atomically(target, json.dumps(written, indent=1) + "\n")
        print(f"written: {target}")


def self_test() -> bool:
    """Print the golden values and what this installation gives for them; whether all agree."""
    checks, left_out = selftest(), ""
    try:
        checks = [*checks, *meteor_checks()]
    except (MetricUnavailable, OSError) as reason:
        left_out = f"meteor: left out, {reason}"
    width = max(len(check.name) for check in checks)
    print(f"{'':<{width}}  {'expected':>14}  {'got':>14}")
    for check in checks:
        verdict = "ok" if check.ok else "WRONG"
        print(f"{check.name:<{width}}  {check.expected:14.10f}  {check.got:14.10f}  {verdict}")
    if left_out:
        print(left_out)
    wrong = sum(not check.ok for check in checks)
    print(f"{len(checks) - wrong} of {len(checks)} values agree")
    return not wrong


def _report(
    options: Options,
    config: Config,
    data: Dataset,
    captions: Captions,
    described: dict[str, Any],
) -> None:
    """Write the results file, score, print the table, and write metrics.json."""
    folder = _output_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / f"captions_{options.split}_results.json"
    # Before anything is scored: whatever fails then, the captions can be scored again.
    write_results(results, dict(zip(data.ids, captions.best, strict=True)))
    print(f"captions: {results}", flush=True)
    training, missing = _training(options, config)
    evaluation = _scored(options, data, captions, training)
    evaluation = replace(evaluation, left_out={**evaluation.left_out, **missing})
    print(evaluation.table())
    samples = {}
    if options.samples:
        samples = scaled(sample_diversity(captions.samples, data.references(), training))
        print(f"{options.samples} samples an image, x100", *rows(samples), sep="\n")
    metrics = {
        **scores_of(evaluation, captions.best),
        "samples": samples,
        **described,
        "data": _described_data(options, config, data),
    }
    print(write_record(folder / "metrics.json", metrics))


def _output_folder(options: Options) -> Path:
    """Where results go: one folder for each way to decode, lest one overwrites another."""
    source = options.subject.resolve()
    beams = f"_beam{options.beam}" if options.beam > 1 else ""
    samples = f"_samples{options.samples}" if options.samples else ""
    name = source.name.removesuffix(".json")
    return options.output or source.with_name(f"{name}_eval_{options.split}{beams}{samples}")


def _matched(file: Path, data: Dataset) -> list[str]:
    """The captions of a results file in the order of the data."""
    references = dict[ImageId, Sequence[str]](zip(data.ids, data.captions, strict=True))
    captions = read_results(file)
    try:
        return match(captions, references)[0]
    except ValueError as error:
        left_out = f"; left out of the data: {_left_out(data)}" if data.rejected else ""
        raise ValueError(f"{file}: {error}{left_out}") from None


def _training(options: Options, config: Config) -> tuple[list[str], dict[str, str]]:
    """The training captions, of which novel captions are none; or why there are none."""
    if options.references or not (options.samples or "health" in options.metrics):
        return [], {}
    if config.data.same_for("train", options.split):
        named = config.data.named(options.split)
        reason = f"{named} is the same for train and {options.split}"
        return [], {"novel": f"no training captions ({reason})"}
    try:
        return load_captions(config.data, "train"), {}
    except (OSError, ValueError) as reason:
        return [], {"novel": f"no training captions ({reason})"}


def _scored(
    options: Options, data: Dataset, captions: Captions, training: Sequence[str]
) -> Evaluation:
    return evaluate(_caption_set(options, data, captions.best, training), options.metrics)


def _caption_set(
    options: Options, data: Dataset, captions: Sequence[str], training: Sequence[str] = ()
) -> CaptionSet:
    wants_images = options.clip is not None
    return CaptionSet(
        captions,
        data.references(),
        images=data.pictures() if wants_images else None,
        training=training,
        clip_folder=options.clip,
        device=_device() if wants_images else "cpu",
    )


def _described_data(options: Options, config: Config, data: Dataset) -> dict[str, Any]:
    given = {"references": str(options.references)} if options.references else {}
    source = given or {"source": config.data.source, "path": config.data.path_of(options.split)}
    return {
        "split": options.split,
        **source,
        "num_images": len(data),
        **({"clip_images": _seen_by_clip(data)} if options.clip else {}),
        "rejected": dict(data.rejected),
        "fingerprint": data.fingerprint(),
    }


def _seen_by_clip(data: Dataset) -> str:
    """What CLIP is given: "original", or the size of the first image where that is all there is."""
    if data.read_original is not None:
        return "original"
    width, height = decode(data.read_image(0)).size
    return f"{width}x{height}"


def _references(options: Options, config: Config, file: Path) -> tuple[Dataset, dict[str, Any]]:
    """The data set that the results of ``file`` are scored against, all of it or the images that
    they caption (``--subset``); and what is to be recorded of that."""
    if options.references:
        data = load_references(options.references, options.split)
    else:
        data = load_split(config.data, options.split)
    _say_data(options, config, data)
    if not options.subset:
        return _at_least_two(data), {}
    part = only(data, read_results(file).keys())
    print(f"of them the {len(part)} that {file} captions (--subset)", flush=True)
    return _at_least_two(part), {"subset": {"images": len(part), "of": len(data)}}


def _say_data(options: Options, config: Config, data: Dataset) -> None:
    """Say what is scored: no score means anything without it."""
    data_path = "" if options.references else config.data.path_of(options.split)
    where = str(options.references or f"{config.data.source} {data_path}".rstrip())
    print(f"data: {where}, split {options.split}, {len(data)} images", flush=True)
    if data.rejected:
        print(f"left out: {_left_out(data)}", flush=True)


def _left_out(data: Dataset) -> str:
    """What the source of the data holds and is not scored, by reason."""
    return ", ".join(
        f"{count} {reason} ({', '.join(data.rejected_names.get(reason, ()))})"
        for reason, count in data.rejected.items()
    )


def _at_least_two(data: Dataset) -> Dataset:
    if len(data) < 2:
        raise ValueError(
            f"{len(data)} image: CIDEr-D counts words over the images that it scores, and over "
            "one it is 0 by definition; evaluate at least 2, better a whole split"
        )
    return data


def _with_backend(config: Config, decoding: Decoding, checkpoint: Path) -> Config:
    """The configuration with the engine that will run, by name, for the record."""
    from rayrl.adapters import base_folder

    asked = config.engine.backend
    if decoding.beams > 1:
        if asked == "vllm":
            raise ValueError(f"--beam {decoding.beams} needs --engine.backend hf, got vllm")
        asked = "hf"
    # Workers see the GPUs that they ask for, and no others.
    gpu = config.rollout.gpus > 0
    backend = chosen_backend(asked, Path(base_folder(checkpoint)), gpu=gpu)
    return config.model_copy(
        update={"engine": config.engine.model_copy(update={"backend": backend})}
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
