"""Whether prompts leave captions the room that they may take.

vLLM refuses a prompt that is longer than ``engine.max_model_len``, but ends a caption there without
a word: captions would be cut off, and scored as if the model had ended them.
"""

from __future__ import annotations

from pathlib import Path

from rayrl.adapters import base_folder
from rayrl.config import Config
from rayrl.types import Prompt


def check_length(prompt_tokens: int, max_tokens: int, longest: int, prompt_id: str) -> None:
    """ValueError, with all lengths in tokens, where a prompt and a caption of ``max_tokens`` after
    it are longer than the ``longest`` sequence of an engine."""
    total = prompt_tokens + max_tokens
    if total > longest:
        raise ValueError(
            f"the prompt of image {prompt_id} (length {prompt_tokens}) and a caption of "
            f"sampling.max_tokens {max_tokens} are longer than engine.max_model_len {longest}, "
            f"where captions would be cut off: want --engine.max_model_len {total} or more, or "
            "fewer image tokens (model.image_processor)"
        )


def check_first_prompt(config: Config, folder: Path, prompt: Prompt) -> None:
    """:func:`check_length` of one prompt of the model in ``folder``, before an engine starts.

    Of the transformers engine nothing is asked: it has no such limit.
    """
    from rayrl.engine.base import chosen_backend
    from rayrl.vlm import load_processor, prompt_inputs

    backend = config.engine.backend
    if backend == "auto":
        gpu = config.rollout.gpus > 0
        backend = chosen_backend(backend, Path(base_folder(folder)), gpu=gpu)
    if backend == "hf":
        return
    processor = load_processor(folder, trust_remote_code=config.model.trust_remote_code)
    ids = prompt_inputs(processor, [prompt.image], [prompt.text])["input_ids"]
    limit = config.engine.max_model_len
    check_length(ids.shape[1], config.sampling.max_tokens, limit, prompt.prompt_id)
