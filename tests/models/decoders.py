"""Two small byte-level decoders with trained weights: a target, and a draft for speculative decoding.

`train_decoder.py` makes the files beside this one from `corpus.txt`, with the gradients and the Adam of this
project and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.safetensors_format import read_tensors
from refimpl.transformer import DecoderConfig

HERE = Path(__file__).parent

TARGET = DecoderConfig(width=72, layers=2, num_heads=4, num_kv_heads=2, hidden=200)
DRAFT = DecoderConfig(width=32, layers=1, num_heads=2, hidden=96)
CONFIGS = {"decoder": TARGET, "draft": DRAFT}


def load(name: str, dtype: type = np.float32) -> tuple[dict[str, FloatArray], DecoderConfig]:
    """Return parameters and configuration of ``"decoder"`` or ``"draft"``."""
    tensors = read_tensors(HERE / f"{name}.safetensors")
    return {key: array.astype(dtype) for key, array in tensors.items()}, CONFIGS[name]


def tokens_of(text: str) -> FloatArray:
    """Return the bytes of a text as tokens, shape (1, T)."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)[None]


def text_of(tokens: FloatArray) -> str:
    """Return tokens as text."""
    return bytes(np.asarray(tokens, np.uint8).ravel().tolist()).decode(errors="replace")
