"""A transformer of three layers, trained on a sequence that can be learned, with one attention or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAYERS = 3
TOKENS = 32  # of the vocabulary


def losses(
    attend: Callable[[Any, Any, Any], Any],
    *,
    device: str,
    dtype: str,
    steps: int,
    length: int,
    batch: int,
    heads: int,
    width: int,
) -> list[float]:
    """Return the loss of each step; `attend` gets q, k, v [B, T, H, D], and masks what comes later.

    Weights are in float32 (float64 if `dtype` is), attention gets numbers of `dtype`.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    size, kind = heads * width, getattr(torch, dtype)
    master = torch.float64 if dtype == "float64" else torch.float32

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
            self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
            self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

        def forward(self, x: Any) -> Any:
            parts = self.qkv(self.first(x)).to(kind).unflatten(-1, (3, heads, width)).unbind(2)
            x = x + self.out(attend(*parts).flatten(2).to(master))
            return x + self.mlp(self.second(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(TOKENS, size), nn.Embedding(length, size)
            self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, TOKENS)

        def forward(self, tokens: Any) -> Any:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            return self.head(self.norm(self.layers(self.tokens(tokens) + self.places(places))))

    model = Model().to(device=device, dtype=master)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if size < 128 else 5e-4)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        text = _text(torch, generator, batch, length + 1).to(device)
        logits = model(text[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def _text(torch: Any, generator: Any, batch: int, length: int) -> Any:
    """Return tokens, each a step of the sequence's own, 1 to 3, behind the last; one in ten at random."""
    own = torch.randint(1, 4, (batch,), generator=generator)
    noise = torch.randint(0, TOKENS, (batch, length), generator=generator)
    random = torch.rand((batch, length), generator=generator) < 0.1
    text = noise.clone()
    for place in range(1, length):
        following = (text[:, place - 1] + own) % TOKENS
        text[:, place] = torch.where(random[:, place], noise[:, place], following)
    return text


def sdpa(q: Any, k: Any, v: Any) -> Any:
    """Return PyTorch's attention of [B, T, H, D]."""
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
