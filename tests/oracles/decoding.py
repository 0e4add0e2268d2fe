"""Oracles of speculative decoding: exact fractions of the draws, and texts read afresh for every token."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles.transformer_blocks import _norm_row, decoder_in_loops


def _drawn(law: list[Fraction], u: Fraction) -> int:
    """The first token at which the running sum passes the share u of the total."""
    total, mass = sum(law), Fraction(0)
    for token, share in enumerate(law):
        mass += share
        if u * total < mass:
            return token
    raise AssertionError("u is below 1")


@oracle("decoding.speculative")
def rounds_in_fractions(drafted: Any, draft: Any, target: Any, /, *, uniforms: Any) -> Any:
    """Algorithm 1, sequence by sequence and draft by draft, without any rounding."""
    B, K = drafted.shape
    tokens, accepted = np.full((B, K + 1), -1), np.zeros(B, np.int64)
    for b in range(B):
        u = [Fraction(float(number)) for number in uniforms[b]]
        n = 0
        while n < K:
            x = drafted[b, n]
            d, t = Fraction(float(draft[b, n, x])), Fraction(float(target[b, n, x]))
            if u[n] >= t / d:
                break
            tokens[b, n] = x
            n += 1
        law = [Fraction(float(share)) for share in target[b, n]]
        if n < K:
            rest = [max(t - Fraction(float(d)), Fraction(0)) for t, d in zip(law, draft[b, n], strict=True)]
            law = rest if any(rest) else law
        tokens[b, n], accepted[b] = _drawn(law, u[K]), n
    return tokens, accepted


def _logits(text: list[int], params: Any, config: Any) -> Any:
    """Logits after the last token of a text, the whole of it read block by block in loops."""
    learned = config.positions == "learned"
    x = np.array([params["embedding"][token] for token in text])
    if learned:
        x = x + params["positions"][: len(text)]
    x = x[None]
    slopes = [2.0 ** (-8 * (h + 1) / config.num_heads) for h in range(config.num_heads)]
    given = {
        "num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "order": "pre",
        "activation": "silu", "eps": config.eps,
    }  # fmt: skip
    if config.positions == "alibi":
        given["alibi_slopes"] = slopes
    elif not learned:
        given["rope"] = config.positions
    for layer in range(config.layers):
        prefix = f"layers.{layer}."
        own = {k.removeprefix(prefix): array for k, array in params.items() if k.startswith(prefix)}
        x = decoder_in_loops(x, **given, **own)
    state = _norm_row(list(x[0, -1]), params["gamma"], params.get("beta"), config.eps)
    return [sum(a * b for a, b in zip(state, row, strict=True)) for row in params["embedding"]]


@oracle("decoding.verification")
def texts_read_afresh(
    prefix: Any, drafted: Any, following: Any, /, *, params: Any, config: Any, accepted: int
) -> Any:
    """No cache and no pass over several tokens: each row from the text that it follows, read as a whole."""
    if config.layers > 1 or prefix.shape[1] + drafted.shape[1] > 5:
        raise NotImplementedError("short texts and one layer: loops take their time")
    logits, resumed = [], []
    for b in range(len(prefix)):
        before, drafts, after = (rows[b].tolist() for rows in (prefix, drafted, following))
        logits.append([_logits(before + drafts[:i], params, config) for i in range(len(drafts) + 1)])
        text = before + drafts[:accepted]
        resumed.append([_logits(text + after[: i + 1], params, config) for i in range(len(after))])
    return np.array(logits), np.array(resumed)
