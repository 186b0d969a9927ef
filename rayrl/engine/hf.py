"""The transformers engine: slower than vLLM, runs wherever torch runs, and is its oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rayrl.config import Part
from rayrl.engine.base import EngineSetup, Sampling, forced_tokens
from rayrl.engine.copies import sample_copies
from rayrl.engine.draw import Drawn, uniforms
from rayrl.engine.shared import sample_groups
from rayrl.learner.families import refusal
from rayrl.learner.features import FeatureCache, image_key
from rayrl.learner.inputs import InputCache
from rayrl.types import Completion, FloatArray, Prompt, RolloutGroup
from rayrl.vlm import banned_ids, eos_ids, load_processor
from rayrl.weights import Loadable, load_into

# What an engine keeps of prepared pictures, and of the features of a frozen vision tower.
_INPUT_BYTES = 256 * 2**20
_FEATURE_BYTES = 256 * 2**20


class HfEngine:
    """Samples with the learner's own code where its model family can share prompts, else with
    ``generate``.  Starts with random weights at version -1 and refuses to sample until a version
    was loaded."""

    def __init__(self, setup: EngineSetup) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

        from rayrl.windows import use_windowed_attention

        trust = setup.trust_remote_code
        config = AutoConfig.from_pretrained(setup.folder, trust_remote_code=trust)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, setup.config.dtype), trust_remote_code=trust
        )
        use_windowed_attention(self._model)
        self._model.to(self._device).eval()
        if (setup.folder / "generation_config.json").is_file():
            self._model.generation_config = GenerationConfig.from_pretrained(setup.folder)
        self._processor = load_processor(setup.folder, trust_remote_code=trust)
        self._eos = eos_ids(self._model, self._processor)
        self._banned = banned_ids(config, self._processor)
        self._prepared = InputCache(
            self._processor, max_bytes=_INPUT_BYTES, dtype=self._model.dtype
        )
        self._features: FeatureCache | None = None
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

    def load_weights(self, weights: Loadable, *, changed: Sequence[Part]) -> None:
        weights.verify()
        self._version = -1
        if {"vision", "connector"} & set(changed):
            # Features would be stale with the next version, so none are kept.
            self._features = None
        elif self._features is None and refusal(self._model) is None:
            self._features = FeatureCache(_FEATURE_BYTES)
        load_into(self._model, weights)
        self._version = weights.version

    def held(self, weights: Loadable) -> Mapping[str, torch.Tensor]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def sleep(self, level: int) -> None:
        """Weights wait in host memory, whatever the level."""
        self._version = -1
        self._features = None
        self._model.to("cpu")
        torch.cuda.empty_cache()

    def wake_weights(self) -> None:
        self._model.to(self._device)

    def wake_cache(self) -> None:
        """There is none."""

    def _sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        forced: Sequence[Sequence[int]],
    ) -> _Drawn:
        inputs = self._inputs(prompts)
        uniform = None
        if seeds is not None:
            uniform = uniforms(seeds, sampling.group_size, sampling.max_tokens)
        draw: Callable[..., Drawn] = sample_copies if refusal(self._model) else sample_groups
        drawn = draw(
            self._model,
            inputs,
            group_size=sampling.group_size,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            banned_ids=self._banned,
            eos_ids=self._eos,
            uniform=uniform,
            forced=forced,
            **self._known_features(prompts, inputs),
        )
        new_ids = drawn.ids.flatten(0, 1).cpu().numpy().astype(np.int32)
        logprobs = drawn.logprobs.flatten(0, 1).cpu().numpy()
        mask = inputs["attention_mask"].bool().cpu()
        prompt_ids = [
            row[keep].numpy().astype(np.int32)
            for row, keep in zip(inputs["input_ids"].cpu(), mask, strict=True)
        ]
        num_forced = [len(ids) for ids in forced for _ in range(sampling.group_size)]
        return _Drawn(prompt_ids, self._completions(new_ids, logprobs, num_forced))

    def _known_features(self, prompts: Sequence[Prompt], inputs: Any) -> dict[str, Any]:
        """The prompts' image features, where a frozen vision tower lets them be kept."""
        if self._features is None:
            return {}
        keys = [image_key(prompt.image) for prompt in prompts]
        with torch.inference_mode():
            return {"image_features": self._features.features(self._model, inputs, keys)}

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs, where the engine holds weights to read them with."""
        if self._version < 0:
            raise RuntimeError("the engine holds no weights yet: load a version before sampling")
        images, texts = [p.image for p in prompts], [p.text for p in prompts]
        ids = [prompt.prompt_id for prompt in prompts]
        return self._prepared.batch(images, texts, ids).to(self._device)

    def _completions(
        self, ids: np.ndarray, logprobs: np.ndarray, num_forced: Sequence[int]
    ) -> list[Completion]:
        """One completion a row of [R, T], up to and with its first end token."""
        ended = np.isin(ids, self._eos)
        lengths = np.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1]).tolist()
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        texts = self._processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Completion(
                token_ids=row,
                logprobs=scores[: len(row)],
                text=text.strip(),
                finish_reason="stop" if int(row[-1]) in self._eos else "length",
                weight_version=self._version,
                num_forced=given,
            )
            for row, scores, text, given in zip(rows, logprobs, texts, num_forced, strict=True)
        ]


class _Drawn:
    """Prompt ids without padding and the completions, prompt by prompt."""

    def __init__(self, prompt_ids: list[np.ndarray], completions: list[Completion]) -> None:
        self.prompt_ids = prompt_ids
        self.completions = completions
