import pytest
import torch
from transformers import AutoTokenizer

from accel.zoo.wan import tokenize
from accel.zoo.wan_text import TextConfig, build_tokenizer, words
from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, MOTIONS, caption


def test_every_caption_is_one_token_a_word_and_comes_back():
    tokenizer = build_tokenizer()
    for i in range(500):
        text = caption(i % 10, i // 10 % 10, i // 100, i % len(MOTIONS))
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_vocabulary_is_the_grammar():
    assert {*COLOURS, *DIGITS, *MOTIONS, *BACKGROUNDS} < set(words())
    assert len(set(words())) == len(words())


@pytest.mark.parametrize("text", ["A RED three", "a red three"])
def test_case_is_ignored_and_unknown_words_are_marked(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text + " zebra").input_ids) == "a red three <unk> </s>"


def test_stock_loader_reads_the_tokenizer(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a blue seven moving left on a white background"
    assert loaded(text).input_ids == build_tokenizer()(text).input_ids


def test_padding_does_not_change_the_text_states():
    torch.manual_seed(0)
    encoder = TextConfig().build().eval()
    tokens = tokenize(["a red three on a dark background"])
    with torch.inference_mode():
        padded = encoder(tokens, (tokens != 0).long()).last_hidden_state
        count = int((tokens != 0).sum())
        bare = encoder(tokens[:, :count]).last_hidden_state
    assert torch.allclose(padded[:, :count], bare, atol=1e-5)  # float32, sums in another order
