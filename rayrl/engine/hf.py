"""The transformers engine: slower than vLLM, runs wherever torch runs, and is its oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayrl.config import Part
from rayrl.engine.base import EngineSetup, Sampling, forced_tokens
from rayrl.types import Completion, FloatArray, Prompt, RolloutGroup
from rayrl.vlm import banned_ids, eos_ids, load_processor, prompt_inputs
from rayrl.weights import Weights, load_into


class HfEngine:
    """Samples with ``generate``.  Starts with random weights at version -1 and refuses to sample
    until a version was loaded."""

    def __init__(self, setup: EngineSetup) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

        trust = setup.trust_remote_code
        config = AutoConfig.from_pretrained(setup.folder, trust_remote_code=trust)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, setup.config.dtype), trust_remote_code=trust
        )
        self._model.to(self._device).eval()
        if (setup.folder / "generation_config.json").is_file():
            self._model.generation_config = GenerationConfig.from_pretrained(setup.folder)
        self._processor = load_processor(setup.folder, trust_remote_code=trust)
        self._eos = eos_ids(self._model, self._processor)
        self._banned = banned_ids(config, self._processor)
        self._rows = max(1, setup.config.max_concurrency)
        self._version = -1

    @property
    def weight_version(self) -> int:
        return self._version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[RolloutGroup]:
        groups = []
        beginnings = forced_tokens(forced, prompts, sampling)
        size = max(1, self._rows // sampling.group_size)
        for start in range(0, len(prompts), size):
            part, part_seeds = prompts[start : start + size], seeds[start : start + size]
            drawn = self._sample(part, sampling, part_seeds, beginnings[start : start + size])
            greedy: list[Completion | None] = [None] * len(part)
            if sampling.greedy_baseline:
                greedy = list(self.greedy(part, sampling.max_tokens))
            for i, (prompt, ids) in enumerate(zip(part, drawn.prompt_ids, strict=True)):
                rows = range(i * sampling.group_size, (i + 1) * sampling.group_size)
                groups.append(
                    RolloutGroup(
                        prompt=prompt,
                        prompt_token_ids=ids,
                        completions=tuple(drawn.completions[row] for row in rows),
                        group_size=sampling.group_size,
                        greedy=greedy[i],
                    )
                )
        return groups

    def greedy(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        sampling = Sampling(group_size=1, temperature=1.0, max_tokens=max_tokens)
        completions = []
        for start in range(0, len(prompts), self._rows):
            part = prompts[start : start + self._rows]
            completions += self._sample(part, sampling, None, [[]] * len(part)).completions
        return completions

    def score(self, prompt: Prompt, token_ids: Sequence[int]) -> FloatArray:
        from rayrl.learner.naive import naive_logprobs

        ids = torch.tensor([[list(token_ids)]], device=self._device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.inference_mode():
            logprobs = naive_logprobs(self._model, self._inputs([prompt]), ids, mask)
        return logprobs[0, 0].float().cpu().numpy()

    def beam(self, prompts: Sequence[Prompt], max_tokens: int, num_beams: int) -> list[str]:
        """The best caption of each prompt by beam search, ranked by mean log-prob a token.  For
        evaluation alone: no policy samples like this, so there is no log-prob to train on."""
        captions = []
        size = max(1, self._rows // num_beams)
        for start in range(0, len(prompts), size):
            inputs = self._inputs(prompts[start : start + size])
            with torch.inference_mode():
                sequences = self._model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=num_beams,
                    max_new_tokens=max_tokens,
                    eos_token_id=list(self._eos),
                    pad_token_id=self._eos[0],
                    suppress_tokens=list(self._banned),
                )
            new_ids = sequences[:, inputs["input_ids"].shape[1] :]
            texts = self._processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
            captions += [text.strip() for text in texts]
        return captions

    def load_weights(self, weights: Weights, *, changed: Sequence[Part]) -> None:
        weights.verify()
        self._version = -1
        load_into(self._model, weights)
        self._version = weights.version

    def _sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        forced: Sequence[Sequence[int]],
    ) -> _Drawn:
        from transformers import LogitsProcessorList

        inputs = self._inputs(prompts)
        rows = [ids for ids in forced for _ in range(sampling.group_size)]
        chooser = _Chooser(
            forced=rows,
            banned=self._banned,
            temperature=sampling.temperature,
            generators=None
            if seeds is None
            else [
                torch.Generator().manual_seed(seed + i)
                for seed in seeds
                for i in range(sampling.group_size)
            ],
        )
        with torch.inference_mode():
            sequences = self._model.generate(
                **inputs,
                # The chooser leaves one finite score a row, so that sampling is its choice.
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=sampling.group_size,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=list(self._eos),
                pad_token_id=self._eos[0],
                logits_processor=LogitsProcessorList([chooser]),
            )
        width = inputs["input_ids"].shape[1]
        new_ids = sequences[:, width:].cpu().numpy().astype(np.int32)
        logprobs = torch.stack(chooser.logprobs, dim=1).numpy()
        completions = [
            self._completion(ids, row, len(given))
            for ids, row, given in zip(new_ids, logprobs, rows, strict=True)
        ]
        mask = inputs["attention_mask"].bool().cpu()
        ids = inputs["input_ids"].cpu()
        prompt_ids = [
            row[keep].numpy().astype(np.int32) for row, keep in zip(ids, mask, strict=True)
        ]
        return _Drawn(prompt_ids, completions)

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs, where the engine holds weights to read them with."""
        if self._version < 0:
            raise RuntimeError("the engine holds no weights yet: load a version before sampling")
        inputs = prompt_inputs(
            self._processor, [p.image for p in prompts], [p.text for p in prompts]
        ).to(self._device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return inputs

    def _completion(self, ids: np.ndarray, logprobs: np.ndarray, num_forced: int) -> Completion:
        ends = np.flatnonzero(np.isin(ids, self._eos))
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        text = self._processor.tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True)
        return Completion(
            token_ids=ids[:length],
            logprobs=logprobs[:length],
            text=text.strip(),
            finish_reason="stop" if len(ends) else "length",
            weight_version=self._version,
            num_forced=num_forced,
        )


class _Drawn:
    """Prompt ids without padding and the completions, prompt by prompt."""

    def __init__(self, prompt_ids: list[np.ndarray], completions: list[Completion]) -> None:
        self.prompt_ids = prompt_ids
        self.completions = completions


class _Chooser:
    """A logits processor that draws each row's token from that row's own generator (or takes the
    arg-max), records its log-prob, and leaves only that token finite.  A row's first tokens may be
    given; they are certain, so their log-prob is 0.

    ``generate`` itself draws all rows from one stream, which would make a group depend on what
    else is in the batch.  Drawing is Gumbel-max on temperature-scaled log-probs.
    """

    def __init__(
        self,
        *,
        forced: Sequence[Sequence[int]],
        banned: Sequence[int],
        temperature: float,
        generators: list[torch.Generator] | None,
    ) -> None:
        self._forced = forced
        self._banned = list(banned)
        self._temperature = temperature
        self._generators = generators
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float() / self._temperature
        logits[:, self._banned] = -torch.inf
        logprobs = logits.log_softmax(-1)
        chosen = self._choose(logprobs)
        picked = logprobs.gather(1, chosen[:, None])[:, 0].cpu()
        step = len(self.logprobs)
        for row, ids in enumerate(self._forced):
            if step < len(ids):
                chosen[row], picked[row] = ids[step], 0.0
        self.logprobs.append(picked)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _choose(self, logprobs: torch.Tensor) -> torch.Tensor:
        if self._generators is None:
            return logprobs.argmax(-1)
        uniform: list[Any] = [
            torch.rand(logprobs.shape[1], generator=generator, dtype=torch.float64)
            for generator in self._generators
        ]
        noise = -torch.log(-torch.log(torch.stack(uniform).clamp(1e-300, 1 - 1e-16)))
        return (logprobs.double().cpu() + noise).argmax(-1).to(logprobs.device)
