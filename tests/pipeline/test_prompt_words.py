"""What a pipeline does not read of a prompt is warned of once: unknown words, spelled words, what was cut off."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparsefeat as sf
from sparsefeat.assets import emojicanvas, load_pipeline
from sparsefeat.pipeline.prompt_words import PromptWarning, warn_of_words
from tests.tiny import tiny_sd


def said(pipe: Any, prompt: Any, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_words(pipe, {"prompt": prompt, **arguments}, stacklevel=1)
    assert all(one.category is PromptWarning for one in caught)
    return [str(one.message) for one in caught]


class Pipe:
    """What is asked of a pipeline here: its tokenizers."""

    def __init__(self, *tokenizers: Any):
        for i, tokenizer in enumerate(tokenizers):
            setattr(self, "tokenizer" if i == 0 else f"tokenizer_{i + 1}", tokenizer)


def large_tokenizer(model: Any, split: Any, limit: int, **special: str) -> PreTrainedTokenizerFast:
    """As real text encoders have: more than 5,000 tokens."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=limit, **special)


def byte_level(limit: int = 40) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte, "fox", "kow", "loon", and many that do not matter."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "fo", "fox", "ko", "kow", "lo", "oo", "loo", "loon"]
    merges = [("f", "o"), ("fo", "x"), ("k", "o"), ("ko", "w"), ("l", "o"), ("lo", "o"), ("loo", "n")]
    words += [f"<{i}>" for i in range(6000)]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges)
    return large_tokenizer(model, pre_tokenizers.ByteLevel(add_prefix_space=False), limit)


def word_level(limit: int = 40) -> PreTrainedTokenizerFast:
    """Whole words, "fox" and "owl", and a token for all others."""
    words = ["[UNK]", "a", "fox", "owl", *(f"<{i}>" for i in range(6000))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    return large_tokenizer(model, pre_tokenizers.Whitespace(), limit, unk_token="[UNK]")


def test_words_that_become_the_unknown_token_are_named_and_known_ones_are_not():
    (sentence,) = said(Pipe(word_level()), "a fox, 狐狸 2024 zebra!")
    assert "'狐狸', '2024', 'zebra': it spells" in sentence
    assert "fox" not in sentence


def test_words_in_single_letters_or_bytes_are_named_and_those_in_larger_pieces_are_not():
    (sentence,) = said(Pipe(byte_level()), "fox kowloon qxzvb 狐狸 2024 -- f/1.8")
    assert "does not know 'qxzvb', '狐狸': it" in sentence


def test_a_closed_vocabulary_knows_the_words_that_are_its_tokens():
    pipe = load_pipeline()
    for style in emojicanvas.STYLES:  # what it was trained on
        assert said(pipe, [emojicanvas.prompt(name, style) for name in emojicanvas.OBJECTS]) == []
    (sentence,) = said(pipe, "a noto emoji of that unicorn")
    assert "does not know 'that', 'unicorn': it" in sentence


def test_what_one_of_several_tokenizers_knows_is_not_warned_of():
    assert said(Pipe(word_level(), byte_level()), "fox kowloon") == []
    assert len(said(Pipe(word_level(), byte_level()), "qxzvb")) == 1
    assert said(Pipe(word_level(2), byte_level()), "fox fox fox") == []


def test_what_is_cut_off_is_shown():
    (sentence,) = said(Pipe(word_level(3)), "a fox a owl")
    assert "reads 3 tokens of a prompt, so 'owl' was cut off" in sentence
    (sentence,) = said(Pipe(word_level(40)), "a fox a owl", max_sequence_length=2)
    assert "reads 2 tokens of a prompt, so 'a owl' was cut off" in sentence


def test_negative_prompts_are_read_too_and_embeddings_are_not():
    assert "'zebra'" in said(Pipe(word_level()), ["a fox"], negative_prompt="zebra")[0]
    assert said(Pipe(word_level()), None) == []


def test_a_word_is_warned_of_once_a_pipeline():
    pipe = Pipe(word_level(3))
    assert len(said(pipe, "a zebra a fox")) == 2
    assert said(pipe, "a zebra a fox") == []
    assert len(said(Pipe(word_level(3)), "a zebra a fox")) == 2


def test_a_call_with_instruments_warns_at_the_users_line():
    pipe = tiny_sd()
    with sf.attach(pipe, sf.HeatMaps()), pytest.warns(PromptWarning, match="'unicorn'") as caught:
        pipe("fox unicorn", num_inference_steps=1)
    assert caught[0].filename == __file__
