"""What ``frugal verify --tier hopper`` does on a GPU, kernels played: registered functions, their samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import View
from cuda_backend.attention import call_flexible_backward_hopper, call_flexible_hopper, flexible, padding
from cuda_backend.attention.ruled_masks import ruled_functions
from refimpl import registry
from refimpl.attention import AttentionOutput
from refimpl.errors import UnsupportedError
from refimpl.numerics import is_floating, round_to, widen
from refimpl.testing import check
from tests.cuda import backward_hopper_played, flexible_hopper_played
from tests.cuda.int8_hopper_played import viewed

pytestmark = pytest.mark.cudasim

registry.load()


def as_read(aux: Any) -> tuple[Any, ...]:
    """Return arrays of functions as kernels read them."""
    arrays = map(np.asarray, aux)
    return tuple(widen(x).astype(np.float32) if is_floating(x.dtype) else x for x in arrays)


@pytest.fixture
def _forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the forward kernel be played where it is called."""

    def kernel(
        q: Any, k: Any, v: Any, *, mods: Any, aux: Any, blocks: Any, return_lse: bool, **more: Any
    ) -> Any:
        if 0 in (*q.shape, *k.shape, *v.shape):
            raise UnsupportedError("flexible_attention_hopper: it is not played")
        arrays = as_read(aux)
        if blocks is not None:  # lists and bits of block masks: test_ruled_masks
            mods = ruled_functions(mods, blocks.block_sizes)
            heads = q.shape[0], q.shape[2]
            arrays = (*arrays, np.broadcast_to(blocks.states, (*heads, *blocks.states.shape[2:])))
        functions = {"mask_mod": mods.mask, "score_mod": mods.score}
        given: dict[str, Any] = {name: mod and mod.function for name, mod in functions.items()}
        with pytest.MonkeyPatch.context() as patch:
            out, lse = flexible_hopper_played.played(
                patch, q, k, v, aux=arrays, scale=more["scale"], words=mods.mask is not None, **given
            )
        return AttentionOutput(round_to(out, q.dtype), lse) if return_lse else round_to(out, q.dtype)

    monkeypatch.setattr(call_flexible_hopper, "flexible_attention_hopper", kernel)


@pytest.fixture
def _backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a backward call launches be played; arrays have addresses, as on a GPU."""
    backward_hopper_played.played(monkeypatch)
    kept: list[Any] = []

    @contextmanager
    def copied(given: View, _stream: int) -> Iterator[View]:
        if not given.shape[3] or not padding.needs_copy(given):
            yield given
            return
        *outer, width = given.shape
        rows = np.zeros((*outer, -(-width // 8) * 8), given.owner.dtype)
        rows[..., :width] = given.owner
        yield given._replace(strides=rows.strides, address=rows.ctypes.data, owner=rows)

    def views(aux: Any, _on: int) -> tuple[View, ...]:
        kept.extend(as_read(aux))
        return tuple(viewed("aux", array, 0) for array in kept[len(kept) - len(aux) :])

    monkeypatch.setattr(call_flexible_backward_hopper, "aligned_rows", copied)
    monkeypatch.setattr(flexible, "aux_views", views)


@pytest.mark.usefixtures("_forward")
@pytest.mark.parametrize(
    ("technique", "dtype"), [("attention.flexible", "bfloat16"), ("attention.varlen", "float16")]
)
def test_forward(technique: str, dtype: str) -> None:
    _assert_ok(technique, dtype)


@pytest.mark.usefixtures("_backward")
@pytest.mark.parametrize(
    ("technique", "dtype"),
    [("attention.flexible_backward", "bfloat16"), ("attention.varlen_backward", "float16")],
)
def test_backward(technique: str, dtype: str) -> None:
    _assert_ok(technique, dtype)


def _assert_ok(technique: str, dtype: str) -> None:
    """Hold the function that is registered for Hopper to its record."""
    (item,) = (item for item in registry.implementations_of(technique) if item.tier == "hopper")
    report = check(
        technique, item.load(), backend="cuda", tier="hopper", dtypes=[dtype], examples=3, edges=False
    )
    assert not report.failed, "\n".join(f"{o.check}: {o.detail}\n  {o.reproducer}" for o in report.failed)
    assert report.counts()["passed"] > 9
