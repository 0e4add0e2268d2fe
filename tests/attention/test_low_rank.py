"""Low-rank attention: what it saves, large scores, refusals, and mutants that the laws must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention import low_rank_attention, scaled_dot_product_attention, standard_attention
from refimpl.compress import truncated_svd
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from tests.survivors import laws_that_catch

registry.load()


def _call(T: int = 6, R: int = 3, heads: int = 2) -> list[Any]:
    rng = np.random.default_rng(T)
    tokens = [rng.standard_normal((2, T, heads, 4)) for _ in range(3)]
    return [*tokens, *(rng.standard_normal((heads, R, T)) for _ in range(2))]


def test_cost_is_linear_in_the_length() -> None:
    counted = []
    for T in (32, 64):
        low, full = Memory(), Memory()
        arrays = _call(T, R=8)
        low_rank_attention(*arrays, memory=low)
        standard_attention(*arrays[:3], memory=full)
        counted.append((low.elements_read + low.elements_written, low.flops, full.elements_read))
    assert counted[1][:2] == (2 * counted[0][0], 2 * counted[0][1])
    assert counted[1][2] > 3 * counted[0][2]


def test_every_output_mixes_the_future() -> None:
    """Why there is no causal form: a change of the last value moves the first output."""
    q, k, v, e, f = _call()
    other = v.copy()
    other[:, -1] += 1.0
    assert np.all(low_rank_attention(q, k, v, e, f)[:, 0] != low_rank_attention(q, k, other, e, f)[:, 0])


def test_scores_of_ten_thousand_do_not_overflow() -> None:
    q, k, v, e, f = (x.astype(np.float16) for x in _call())
    out = low_rank_attention(q * np.float16(1000), k * np.float16(10), v, e, f)
    assert out.dtype == np.float16
    assert np.isfinite(out).all()


def test_nothing_is_lost_where_keys_repeat() -> None:
    """Four keys, each there twice, are four mixtures: the means of the pairs.  They span four directions."""
    q, k, v, _, _ = _call(T=8)
    k, v = (np.repeat(x[:, :4], 2, axis=1) for x in (k, v))
    pairs = np.kron(np.eye(4), np.full((1, 2), 0.5))[None]
    np.testing.assert_allclose(
        low_rank_attention(q, k, v, pairs, pairs), scaled_dot_product_attention(q, k, v), rtol=1e-12
    )
    left, right = truncated_svd(k[0, :, 0], rank=4)
    np.testing.assert_allclose(left @ right.T, k[0, :, 0], atol=1e-13)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (ShapeError, {"e": np.ones((2, 3, 7)), "f": np.ones((2, 3, 7))}),
        (ShapeError, {"e": np.ones((3, 3, 6)), "f": np.ones((3, 3, 6))}),
        (ShapeError, {"f": np.ones((2, 4, 6))}),
        (ShapeError, {"key_mask": np.ones((2, 5), bool)}),
        (DTypeError, {"key_mask": np.ones((2, 6))}),
        (OptionError, {"scale": np.inf}),
    ],
)
def test_refusals(error: type[Exception], change: dict[str, Any]) -> None:
    q, k, v, e, f = _call()
    options = {name: value for name, value in change.items() if name not in ("e", "f")}
    with pytest.raises(error):
        low_rank_attention(q, k, v, change.get("e", e), change.get("f", f), **options)


MUTANTS: dict[str, Callable[..., Any]] = {}


def mutant(f: Callable[..., Any]) -> Callable[..., Any]:
    MUTANTS[f.__name__] = f
    return f


@mutant
def projections_exchanged(q: Any, k: Any, v: Any, e: Any, f: Any, /, **options: Any) -> Any:
    return low_rank_attention(q, k, v, f, e, **options)


@mutant
def one_projection_for_both(q: Any, k: Any, v: Any, e: Any, f: Any, /, **options: Any) -> Any:
    return low_rank_attention(q, k, v, e, e, **options)


@mutant
def projection_of_the_first_head(q: Any, k: Any, v: Any, e: Any, f: Any, /, **options: Any) -> Any:
    return low_rank_attention(q, k, v, e[:1], f[:1], **options)


@mutant
def scaled_by_the_rank(
    q: Any, k: Any, v: Any, e: Any, f: Any, /, *, scale: Any = None, **options: Any
) -> Any:
    factor = max(e.shape[1], 1) ** -0.5 if scale is None else scale
    return low_rank_attention(q, k, v, e, f, scale=factor, **options)


@mutant
def padding_left_in(
    q: Any, k: Any, v: Any, e: Any, f: Any, /, *, key_mask: Any = None, **options: Any
) -> Any:
    return low_rank_attention(q, k, v, e, f, **options)


@mutant
def padding_left_in_the_values(
    q: Any, k: Any, v: Any, e: Any, f: Any, /, *, key_mask: Any = None, **options: Any
) -> Any:
    kept = k if key_mask is None else np.where(key_mask[:, :, None, None], k, 0)
    return low_rank_attention(q, kept, v, e, f, **options)


@mutant
def weights_not_normalised(
    q: Any, k: Any, v: Any, e: Any, f: Any, /, *, key_mask: Any = None, scale: Any = None
) -> Any:
    out = low_rank_attention(q, k, v, e, f, key_mask=key_mask, scale=scale)
    return out * max(e.shape[1], 1)


@mutant
def queries_averaged(q: Any, k: Any, v: Any, e: Any, f: Any, /, **options: Any) -> Any:
    return low_rank_attention(q + 0.1 * np.roll(q, 1, axis=1), k, v, e, f, **options)


@mutant
def heads_interleaved(q: Any, k: Any, v: Any, e: Any, f: Any, /, **options: Any) -> Any:
    group = q.shape[2] // k.shape[2]
    e, f = (np.broadcast_to(x, (k.shape[2], *x.shape[1:])) for x in (e, f))
    return low_rank_attention(
        q,
        *(np.tile(x, (1, 1, group, 1)) for x in (k, v)),
        *(np.tile(x, (group, 1, 1)) for x in (e, f)),
        **options,
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    assert laws_that_catch("attention.low_rank", MUTANTS[name])
