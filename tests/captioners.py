"""Folders of tiny captioners with their family's own processor, as published models have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

IMAGE, BEGIN, END, PAD = "<image>", "<s>", "</s>", "<pad>"
_SIDE, _PATCH = 32, 16
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
    "initializer_range": 0.02,
}
_FEATURES = (_SIDE // _PATCH) ** 2


def write_captioner(family: str, captions: Sequence[str], folder: Path) -> Path:
    """A random model of a family, and a processor whose tokenizer knows these captions."""
    config, processor = FAMILIES[family](_tokenizer(captions))
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_tokens" in name:  # zeros by default
                parameter.normal_()
            elif parameter.ndim > 1:  # far from the near-constant function that it starts as
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(captions: Sequence[str]) -> Any:
    """Byte-level BPE that begins every text with a token of its own, as Llama's does."""
    special = [PAD, BEGIN, END, IMAGE]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {caption}" for caption in captions], trainer)
    # PaliGemma in vLLM asks for this token by its own name.
    tokenizer.add_tokens(["\n"])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
    )


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "model_type": "llama",
            "vocab_size": len(tokenizer),
        },
        # As LLaVA-1.5: nothing of the tower's last layer is used.
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pictures = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}
    )
    processor = transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def _paligemma(tokenizer: Any) -> tuple[Any, Any]:
    pictures = transformers.SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    pictures.image_seq_length = _FEATURES
    processor = transformers.PaliGemmaProcessor(pictures, tokenizer)
    config = transformers.PaliGemmaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projection_dim=64,
        hidden_size=64,
        vision_config={**_VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "model_type": "gemma",
            "vocab_size": len(processor.tokenizer),
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
    )
    return config, processor


def _blip2(tokenizer: Any) -> tuple[Any, Any]:
    pictures = transformers.BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    config = transformers.Blip2Config(
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        num_query_tokens=4,
        vision_config=_VISION,
        qformer_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 64,
            "cross_attention_frequency": 1,
            "vocab_size": len(tokenizer),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "dropout": 0.0,
        },
    )
    return config, transformers.Blip2Processor(pictures, tokenizer, num_query_tokens=4)


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "llava": _llava,
    "paligemma": _paligemma,
    "blip-2": _blip2,
}
