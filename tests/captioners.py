"""Folders of tiny captioners with their family's own processor, as published models have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.processing_utils import ProcessorMixin

from tests.unit.tiny_families import build

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


# Qwen's tokens, and their chat template with the words of the system left out.
_QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WITHOUT_VIDEO: dict[str, Any] = {}


def write_captioner(family: str, captions: Sequence[str], folder: Path) -> Path:
    """A random model of a family, and a processor whose tokenizer knows these captions."""
    config, processor = FAMILIES[family](captions)
    model = build(config)
    end, padding = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    # Qwen's models name both as ends.
    model.generation_config.eos_token_id = [padding, end] if "qwen" in family else end
    model.generation_config.pad_token_id = padding
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if "qwen" in family:
        _WITHOUT_VIDEO[config.model_type] = processor
    return folder


@contextmanager
def qwen_without_video() -> Iterator[None]:
    """Qwen's processors take videos too, for which transformers wants torchvision: the ones that
    were written here are read without."""
    read = transformers.AutoProcessor.from_pretrained

    def from_pretrained(path: Any, **options: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(path)
        known = _WITHOUT_VIDEO.get(config.model_type)
        return read(path, **options) if known is None else copy.deepcopy(known)

    with mock.patch.object(transformers.AutoProcessor, "from_pretrained", from_pretrained):
        yield


def _tokenizer(captions: Sequence[str]) -> Any:
    """Byte-level BPE that begins every text with a token of its own, as Llama's does."""
    tokenizer = _bpe(captions, [PAD, BEGIN, END, IMAGE])
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


def _bpe(captions: Sequence[str], special: list[str]) -> Tokenizer:
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
    return tokenizer


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _llava(captions: Sequence[str]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(captions)
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


def _paligemma(captions: Sequence[str]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(captions)
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


def _blip2(captions: Sequence[str]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(captions)
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


def _pictures_alone(kind: type[Any]) -> type[Any]:
    """A family's processor without its part for videos."""

    class PicturesAlone(kind):  # type: ignore[misc]
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
        ) -> None:
            self.image_token, self.video_token = _QWEN[-2:]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(_QWEN[-2:])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return PicturesAlone


def _qwen(
    captions: Sequence[str], name: str, vision: dict[str, Any], text: dict[str, Any]
) -> tuple[Any, Any]:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bpe(captions, _QWEN),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_QWEN[1:],
    )
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=16 * 16, max_pixels=_SIDE**2
    )
    processor = _pictures_alone(getattr(transformers, f"{name}Processor"))(
        pictures, tokenizer, chat_template=_QWEN_TEMPLATE
    )
    image, video, start = tokenizer.convert_tokens_to_ids([*_QWEN[-2:], "<|vision_start|>"])
    config = getattr(transformers, f"{name}Config")(
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        text_config={
            **_TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_scaling": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            **text,
        },
    )
    return config, processor


def _qwen2_5_vl(captions: Sequence[str]) -> tuple[Any, Any]:
    windows = {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(captions, "Qwen2_5_VL", windows, {})


def _qwen3_vl(captions: Sequence[str]) -> tuple[Any, Any]:
    deep = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return _qwen(captions, "Qwen3VL", deep, {"head_dim": 32})


FAMILIES: dict[str, Callable[[Sequence[str]], tuple[Any, Any]]] = {
    "llava": _llava,
    "paligemma": _paligemma,
    "blip-2": _blip2,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
}
