"""Attention as a PyTorch operator on the host: gradients, torch.compile, dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import torch_layout
from cuda_backend.torch_ops import attention
from refimpl.attention import flash_attention_vjp, scaled_dot_product_attention
from refimpl.errors import UnsupportedError
from refimpl.random import dropout_keep
from tests.cuda.transformer_training import losses, sdpa

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.cudasim


def tensors(dtype: Any, *, sizes: Any = (1, 4, 5, 2, 1, 3, 2)) -> list[Any]:
    B, Tq, Tk, Hq, Hkv, D, Dv = sizes
    generator = torch.Generator().manual_seed(1)
    shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
    return [
        torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in shapes
    ]


def test_gradcheck_in_double() -> None:
    """The reference's numbers through the operator's wiring."""
    for causal in ("", "bottom_right"):
        assert torch.autograd.gradcheck(lambda *x, c=causal: attention(*x, causal=c), tensors(torch.float64))


def test_gradcheck_of_the_portable_kernels() -> None:
    """In float32, as they compute: differences over 2**-6 have errors near 2**-22 / 2**-6 and 2**-12."""
    inputs = tensors(torch.float32, sizes=(1, 2, 3, 2, 1, 2, 2))
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            lambda *x: attention(*x, causal="top_left"), inputs, eps=2**-6, atol=2e-3, rtol=2e-3
        )


def test_a_gradient_is_not_lost_in_silence() -> None:
    """What reads a tensor's memory records nothing: it refuses while PyTorch records."""
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"requires a gradient.*torch_ops"):
        torch_layout(leaf)
    with torch.no_grad():
        assert torch_layout(leaf)[0] == (2,)
    assert torch_layout(leaf.detach())[0] == (2,)


def test_the_operator_is_sound() -> None:
    """Schema, shapes without data, autograd's registration, and all of it traced."""
    from cuda_backend.attention.autograd import register

    options = ("top_left", None, 0.0, 0, False, "portable")
    torch.library.opcheck(register(torch), (*tensors(torch.float64), *options))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equals_pytorch(dtype: str) -> None:
    q, k, v = tensors(getattr(torch, dtype), sizes=(2, 5, 5, 2, 1, 4, 4))
    out = attention(q, k, v, causal="top_left")
    assert out.dtype == q.dtype
    out.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    turned = [x.transpose(1, 2) for x in exact]
    wanted = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
    wanted.sum().backward()
    limit = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}[dtype]
    assert (out.double() - wanted.transpose(1, 2)).abs().max() < limit
    for x, truth in zip((q, k, v), exact, strict=True):
        assert (x.grad.double() - truth.grad).abs().max() < limit * max(1.0, truth.grad.abs().max())


def test_dropout_is_the_references_bit_for_bit() -> None:
    """With all weights alike and unit vectors as values, the output shows what was dropped."""
    seed, p = 2**40 + 3, 0.3
    q = torch.zeros(1, 6, 2, 4)
    k, v = torch.zeros(1, 7, 2, 4), torch.zeros(1, 7, 2, 7)
    v[0, :, :, :] = torch.eye(7)[:, None]
    out = attention(q, k, v, dropout_p=p, seed=seed)
    rows, columns = np.arange(6), np.arange(7)
    kept = np.stack([dropout_keep(seed, p, 0, head, rows, columns).reshape(6, 7) for head in (0, 1)])
    assert np.array_equal(out.numpy()[0].transpose(1, 0, 2) != 0, kept)
    q, k, v = tensors(torch.float64, sizes=(1, 6, 7, 2, 2, 4, 4))
    attention(q, k, v, dropout_p=p, seed=seed).sum().backward()
    arrays = [x.detach().numpy() for x in (q, k, v)]
    forward = scaled_dot_product_attention(*arrays, dropout_p=p, rng=seed, return_lse=True)
    given = *arrays, forward.out, forward.lse, np.ones_like(forward.out)
    truth = flash_attention_vjp(*given, dropout_p=p, rng=seed)
    for x, wanted in zip((q, k, v), truth[:3], strict=True):
        assert np.allclose(x.grad.numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_under_compile() -> None:
    """One graph, no break; the backward pass is traced, too."""

    def layer(q: Any, k: Any, v: Any) -> Any:
        return (2 * attention(q.tanh(), k, v, causal="top_left")).square().sum()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    one, other = (
        tensors(torch.float64, sizes=(1, 4, 4, 2, 1, 3, 2)),
        tensors(torch.float64, sizes=(1, 4, 4, 2, 1, 3, 2)),
    )
    layer(*one).backward()
    compiled(*other).backward()
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x.grad, y.grad)


def test_the_statistic_has_no_gradient() -> None:
    from cuda_backend.attention.autograd import register

    _, lse = register(torch)(*tensors(torch.float64), "", None, 0.0, 0, False, "portable")
    assert not lse.requires_grad


def test_training_follows_pytorch() -> None:
    """Two hundred steps of three layers, in double: the same curve but for rounding."""

    def ours(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, causal="top_left")

    how: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float64",
        "length": 12,
        "batch": 2,
        "heads": 2,
        "width": 8,
    }
    found, wanted = (losses(attend, steps=200, **how) for attend in (ours, sdpa))
    assert np.mean(wanted[-20:]) < 0.9 * wanted[0], "something is learned"
    assert np.abs(np.subtract(found, wanted)).max() < 1e-6
