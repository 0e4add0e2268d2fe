"""The portable backward kernels on a GPU: the grid of shapes, options, repeats, arrays of every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from refimpl.attention.samples import sample_attention
from refimpl.errors import CapacityError, DTypeError
from refimpl.numerics import widen
from refimpl.registry import Case
from refimpl.tolerances import cast
from tests.cuda.judge import DTYPES, arrays
from tests.cuda.judge_backward import backward_of, gradient_difference

pytestmark = pytest.mark.cuda

vjp: Any = None
LENGTHS = (17, 63, 64, 65, 300)  # 1: see test_a_single_key
DROPPED: dict[str, Any] = {"causal": True, "dropout_p": 0.2, "rng": 2**63 + 5}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Import the kernels only where they run: the import decides between GPU and simulator."""
    global vjp
    reason = cuda_backend.availability("cuda")
    if reason:
        pytest.skip(reason)
    vjp = cuda_backend.flash_attention_vjp


@pytest.mark.parametrize(
    ("dtype", "D", "options"),
    [(dtype, D, {}) for dtype in sorted(DTYPES) for D in (16, 64, 80, 128)]
    + [("float16", D, DROPPED) for D in (16, 64, 80, 128)]
    + [(dtype, 64, DROPPED) for dtype in ("bfloat16", "float32")]
    + [(dtype, 128, {"causal": True}) for dtype in sorted(DTYPES)],
)
def test_grid(dtype: str, D: int, options: dict[str, Any]) -> None:
    """Four query heads to two key heads throughout."""
    for n in LENGTHS:
        case = backward_of(Case(arrays((1, n, n, 4, 2, D, D), dtype, seed=n), options), dtype)
        assert gradient_difference(vjp, case, dtype) is None, n


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_single_key_passes_the_gradient_on(dtype: str) -> None:
    """Its weight is 1 whatever the score: dV is dO, and queries and keys have no gradient but rounding.

    The weight is exp(s - lse) of two numbers of size |s|, each rounded to float32: 1 to within |s| ulps.
    """
    case = backward_of(Case(arrays((1, 1, 1, 2, 2, 64, 64), dtype)), dtype)
    assert gradient_difference(vjp, case, dtype) is None
    dq, dk, dv, _ = case.call(vjp)
    error = np.abs(widen(dv).astype(np.float64) - widen(case.args[-1])) / np.abs(widen(case.args[-1]))
    score = np.abs(widen(case.args[4])).max()
    assert error.max() <= (4 * (score + 1) * 2.0**-24 if dtype == "float32" else 0)
    for gradient in (dq, dk):
        assert np.abs(widen(gradient)).max() < 1e-4


@pytest.mark.parametrize("extra", ["bias", "softcap_and_bias", "lengths", "attn_mask", "all"])
def test_options(extra: str) -> None:
    axes: Any = {"B": 2, "Tq": 70, "Tk": 131, "Hkv": 2, "group": 2, "D": 40, "Dv": 24}
    drawn = sample_attention(np.random.default_rng(1), **axes, causal="bottom_right", extra=extra)
    case = backward_of(cast(drawn, DTYPES["float16"]), "float16")
    assert gradient_difference(vjp, case, "float16") is None


@pytest.mark.parametrize(
    "shape",
    [(1, 0, 3, 2, 1, 4, 4), (2, 3, 0, 2, 1, 4, 4), (0, 3, 3, 2, 1, 4, 4), (1, 70, 90, 1, 1, 256, 248)],
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    case = backward_of(Case(arrays(shape, "float32")), "float32")
    assert gradient_difference(vjp, case, "float32") is None


@pytest.mark.parametrize("blocks", [(3, 5), (128, 32), (64, 32), (1, 100)])
def test_block_sizes(blocks: tuple[int, int]) -> None:
    forward = Case(arrays((1, 150, 140, 1, 1, 32, 32), "float32"), {"causal": "top_left"})
    case = backward_of(forward, "float32").replace(block_sizes=blocks)
    assert gradient_difference(vjp, case, "float32") is None


def test_tiles_that_do_not_fit() -> None:
    case = backward_of(Case(arrays((1, 4, 4, 1, 1, 256, 256), "float32")), "float32")
    with pytest.raises(CapacityError, match=r"tiles of \(128, 128\)"):
        case.replace(block_sizes=(128, 128)).call(vjp)


def on_torch(array: Any) -> Any:
    torch = pytest.importorskip("torch")
    array = np.ascontiguousarray(array)
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def test_repeated_backward_is_bitwise_equal() -> None:
    torch = pytest.importorskip("torch")
    case = backward_of(Case(arrays((2, 300, 300, 8, 2, 64, 64), "float16"), DROPPED), "float16")
    tensors = [on_torch(array) for array in case.args]
    first = vjp(*tensors, **DROPPED)
    for _ in range(20):
        for one, other in zip(first[:3], vjp(*tensors, **DROPPED)[:3], strict=True):
            assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_torch_tensors_on_their_stream(dtype: str) -> None:
    """Inputs that a slow kernel on a side stream still writes are read after it, and results stay there."""
    torch = pytest.importorskip("torch")
    bias = np.random.default_rng(2).standard_normal((4, 1, 130)).astype(np.float32)
    options: dict[str, Any] = {"causal": True, "bias": bias, "dropout_p": 0.1, "rng": 9}
    case = backward_of(Case(arrays((2, 130, 130, 4, 2, 64, 64), dtype), options), dtype)
    expected = case.call(vjp)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        *given, do = (on_torch(array) for array in case.args)
        late = torch.zeros_like(do)
        torch.cuda._sleep(50_000_000)
        late.copy_(do)
        found = vjp(*given, late, **{**options, "bias": on_torch(bias)})
    stream.synchronize()
    for name in ("dq", "dk", "dv", "dbias"):
        tensor, wanted = getattr(found, name), getattr(expected, name)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.is_cuda
        assert tensor.dtype == given[0].dtype
        assert np.array_equal(tensor.float().cpu().numpy(), widen(wanted).astype(np.float32)), name


def test_the_gradients_are_those_of_autograd_through_the_forward_kernel() -> None:
    """The forward kernel's own output and log-sum-exp, against PyTorch in float64."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 257, heads, 64, device="cuda") for heads in (8, 2, 2))
    out, lse = cuda_backend.flash_attention(q, k, v, causal=True, return_lse=True)
    do = torch.randn_like(out)
    exact = [x.double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True).backward(
        do.double().transpose(1, 2)
    )
    for found, wanted in zip(vjp(q, k, v, out, lse, do, causal=True)[:3], exact, strict=True):
        truth = wanted.grad.transpose(1, 2)
        assert (found.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_cupy_arrays_on_their_stream() -> None:
    cupy = pytest.importorskip("cupy")
    case = backward_of(Case(arrays((1, 70, 70, 2, 2, 64, 64), "float16")), "float16")
    expected = case.call(vjp)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        found = vjp(*(cupy.asarray(array) for array in case.args))
        stream.synchronize()
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert isinstance(one, cupy.ndarray)
        assert np.array_equal(one.get(), other)


def test_numba_arrays() -> None:
    cuda = pytest.importorskip("cuda_backend._numba").cuda
    case = backward_of(Case(arrays((1, 70, 70, 2, 2, 16, 16), "float32")), "float32")
    found = vjp(*(cuda.to_device(np.ascontiguousarray(array)) for array in case.args))
    for one, other in zip(found[:3], case.call(vjp)[:3], strict=True):
        assert np.array_equal(one.copy_to_host(), other)


def test_mixed_arrays_are_refused() -> None:
    args = backward_of(Case(arrays((1, 4, 4, 1, 1, 8, 8), "float32")), "float32").args
    tensors = [on_torch(array) for array in args]
    with pytest.raises(DTypeError, match="q, k, v, o and do: expected arrays of one library"):
        vjp(*tensors[:5], args[5])
    with pytest.raises(DTypeError, match="lse: expected an array of numpy, got one of torch"):
        vjp(*args[:4], tensors[4], args[5])
