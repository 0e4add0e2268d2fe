"""Hopper backward calls with functions of the user's from end to end, on a played machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.attention import flexible
from cuda_backend.attention.call_flexible_backward_hopper import flexible_attention_vjp_hopper
from cuda_backend.attention.user_device import Mods
from refimpl.attention import (
    block_mask,
    flexible_attention,
    flexible_attention_vjp,
    mods,
    varlen_attention,
    varlen_attention_vjp,
)
from refimpl.attention.block_mask import DEAD, FULL, BlockMask
from refimpl.attention.user_functions import as_mod
from refimpl.errors import OptionError, UnsupportedError
from tests.cuda.backward_hopper_played import played
from tests.cuda.hopper_machine import KINDS
from tests.cuda.int8_hopper_played import viewed

LIMITS = {"f16": 3e-3, "bf16": 2.5e-2}


def branching(b: int, h: int, i: int, j: int) -> bool:
    """Queries in thirds: none, some, and all keys."""
    if i % 3 == 0:
        return False
    return i % 3 == 2 or (j <= i + b and (j + h) % 2 == 0)


def bent(score: Any, b: int, h: int, i: int, j: int, aux: Any) -> Any:
    if score > 0 and i >= j:
        return 0.5 * score + aux[-1][h, b]
    return 0.1 * score * score - 1.0


def bent_vjp(gradient: Any, score: Any, _b: int, _h: int, i: int, j: int) -> Any:
    return 0.5 * gradient if score > 0 and i >= j else 0.2 * score * gradient


def far(score: Any, _b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Masks by itself, and has no number there for a gradient."""
    return np.where(abs(i - j) > 40, -np.inf, 2 * score)


def far_vjp(gradient: Any, _score: Any, _b: Any, _h: Any, i: Any, j: Any) -> Any:
    return np.where(abs(i - j) > 40, np.nan, 2 * gradient)


def blocky(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Dead, full and partial tiles."""
    return (i // 128 != j // 128) & (i // 256 == j // 256) | (i > j + 300)


def everywhere_else(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
    """Another mask for each sequence and head."""
    return aux[0][b, h, i // 64, j // 64]


def options(name: str, sizes: Any) -> dict[str, Any]:
    """Return the functions and arrays of a case."""
    B, Tq, Tk, Hq = sizes[:4]
    rng, longest = np.random.default_rng(2), max(Tq, Tk)
    slopes = 2.0 ** -np.arange(1.0, Hq + 1)
    alibi = {"score_mod": mods.alibi(), "score_mod_vjp": mods.alibi_vjp, "aux": (slopes,)}
    cases: dict[str, dict[str, Any]] = {
        "none": {},
        "sliding": {"mask_mod": mods.both(mods.causal, mods.sliding(60))},
        "documents": {
            "mask_mod": mods.documents(), "aux": (np.sort(rng.integers(0, 4, (B, longest)), axis=1),)
        },
        "by head": {"mask_mod": mods.bigbird(64), "aux": (rng.random((Hq, *[-(-longest // 64)] * 2)) < 0.4,)},
        "alibi": {"mask_mod": mods.causal, **alibi},
        "softcap": {"score_mod": mods.softcap(2.0), "score_mod_vjp": mods.softcap_vjp(2.0)},
        "branching": {
            "mask_mod": branching, "score_mod": bent, "score_mod_vjp": bent_vjp,
            "aux": (rng.standard_normal((Hq, B)),),
        },
        "both": {
            "mask_mod": everywhere_else, "score_mod": mods.softcap(1.0),
            "score_mod_vjp": mods.softcap_vjp(1.0),
            "aux": (rng.random((B, Hq, *[-(-longest // 64)] * 2)) < 0.5,),
        },
        "far": {"score_mod": far, "score_mod_vjp": far_vjp},
        "blocky": {"mask_mod": blocky},
        "nothing": {"mask_mod": lambda b, h, i, j: j < -i - 1},
    }  # fmt: skip
    return cases[name]


def gradients(
    kind: str, sizes: Any, name: str, *, deterministic: bool = False, **more: Any
) -> tuple[list[Any], list[Any]]:
    """Return gradients of a case, and the true ones."""
    B, Tq, Tk, Hq, Hkv, D, Dv = sizes
    rng = np.random.default_rng(7)
    shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, Hq, Dv)
    q, k, v, do = (rng.standard_normal(shape).astype(KINDS[kind]) for shape in shapes)
    wide: list[Any] = [x.astype(np.float64) for x in (q, k, v, do)]
    blocks = more.pop("blocks", None)
    given = {**options(name, sizes), **more}
    forward: Any = flexible_attention(*wide[:3], return_lse=True, block_mask=blocks, **given)
    truth = flexible_attention_vjp(*wide, block_mask=blocks, **given)
    aux = tuple(x.astype(np.float32) if x.dtype.kind == "f" else x for x in given.get("aux", ()))
    arrays = tuple(viewed("aux", array, 0) for array in aux)
    functions = Mods(
        _mod("mask_mod", given), _mod("score_mod", given, "score"),
        _mod("score_mod_vjp", given, "gradient", "score"), tuple((x.dtype.name, x.ndim) for x in aux),
    )  # fmt: skip
    found = flexible_attention_vjp_hopper(
        q, k, v, forward.out.astype(KINDS[kind]), forward.lse.astype(np.float32), do,
        mods=functions, arrays=arrays, aux=aux, scale=given.get("scale"), deterministic=deterministic,
        blocks=blocks, stream=0,
    )  # fmt: skip
    return list(found[:3]), list(truth[:3])


def difference(kind: str, sizes: Any, name: str, **more: Any) -> float:
    """Return the largest error of a gradient, as a part of its largest number."""
    errors = []
    for found, exact in zip(*gradients(kind, sizes, name, **more), strict=True):
        assert found.shape == exact.shape
        gradient = found.astype(np.float64)
        assert not np.isnan(gradient).any()
        errors.append(float(np.abs(gradient - exact).max() / max(1.0, np.abs(exact).max())))
    return max(errors)


def _mod(name: str, given: dict[str, Any], *leading: str) -> Any:
    return as_mod(name, given[name], leading) if name in given else None


NAMES = (
    "none", "sliding", "documents", "by head", "alibi", "softcap", "branching", "far", "blocky", "nothing"
)  # fmt: skip
SIZES = {64: (2, 100, 150, 2, 1, 64, 64), 128: (1, 100, 270, 2, 1, 128, 128)}


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_functions(monkeypatch: pytest.MonkeyPatch, name: str, d: int) -> None:
    launched = played(monkeypatch, late=d == 64)
    assert difference("f16", SIZES[d], name) < LIMITS["f16"]
    assert launched == ["prepare", "main", "finish"]


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((1, 1, 1, 1, 1, 8, 8), "softcap"),
        ((2, 140, 300, 4, 2, 64, 64), "by head"),
        ((1, 300, 70, 2, 1, 40, 24), "branching"),
        ((1, 161, 257, 2, 2, 72, 128), "alibi"),
    ],
)
def test_shapes_in_turn(monkeypatch: pytest.MonkeyPatch, sizes: Any, name: str) -> None:
    """Ragged, grouped and unequal heads, in bfloat16, blocks taking turns."""
    played(monkeypatch, late=True, processors=3)
    assert difference("bf16", sizes, name, deterministic=True) < LIMITS["bf16"]


def test_turns_make_dq_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in range(2):
        played(monkeypatch, processors=3, seed=seed, late=seed == 1)
        found.append(gradients("f16", (1, 300, 300, 1, 1, 64, 64), "blocky", deterministic=True)[0])
    for one, same in zip(found[0], found[1], strict=True):
        assert np.array_equal(one, same)


def test_the_scale_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)
    assert difference("f16", (1, 70, 70, 1, 1, 64, 64), "softcap", scale=0.4) < LIMITS["f16"]


def test_a_gradient_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)
    crooked: dict[str, Any] = {
        "score_mod": mods.softcap(2.0),
        "score_mod_vjp": lambda g, s, b, h, i, j: g + 0.1,
    }
    with pytest.raises(OptionError, match="linear in the gradient"):
        gradients("f16", (1, 70, 70, 1, 1, 64, 64), "softcap", **crooked)


@pytest.mark.parametrize("sizes", [(16, 48), (32, 32), (200, 24)])
def test_block_masks_of_any_size(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    """Tiles that neither divide the kernel's nor are divided by them."""
    shape = (1, 150, 270, 2, 1, 64, 64)
    played(monkeypatch)
    blocks = block_mask(options("sliding", shape)["mask_mod"], 1, 2, 150, 270, block_sizes=sizes)
    assert difference("f16", shape, "sliding", blocks=blocks) < LIMITS["f16"]


@pytest.mark.parametrize(
    ("sizes", "lengths", "name"),
    [
        ((64, 128), (100, 270), "sliding"),  # the kernel's own tiles, ragged at both ends
        ((5, 3), (70, 150), "documents"),
        ((96, 64), (128, 256), "branching"),
        ((300, 300), (150, 270), "by head"),  # one tile
    ],
)
def test_states_overrule_the_function(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], lengths: tuple[int, int], name: str
) -> None:
    """Dead tiles have no gradient and full ones all of it, whatever the mask says of them."""
    shape = (2, *lengths, 2, 1, 64, 64)
    played(monkeypatch)
    tiles = (2, 2, *(-(-length // size) for length, size in zip(lengths, sizes, strict=True)))
    states = np.random.default_rng(3).integers(0, 3, tiles).astype(np.uint8)
    states[..., -1, -1] = (FULL, DEAD)
    assert difference("f16", shape, name, blocks=BlockMask(states, sizes, lengths)) < LIMITS["f16"]


@pytest.mark.parametrize(
    ("D", "Dv", "said"), [(192, 64, "^.*: D is 192; .* up to 128$"), (64, 136, "Dv is 136")]
)
def test_wider_heads_are_refused(monkeypatch: pytest.MonkeyPatch, D: int, Dv: int, said: str) -> None:
    """They would want more shared memory than there is; `tier="auto"` takes other kernels then."""
    launched = played(monkeypatch)
    with pytest.raises(UnsupportedError, match=said):
        gradients("f16", (1, 70, 70, 1, 1, D, Dv), "sliding")
    assert not launched


def test_a_score_needs_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)
    with pytest.raises(OptionError, match="score_mod_vjp: needed"):
        flexible_attention_vjp_hopper(
            *[np.zeros((1, 1, 1, 8), np.float16)] * 6,
            mods=Mods(score=as_mod("score_mod", mods.softcap(2.0), ("score",))),
            arrays=(), aux=(), scale=None, stream=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "key_lengths", "given", "kind", "sizes"),
    [
        ((40, 0, 130, 1, 20), (40, 0, 130, 1, 20), {"causal": True}, "f16", (2, 1, 64, 64)),
        ((70, 3, 90), (150, 0, 64), {"causal": "bottom_right"}, "f16", (2, 2, 128, 128)),
        ((100, 64), (64, 70), {"window_size": (20, 30)}, "bf16", (1, 1, 40, 24)),
        ((33, 128, 20), (33, 128, 20), {"causal": "top_left", "softcap": 1.5}, "f16", (4, 2, 64, 64)),
    ],
)
def test_packed_sequences(
    monkeypatch: pytest.MonkeyPatch, lengths: Any, key_lengths: Any, given: Any, kind: str, sizes: Any,
) -> None:  # fmt: skip
    """From the public call on, with a tail of padding; the truth is computed sequence by sequence."""
    launched = played(monkeypatch, late=True, processors=3)
    monkeypatch.setattr(flexible, "stream_of", lambda *_: 0)
    monkeypatch.setattr(flexible, "aux_views", lambda aux, _: tuple(viewed("aux", x, 0) for x in aux))
    Hq, Hkv, D, Dv = sizes
    starts, key_starts = (np.cumsum([0, *each]).astype(np.int32) for each in (lengths, key_lengths))
    rng, tail = np.random.default_rng(5), 7
    shapes = (starts[-1] + tail, Hq, D), (key_starts[-1] + tail, Hkv, D), (key_starts[-1] + tail, Hkv, Dv)
    q, k, v, do = (
        rng.standard_normal(shape).astype(KINDS[kind]) for shape in (*shapes, (*shapes[0][:2], Dv))
    )
    wide: list[Any] = [x.astype(np.float64) for x in (q, k, v)]
    exact_inputs: Any = (*wide, starts, key_starts)
    out, lse = varlen_attention(*exact_inputs, return_lse=True, **given)
    exact_inputs += (do.astype(np.float64),)
    truth = varlen_attention_vjp(*exact_inputs, **given)
    found = cuda_backend.varlen_attention_vjp(
        q, k, v, starts, key_starts, out.astype(KINDS[kind]), lse.astype(np.float32), do,
        tier="hopper", deterministic=True, **given,
    )  # fmt: skip
    assert launched == ["prepare", "main", "finish"]
    for name, gradient, exact in zip(truth._fields, found[:3], truth[:3], strict=False):
        error = np.abs(gradient.astype(np.float64) - exact).max() / max(1.0, np.abs(exact).max())
        assert error < LIMITS[kind], name
        behind = starts[-1] if name == "dq" else key_starts[-1]
        assert not gradient[behind:].any(), "padding has no gradient"
