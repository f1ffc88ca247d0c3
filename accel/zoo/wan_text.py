"""The words of digits-wan: a tokenizer of whole words and a small UMT5 text encoder."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, MOTIONS

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 as in T5
GRAMMAR = ("a", "an", "moving", "on", "background")
MAX_LENGTH = 512  # what WanPipeline pads a prompt to


def words() -> tuple[str, ...]:
    """Every word of the world's captions, each once."""
    return tuple(dict.fromkeys((*GRAMMAR, *COLOURS, *DIGITS, *MOTIONS, *BACKGROUNDS)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, then the end token; unknown words become `<unk>`, case is ignored."""
    vocabulary = {word: i for i, word in enumerate((PAD, END, UNKNOWN, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
    )


@dataclass(frozen=True)
class TextConfig:
    """Size of the text encoder."""

    width: int = 64
    heads: int = 4
    layers: int = 2

    def build(self) -> UMT5EncoderModel:
        """A fresh encoder, without dropout."""
        config = UMT5Config(
            vocab_size=3 + len(words()),
            d_model=self.width,
            d_kv=self.width // self.heads,
            d_ff=2 * self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=0,
            eos_token_id=1,
        )
        return UMT5EncoderModel(config)
