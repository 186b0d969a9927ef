"""Naive against prefix-shared log-probs: time, peak memory and utilisation of forward + backward.

    python benchmarks/bench_learner.py --small            # seconds on a laptop
    python benchmarks/bench_learner.py                    # the whole grid on this machine
    python benchmarks/bench_learner.py --device cuda --dtype bfloat16 \
        --models smolvlm-256m smolvlm-500m qwen2.5-vl-3b --groups 16 --prompts 8

Weights and pictures are random, captions have ``--tokens`` tokens and share no words, which is the
worst case for the tree.  All methods of a case run in turn, ``--repeats`` times; the median counts.
``predicted`` is the ratio of counted FLOPs (attention counted dense), ``utilisation`` the counted
FLOPs over the time and over what a large matrix product reaches on this device and type.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from learner_models import IMAGE, MODELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoModelForImageTextToText

from rayrl.learner.features import FeatureCache
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs

TEXT_TOKENS = 12


Method = Callable[..., Any]


def methods(frozen: bool, cache: FeatureCache) -> dict[str, Method]:
    """Each takes (model, prompt_inputs, ids, mask) and returns a LogprobOutput."""

    def cached(model: Any, inputs: Any, ids: Tensor, mask: Tensor) -> Any:
        keys = [str(p).encode() for p in range(len(ids))]
        features = cache.features(model, inputs, keys)
        return prefix_shared_outputs(model, inputs, ids, mask, image_features=features)

    def whole(model: Any, inputs: Any, ids: Tensor, mask: Tensor) -> Any:
        return prefix_shared_outputs(model, inputs, ids, mask, chunk_bytes=2**62)

    table: dict[str, Method] = {
        "naive": naive_outputs,
        "shared": prefix_shared_outputs,
        "shared, all logits at once": whole,
    }
    return {**table, "shared, features cached": cached} if frozen else table


def make_case(args: argparse.Namespace, name: str, tokens: int, group: int) -> tuple[Any, tuple]:
    """A model with random weights and a batch of groups, on the device."""
    torch.manual_seed(args.seed)
    config, images = MODELS[name](tokens)
    with torch.device(args.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, args.dtype))
    for parameter_name, parameter in model.named_parameters():
        vision = any(part in parameter_name for part in ("vision", "visual", "connector"))
        parameter.requires_grad_(not (vision and args.frozen_vision))
    p, t = args.prompts, args.tokens
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(8, vocabulary, (p, tokens + TEXT_TOKENS))
    ids[:, 2 : 2 + tokens] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(p)}
    inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if "image_grid_thw" not in inputs:
        del inputs["mm_token_type_ids"]
    inputs = {key: value.to(args.device) for key, value in inputs.items()}
    completions = torch.randint(8, vocabulary, (p, group, t))
    return model.eval(), (inputs, completions, torch.ones_like(completions, dtype=torch.bool))


def update(method: Method, model: Any, batch: tuple) -> tuple[float, Tensor]:
    """Seconds of forward + backward, and the log-probs."""
    model.zero_grad(set_to_none=True)
    synchronize()
    start = time.perf_counter()
    logprobs = method(model, *batch).logprobs
    logprobs.mean().backward()
    synchronize()
    return time.perf_counter() - start, logprobs.detach()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory(TorchDispatchMode):
    """Most bytes at once in tensors made inside, counted by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for storage in _storages((args, kwargs)):  # what exists already is not counted
            self._watch(storage, 0)
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._watch(storage, storage.nbytes())
        return out

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def first_run(method: Method, model: Any, batch: tuple, device: str) -> dict[str, Any]:
    """Counted FLOPs, peak memory beyond what was in use before, log-probs; and warm caches."""
    aten = torch.ops.aten
    cpu_attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        update(method, model, batch)
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprobs = update(method, model, batch)[1]
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with PeakMemory() as memory:
            logprobs = update(method, model, batch)[1]
        peak = memory.peak
    return {"flops": counter.get_total_flops(), "peak_bytes": peak, "logprobs": logprobs}


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the most that this device gives in this type."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def measure(args: argparse.Namespace, name: str, tokens: int, group: int, limit: float) -> dict:
    """One case: every method in turn, ``repeats`` times."""
    model, batch = make_case(args, name, tokens, group)
    table = methods(args.frozen_vision, FeatureCache(2**30))
    seconds: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for label, method in list(table.items()):
        try:
            rows[label] = first_run(method, model, batch, args.device)
        except torch.OutOfMemoryError:
            rows[label] = {"seconds": None, "note": "out of memory"}
            del table[label]
            torch.cuda.empty_cache()
    for _ in range(args.repeats):
        for label, method in table.items():
            seconds.setdefault(label, []).append(update(method, model, batch)[0])
    naive = rows["naive"]
    for label, values in seconds.items():
        row, median = rows[label], statistics.median(values)
        row |= {"seconds": median, "all_seconds": values}
        row["utilisation"] = row["flops"] / median / limit
        if "flops" in naive:
            row["speedup"] = statistics.median(seconds["naive"]) / median
            row["predicted"] = naive["flops"] / row["flops"]
            row["max_difference"] = float((row["logprobs"] - naive["logprobs"]).abs().max())
    for row in rows.values():
        row.pop("logprobs", None)
    parameters = sum(p.numel() for p in model.parameters())
    case = {"model": name, "parameters": parameters, "image_tokens": tokens, "group_size": group}
    return {**case, "methods": rows}


def show(case: dict) -> None:
    print(f"{case['model']}  {case['image_tokens']} image tokens  G = {case['group_size']}")
    for label, row in case["methods"].items():
        if row["seconds"] is None:
            print(f"  {label:27} {row['note']}")
            continue
        print(
            f"  {label:27} {row['seconds'] * 1e3:8.1f} ms  x{row.get('speedup', 0):5.2f} "
            f"(FLOPs x{row.get('predicted', 0):5.2f})  {row['peak_bytes'] / 2**20:6.0f} MiB  "
            f"{row['utilisation']:5.1%} of a matrix product  "
            f"difference {row.get('max_difference', float('nan')):.1e}",
            flush=True,
        )


def hardware(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    cpu = Path("/proc/cpuinfo")
    if device == "cpu" and cpu.exists():
        models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--models", nargs="+", default=["tiny-2.5m"], choices=list(MODELS))
    parser.add_argument("--image-tokens", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--groups", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--prompts", type=int, default=4, help="images of an update")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a caption")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frozen-vision", action="store_true", help="and cache its features")
    parser.add_argument("--small", action="store_true", help="two cases, for a quick look")
    parser.add_argument("--out", type=Path, help="write a JSON file into this folder")
    args = parser.parse_args(argv)
    if args.small:
        args.image_tokens, args.groups, args.repeats = [16, 64], [8], 3
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    limit = matmul_flops(args.device, getattr(torch, args.dtype))
    machine = hardware(args.device)
    print(f"{machine['device']}: {limit / 1e12:.2f} TFLOP/s in a {args.dtype} matrix product")
    cases = []
    for name in args.models:
        for tokens in args.image_tokens:
            for group in args.groups:
                cases.append(measure(args, name, tokens, group, limit))
                show(cases[-1])
    if args.out:
        result = {
            "command": "python benchmarks/bench_learner.py " + " ".join(argv),
            "date": date.today().isoformat(),
            "hardware": {**machine, "matmul_flops": limit},
            "torch": torch.__version__,
            "cases": cases,
        }
        slug = "-".join("".join(c if c.isalnum() else " " for c in machine["device"]).split())
        file = args.out / f"learner_{slug.lower()}_{result['date']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
