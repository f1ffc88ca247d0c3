import itertools

import pytest
from transformers import CLIPTokenizer

from accel.zoo import tokens
from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, MOTIONS, caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json and merges.txt"])
def tokenizer(request, folder) -> CLIPTokenizer:
    """As a stock loader reads it: from one file where it knows that, else from the two old ones."""
    if request.param != "tokenizer.json":
        (folder / "tokenizer.json").unlink()
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_every_caption_is_one_token(tokenizer):
    motions = [None, *range(len(MOTIONS))]
    for parts in itertools.product(range(10), range(10), range(5), motions):
        text = caption(*parts)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= tokens.LENGTH, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_the_captions_have_different_tokens(tokenizer):
    assert len({tokenizer(word).input_ids[1] for word in tokens.WORDS}) == len(tokens.WORDS)


@pytest.mark.parametrize("text", ["xylophone", "tenderness", "éß", "redblue"])
def test_an_unknown_word_falls_apart_into_known_bytes(tokenizer, text):
    ids = tokenizer(text).input_ids[1:-1]
    assert len(ids) > 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_prompts_are_padded_and_cut_to_the_length(tokenizer):
    batch = ["", "a red three", "a red three " * 9]
    ids = tokenizer(batch, padding="max_length", truncation=True).input_ids
    assert [len(row) for row in ids] == [tokens.LENGTH] * 3
    begin, end = (tokenizer.convert_tokens_to_ids(t) for t in (tokens.BEGIN, tokens.END))
    assert ids[0] == [begin] + [end] * (tokens.LENGTH - 1)
    assert ids[1][4:] == [end] * (tokens.LENGTH - 4)
    assert end not in ids[2][:-1]


def test_byte_symbols_are_those_of_gpt2():
    symbols = tokens.byte_symbols()
    assert len(set(symbols)) == 256
    assert (symbols[ord("a")], symbols[0x20], symbols[0x0A]) == ("a", "Ġ", "Ċ")


def test_merges_are_learned_from_the_most_frequent_pair():
    """Counted by hand: "ab" is in three of the words, then "abc</w>" stands twice."""
    merges = tokens.learn_merges(("abc", "abcd", "ab", "abc"))
    assert merges[:2] == [("a", "b"), ("ab", "c</w>")]
    assert set(merges[2:]) == {("c", "d</w>"), ("ab", "cd</w>"), ("a", "b</w>")}  # once each


def test_phrase_is_the_caption_with_parts_left_out():
    for parts in itertools.product(range(10), range(10), range(5)):
        assert tokens.phrase(*parts) == caption(*parts)
    three, red, dark = DIGITS.index("three"), COLOURS.index("red"), BACKGROUNDS.index("dark")
    assert tokens.phrase(three, red) == "a red three"
    assert tokens.phrase(three, None, dark) == "a three on a dark background"
    assert tokens.phrase(DIGITS.index("eight"), COLOURS.index("orange")) == "an orange eight"
    assert tokens.phrase(DIGITS.index("eight")) == "an eight"
