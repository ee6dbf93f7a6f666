"""A tokenizer for the tiny models: one token per printable character."""

from __future__ import annotations

from tiny_models import VOCAB_SIZE
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def characters_tokenizer() -> PreTrainedTokenizerFast:
    """Its vocabulary is as large as that of the tiny models."""
    words = ["<pad>", "<s>", "</s>", *map(chr, range(33, 127))]
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == VOCAB_SIZE
    characters = Tokenizer(models.BPE(vocabulary, merges=[]))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
