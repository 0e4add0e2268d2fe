"""Linear attention: its forms against each other, decoding, traffic, and mutants that the laws must catch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention import (
    LinearState,
    linear_attention,
    linear_attention_chunked,
    linear_attention_parallel,
    linear_attention_step,
    linear_attention_vjp,
)
from refimpl.attention.linear_call import elu_feature_map
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from tests.survivors import laws_that_catch

registry.load()


def _tokens(T: int, H: int = 1, D: int = 4, dtype: Any = np.float64) -> Any:
    return np.random.default_rng(T).standard_normal((2, T, H, D)).astype(dtype)


def test_decoding_is_the_causal_form_token_by_token() -> None:
    q, k, v = _tokens(11, H=4), _tokens(11, H=2), _tokens(11, H=2, D=3)
    whole, state = linear_attention(q, k, v, causal=True), None
    for t in range(11):
        out, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state)
        np.testing.assert_allclose(out, whole[:, t], rtol=1e-13)
    assert state is not None
    assert state.S.size + state.z.size == 2 * 2 * 4 * (3 + 1)


def test_the_state_is_float32_for_float16_tokens() -> None:
    """4096 keys of feature 2 sum to 8192; float16 would stop at 4096, where its spacing is 4."""
    ones = np.ones((1, 1, 1), np.float16)
    state = LinearState(np.full((1, 1, 1, 1), 8190, np.float32), np.full((1, 1, 1), 8190, np.float32))
    out, state = linear_attention_step(ones, ones, ones, state)
    assert out.dtype == np.float16
    assert (state.S.dtype, state.S.item(), state.z.item()) == (np.float32, 8192.0, 8192.0)


def test_a_step_refuses_a_state_of_another_shape() -> None:
    x = np.ones((1, 2, 3))
    _, state = linear_attention_step(x, x, x)
    with pytest.raises(ShapeError, match="z: axis D"):
        linear_attention_step(x, x, x, LinearState(state.S, state.z[..., :2]))


def test_chunks_are_fast_and_small_at_great_length() -> None:
    """65,536 tokens take well under a second on one core; the square of scores would be 16 GB."""
    x = _tokens(65_536, D=64, dtype=np.float32)[:1]
    start = time.perf_counter()
    memory = Memory()
    out = linear_attention_chunked(x, x, x, causal=True, memory=memory)
    assert time.perf_counter() - start < 10  # generous: CI shares its cores
    assert memory.peak < 64 * (3 * 64 + 2 * 64)
    first = linear_attention_parallel(x[:, :64], x[:, :64], x[:, :64], causal=True)
    np.testing.assert_allclose(out[:, :64], first, rtol=1e-5, atol=1e-6)


def test_traffic_is_linear_and_the_state_constant() -> None:
    counted = []
    for T in (64, 128):
        memory, x = Memory(), _tokens(T)
        linear_attention(x, x, x, causal=True, memory=memory)
        counted.append((memory.elements_read + memory.elements_written, memory.flops, memory.state))
    assert counted[1][0] == 2 * counted[0][0] == 2 * 4 * x[:, :64].size
    assert counted[1][1] == 2 * counted[0][1]
    assert counted[1][2] == counted[0][2]


def test_features_stay_positive_where_elu_plus_one_rounds_to_zero() -> None:
    x = np.float32([-20.0, -80.0])
    assert np.all(elu_feature_map(x) > 0)
    assert np.all(np.expm1(x) + np.float32(1) == 0)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (OptionError, {"eps": -1e-6}),
        (OptionError, {"causal": True}),
        (OptionError, {"causal": "left"}),
        (DTypeError, {"key_mask": np.ones((2, 5))}),
        (ShapeError, {"key_mask": np.ones((2, 4), bool)}),
    ],
)
@pytest.mark.parametrize("form", [linear_attention, linear_attention_chunked, linear_attention_parallel])
def test_refusals(form: Callable[..., Any], error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error):
        form(_tokens(4), _tokens(5), _tokens(5), **options)


def test_the_gradient_is_that_of_autograd_in_each_dtype() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, do = (_tokens(n) for n in (9, 9, 9, 9))
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    x, y = (torch.nn.functional.elu(leaf) + 1 for leaf in leaves[:2])
    scores = torch.einsum("nihd,njhd->nhij", x, y).tril()
    out = torch.einsum("nhij,njhe->nihe", scores, leaves[2])
    (out / (scores.sum(-1).transpose(1, 2)[..., None] + 1e-6)).backward(torch.from_numpy(do))
    found = linear_attention_vjp(q, k, v, do, causal=True, chunk_size=4)
    for gradient, leaf in zip(found[:3], leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-11, atol=1e-13)
    narrow = linear_attention_vjp(*(x.astype(np.float16) for x in (q, k, v, do)), causal=True)
    assert all(gradient.dtype == np.float16 for gradient in narrow[:3])


MUTANTS: dict[str, Callable[..., Any]] = {}


def mutant(f: Callable[..., Any]) -> Callable[..., Any]:
    MUTANTS[f.__name__] = f
    return f


@mutant
def scaled_as_softmax_attention_is(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return linear_attention(q * q.shape[3] ** -0.5, k, v, **options)


@mutant
def relu_plus_one_for_a_feature_map(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return linear_attention(np.maximum(q, 0), np.maximum(k, 0), v, **options)


@mutant
def elu_without_the_one(q: Any, k: Any, v: Any, /, *, eps: float = 1e-6) -> Any:
    x, y = elu_feature_map(q) - 1, elu_feature_map(k) - 1
    y, w = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (y, v))
    scores = np.einsum("bihd,bjhd->bhij", x, y)
    return np.einsum("bhij,bjhe->bihe", scores, w) / (scores.sum(-1).swapaxes(1, 2)[..., None] + eps)


@mutant
def eps_forgotten(q: Any, k: Any, v: Any, /, *, eps: float = 1e-6, **options: Any) -> Any:
    return linear_attention(q, k, v, eps=0.0, **options)


@mutant
def eps_as_a_floor(q: Any, k: Any, v: Any, /, *, eps: float = 1e-6, **options: Any) -> Any:
    ones = linear_attention(q, k, np.ones_like(v[..., :1]), eps=1.0, **options)
    total = ones / (1.0 - ones)  # n / (n + 1) = ones
    return linear_attention(q, k, v, eps=0.0, **options) * np.minimum(1.0, total / (eps or 1e-300))


@mutant
def not_normalised(q: Any, k: Any, v: Any, /, *, eps: float = 1e-6, **options: Any) -> Any:
    ones = linear_attention(q, k, np.ones_like(v[..., :1]), eps=1.0, **options)
    return linear_attention(q, k, v, eps=1.0, **options) / (1.0 - ones)


@mutant
def the_token_itself_left_out(q: Any, k: Any, v: Any, /, *, causal: Any = False, **options: Any) -> Any:
    if causal != "bottom_right":
        return linear_attention(q, k, v, causal=causal, **options)
    return linear_attention(q, k[:, :-1], v[:, :-1], causal=causal, **_shorter(options))


@mutant
def one_token_ahead(q: Any, k: Any, v: Any, /, *, causal: Any = False, **options: Any) -> Any:
    if causal != "top_left":
        return linear_attention(q, k, v, causal=causal, **options)
    mask = np.tri(q.shape[1], k.shape[1], 1)
    y = elu_feature_map(k) * np.asarray(options.get("key_mask", np.ones(k.shape[:2])))[:, :, None, None]
    y, w = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (y, v))
    scores = np.einsum("bihd,bjhd->bhij", elu_feature_map(q), y) * mask
    total = scores.sum(-1).swapaxes(1, 2)[..., None] + options.get("eps", 1e-6)
    return np.einsum("bhij,bjhe->bihe", scores, w) / np.where(total == 0, 1, total)


@mutant
def the_other_corner(q: Any, k: Any, v: Any, /, *, causal: Any = False, **options: Any) -> Any:
    other = {"top_left": "bottom_right", "bottom_right": "top_left"}.get(causal, causal)
    return linear_attention(q, k, v, causal=other, **options)


@mutant
def padding_masks_values_only(q: Any, k: Any, v: Any, /, *, key_mask: Any = None, **options: Any) -> Any:
    kept = v if key_mask is None else v * key_mask[:, :, None, None]
    return linear_attention(q, k, kept, **options)


@mutant
def padding_inverted(q: Any, k: Any, v: Any, /, *, key_mask: Any = None, **options: Any) -> Any:
    return linear_attention(q, k, v, key_mask=None if key_mask is None else ~key_mask, **options)


@mutant
def heads_interleaved(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    group = q.shape[2] // k.shape[2]
    return linear_attention(q, np.tile(k, (1, 1, group, 1)), np.tile(v, (1, 1, group, 1)), **options)


def _shorter(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:, :-1] if name == "key_mask" else value for name, value in options.items()}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    assert laws_that_catch("attention.linear", MUTANTS[name])


@pytest.mark.parametrize("name", ["border_of_chunks", "state_late", "state_early"])
def test_mutant_of_the_chunked_form(name: str) -> None:
    def broken(
        q: Any, k: Any, v: Any, /, *, chunk_size: int = 64, causal: Any = False, **options: Any
    ) -> Any:
        out = linear_attention(q, k, v, causal=causal, **options)
        if causal and q.shape[1] > chunk_size:
            size = {"border_of_chunks": 0, "state_late": 1, "state_early": -1}[name]
            first = slice(chunk_size, chunk_size + 1)
            keys = slice(chunk_size, None) if not size else slice(0, max(chunk_size - size, 0))
            if "key_mask" in options:
                options = {**options, "key_mask": options["key_mask"][:, keys]}
            out[:, first] = linear_attention(q[:, first], k[:, keys], v[:, keys], **options)
        return out

    assert laws_that_catch("attention.linear_chunked", broken)
