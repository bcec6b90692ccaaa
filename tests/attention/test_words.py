"""Words to token positions, with fast tokenizers' offsets and without."""

from __future__ import annotations

import pytest

from sparsefeat.attention.words import Token, token_indices, tokens_of, words_of
from tests.tiny import MAX_TOKENS, tiny_tokenizer


class SlowTokenizer:
    """A tokenizer without offsets: whole words, CLIP's end mark, `ing` split off."""

    is_fast = False
    model_max_length = 10
    all_special_tokens = ("<s>", "</s>")
    unk_token = None

    def __call__(self, text, truncation=False, max_length=None):
        pieces = []
        for word in text.lower().split():
            pieces += [word[:-3], "ing</w>"] if word.endswith("ing") else [f"{word}</w>"]
        self.names = ["<s>", *pieces, "</s>"][:max_length]
        return {"input_ids": list(range(len(self.names)))}

    def convert_ids_to_tokens(self, ids):
        return [self.names[i] for i in ids]


def test_tokens_cover_the_characters_they_were_made_of():
    text = "a Fox, cat"
    tokens = tokens_of(tiny_tokenizer(), text)
    assert [text[t.start : t.stop] for t in tokens] == ["", "a", "Fox", ",", "cat", ""]
    assert [t.special for t in tokens] == [True, False, False, False, False, True]
    assert [t.index for t in tokens] == list(range(6))


@pytest.mark.parametrize(
    ("word", "occurrence", "expected"),
    [
        ("fox", None, (2, 9)),
        ("FOX", 0, (2,)),
        ("fox", 1, (9,)),
        ("fox", -1, (9,)),
        ("dog", None, (4, 5, 6)),
        ("fox a dog", None, (2, 3, 4, 5, 6)),
        ("fox  a\tdog", None, (2, 3, 4, 5, 6)),
    ],
)
def test_a_word_or_phrase_is_all_its_tokens_of_all_its_occurrences(word, occurrence, expected):
    text = "a fox a dog, a fox"  # "fox" is one token of this tokenizer, "dog" three, the comma one
    assert token_indices(tokens_of(tiny_tokenizer(), text), text, word, occurrence) == expected


def test_a_word_the_tokenizer_does_not_have_has_no_tokens_of_its_own():
    text = "a 狐狸 fox狐"  # this tokenizer's token for what it does not have is <|endoftext|>
    tokens = tokens_of(tiny_tokenizer(), text)
    with pytest.raises(
        ValueError, match=r"word='狐狸' is not in the tokenizer's vocabulary \(it became <\|endoftext\|>\)"
    ):
        token_indices(tokens, text, "狐狸")
    own = [t.index for t in tokens if text[t.start : t.stop] and text[t.start : t.stop] in "fox"]
    assert token_indices(tokens, text, "fox狐") == tuple(own)


def test_a_slow_tokenizer_is_followed_by_spelling():
    text = "Painting a painting of Foxes"
    tokens = tokens_of(SlowTokenizer(), text)
    assert [text[t.start : t.stop] for t in tokens] == ["", "Paint", "ing", "a", "paint", "ing", "of", "Foxes", ""]
    assert token_indices(tokens, text, "painting") == (1, 2, 4, 5)
    assert token_indices(tokens, text, "foxes") == (7,)


def test_a_word_is_not_found_inside_another_and_the_error_lists_the_words():
    text = "foxes and a cat, and a cat"
    tokens = tokens_of(tiny_tokenizer(), text)
    with pytest.raises(ValueError, match=r"'fox' is not in the prompt .*; its words are: foxes, and, a, cat\.$"):
        token_indices(tokens, text, "fox")
    with pytest.raises(
        ValueError, match=r"'fox' is not in the prompt ''; there is no word in it, only tokens, .*\.map\("
    ):
        token_indices(tokens_of(tiny_tokenizer(), ""), "", "fox")


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("一只fox狐狸，狐", "狐狸", (5, 6)),
        ("一只fox狐狸，狐", "狐", (5, 8)),
        ("一只fox狐狸，狐", "fox", (2, 3, 4)),
        ("สุนัขตัวหนึ่ง", "ตัว", (5, 6, 7)),
        ("crème, cafe\u0301 cafe", "cafe\u0301", (7, 8, 9, 10, 11)),
        ("crème, cafe\u0301 cafe", "cafe", (13, 14, 15, 16)),
        ("\u2764\ufe0ffox", "fox", (2, 3, 4)),
    ],
)
def test_scripts_without_spaces_and_letters_of_two_characters(text, word, expected):
    tokens = tuple(Token(i, character, i, i + 1) for i, character in enumerate(text))
    assert token_indices(tokens, text, word) == expected


@pytest.mark.parametrize(("text", "word"), [("लोमड़ी", "लोम"), ("cafe\u0301s", "cafe\u0301"), ("afox狐", "fox狐")])
def test_an_accent_or_a_vowel_sign_does_not_end_a_word(text, word):
    tokens = tuple(Token(i, character, i, i + 1) for i, character in enumerate(text))
    with pytest.raises(ValueError, match=f"its words are: {text}"):
        token_indices(tokens, text, word)


def test_errors_name_the_mistake():
    text = "a cat"
    tokens = tokens_of(tiny_tokenizer(), text)
    with pytest.raises(ValueError, match="word='  ' is no word; name a word of the prompt: a, cat"):
        token_indices(tokens, text, "  ")
    with pytest.raises(ValueError, match=r"occurrence=1 of word='cat' does not exist; it occurs 1 time"):
        token_indices(tokens, text, "cat", 1)
    text = "b" + " a" * MAX_TOKENS + " cat"
    with pytest.raises(ValueError, match="stands behind the 16 tokens"):
        token_indices(tokens_of(tiny_tokenizer(), text), text, "cat")


def test_words_leave_punctuation_out():
    assert words_of("A noto emoji, of Bob's well-made fox!") == (
        "A",
        "noto",
        "emoji",
        "of",
        "Bob's",
        "well-made",
        "fox",
    )
