"""Words are found in what the text encoders were given, not in what the pipeline was asked: rewritten prompts, templates,
padding on either side, words of several vectors, chunks. The positions expected are counted by hand in the ids.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsefeat.attention import HeatMaps
from sparsefeat.attention.encoded import EncodedPrompt, Rows
from sparsefeat.pipeline import attach
from tests.families import families
from tests.families.text import tiny_words
from tests.tiny import MAX_TOKENS, pixels, tiny_sd, tiny_sdxl, tiny_tokenizer


def made_of(cls, pipe, **options):
    names = inspect.signature(cls.__init__).parameters
    new = cls(**{n: p for n, p in pipe.components.items() if n in names}, **options)
    new.set_progress_bar_config(disable=True)
    return new


def recorded(pipe, prompt, **arguments):
    with attach(pipe, maps := HeatMaps()) as run:
        pixels(pipe, prompt, steps=1, **arguments)
    return run[maps]


def is_at(recording, word, positions, image=0, **options):
    return torch.equal(recording.word(word, image, **options).values, recording.map(positions, image).values)


class Styled(StableDiffusionPipeline):
    """Puts a style before and after the prompt, and writes it anew."""

    def encode_prompt(self, prompt, *args, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return super().encode_prompt([f"a cat, {p.replace('!', '')}, noto" for p in prompts], *args, **kwargs)


class Weighted(StableDiffusionXLPipeline):
    """Takes the weights of "(word:1.3)" out."""

    def encode_prompt(self, prompt, *args, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        plain = [p.replace("(", "").replace(":1.3)", "") for p in prompts]
        return super().encode_prompt(plain, *args, **kwargs)


def test_a_style_around_the_prompt_moves_its_words_and_has_words_of_its_own():
    pipe = made_of(Styled, tiny_sd(), requires_safety_checker=False)
    recording = recorded(pipe, ["a fox", "a cat"])
    # <s> a cat , a fox , n o t o</w> </s>
    assert is_at(recording, "fox", [5])
    assert is_at(recording, "a", [4])  # the prompt's own, not the style's
    assert is_at(recording, "cat", [5], image=1)
    assert is_at(recording, "noto", [7, 8, 9, 10])
    assert is_at(recording, "cat", [2])  # only the style has it for this image
    assert torch.equal(
        recording.tensor(0, "tokens")[[4, 5]].sum(0).round(decimals=3), torch.ones(16, 16)
    )  # the prompt's own tokens alone
    with pytest.raises(ValueError, match="its words are: a, fox"):
        recording.word("dog")


def test_a_word_that_may_be_the_styles_is_refused():
    pipe = made_of(Styled, tiny_sd(), requires_safety_checker=False)
    recording = recorded(pipe, "cat! a cat!")  # written anew, so that the prompt cannot be found in what was encoded
    with pytest.raises(ValueError, match=r"'cat' stands 2 time\(s\) in the prompt .* and 3 time\(s\)"):
        recording.word("cat")


def test_weights_are_no_words_in_a_pipeline_of_two_encoders():
    pipe = made_of(Weighted, tiny_sdxl(), add_watermarker=False)
    recording = recorded(pipe, "(cat:1.3) a fox")
    assert is_at(recording, "fox", [3])
    assert is_at(recording, "cat", [1])


def test_all_vectors_of_a_word_of_textual_inversion_are_its_map():
    pipe = tiny_sdxl()
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        vectors = torch.randn(2, encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
        pipe.load_textual_inversion(vectors, token="<toy>", text_encoder=encoder, tokenizer=tokenizer)
    recording = recorded(pipe, ["fox, <toy> cat", "a fox"])
    assert is_at(recording, "<toy>", [3, 4])
    assert is_at(recording, "cat", [5])
    assert is_at(recording, "fox", [2], image=1)


def test_the_words_of_a_template_are_not_the_prompts():
    tiny = families()["sana"]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    pipe = tiny.build()
    given = []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True
    )
    with attach(pipe, maps := HeatMaps()) as run:
        tiny.call(pipe, ["red fox"], guidance=False, complex_human_instruction=["a photo of a fox in the snow "])
    handle.remove()
    recording = run[maps]
    ids, keys = given[0][0].tolist(), recording.tensor().shape[0]
    fox = pipe.tokenizer.convert_tokens_to_ids("fox")
    places = [place for place, token in enumerate(ids) if token == fox]
    assert len(places) == 2  # the instruction's and the prompt's
    assert is_at(recording, "fox", [places[1] - (len(ids) - keys)])  # keys: the first token, and the last ones
    assert len(recording.word("fox").values)


def test_each_encoder_is_looked_up_by_its_own_prompt():
    tiny = families()["flux"]
    pipe = tiny.build()
    with attach(pipe, maps := HeatMaps()) as run:
        tiny.call(
            pipe, ["a fox"], guidance=False, steps=1, prompt_2=["a cat and a fox"]
        )  # of T5, whose text is attended to
    assert is_at(run[maps], "a", [0, 3])
    assert is_at(run[maps], "cat", [1])
    own = run[maps].tensor(normalize="tokens")[:5].sum(0)
    assert torch.equal(own.round(decimals=3), torch.ones_like(own))


def test_a_word_beside_another_encoders_has_no_map_of_its_own():
    recording = recorded(tiny_sdxl(), ["a fox", "fox"], prompt_2=["a cat", ""], negative_prompt=["", ""])
    assert is_at(recording, "a", [1])  # both encoders' first word
    assert is_at(recording, "fox", [1], image=1)  # beside padding
    with pytest.raises(ValueError, match=r"'fox' shares its place with a word that another .* \.map\(\[2\]\)"):
        recording.word("fox")


def test_padding_before_the_prompt_moves_its_words():
    pipe = tiny_sd()
    pipe.tokenizer.padding_side = "left"
    recording = recorded(pipe, "a fox")
    # 16 positions, of which the last four are <s> a fox </s>
    assert is_at(recording, "fox", [MAX_TOKENS - 2])
    assert [token.label for token in recording.tokens()][-4:][1:3] == ["a</w>", "fox</w>"]


# Without a pipeline: rows of ids, and how many keys the attention has


def words(*text, left=0, right=0):
    tokenizer = tiny_words(bos=True)
    rows = [(0,) * left + tuple(tokenizer(each)["input_ids"]) + (0,) * right for each in text]
    return Rows(tokenizer, tuple(rows))


def test_chunks_stand_one_after_the_other_with_or_without_the_marks_between_them():
    prompt = "a red fox in the snow"
    encoded = EncodedPrompt(prompt, (words("a red fox", "in the snow"),))
    # <bos> a red fox </s> <bos> in the snow </s>
    assert encoded.indices(10, "fox") == (3,)
    assert encoded.indices(10, "snow") == (8,)
    # <bos> a red fox in the snow </s>
    assert encoded.indices(8, "fox") == (3,)
    assert encoded.indices(8, "snow") == (6,)
    assert encoded.indices(8, "red fox") == (2, 3)


def test_two_encoders_one_after_the_other_have_the_word_twice():
    encoded = EncodedPrompt("a fox", (words("a fox", right=2), words("a fox", right=4)))
    assert encoded.indices(6 + 8, "fox") == (2, 6 + 2)
    assert encoded.indices(6, "fox") == (2,)  # the keys are of the first alone, as wide as both


def test_keys_that_lack_the_padding_behind_or_are_of_nobody():
    encoded = EncodedPrompt("a fox", (words("a fox", right=4),))
    assert encoded.indices(5, "fox") == (2,)
    for keys in (2, 9, 30):
        with pytest.raises(ValueError, match=r"cannot be told from the \d+ tokens that the text encoders were given"):
            encoded.indices(keys, "fox")
    with pytest.raises(ValueError, match="nothing was seen"):
        EncodedPrompt("a fox", ()).indices(16, "fox")


def test_a_prompt_that_was_cut_off_has_the_words_that_were_left():
    tokenizer = tiny_words(bos=True)
    template = "photo of a cat in the snow"
    ids = tuple(tokenizer(f"{template} a red fox")["input_ids"][:-2])  # "fox" and the mark are gone
    encoded = EncodedPrompt("a red fox", (Rows(tokenizer, (ids,)),))
    assert encoded.indices(len(ids), "red") == (9,)
    assert encoded.indices(len(ids), "a") == (8,)
    with pytest.raises(ValueError, match="is not in the prompt"):
        encoded.indices(len(ids), "fox")


def test_a_word_that_the_tokenizer_does_not_know_hides_none_of_the_others():
    tokenizer = tiny_words(bos=True)
    template = "photo of a cat in the snow"
    prompt = "red fox \u2603 \u72d0 dog fox"  # two signs that it has no token for
    ids = tuple(tokenizer(f"{template} {prompt}")["input_ids"])
    encoded = EncodedPrompt(prompt, (Rows(tokenizer, (ids,)),))
    assert encoded.indices(len(ids), "dog") == (12,)
    assert encoded.indices(len(ids), "fox") == (9, 13)
    assert encoded.indices(len(ids), "red") == (8,)


def test_a_character_of_several_tokens_is_all_of_them():
    byte = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(byte, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    ids = tuple(tokenizer("User: \u72d0, \U0001f98a fox")["input_ids"])  # of three bytes, and of four
    encoded = EncodedPrompt("\u72d0, \U0001f98a fox", (Rows(tokenizer, (ids,)),))
    assert encoded.indices(len(ids), "\u72d0") == (6, 7, 8)
    assert encoded.indices(len(ids), "\U0001f98a") == (11, 12, 13, 14)
    assert encoded.indices(len(ids), "fox") == (16, 17, 18)


def test_the_map_of_a_word_is_never_that_of_padding():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a fox", padding="max_length", max_length=MAX_TOKENS)["input_ids"]
    encoded = EncodedPrompt("a fox", (Rows(tokenizer, (tuple(ids),)),))
    assert {token.index for token in encoded.tokens(MAX_TOKENS) if not token.special} == {1, 2}
    assert encoded.own(MAX_TOKENS) == [1, 2]
