"""Tiny text encoders of the kinds that pipelines have, and a tokenizer of whole words for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_WORDS = (
    "a",
    "fox",
    "cat",
    "dog",
    "red",
    "blue",
    "photo",
    "emoji",
    "noto",
    "of",
    "in",
    "the",
    "snow",
    "user",
    "system",
)
_SPECIAL = ("<pad>", "</s>", "<unk>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "\n")


def tiny_words(*, bos: bool = False, eos: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and newlines; what it does not know is `<unk>`, whatever it was.

    One word is one token, as in the real tokenizers for common words, so templates are as long as they are there.
    """
    vocab = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    first, last = ("<bos> " if bos else ""), (" </s>" if eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A{last}", special_tokens=[("<bos>", vocab["<bos>"]), ("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_input_names=["input_ids", "attention_mask"],
        **{"model_max_length": 512, **options},
    )


VOCABULARY = len(_SPECIAL) + len(_WORDS)


def tiny_t5(d_model: int = 32, layers: int = 2, seed: int = 0, kind: str = "T5") -> Any:
    """T5, or with `kind="UMT5"` the one of AuraFlow and Wan; both are `encoder.block.N`."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, d_model=d_model, d_kv=8, d_ff=2 * d_model, num_layers=layers, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def tiny_decoder(kind: str = "Gemma2Model", hidden: int = 32, layers: int = 2, seed: int = 0, **options: Any) -> Any:
    """A language model as text encoder: "Gemma2Model", "LlamaModel", "Qwen3Model", "Qwen3ForCausalLM"."""
    torch.manual_seed(seed)
    name = kind.removesuffix("Model").removesuffix("ForCausalLM")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
        **options,
    )
    return getattr(transformers, kind)(config).eval()


def tiny_qwen_vl(hidden: int = 32, layers: int = 2, seed: int = 0) -> Any:
    """Qwen2.5-VL: the language model of Qwen-Image, with a vision tower that text alone does not run."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
        "bos_token_id": 3,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "fullatt_block_indexes": [0],
    }
    tokens = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    for name, value in text.items():  # transformers before 4.52 keeps the text's settings on the config itself
        if not hasattr(config, name):
            setattr(config, name, value)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_qwen3_vl(hidden: int = 32, layers: int = 2, seed: int = 0) -> Any:
    """Qwen 3 VL: the language model of Krea 2, with a vision tower that text alone does not run."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rope_scaling": {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_type": "default"},
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    tokens = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    return transformers.Qwen3VLModel(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    ).eval()
