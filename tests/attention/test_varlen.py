"""Packed sequences: wrong functions are caught, wrong calls refused; gradients; the mask form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import attention, registry
from refimpl.attention.varlen import key_ranges, packing
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.testing import check

registry.load()
STARTS, KEY_STARTS = np.array([0, 3, 3, 7]), np.array([0, 2, 4, 9])
CLOSE = 1e-12  # float64, sums of 5 terms of size 1


def draws() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((n, h, 3)) for n, h in ((9, 2), (10, 1), (10, 1), (9, 2)))


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_gradients_of_both_forms_agree(causal: Any) -> None:
    q, k, v, do = draws()
    options: dict[str, Any] = {"causal": causal, "softcap": 1.5, "scale": 0.7, "window_size": (1, 2)}
    given = q, k, v, STARTS, KEY_STARTS, do
    found = attention.varlen_attention_masked_vjp(*given, **options)
    wanted = attention.varlen_attention_vjp(*given, **options)
    for name in ("dq", "dk", "dv"):
        assert np.abs(getattr(found, name) - getattr(wanted, name)).max() < CLOSE
    assert not wanted.dq[7:].any()
    assert not wanted.dk[9:].any()


def test_ranges_of_keys_by_hand() -> None:
    """Sequences of 3, 0, 4 queries and 2, 2, 5 keys, and two tokens of padding."""
    q, k, v, _ = draws()
    pack = packing(q, k, v, STARTS, KEY_STARTS)
    every = [(0, 2)] * 3 + [(4, 9)] * 4 + [(0, 0)] * 2
    top = [(0, 1), (0, 2), (0, 2), (4, 5), (4, 6), (4, 7), (4, 8), (0, 0), (0, 0)]
    bottom = [(0, 0), (0, 1), (0, 2), (4, 6), (4, 7), (4, 8), (4, 9), (0, 0), (0, 0)]
    for causal, expected in ((False, every), ("top_left", top), ("bottom_right", bottom)):
        assert list(zip(*map(np.ndarray.tolist, key_ranges(pack, causal)), strict=True)) == expected  # type: ignore[arg-type]


def test_windows_by_hand() -> None:
    """As above, a window around each query; by default places are counted from the ends."""
    q, k, v, _ = draws()
    pack, padding = packing(q, k, v, STARTS, KEY_STARTS), [(0, 0), (0, 0)]
    cases: tuple[Any, ...] = (
        (False, (1, 0), [(0, 0), (0, 1), (0, 2), (4, 6), (5, 7), (6, 8), (7, 9), *padding]),
        (False, (0, 1), [(0, 1), (0, 2), (1, 2), (5, 7), (6, 8), (7, 9), (8, 9), *padding]),
        (False, (-1, 0), [(0, 0), (0, 1), (0, 2), (4, 6), (4, 7), (4, 8), (4, 9), *padding]),
        ("bottom_right", (1, 7), [(0, 0), (0, 1), (0, 2), (4, 6), (5, 7), (6, 8), (7, 9), *padding]),
        ("top_left", (0, -1), [(0, 1), (1, 2), (2, 2), (4, 5), (5, 6), (6, 7), (7, 8), *padding]),
    )
    for causal, window, expected in cases:
        first, behind = (x.tolist() for x in key_ranges(pack, causal, window))
        assert list(zip(first, behind, strict=True)) == expected, (causal, window)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 3, 2, 7]}, OptionError, "cu_seqlens_q: expected sums of lengths"),
        ({"cu_seqlens_q": [1, 3, 3, 7]}, OptionError, "from 0 to at most 9 tokens"),
        ({"cu_seqlens_k": [0, 2, 4, 11]}, OptionError, "cu_seqlens_k: expected sums of lengths"),
        ({"cu_seqlens_k": [0, 2, 9]}, ShapeError, "expected 3 sequences, as cu_seqlens_q, got 2"),
        ({"cu_seqlens_k": [0.0, 2.0, 4.0, 9.0]}, DTypeError, "cu_seqlens_k: expected integers"),
        ({"cu_seqlens_q": []}, DTypeError, "cu_seqlens_q: expected integers"),
        ({"cu_seqlens_q": np.zeros((2, 2), int)}, ShapeError, r"expected shape \(sequences \+ 1,\)"),
        ({"causal": True}, OptionError, "causal: True is ambiguous"),
        ({"causal": "left"}, OptionError, "causal: expected False, True"),
        ({"window_size": (-2, 0)}, OptionError, "window_size: expected at least -1, got -2"),
        ({"window_size": 3}, OptionError, "window_size: expected two numbers, left and right, got 3"),
        ({"window_size": (1.5, 0)}, DTypeError, "window_size: expected a whole number"),
        ({"k": np.ones((10, 1, 4))}, ShapeError, "axis D"),
        ({"q": np.ones((1, 9, 2, 3))}, ShapeError, "q: expected 3 axes"),
    ],
)
@pytest.mark.parametrize("f", [attention.varlen_attention, attention.varlen_attention_masked])
def test_what_is_refused(f: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, _ = draws()
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": STARTS, "cu_seqlens_k": KEY_STARTS} | change
    options = {name: given.pop(name) for name in ("causal", "window_size") if name in given}
    with pytest.raises(error, match=message):
        f(*given.values(), **options)


MUTANTS: dict[str, Callable[..., Any]] = {}


def mutant(f: Any) -> Any:
    MUTANTS[f.__name__] = f
    return f


@mutant
def sequences_meet(q: Any, k: Any, v: Any, starts: Any, key_starts: Any, /, **options: Any) -> Any:
    ends = (np.array([0, x[-1]]) for x in (starts, key_starts))
    return attention.varlen_attention(q, k, v, *ends, **options)


@mutant
def padding_is_of_the_last_sequence(q: Any, k: Any, v: Any, starts: Any, keys: Any, /, **options: Any) -> Any:
    longer = (np.append(x[:-1], len(y)) if len(x) > 1 else x for x, y in ((starts, q), (keys, k)))
    return attention.varlen_attention(q, k, v, *longer, **options)


@mutant
def alignments_exchanged(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    other = {"top_left": "bottom_right", "bottom_right": "top_left"}
    causal = options.pop("causal", False)
    return attention.varlen_attention(q, k, v, *starts, causal=other.get(causal, causal), **options)


@mutant
def offset_of_the_whole_batch(q: Any, k: Any, v: Any, starts: Any, keys: Any, /, **options: Any) -> Any:
    """Causal by places in the packed arrays, not in the sequence."""
    if options.get("causal") != "bottom_right" or options.get("softcap") or "window_size" in options:
        return attention.varlen_attention(q, k, v, starts, keys, **options)
    home = [np.searchsorted(x, np.arange(n), "right") for x, n in ((starts, len(q)), (keys, len(k)))]
    mask = (home[0][:, None] == home[1]) & (home[0][:, None] < len(starts))
    mask &= np.arange(len(k)) <= np.arange(len(q))[:, None] + len(k) - len(q)
    out, lse = attention.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, scale=options.get("scale"), return_lse=True
    )
    return attention.AttentionOutput(out[0], lse[0]) if options.get("return_lse") else out[0]


@mutant
def windows_count_the_own_key(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    left, right = options.pop("window_size", (-1, -1))
    window = (left - 1 if left > 0 else left, right)
    return attention.varlen_attention(q, k, v, *starts, window_size=window, **options)


@mutant
def windows_have_their_sides_exchanged(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    sides = options.pop("window_size", (-1, -1))
    return attention.varlen_attention(q, k, v, *starts, window_size=sides[::-1], **options)


@mutant
def windows_of_one_side_are_none(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    if -1 in options.get("window_size", ()):
        del options["window_size"]
    return attention.varlen_attention(q, k, v, *starts, **options)


@mutant
def empty_sequences_are_dropped(q: Any, k: Any, v: Any, starts: Any, keys: Any, /, **options: Any) -> Any:
    """Of queries alone: the keys of later sequences then belong to others."""
    kept = np.concatenate([[True], np.diff(starts) > 0])
    starts = starts[kept]
    return attention.varlen_attention(q, k, v, starts, keys[: len(starts)], **options)


@mutant
def log_sum_exp_with_tokens_first(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    found: Any = attention.varlen_attention(q, k, v, *starts, **options)
    return found._replace(lse=found.lse.T) if options.get("return_lse") else found


@mutant
def softcap_is_forgotten(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    return attention.varlen_attention(q, k, v, *starts, **{**options, "softcap": None})


@mutant
def rows_without_keys_are_averages(q: Any, k: Any, v: Any, /, *starts: Any, **options: Any) -> Any:
    found: Any = attention.varlen_attention(q, k, v, *starts, **{**options, "return_lse": True})
    alone = np.isneginf(found.lse).T[..., None]
    out = np.where(alone, v.mean(axis=(0, 1)) if len(v) else 1.0, found.out)
    return found._replace(out=out) if options.get("return_lse") else out


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    assert check("attention.varlen", MUTANTS[name], examples=12).failed
