"""Convolutions and Long-Short Range Attention: formats, refusals, and mutants that the laws must catch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention import (
    convolution_step,
    dynamic_convolution,
    lightweight_convolution,
    long_short_range_attention,
    multi_head_attention,
)
from refimpl.attention.lsra import sample_long_short
from refimpl.errors import DTypeError, ShapeError
from refimpl.memory import Memory
from tests.survivors import Mutants

registry.load()

SHAPE = {"B": 2, "T": 6, "H": 2, "D": 3, "R": 2, "K": 3, "left": 4, "right": 5}


def test_convolution_costs_are_linear_in_the_length() -> None:
    for f, w in ((lightweight_convolution, np.zeros((2, 3))), (dynamic_convolution, np.zeros((4, 2, 3)))):
        counted = []
        for T in (16, 32):
            memory = Memory()
            f(np.ones((1, T, 4)), w, memory=memory)
            counted.append((memory.flops, memory.elements_written))
        assert counted[1] == (2 * counted[0][0], 2 * counted[0][1])


@pytest.mark.parametrize(
    ("f", "shape"), [(lightweight_convolution, (2, 3)), (dynamic_convolution, (4, 2, 3))]
)
def test_decoding_is_the_causal_convolution_token_by_token(f: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, w, buffer = rng.standard_normal((2, 7, 4)), rng.standard_normal(shape), None
    whole = f(x, w, causal=True)
    for t in range(7):
        out, buffer = convolution_step(x[:, t], w, buffer)
        np.testing.assert_allclose(out, whole[:, t], rtol=1e-13, atol=1e-14)
    assert buffer.shape == (2, 2, 4)
    with pytest.raises(ShapeError, match="buffer"):
        convolution_step(x[:, 0], w, buffer[:, :1])
    with pytest.raises(ShapeError, match="2 axes"):
        convolution_step(x, w)


def test_float16_is_summed_in_float32() -> None:
    x = np.full((1, 4096, 1), 1.0, np.float16)
    out = lightweight_convolution(x, np.zeros((1, 4096), np.float16), causal=True)
    assert out.dtype == np.float16
    assert out[0, -1, 0] == 1.0


@pytest.mark.parametrize(
    ("error", "f", "x", "w"),
    [
        (ShapeError, lightweight_convolution, np.ones((1, 3, 4)), np.ones((3, 2))),
        (ShapeError, lightweight_convolution, np.ones((1, 3, 4)), np.ones((4, 2, 2))),
        (ShapeError, lightweight_convolution, np.ones((1, 3, 4)), np.ones((2, 0))),
        (ShapeError, dynamic_convolution, np.ones((1, 3, 4)), np.ones((3, 2, 2))),
        (ShapeError, dynamic_convolution, np.ones((1, 3, 4)), np.ones((2, 2))),
        (DTypeError, lightweight_convolution, np.ones((1, 3, 4), bool), np.ones((2, 2))),
    ],
)
def test_convolution_refuses(error: type[Exception], f: Any, x: Any, w: Any) -> None:
    with pytest.raises(error):
        f(x, w)


@pytest.mark.parametrize(
    ("error", "index", "shape"),
    [
        (ShapeError, 0, (2, 6, 10)),
        (ShapeError, 5, (5, 7)),
        (ShapeError, 7, (5, 5)),
        (ShapeError, 6, (3, 3)),
        (DTypeError, "key_mask", (2, 6)),
        (ShapeError, "b_in", (4,)),
    ],
)
def test_lsra_refuses(error: type[Exception], index: Any, shape: tuple[int, ...]) -> None:
    case = sample_long_short(np.random.default_rng(0), **SHAPE)
    args, options = list(case.args), dict(case.kwargs)
    if isinstance(index, int):
        args[index] = np.ones(shape)
    else:
        options[index] = np.ones(shape)
    with pytest.raises(error):
        long_short_range_attention(*args, **options)


MUTANTS = Mutants()
mutant = MUTANTS.of


LIGHT, DYNAMIC, LSRA = (
    f"attention.{name}" for name in ("lightweight_convolution", "dynamic_convolution", "lsra")
)


@mutant(LIGHT)
def weights_not_normalised(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    return lightweight_convolution(x, w, causal=causal) * np.exp(w).sum(-1).repeat(x.shape[2] // len(w))


@mutant(LIGHT)
def kernel_flipped_as_in_signal_processing(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    return lightweight_convolution(x, w[:, ::-1], causal=causal)


@mutant(LIGHT)
def even_kernels_reach_left(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    if causal or w.shape[1] % 2:
        return lightweight_convolution(x, w, causal=causal)
    return lightweight_convolution(x[:, ::-1], w[:, ::-1])[:, ::-1]


@mutant(LIGHT)
def causal_ignored(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    return lightweight_convolution(x, w)


@mutant(LIGHT)
def channels_interleaved_over_heads(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    order = np.arange(x.shape[2]).reshape(-1, len(w)).T.ravel()
    out = np.empty_like(x)
    out[:, :, order] = lightweight_convolution(x[:, :, order], w, causal=causal)
    return out


@mutant(LIGHT)
def renormalised_at_the_ends(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    inside = lightweight_convolution(np.ones_like(x), w, causal=causal)
    return lightweight_convolution(x, w, causal=causal) / inside


@mutant(LIGHT)
def sequence_wrapped(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    K = w.shape[1]
    twice = np.concatenate([x[:, -K:], x, x[:, :K]], axis=1)
    return lightweight_convolution(twice, w, causal=causal)[:, min(K, x.shape[1]) :][:, : x.shape[1]]


@mutant(DYNAMIC)
def kernels_of_the_token_before(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    wide = np.concatenate([x, np.roll(x, 1, axis=1)], axis=2)
    half = np.concatenate([np.zeros_like(w), w])
    heads = np.concatenate([half, half], axis=1)
    return dynamic_convolution(wide, heads, causal=causal)[:, :, : x.shape[2]]


@mutant(DYNAMIC)
def one_kernel_for_all_tokens(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    if not x.size:
        return dynamic_convolution(x, w, causal=causal)
    return lightweight_convolution(x, np.einsum("d,dhk->hk", x.mean(axis=(0, 1)), w), causal=causal)


@mutant(DYNAMIC)
def kernels_flipped(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    return dynamic_convolution(x, w[:, :, ::-1], causal=causal)


@mutant(DYNAMIC)
def heads_reversed(x: Any, w: Any, /, *, causal: bool = False) -> Any:
    return dynamic_convolution(x, w[:, ::-1], causal=causal)


@mutant(LSRA)
def branches_exchanged(*args: Any, **options: Any) -> Any:
    out = long_short_range_attention(*args, **options)
    width = args[4].shape[1]
    return np.concatenate([out[..., width:], out[..., :width]], axis=-1)


@mutant(LSRA)
def channels_taken_from_the_end(x: Any, *weights: Any, **options: Any) -> Any:
    return long_short_range_attention(x[..., ::-1], *weights, **options)


@mutant(LSRA)
def attention_to_all_channels(x: Any, *weights: Any, **options: Any) -> Any:
    left = weights[0].shape[0]
    mixed = np.concatenate([x[..., :left] + 0.1 * x.mean(axis=-1, keepdims=True), x[..., left:]], axis=-1)
    return long_short_range_attention(mixed, *weights, **options)


@mutant(LSRA)
def gates_and_values_exchanged(x: Any, *weights: Any, **options: Any) -> Any:
    w = list(weights)
    w[4] = np.roll(w[4], w[6].shape[0], axis=1)
    return long_short_range_attention(x, *w, **options)


@mutant(LSRA)
def padding_left_in_the_convolution(x: Any, *weights: Any, key_mask: Any = None, **options: Any) -> Any:
    out = long_short_range_attention(x, *weights, **options)
    width = weights[3].shape[1]
    out[..., :width] = long_short_range_attention(x, *weights, key_mask=key_mask, **options)[..., :width]
    return out


@mutant(LSRA)
def padding_left_in_the_keys(x: Any, *weights: Any, key_mask: Any = None, **options: Any) -> Any:
    out = long_short_range_attention(x, *weights, key_mask=key_mask, **options)
    width = weights[3].shape[1]
    out[..., :width] = long_short_range_attention(x, *weights, **options)[..., :width]
    return out


@mutant(LSRA)
def only_the_attention_is_causal(x: Any, *weights: Any, causal: bool = False, **options: Any) -> Any:
    out = long_short_range_attention(x, *weights, causal=causal, **options)
    width = weights[3].shape[1]
    out[..., width:] = long_short_range_attention(x, *weights, **options)[..., width:]
    return out


@mutant(LSRA)
def scaled_by_the_width_of_all_heads(x: Any, *weights: Any, num_heads: int, **options: Any) -> Any:
    out = long_short_range_attention(x, *weights, num_heads=num_heads, **options)
    width, left = weights[3].shape[1], weights[0].shape[0]
    named = {name: value for name, value in options.items() if name in ("b_q", "b_k", "b_v", "b_o", "causal")}
    if "key_mask" in options:
        named["attn_mask"] = options["key_mask"][:, None, None, :]
    scale = weights[0].shape[1] ** -0.5
    out[..., :width] = multi_head_attention(
        x[..., :left], *weights[:4], num_heads=num_heads, scale=scale, **named
    )
    return out


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
