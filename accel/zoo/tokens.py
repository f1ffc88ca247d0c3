"""The tokenizer of digits-sd: a stock CLIPTokenizer in which every caption word is one token.

Byte pair encoding (Sennrich et al. 2016) in CLIP's form: bytes, bytes that end a word ("</w>"),
merges, then the two marks of begin and end. Any other word falls apart into known bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from accel.zoo.world import BACKGROUNDS, COLOURS, DIGITS, MOTIONS

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
LENGTH = 16  # tokens of a prompt, marks included; the longest caption has 11
WORDS = ("a", "an", "on", "background", "moving", *DIGITS, *COLOURS, *BACKGROUNDS, *MOTIONS)
MERGES_HEADER = "#version: 0.2"  # the first line of every merges.txt; readers skip it


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes (Radford et al. 2019), byte 0 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges, most frequent pair first, until each of the words is one symbol."""
    spelled = [(*word[:-1], word[-1] + END_OF_WORD) for word in words]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Number of each token, in CLIP's order."""
    symbols = byte_symbols()
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *(a + b for a, b in merges)]
    return {token: i for i, token in enumerate([*tokens, BEGIN, END])}


def build_tokenizer() -> CLIPTokenizer:
    """For prompts of up to `LENGTH` tokens, padded with the end mark as Stable Diffusion does."""
    merges = learn_merges(WORDS)
    return CLIPTokenizer(vocab=vocabulary(merges), merges=merges, model_max_length=LENGTH)


def write_tokenizer(folder: Path) -> None:
    """What any version of transformers reads: tokenizer.json, and vocab.json with merges.txt."""
    build_tokenizer().save_pretrained(folder)
    merges = learn_merges(WORDS)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False) + "\n")
    lines = [MERGES_HEADER, *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def phrase(digit: int, colour: int | None = None, background: int | None = None) -> str:
    """`world.caption` with parts left out: "a red three", "a three on a dark background"."""
    words = DIGITS[digit] if colour is None else f"{COLOURS[colour]} {DIGITS[digit]}"
    article = "an" if words[0] in "aeiou" else "a"
    ground = "" if background is None else f" on a {BACKGROUNDS[background]} background"
    return f"{article} {words}{ground}"
