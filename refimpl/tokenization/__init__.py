"""Tokenisation: text as subwords, learned by byte-pair encoding."""

from refimpl.tokenization.bpe import decode, encode, encode_in_learned_order, token_bytes, train_bpe
from refimpl.tokenization.split import chunks_of, split_gpt2

__all__ = [
    "chunks_of",
    "decode",
    "encode",
    "encode_in_learned_order",
    "split_gpt2",
    "token_bytes",
    "train_bpe",
]
