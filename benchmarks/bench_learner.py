"""The learner's update, naive against prefix-shared: time, peak memory, utilisation.

    .venv/bin/python benchmarks/bench_learner.py            # this machine; over ten minutes
    .venv/bin/python benchmarks/bench_learner.py --small    # every row in little; a minute or two
    PYTHONPATH=. python benchmarks/bench_learner.py --suites gpu --limit-tflops 790   # an H200

The last one needs torch and transformers alone.

An update is forward, backward and the learner's step (clipping, AdamW, on float32 masters where the
model is in bfloat16) on P images with G captions of 20 tokens each.  Weights,
pictures and captions are random and share no words, the worst case for sharing.  The methods of a
row run in turn, round after round, and their median counts; the first pass of each, before the
rounds, gives FLOPs, memory and the gradient, which must be the naive one's.  What does not fit a
GPU at once runs in micro-batches, halved until they do.  In a run an update follows another one,
and not what uses ten times its memory and gives that back to the system: in a round each method
runs twice in a row, and the second time counts, unless it takes so long that this hardly shows.

``plain transformers`` is what a short script does: G copies of image and prompt, and the logits of
every position.  ``naive`` (``naive_logprobs``, the oracle) makes those of the captions alone.

``predicted`` is the ratio of the counted FLOPs; ``utilisation`` is counted FLOPs over the time and
over the limit: what a large matrix product reaches in the same rounds, for a shared machine is not
as fast in every minute, or ``--limit-tflops``.
``useful_utilisation`` counts what the update needs and no copies nor repetitions of it
(``rayrl/learner/flops.py``): the limit's share of the time that the update took.  Rows that
want a GPU are written down as not measured where there is none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import promises
import torch
from learner_cost import LargeProduct, counted, distance, timed
from learner_models import IMAGE, MODELS, SMALL
from learner_rows import SUITES, Row
from learner_step import Step
from record import RESULTS, write
from torch import Tensor
from transformers import AutoModelForImageTextToText

from rayrl.learner.families import FAMILIES
from rayrl.learner.features import FeatureCache
from rayrl.learner.flops import FlopCounter
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from rayrl.windows import use_windowed_attention

TEXT_TOKENS, CAPTION_TOKENS = 12, 20
ONCE_SECONDS = 5.0
"""A method that takes longer runs once a round."""
# Relative distance of the whole gradient from the naive one.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

PLAIN = "plain transformers"
CACHED = "shared, features cached"

Batch = tuple[Mapping[str, Tensor], Tensor]
Method = Callable[[Any, Mapping[str, Tensor], Tensor], Tensor]


def methods(row: Row, model: Any, batch: Batch) -> dict[str, Method]:
    """What is compared: (model, inputs of P prompts, caption ids [P, G, T]) to log-probs."""

    def naive(model: Any, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        return naive_outputs(model, inputs, ids, torch.ones_like(ids).bool()).logprobs

    def shared(model: Any, inputs: Mapping[str, Tensor], ids: Tensor, **options: Any) -> Tensor:
        mask = torch.ones_like(ids).bool()
        return prefix_shared_outputs(model, inputs, ids, mask, **options).logprobs

    table: dict[str, Method] = {"naive": naive, "shared": shared}
    if row.plain:
        table[PLAIN] = plain
    if row.gpu:  # with a vocabulary of a thousand words there is nothing to save
        table["shared, all logits at once"] = partial(shared, chunk_bytes=2**62)
    if row.frozen_vision:
        cache = FeatureCache(2**30)
        cache.features(model, batch[0], image_names(model, batch[0]))

        def cached(model: Any, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
            features = cache.features(model, inputs, image_names(model, inputs))
            return shared(model, inputs, ids, image_features=features)

        table[CACHED] = cached
    return table


def plain(model: Any, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Log-probs [P, G, T] of captions without padding, the model called as its users call it and
    its vision tower as transformers has it."""
    p, g, t = ids.shape
    family = FAMILIES[model.config.model_type]
    rows = family.take_images(inputs, family.image_inputs, [i for i in range(p) for _ in range(g)])
    for name, value in inputs.items():
        if name not in family.image_inputs:
            tail = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            added = tail.get(name, torch.zeros_like(ids)).flatten(0, 1).to(value.dtype)
            rows[name] = torch.cat([value.repeat_interleave(g, 0), added], 1)
    vision = model.config.vision_config
    rayrls, vision._attn_implementation = vision._attn_implementation, "sdpa"
    logits = model(**rows, use_cache=False).logits[:, -t - 1 : -1]
    vision._attn_implementation = rayrls
    return logits.float().log_softmax(-1).view(p, g, t, -1).gather(-1, ids[..., None])[..., 0]


def image_names(model: Any, inputs: Mapping[str, Tensor]) -> list[bytes]:
    """A key for each prompt's picture: a few of its random pixels."""
    pictures = [take(model, inputs, p, p + 1) for p in range(len(inputs["input_ids"]))]
    return [p["pixel_values"].flatten()[:8].float().cpu().numpy().tobytes() for p in pictures]


def take(model: Any, inputs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The inputs of some of the prompts."""
    family, chosen = FAMILIES[model.config.model_type], list(range(start, stop))
    text = {k: v[start:stop] for k, v in inputs.items() if k not in family.image_inputs}
    return {**text, **family.take_images(inputs, family.image_inputs, chosen)}


def make_model(row: Row, device: str, *, small: bool) -> tuple[Any, Callable[[int], Any]]:
    """A model with random weights, and the function that gives P pictures."""
    torch.manual_seed(0)
    config, images = (SMALL if small else MODELS)[row.model](row.image_tokens)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, row.dtype))
    use_windowed_attention(model)
    for name, parameter in model.named_parameters():
        vision = any(part in name for part in ("vision", "visual", "connector"))
        parameter.requires_grad_(not (vision and row.frozen_vision))
    return model.eval(), images


def make_batch(row: Row, model: Any, images: Any, device: str, prompts: int) -> Batch:
    """Inputs of P prompts and caption ids [P, G, T], on the device."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(8, vocabulary, (prompts, row.image_tokens + TEXT_TOKENS))
    ids[:, 2 : 2 + row.image_tokens] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(prompts)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    captions = torch.randint(8, vocabulary, (prompts, row.group_size, CAPTION_TOKENS))
    return {key: value.to(device) for key, value in inputs.items()}, captions.to(device)


def backward(
    method: Method,
    model: Any,
    batch: Batch,
    at_once: int,
    collect: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-probs [P, G, T] and the gradient of their mean, ``at_once`` captions at a time: whole
    groups, or parts of one group, each followed by ``collect``."""
    inputs, ids = batch
    prompts, group, _ = ids.shape
    images, captions = max(1, at_once // group), min(group, at_once)
    parts = []
    for p in range(0, prompts, images):
        here = take(model, inputs, p, p + images)
        for g in range(0, group, captions):
            logprobs = method(model, here, ids[p : p + images, g : g + captions])
            (logprobs.sum() / ids.numel()).backward()
            collect()
            parts.append(logprobs.detach().flatten())
    return torch.cat(parts)


def first_pass(
    method: Method, model: Any, batch: Batch, device: str
) -> tuple[dict[str, Any], Tensor, dict[str, Tensor]]:
    """Cost, log-probs and gradient by name, at once or in the largest micro-batches that fit."""
    at_once = batch[1].shape[0] * batch[1].shape[1]
    while True:
        model.zero_grad(set_to_none=True)
        try:
            with counted(device) as cost:
                logprobs = backward(method, model, batch, at_once)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        else:
            break
        # Out here the failed pass's tensors are gone.
        torch.cuda.empty_cache()
        at_once //= 2
    named = model.named_parameters()
    gradient = {name: p.grad for name, p in named if p.grad is not None}
    return {"captions_at_once": at_once, **asdict(cost)}, logprobs, gradient


def first_passes(
    row: Row, table: Mapping[str, Method], model: Any, batch: Batch, device: str
) -> dict[str, dict[str, Any]]:
    """One entry a method: what it costs, and that it computes what the naive one does.

    Raises ValueError where a gradient is not the naive one."""
    entries: dict[str, dict[str, Any]] = {}
    reference: tuple[Tensor, dict[str, Tensor]] | None = None
    for label, method in table.items():
        entry, logprobs, gradient = first_pass(method, model, batch, device)
        reference = reference or (logprobs, gradient)
        entry["max_logprob_difference"] = float((logprobs - reference[0]).abs().max())
        entry["gradient_difference"] = distance(gradient, reference[1])
        if not entry["gradient_difference"] < TOLERANCE[row.dtype]:
            raise ValueError(
                f"{row}: gradient of {label!r} differs from the naive one by "
                f"{entry['gradient_difference']:.1e}, want less than {TOLERANCE[row.dtype]}"
            )
        entries[label] = entry
    model.zero_grad(set_to_none=True)
    return entries


def useful_flops(model: Any, batch: Batch, label: str) -> float:
    """What an update must compute, every image and every prompt once."""
    inputs, ids = batch
    encoded = 0.0 if label == CACHED else 1.0
    everything = torch.ones_like(ids).bool()
    return FlopCounter(model).count(inputs, everything, backward=True, encoded=encoded)


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the first passes, then rounds in which every method runs once, and the matrix
    product that is the limit."""
    model, images = make_model(row, args.device, small=args.small)
    naive_tokens = row.group_size * (row.image_tokens + TEXT_TOKENS + CAPTION_TOKENS)
    room = row.prompts if row.gpu else args.tokens_at_once // naive_tokens
    batch = make_batch(row, model, images, args.device, max(1, min(row.prompts, room)))
    table = methods(row, model, batch)
    step = Step(model)
    entries = first_passes(row, table, model, batch, args.device)
    product = LargeProduct(args.device, model.dtype)
    timed(product, args.device)

    def update(label: str, method: Method) -> None:
        backward(method, model, batch, entries[label]["captions_at_once"], step.collect)
        step.take()

    products: list[float] = []
    seconds: dict[str, list[float]] = {label: [] for label in table}
    started = time.perf_counter()
    for done in range(args.rounds):
        if done >= 2 and time.perf_counter() - started > args.seconds:
            break
        for label, method in table.items():
            once = partial(update, label, method)
            first = timed(once, args.device)
            seconds[label].append(timed(once, args.device) if first < ONCE_SECONDS else first)
        products += [timed(product, args.device) for _ in range(3)]
    limit = (args.limit_tflops or product.flops / statistics.median(products) / 1e12) * 1e12
    naive = statistics.median(seconds["naive"])
    for label, entry in entries.items():
        if PLAIN in seconds:
            entry["times_plain"] = statistics.median(seconds[PLAIN]) / statistics.median(
                seconds[label]
            )
        median = statistics.median(seconds[label])
        entry |= {"seconds": median, "all_seconds": seconds[label]}
        entry["speedup"] = naive / median
        entry["predicted"] = entries["naive"]["flops"] / entry["flops"]
        entry["tflops"] = entry["flops"] / median / 1e12
        entry["utilisation"] = entry["flops"] / median / limit
        entry["useful_flops"] = useful_flops(model, batch, label)
        entry["useful_utilisation"] = entry["useful_flops"] / median / limit
    parameters = sum(p.numel() for p in model.parameters())
    sizes = {"parameters": parameters, "prompts": len(batch[1]), "limit_tflops": limit / 1e12}
    return {**asdict(row), **sizes, "methods": entries}


def show(case: dict[str, Any]) -> None:
    frozen = "vision frozen" if case["frozen_vision"] else "all trained"
    print(
        f"{case['model']} ({frozen})  {case['image_tokens']} image tokens  "
        f"G = {case['group_size']}  P = {case.get('prompts')}"
    )
    for label, entry in case.get("methods", {}).items():
        print(
            f"  {label:27} {entry['seconds'] * 1e3:8.1f} ms  x{entry['speedup']:5.2f} "
            f"(FLOPs x{entry['predicted']:5.2f})  {entry['peak_bytes'] / 2**20:7.0f} MiB  "
            f"{entry['utilisation']:5.1%} of the limit, {entry['useful_utilisation']:5.1%} useful  "
            f"gradient differs by {entry['gradient_difference']:.0e}",
            flush=True,
        )
    if "not_measured" in case:
        print(f"  not measured: {case['not_measured']}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only rows of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a row's rounds after two")
    parser.add_argument(
        "--tokens-at-once", type=int, default=36864, help="bounds P on CPU, by the naive way's rows"
    )
    parser.add_argument("--limit-tflops", type=float, help="the physical limit, where known")
    parser.add_argument("--small", action="store_true", help="every row in little; writes nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the JSON file, by default {RESULTS}")
    return parser.parse_args(argv)


def rows_of(args: argparse.Namespace) -> list[Row]:
    rows = [row for suite in args.suites for row in SUITES[suite]]
    rows = [row for row in rows if not args.models or row.model in args.models]
    if not args.small:
        return rows
    args.rounds = 2
    little = [
        replace(row, image_tokens=min(row.image_tokens, 64), group_size=4, prompts=2)
        for row in rows
    ]
    return list(dict.fromkeys(little))


def main(argv: list[str]) -> None:
    args = parse(argv)
    cases: list[dict[str, Any]] = []
    for row in rows_of(args):
        if row.gpu and args.device != "cuda" and not args.small:
            cases.append({**asdict(row), "not_measured": "no CUDA device at hand"})
        else:
            try:
                cases.append(measure(row, args))
            except torch.OutOfMemoryError:
                cases.append({**asdict(row), "not_measured": "out of memory"})
        show(cases[-1])
    if not args.small or args.out:
        result = {"device": args.device, "promised": promises.of_updates(cases), "cases": cases}
        packages = ("torch", "transformers")
        write("learner", argv, result, packages=packages, folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
