"""Whole steps of TRL's GRPOTrainer on the same job.  Run by bench_against_trl.py.

Settings are those under which TRL is fastest here: no gradient checkpointing, float32 as the peer,
one generation batch an update (so that no old log-probs are computed), all captions of a step at
once, no logging.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from grpo_case import (
    MAX_TOKENS,
    Case,
    Seconds,
    answer,
    data,
    load_case,
    open_channel,
    prompts_of,
    report,
    say_ready,
    wait_for_request,
)
from grpo_case import reward as reward_of
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rayrl.rewards.build import build_terms
from rayrl.rewards.term import Item
from rayrl.types import Prompt
from rayrl.vlm import banned_ids, choose_trainable, load_captioner

STEPS = 10_000


def dataset(case: Case) -> Dataset:
    """The same pictures and captions in TRL's columns; pictures are decoded when they are used."""
    prompts = prompts_of(case, data(case))
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt.text}] for prompt in prompts],
            "image": [{"bytes": prompt.image, "path": None} for prompt in prompts],
            "prompt_id": [prompt.prompt_id for prompt in prompts],
            "references": [list(prompt.references) for prompt in prompts],
        },
        features=Features(
            {
                "prompt": List(message),
                "image": Image(),
                "prompt_id": Value("string"),
                "references": List(Value("string")),
            }
        ),
    )


class Reward:
    """rayrl's scorer as a reward function of TRL's; keeps what the last step's report says."""

    __name__ = "cider_d"

    def __init__(self, case: Case, eos_ids: tuple[int, ...]) -> None:
        config, statistics = reward_of(data(case))
        self._terms, self._weights = build_terms(config, statistics), config.terms
        self._group, self._eos = case.group_size, set(eos_ids)
        self.rewards: list[float] = []
        self.tokens = 0

    def __call__(
        self,
        prompts: Any,
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        prompt_id: list[str],
        references: list[list[str]],
        **_: Any,
    ) -> list[float]:
        items = []
        for start in range(0, len(completions), self._group):
            part = slice(start, start + self._group)
            items.append(
                Item(
                    prompt=Prompt(
                        prompt_id=prompt_id[start],
                        image=b"-",
                        text="-",
                        references=tuple(references[start]),
                    ),
                    captions=tuple(message[-1]["content"] for message in completions[part]),
                    finished=tuple(ids[-1] in self._eos for ids in completion_ids[part]),
                )
            )
        total = [0.0] * len(completions)
        for name, term in self._terms.items():
            scores = [float(value) for item in term.score(items) for value in item]  # type: ignore[union-attr]
            total = [a + self._weights[name].weight * b for a, b in zip(total, scores, strict=True)]
        self.rewards, self.tokens = total, sum(len(ids) for ids in completion_ids)
        return total


class OnRequest(TrainerCallback):
    """Holds the trainer before every step until the step is asked for, and reports it after."""

    def __init__(self, channel: Any, reward: Reward) -> None:
        self._channel, self._reward = channel, reward
        self.seconds, self._started = Seconds(), 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        say_ready(self._channel)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not wait_for_request():
            raise SystemExit(0)
        self.seconds.by_phase.clear()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        spent = time.perf_counter() - self._started
        phases = self.seconds.by_phase
        phases["update"] = spent - sum(phases.values())
        result = report(self.seconds, self._reward.tokens, self._reward.rewards)
        answer(self._channel, {"seconds": spent, **result})


def settings(case: Case, folder: str, banned: tuple[int, ...]) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=case.captions_per_step,
        gradient_accumulation_steps=1,
        num_generations=case.group_size,
        num_iterations=1,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        beta=case.kl_coef,
        loss_type="grpo",
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=STEPS,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=case.seed,
        generation_kwargs={"suppress_tokens": list(banned)},
    )


def timed(phase: Callable[..., Any], seconds: Seconds, name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with seconds(name):
            return phase(*args, **kwargs)

    return run


def main(text: str) -> None:
    channel = open_channel()
    case = load_case(text)
    captioner = load_captioner(case.folder)
    reward = Reward(case, captioner.eos_ids)
    on_request = OnRequest(channel, reward)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=case.folder,
            reward_funcs=reward,
            args=settings(case, folder, banned_ids(captioner.model.config, captioner.processor)),
            train_dataset=dataset(case),
            processing_class=captioner.processor,
            callbacks=[on_request],
        )
        trainer._generate = timed(trainer._generate, on_request.seconds, "sampling")
        trainer._calculate_rewards = timed(trainer._calculate_rewards, on_request.seconds, "reward")
        choose_trainable(trainer.model, case.trainable)
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
