"""Packed sequences in the portable kernels, simulated; the kernel of ranges; the PyTorch operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.arrays import view
from cuda_backend.attention import varlen
from refimpl.attention import varlen_attention, varlen_attention_vjp
from refimpl.attention.samples_varlen import sample_varlen
from refimpl.attention.varlen import key_ranges, packing
from refimpl.errors import UnsupportedError

pytestmark = pytest.mark.cudasim

SHAPE: dict[str, Any] = {"S": 5, "Lq": 6, "Lk": 7, "Hkv": 1, "group": 2, "D": 3, "Dv": 2, "tail": "padded"}
CLOSE = 2e-5  # float32, scores of size 1, as in test_flexible_simulated
CAUSAL: tuple[Any, ...] = (False, "top_left", "bottom_right")


def test_refusals_bear_its_name() -> None:
    x, starts = np.ones((3, 1, 4)), np.array([0, 3])
    with pytest.raises(UnsupportedError, match=r"^varlen_attention: inputs are float64"):
        cuda_backend.varlen_attention(x, x, x, starts, starts)
    with pytest.raises(UnsupportedError, match=r"^varlen_attention_vjp: inputs are float64"):
        cuda_backend.varlen_attention_vjp(x, x, x, starts, starts, x, np.zeros((1, 3)), x)


def case_of(causal: Any, seed: int = 3) -> tuple[Any, ...]:
    return sample_varlen(np.random.default_rng(seed), causal=causal, **SHAPE).args


@pytest.mark.parametrize("causal", CAUSAL)
def test_gradients_equal_the_reference(causal: Any) -> None:
    *exact, starts, key_starts = case_of(causal)
    q, k, v = (x.astype(np.float32) for x in exact)
    do = np.random.default_rng(1).standard_normal((*q.shape[:2], 2)).astype(np.float32)
    options: dict[str, Any] = {"causal": causal, "softcap": 1.5, "window_size": (2, 1)}
    out, lse = cuda_backend.varlen_attention(q, k, v, starts, key_starts, return_lse=True, **options)
    given = q, k, v, starts, key_starts, out, lse, do
    found = cuda_backend.varlen_attention_vjp(*given, block_sizes=(3, 4), **options)
    inputs: Any = (*exact, starts, key_starts, do.astype(float))
    assert np.abs(out - varlen_attention(*inputs[:5], **options)).max() < CLOSE
    wanted = varlen_attention_vjp(*inputs, **options)
    for name in ("dq", "dk", "dv"):
        assert np.abs(getattr(found, name) - getattr(wanted, name)).max() < CLOSE, name


@pytest.mark.parametrize("kinds", [("int32", "int64"), ("int64", "int32")])
@pytest.mark.parametrize("window", [(-1, -1), (1, -1), (-1, 1), (0, 0), (3, 2), (9, 9)])
@pytest.mark.parametrize("causal", CAUSAL)
def test_the_kernel_finds_the_ranges_of_the_reference(
    causal: Any, window: Any, kinds: tuple[str, str]
) -> None:
    for seed in (3, 4):
        q, k, v, *starts = case_of(causal, seed)
        outputs = [view("out", np.full(len(q), -1, np.int32), 0) for _ in range(2)]
        given = [view("starts", x.astype(kind), 0) for x, kind in zip(starts, kinds, strict=True)]
        varlen.queue_ranges(given, outputs, causal or "", 0, window)
        for found, expected in zip(
            outputs, key_ranges(packing(q, k, v, *starts), causal, window), strict=True
        ):
            assert np.array_equal(found.owner, expected)


def test_tiles_of_other_sequences_are_not_read() -> None:
    """NaN in the keys of one sequence stays in it."""
    x = np.ones((16, 1, 2), np.float32)
    other = x.copy()
    other[8:] = np.nan
    starts = np.array([0, 8, 16])
    out = cuda_backend.varlen_attention(x, other, other, starts, starts, block_sizes=(4, 4))
    assert np.isfinite(out[:8]).all()
    assert np.isnan(out[8:]).all()


def test_the_operator_of_pytorch() -> None:
    """Schema and gradients in double; flash-attention's order of arguments; no dropout."""
    torch = pytest.importorskip("torch")
    from cuda_backend.attention.autograd_varlen import register
    from cuda_backend.torch_ops import varlen_attention as operator

    tensors = [torch.from_numpy(x.astype(float)).requires_grad_() for x in case_of(False)[:3]]
    starts: Any = [torch.from_numpy(x) for x in case_of(False)[3:]]
    torch.library.opcheck(register(torch), (*tensors, *starts, "bottom_right", 2, -1, 1.5, None))

    def called(q: Any, k: Any, v: Any) -> Any:
        return operator(q, k, v, starts[0], starts[1], 6, 7, 0.0, 0.7, True, (2, 3), 1.5)

    assert torch.autograd.gradcheck(called, tensors)
    wanted = varlen_attention(
        *case_of(False), causal="bottom_right", window_size=(2, -1), softcap=1.5, scale=0.7
    )
    assert np.abs(called(*tensors).detach().numpy() - wanted).max() < 1e-12
    single = [x.detach().float().requires_grad_() for x in tensors]
    called(*single).sum().backward()
    called(*tensors).sum().backward()
    for x, exact in zip(single, tensors, strict=True):
        assert (x.grad - exact.grad).abs().max() < CLOSE
    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.1"):
        operator(tensors[0], tensors[1], tensors[2], starts[0], starts[1], dropout_p=0.1)
