"""Write docs/results.md from benchmarks/results/*.json.

    .venv/bin/python benchmarks/write_results.py

Of each benchmark the newest result on each machine is shown; what has none is named as not
measured.  A test compares the page with what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import result_tables
from record import RESULTS, ROOT

PAGE = ROOT / "docs" / "results.md"
INTRODUCTION = """# Results

What has been measured, each table with the command that made it, its date and its machine; the
JSON files hold every round. A speed is a ratio to a peer that ran in the same run, taking turns;
medians count. This page is written by `python benchmarks/write_results.py`.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark: files ``<name>[-_]*.json``, and what its numbers say."""

    name: str
    title: str
    text: str
    lines: Callable[[result_tables.Result], list[str]]


SECTIONS = (
    Section(
        "default-run",
        "Does the objective pay?",
        "The default job (generated pictures, the tiny captioner) against a control that continues "
        "cross-entropy for as long as the objective trained.",
        result_tables.default_run,
    ),
    Section(
        "flickr8k-tiny",
        "Real photographs",
        "Flickr8k with a captioner of 2.1 M parameters that is trained from nothing.",
        result_tables.flickr8k_tiny,
    ),
    Section(
        "learner",
        "The learner's update: sharing the prefix",
        "Forward, backward and AdamW on P images with G captions of 20 tokens; random weights. "
        "Plain transformers makes G copies of image and prompt and the logits of every position; "
        "the naive way, the oracle, makes those of the captions alone. "
        "Every gradient was compared with the naive one in the same run. Utilisation is counted "
        "FLOPs over the time and over a large matrix product in the same rounds.",
        result_tables.learner,
    ),
    Section(
        "against-trl",
        "Whole steps against TRL",
        "Sampling, reward, update, and for rayrl the weights' way back to the engine: the same "
        "model, pictures, reward, group size and optimizer, without Ray, all cores each in turn. "
        "On a CPU TRL samples with transformers' `generate`; `rayrl, hf` runs transformers after "
        "prompts that are computed once, `rayrl, vllm` is what runs use; with staleness 1 it "
        "samples the next step while the learner updates.",
        result_tables.against_trl,
    ),
    Section(
        "rewards",
        "CIDEr-D",
        "Scores equal pycocoevalcap's; several captions of each image, as in training.",
        result_tables.rewards,
    ),
    Section(
        "reward-step",
        "Rewards in a step",
        "Seconds by which the driver waits for each phase of the main job on this machine, CIDEr-D "
        "alone.",
        result_tables.reward_step,
    ),
    Section(
        "fleet",
        "The driver under load",
        "A whole job whose engines only take their time and whose learner takes none. All workers "
        "share the cores of one machine, so what lies beyond the ideal is an upper bound. Bare Ray "
        "is a loop that makes the same calls and does nothing else, in the same run.",
        result_tables.fleet,
    ),
    Section(
        "threads",
        "Several workers on the same cores",
        "A learner's update, forward and backward, alone and beside another one, by how PyTorch's "
        "threads wait for each other: awake for milliseconds, or for microseconds and then asleep.",
        result_tables.threads,
    ),
    Section(
        "sync",
        "A weight sync on one node",
        "Packing, publication and loading through the object store, by engines that hold no model; "
        "beside as many plain copies of the same bytes by one thread.",
        result_tables.sync,
    ),
    Section(
        "fault-campaign",
        "Faults",
        "At random moments of whole runs. A run is well when it did all its steps, trained on the "
        "groups of an undisturbed run, each once and in its order, dropped none, logged every step "
        "once and ended with the same weights bit for bit (not compared where an asynchronous run "
        "was resumed, whose first batches are sampled with newer weights). Engines and the "
        "learner's arithmetic are fakes that take milliseconds, save in the rows that say vLLM.",
        result_tables.fault_campaign,
    ),
)


def newest(name: str, folder: Path) -> list[Path]:
    """The newest file of a benchmark on each machine."""
    by_machine: dict[str, Path] = {}
    pattern = re.compile(rf"{name}[-_](.*)\.json")
    day = re.compile(r"\d{4}-\d{2}-\d{2}")
    for file in sorted(folder.glob("*.json"), key=lambda file: day.findall(file.name)[-1:]):
        match = pattern.fullmatch(file.name)
        if match:
            by_machine[day.sub("", match[1]).strip("-_")] = file
    return list(by_machine.values())


def section(part: Section, folder: Path) -> list[str]:
    lines = ["", f"## {part.title}", "", part.text]
    files = newest(part.name, folder)
    results = [json.loads(file.read_text()) for file in files]
    on_gpu = any("gpu" in result["hardware"] for result in results)
    for file, result in zip(files, results, strict=True):
        if on_gpu and "cases" in result:  # rows that wanted a GPU have been measured on one
            result["cases"] = [case for case in result["cases"] if "not_measured" not in case]
        link = f"[{file.name}](../benchmarks/results/{file.name})"
        machine = describe(result["hardware"])
        lines += ["", f"{machine}, {result['date']}, `{result['command']}`, {link}", ""]
        lines += part.lines(result) + result_tables.promised(result)
    if not files:
        script = f"benchmarks/bench_{part.name.replace('-', '_')}.py"
        lines += ["", f"Not measured yet: `python {script}`."]
    return lines


def describe(hardware: str | dict[str, object]) -> str:
    """One phrase for a machine."""
    if isinstance(hardware, str):
        return hardware
    if "gpu" in hardware:
        return str(hardware["gpu"])
    return f"{hardware['cores']} x {hardware.get('processor') or hardware.get('device')}"


def page(folder: Path = RESULTS) -> str:
    """The whole page."""
    lines = [line for part in SECTIONS for line in section(part, folder)]
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
