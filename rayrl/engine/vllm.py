"""The vLLM engine: one in-process ``LLM``, tensor parallelism 1, weights pulled by version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rayrl.checkpoint_names import Renamed, checkpoint_names
from rayrl.config import Part
from rayrl.engine.base import EngineSetup, Sampling, forced_tokens
from rayrl.engine.vllm_process import TRANSFER_BACKEND, import_vllm, silence_thread_warnings
from rayrl.prompt_length import check_length
from rayrl.readback import parts_of_fused
from rayrl.types import Completion, FloatArray, Prompt, RolloutGroup
from rayrl.vlm import (
    adds_special_tokens,
    banned_ids,
    decode_image,
    load_processor,
    prompt_text,
)
from rayrl.weights import Loadable

# The learner masks banned tokens outright; after softmax a bias of -100 is the same to 1e-40.
_BAN_BIAS = -100.0
# vLLM puts the image before the prompt itself for these families' processors, and so must be given
# what follows it.
_WITHOUT_PLACEHOLDER = {"Blip2Processor": "{}", "PaliGemmaProcessor": "{}\n"}
# Log-probs of the sampled tokens alone, and no text: vLLM would decode token by token, twice.
_OUTPUT = {"logprobs": 0, "flat_logprobs": True, "detokenize": False}


class VllmEngine:
    """Samples groups with vLLM.  Starts with random weights at version -1 and refuses to sample
    until a version was loaded."""

    def __init__(self, setup: EngineSetup) -> None:
        llm_class, self._sampling_params = import_vllm()
        from transformers import AutoConfig
        from vllm.config import WeightTransferConfig

        config = setup.config
        self._version = -1
        self._longest = config.max_model_len
        self._processor = load_processor(setup.folder, trust_remote_code=setup.trust_remote_code)
        model_config = AutoConfig.from_pretrained(
            setup.folder, trust_remote_code=setup.trust_remote_code
        )
        self._bias = dict.fromkeys(banned_ids(model_config, self._processor), _BAN_BIAS)
        self._llm = llm_class(
            model=str(setup.folder),
            load_format="dummy",
            dtype=config.dtype,
            trust_remote_code=setup.trust_remote_code,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_concurrency,
            kv_cache_memory_bytes=config.kv_cache_mb * 2**20,
            enforce_eager=config.enforce_eager,
            logprobs_mode="processed_logprobs",
            limit_mm_per_prompt={"image": 1},
            mm_processor_cache_gb=0.25,
            weight_transfer_config=WeightTransferConfig(backend=TRANSFER_BACKEND),
            disable_log_stats=True,
            **_platform_arguments(config.max_model_len),
            enable_sleep_mode=setup.shares_gpu,
        )
        silence_thread_warnings()
        self._names = checkpoint_names(model_config, trust_remote_code=setup.trust_remote_code)
        self._prompt_ids: dict[str, list[int]] = {}

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
        self._check_loaded()
        beginnings = forced_tokens(forced, prompts, sampling)
        parameters = [
            self._sampling_params(
                n=sampling.group_size,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens - len(given),
                seed=seed,
                logit_bias=self._bias,
                **_OUTPUT,
            )
            for given, seed in zip(beginnings, seeds, strict=True)
        ]
        outputs = self._llm.generate(self._inputs(prompts, beginnings), parameters, use_tqdm=False)
        self._check_lengths(prompts, outputs, beginnings, sampling.max_tokens)
        greedy: list[Completion | None] = [None] * len(prompts)
        if sampling.greedy_baseline:
            greedy = list(self.greedy(prompts, sampling.max_tokens))
        return [
            RolloutGroup(
                prompt=prompt,
                prompt_token_ids=_without_last(output.prompt_token_ids, len(given)),
                completions=tuple(self._completions(output.outputs, given)),
                group_size=sampling.group_size,
                greedy=baseline,
            )
            for prompt, output, given, baseline in zip(
                prompts, outputs, beginnings, greedy, strict=True
            )
        ]

    def greedy(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        self._check_loaded()
        parameters = self._sampling_params(
            temperature=0.0, max_tokens=max_tokens, logit_bias=self._bias, **_OUTPUT
        )
        beginnings: list[list[int]] = [[]] * len(prompts)
        inputs = self._inputs(prompts, beginnings)
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        self._check_lengths(prompts, outputs, beginnings, max_tokens)
        return self._completions([output.outputs[0] for output in outputs], [])

    def score(self, prompt: Prompt, token_ids: Sequence[int]) -> FloatArray:
        self._check_loaded()
        inputs = self._inputs([prompt], [token_ids])
        parameters = self._sampling_params(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        (output,) = self._llm.generate(inputs, parameters, use_tqdm=False)
        # The caption ends the prompt, whatever the image was expanded to.
        steps = output.prompt_logprobs[-len(token_ids) :]
        scored = [step[i].logprob for i, step in zip(token_ids, steps, strict=True)]
        return np.asarray(scored, np.float32)

    def load_weights(self, weights: Loadable, *, changed: Sequence[Part]) -> None:
        weights.verify()
        # A failed update leaves the model unusable, so the version goes first and returns last.
        self._version = -1
        self._llm.start_weight_update()
        renamed = Renamed(weights, self._names)
        self._llm.update_weights({"update_info": {"weights": renamed}})
        self._llm.finish_weight_update(str(weights.version))
        self._drop_stale_caches(changed)
        self._version = weights.version

    def held(self, weights: Loadable) -> Mapping[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors()}

        def read(model: Any) -> Mapping[str, Tensor]:
            fused = getattr(model, "packed_modules_mapping", {})
            mapper = getattr(model, "hf_to_vllm_mapper", None)
            theirs = {name: _mapped(mapper, self._names.get(name, name)) for name in shapes}
            renamed = {theirs[name]: shape for name, shape in shapes.items()}
            found = parts_of_fused(dict(model.named_parameters()), renamed, fused)
            return {name: found[their] for name, their in theirs.items() if their in found}

        (held,) = self._llm.apply_model(read)
        return held

    def sleep(self, level: int) -> None:
        self._version = -1
        self._llm.sleep(level=level)

    def wake_weights(self) -> None:
        self._llm.wake_up(tags=["weights"])

    def wake_cache(self) -> None:
        if not self._llm.wake_up(tags=["kv_cache"]):
            raise RuntimeError("vLLM is still asleep after waking its weights and its cache")

    def _drop_stale_caches(self, changed: Sequence[Part]) -> None:
        """Key-values are stale after any update; image embeddings only when what makes them
        moved.  vLLM keys both by the image, not by the weights, and keeps serving old ones."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        if {"vision", "connector"} & set(changed):
            self._llm.reset_mm_cache()
            self._llm.llm_engine.reset_encoder_cache()

    def _check_loaded(self) -> None:
        if self._version < 0:
            raise RuntimeError("the engine holds no weights yet: load a version before sampling")

    def _check_lengths(
        self,
        prompts: Sequence[Prompt],
        outputs: Sequence[Any],
        beginnings: Sequence[Sequence[int]],
        max_tokens: int,
    ) -> None:
        """ValueError where a caption was cut off at the longest sequence, before it had
        ``max_tokens``: of that vLLM says nothing."""
        for prompt, output, given in zip(prompts, outputs, beginnings, strict=True):
            room = max_tokens - len(given)
            ended_by_length = [c for c in output.outputs if c.finish_reason == "length"]
            if all(len(c.token_ids) >= room for c in ended_by_length):
                continue
            length = len(output.prompt_token_ids) - len(given)
            check_length(length, max_tokens, self._longest, prompt.prompt_id)

    def _inputs(
        self, prompts: Sequence[Prompt], forced: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        """To vLLM the tokens that a caption begins with are the end of its prompt."""
        return [
            {
                "prompt_token_ids": [*self._unexpanded(prompt.text), *given],
                "multi_modal_data": {"image": decode_image(prompt.image)},
            }
            for prompt, given in zip(prompts, forced, strict=True)
        ]

    def _unexpanded(self, instruction: str) -> list[int]:
        """Prompt ids with one placeholder for the image: vLLM expands it, and would expand
        expanded ones again."""
        if instruction not in self._prompt_ids:
            kind = type(self._processor).__name__
            layout = _WITHOUT_PLACEHOLDER.get(kind)
            text = (
                layout.format(instruction) if layout else prompt_text(self._processor, instruction)
            )
            self._prompt_ids[instruction] = self._processor.tokenizer(
                text, add_special_tokens=adds_special_tokens(self._processor, text)
            )["input_ids"]
        return self._prompt_ids[instruction]

    def _completions(self, outputs: Sequence[Any], forced: Sequence[int]) -> list[Completion]:
        ids = [[*forced, *output.token_ids] for output in outputs]
        texts = self._processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Completion(
                token_ids=np.asarray(tokens, np.int32),
                logprobs=np.asarray([0.0] * len(forced) + _sampled_logprobs(output), np.float32),
                text=text.strip(),
                finish_reason=output.finish_reason,
                weight_version=self._version,
                num_forced=len(forced),
            )
            for output, tokens, text in zip(outputs, ids, texts, strict=True)
        ]


def _sampled_logprobs(output: Any) -> list[float]:
    """Of each sampled token, from one flat list that could hold other tokens' too."""
    flat = output.logprobs
    if flat.token_ids != list(output.token_ids):
        raise RuntimeError(
            f"vLLM sampled tokens {list(output.token_ids)} and reports log-probs of "
            f"{flat.token_ids}; want one of each sampled token"
        )
    return list(flat.logprobs)


def _mapped(mapper: Any, name: str) -> str:
    """The name that vLLM's model gives a checkpoint's tensor; "" where it drops it."""
    if mapper is None:
        return name
    return next(iter(mapper.get_rename_mapper().apply_list([name])), "")


def _without_last(ids: Sequence[int], count: int) -> npt.NDArray[np.int32]:
    return np.asarray(ids[: len(ids) - count], np.int32)


def _platform_arguments(longest: int) -> dict[str, Any]:
    """Where sequences have at most ``longest`` tokens."""
    import torch

    if torch.cuda.is_available():
        return {
            # What must be free at the start: the cache's size is given in bytes, and a learner or
            # another engine may be there already.
            "gpu_memory_utilization": 0.05,
            # Of prompts and their pictures together, which else would be few at a time.
            "max_num_batched_tokens": max(8192, longest),
        }
    return {
        "max_num_batched_tokens": max(2048, longest),
        # Smaller blocks let short prompts share their key-values; 32 is the smallest on CPU.
        "block_size": 32,
        # Half a prompt samples a token that is thrown away, and rewinding a seeded generator by
        # it is not possible on CPU.
        "enable_chunked_prefill": False,
    }
