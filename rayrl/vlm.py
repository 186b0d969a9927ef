"""The captioner: model, processor, instruction; the tiny one; which parts train.

A captioner is a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.  Both the
engines and the learner read it through this module, so that both see the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rayrl.adapters import base_folder
from rayrl.config import TinyConfig
from rayrl.data.images import decode
from rayrl.parts import Part, part_of

IMAGE_TOKEN = "<image>"
# Prompts of processors without a chat template that do not read "<image> instruction": BLIP-2's
# puts the image before the prompt itself, PaliGemma's wants no space.
_LAYOUTS = {"Blip2Processor": "{instruction}", "PaliGemmaProcessor": "{image}{instruction}"}
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """A loaded model with its processor.  ``banned_ids`` can never be part of a caption (image
    placeholders, padding): the sampler and the learner mask them alike."""

    model: Any
    processor: Any
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    pad_id: int


def quiet_transformers() -> None:
    """No progress bars and no remarks about configurations: a run has a progress line of its own,
    and every real problem raises."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The processor of a model folder, with left padding (prompts end where captions start)."""
    from transformers import AutoConfig, AutoProcessor

    quiet_transformers()
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if getattr(processor, "num_query_tokens", 0) is None:
        # Older folders of BLIP-2, whose processor would put no image into the prompt.
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        processor.num_query_tokens = config.num_query_tokens
    return processor


def load_captioner(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Captioner:
    """Load model and processor from a folder or hub name, in evaluation mode (dropout off, as in
    the reinforcement stage of arXiv 2503.01333).  Adapters are merged into their base."""
    from transformers import AutoModelForImageTextToText

    from rayrl.windows import use_windowed_attention

    quiet_transformers()
    base = base_folder(path)
    model = AutoModelForImageTextToText.from_pretrained(
        base,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # never a pickle
    )
    use_windowed_attention(model)
    if base != path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    processor = load_processor(path, trust_remote_code=trust_remote_code)
    model.to(device)  # type: ignore[arg-type]
    return Captioner(
        model=model.eval(),
        processor=processor,
        eos_ids=eos_ids(model, processor),
        banned_ids=banned_ids(model.config, processor),
        pad_id=int(processor.tokenizer.pad_token_id),
    )


def eos_ids(model: Any, processor: Any) -> tuple[int, ...]:
    """Ids that end a caption: the generation configuration's, else the tokenizer's.  The first is
    the one that captions are taught to end with: the tokenizer's, where it is among them.

    Banned ids are left out: Qwen's models name their padding as an end too."""
    own = processor.tokenizer.eos_token_id
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = own
    named = given if isinstance(given, list | tuple) else [given]
    banned = banned_ids(model.config, processor)
    ids = {int(i) for i in named if i is not None} - set(banned)
    if not ids:
        raise ValueError(
            f"the model names no end-of-sequence token that may be sampled (named: {given}, "
            f"banned: {list(banned)}), so captions could never end"
        )
    return tuple(sorted(ids, key=lambda i: (i != own, i)))


def banned_ids(config: Any, processor: Any) -> tuple[int, ...]:
    """Ids that must never be sampled: the image placeholder and its companions, and padding
    (unless padding doubles as the end token).

    A model that samples the placeholder breaks the next forward pass, where every placeholder
    wants an image feature.
    """
    tokenizer = processor.tokenizer
    ids = {
        getattr(config, name, None)
        for name in ("image_token_id", "image_token_index", "video_token_id")
    }
    for token in ("<image>", "<fake_token_around_image>", "<global-img>"):
        if token in tokenizer.get_added_vocab():
            ids.add(tokenizer.convert_tokens_to_ids(token))
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return tuple(sorted(int(i) for i in ids if i is not None))


def prompt_text(processor: Any, instruction: str) -> str:
    """The instruction in the model's chat template, with one image placeholder."""
    if getattr(processor, "chat_template", None):
        message = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": instruction}],
        }
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return str(text)
    token = getattr(processor, "image_token", IMAGE_TOKEN)
    layout = _LAYOUTS.get(type(processor).__name__, "{image} {instruction}")
    return layout.format(image=token, instruction=instruction)


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether tokenizing a prompt adds what its tokenizer begins texts with: a chat template may
    have done that already."""
    begin = processor.tokenizer.bos_token
    return begin is None or not text.startswith(begin)


def decode_image(image: bytes) -> Image.Image:
    """An RGB picture from an encoded file."""
    return decode(image)


def prompt_inputs(processor: Any, images: Sequence[bytes], instructions: Sequence[str]) -> Any:
    """The processor's output for P prompts: input_ids [P, S] (left-padded, image tokens
    expanded), attention_mask [P, S], pixel_values and whatever else the family needs."""
    pictures = [[decode_image(image)] for image in images]
    texts = [prompt_text(processor, instruction) for instruction in instructions]
    inputs = processor(
        images=pictures,
        text=texts,
        return_tensors="pt",
        padding=True,
        add_special_tokens=adds_special_tokens(processor, texts[0]),
    )
    # PaliGemma's processor makes some, with which the model would compute a loss of its own.
    inputs.pop("labels", None)
    return inputs


def choose_trainable(model: torch.nn.Module, trainable: Iterable[Part]) -> list[str]:
    """Freeze every part that is not named; returns the names of the parameters that train."""
    chosen = set(trainable)
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in chosen)
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise ValueError(f"no parameter belongs to {sorted(chosen)} in {type(model).__name__}")
    return names


def build_tiny_captioner(
    config: TinyConfig, captions: Sequence[str], instruction: str, folder: Path, *, seed: int
) -> Path:
    """Write a randomly initialised tiny captioner to ``folder``: an Idefics3 with a byte-level BPE
    tokenizer trained on ``captions``.  Equal arguments give equal files."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    quiet_transformers()
    tokenizer = _train_tokenizer(captions, instruction, config.vocab_size)
    processor = _tiny_processor(tokenizer, config)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<image>", "<|im_start|>")}
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    model_config = Idefics3Config(
        image_token_id=ids["<image>"],
        scale_factor=config.pixel_shuffle,
        tie_word_embeddings=True,
        pad_token_id=ids["<pad>"],
        vision_config={
            "hidden_size": config.vision_width,
            "intermediate_size": config.vision_width * 2,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_width // 32,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "initializer_range": config.vision_width**-0.5,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": config.text_width,
            "intermediate_size": config.text_width * 3,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_width // 32,
            "num_key_value_heads": config.text_width // 32,
            "max_position_embeddings": config.max_positions,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": end,
            "pad_token_id": ids["<pad>"],
            "tie_word_embeddings": True,
            "initializer_range": config.text_width**-0.5,
        },
        initializer_range=config.text_width**-0.5,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(model_config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = ids["<pad>"]
    model.generation_config.bos_token_id = ids["<|im_start|>"]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _train_tokenizer(captions: Sequence[str], instruction: str, vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [
        "<pad>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    # Captions follow "Assistant:", hence the leading space, which BPE folds into the first word.
    texts = [f" {caption.strip()}" for caption in captions]
    # The prompt repeats once an image; weighing it like a tenth of the captions keeps it short.
    texts += [f"User: {instruction}\nAssistant:"] * max(2, len(texts) // 10)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=special[3:],
    )


def _tiny_processor(tokenizer: Any, config: TinyConfig) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    image_processor = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": config.image_size},
        max_image_size={"longest_edge": config.image_size},
    )
    return Idefics3Processor(
        image_processor,
        tokenizer,
        image_seq_len=config.image_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def caption_token_ids(processor: Any, caption: str, eos_id: int) -> list[int]:
    """A reference caption as the model writes it: a leading space, then the end token."""
    return [*caption_prefix_ids(processor, caption), eos_id]


def caption_prefix_ids(processor: Any, caption: str) -> list[int]:
    """A reference caption as the model begins one, without an end.  What looks like a special token
    in it is text: an image placeholder would want an image, and an end would be taught as one."""
    ids: list[int] = processor.tokenizer(
        f" {caption.strip()}", add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    return ids
