"""The portable int8 kernels on a GPU: codes and products equal, every library, streams, repeated runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from refimpl import quant
from refimpl.errors import DTypeError, OptionError
from refimpl.quant import Int8Columns
from refimpl.registry import Case
from tests.cuda.judge import DTYPES
from tests.cuda.test_device import on_torch

pytestmark = pytest.mark.cuda

judge: Any = None


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Import the kernels only where they run: the import decides between GPU and simulator."""
    global judge
    reason = cuda_backend.availability("cuda")
    if reason:
        pytest.skip(reason)
    from tests.cuda import int8_judge

    judge = int8_judge


@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("threshold", [None, 2.5, 6.0])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_rows_equal_the_reference(dtype: str, threshold: Any, convention: Any) -> None:
    options = {"threshold": threshold, "convention": convention}
    for shape in ((1, 1), (0, 5), (5, 0), (33, 257), (70, 1024), (513, 4100), (3, 20_000)):
        for special in (0.0, 1e-3, 0.3):
            x = judge.matrix(shape[1], shape, dtype, special)
            with np.errstate(all="ignore"):
                expected = quant.quantize_rows(x, **options)
            assert judge.differing(cuda_backend.quantize_rows(x, **options), expected) is None, shape


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_number_of_a_narrow_format(dtype: str) -> None:
    """All 65,536 bit patterns, each beside an absmax that makes many of them tie."""
    if dtype == "float32":
        bits = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32)
        numbers = bits.view(np.float32)
    else:
        numbers = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    columns = numbers.reshape(-1, 64)
    x = np.concatenate([columns, np.full((columns.shape[0], 4), 127, DTYPES[dtype])], axis=1)
    for threshold in (None, 127.5):
        with np.errstate(all="ignore"):
            expected = quant.quantize_rows(x, threshold=threshold)
        assert judge.differing(cuda_backend.quantize_rows(x, threshold=threshold), expected) is None


@pytest.mark.parametrize("order", ["C", "F"])
def test_columns_equal_the_reference(order: Any) -> None:
    for shape in ((1, 1), (0, 3), (3, 0), (257, 130), (1024, 384)):
        weight = np.array(judge.matrix(1, shape, "float16"), order=order)
        assert judge.differing(cuda_backend.quantize_columns(weight), quant.quantize_columns(weight)) is None
    weight = np.ones((8, 8), np.float32)
    weight[3, 5] = np.inf
    with pytest.raises(OptionError, match="got inf in column 5"):
        cuda_backend.quantize_columns(weight)


@pytest.mark.parametrize("order", ["CF", "CC", "FF"])
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4, 4), (4, 0, 4), (1, 1, 1), (1, 4096, 1), (127, 36, 129), (128, 64, 128), (129, 35, 127),
        (33, 1000, 65), (512, 1024, 384), (3, 131_072, 5), (2, 133_144, 2), (2, 133_141, 3),
    ],
)  # fmt: skip
def test_products_are_exact(sizes: tuple[int, int, int], order: str) -> None:
    M, K, N = sizes
    rng = np.random.default_rng(K)
    a = np.array(rng.integers(-127, 128, (M, K)), np.int8, order=order[0])  # type: ignore[call-overload]
    b = np.array(rng.integers(-127, 128, (K, N)), np.int8, order=order[1])  # type: ignore[call-overload]
    found = cuda_backend.int8_matmul(a, b)
    assert found.dtype == np.int32
    assert np.array_equal(found, quant.int8_matmul(a, b))


@pytest.mark.parametrize("K", [131_072, 133_144])
def test_the_largest_sums(K: int) -> None:
    a = np.full((2, K), 127, np.int8)
    for sign in (1, -1):
        assert (cuda_backend.int8_matmul(a, (sign * a).T) == sign * K * 127**2).all()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("outliers", ["none", "some", "all", "zero_row"])
@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("name", ["llm_int8_linear", "llm_int8_linear_fused"])
def test_linear_layers(name: str, convention: str, outliers: str, dtype: str) -> None:
    f = getattr(cuda_backend, name)
    for T, K, N in ((1, 64, 33), (65, 100, 130), (130, 257, 64), (200, 512, 384)):
        case = judge.case_of(K, dtype, T=T, K=K, N=N, convention=convention, outliers=outliers)
        assert judge.linear_difference(f, name, case, dtype) is None, (T, K, N)


def test_one_wide_row() -> None:
    """K = 131,072 in float16, a hundred outlier columns."""
    rng = np.random.default_rng(0)
    x = np.clip(rng.standard_normal((2, 131_072)), -4, 4)
    x[1, rng.choice(131_072, 100, replace=False)] = 9.0
    weight = rng.standard_normal((131_072, 3)) / 100
    case = Case((x.astype(np.float16), weight.astype(np.float16)), {"threshold": 6.0})
    for name in ("llm_int8_linear", "llm_int8_linear_fused"):
        assert judge.linear_difference(getattr(cuda_backend, name), name, case, "float16") is None


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", ["llm_int8_linear", "llm_int8_linear_fused"])
def test_torch_tensors_on_their_stream(name: str, dtype: str) -> None:
    """Inputs that a slow kernel on a side stream still writes are read after it; results repeat."""
    torch = pytest.importorskip("torch")
    f = getattr(cuda_backend, name)
    case = judge.case_of(0, dtype, T=130, K=260, N=192)
    (x, weight), bias = case.args, case.kwargs["bias"]
    expected = f(x, weight, bias=bias)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        w, b = on_torch(weight), on_torch(bias)
        stored = cuda_backend.quantize_columns(w)
        late = torch.zeros_like(on_torch(x))
        torch.cuda._sleep(50_000_000)
        late.copy_(on_torch(x))
        out = f(late, stored, bias=b)
        again = [f(late, w, bias=b) for _ in range(5)]
        parts = f(late, stored, bias=b, return_parts=True)
    stream.synchronize()
    assert isinstance(out, torch.Tensor)
    assert out.dtype == late.dtype
    assert stored.codes.stride() == (1, 260)
    assert parts.outliers.tolist() == quant.outlier_columns(x).tolist()
    for each in (out, *again, parts.out):
        assert np.array_equal(judge.numbers(expected), each.double().cpu().numpy())


def test_an_explicit_stream_and_memory_between_kernels() -> None:
    """Calls wait behind a slow kernel on a stream while PyTorch hands out freed memory on its own."""
    torch = pytest.importorskip("torch")
    x = torch.randn(256, 512, device="cuda", dtype=torch.float16)
    x[:, 7] = 8.0
    weight = cuda_backend.quantize_columns(torch.randn(512, 256, device="cuda", dtype=torch.float16))
    expected = cuda_backend.llm_int8_linear(x, weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
    found = cuda_backend.llm_int8_linear(x, weight, stream=stream)
    garbage = [torch.full((256, 512), -1, device="cuda", dtype=torch.int8) for _ in range(8)]
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    del garbage


def test_strided_tensors() -> None:
    torch = pytest.importorskip("torch")
    packed = torch.randn(40, 3, 68, device="cuda")
    linear = torch.randn(50, 68, device="cuda")
    found = cuda_backend.llm_int8_linear_fused(packed[:, 1], linear.T, threshold=2.0)
    host = [array.cpu().numpy().copy() for array in (packed[:, 1], linear.T)]
    assert np.array_equal(found.cpu().numpy(), cuda_backend.llm_int8_linear_fused(*host, threshold=2.0))


def test_the_fused_layer_equals_its_steps_without_outliers() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16).clamp(-4, 4)
    weight = cuda_backend.quantize_columns(torch.randn(1024, 500, device="cuda", dtype=torch.bfloat16))
    fused, whole = cuda_backend.llm_int8_linear_fused(x, weight), cuda_backend.llm_int8_linear(x, weight)
    product = cuda_backend.int8_matmul(cuda_backend.quantize_rows(x).codes, weight.codes)
    rows = cuda_backend.quantize_rows(x)
    separate = cuda_backend.dequantize_product(product, rows.absmax, weight.absmax, dtype=torch.bfloat16)
    assert torch.equal(fused, whole)
    assert torch.equal(fused, separate)


def test_other_libraries() -> None:
    case = judge.case_of(0, "float32", T=33, K=64, N=40)
    x, weight = case.args
    expected = cuda_backend.llm_int8_linear_fused(x, weight)
    numba = pytest.importorskip("cuda_backend._numba").cuda
    found = cuda_backend.llm_int8_linear_fused(numba.to_device(x), numba.to_device(weight))
    assert np.array_equal(found.copy_to_host(), expected)
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        found = cuda_backend.llm_int8_linear_fused(cupy.asarray(x), cupy.asarray(weight))
        stream.synchronize()
    assert np.array_equal(found.get(), expected)
    jax = pytest.importorskip("jax")
    found = cuda_backend.llm_int8_linear_fused(jax.device_put(x), jax.device_put(weight))
    assert np.array_equal(np.asarray(found), expected)


def test_mixed_arrays_are_refused() -> None:
    torch = pytest.importorskip("torch")
    x, weight = torch.ones(2, 4, device="cuda"), np.ones((4, 4), np.float32)
    with pytest.raises(DTypeError, match="expected arrays of one library"):
        cuda_backend.llm_int8_linear(x, weight)
    codes = Int8Columns(torch.ones(4, 4, device="cuda"), torch.ones(4, device="cuda"))
    with pytest.raises(DTypeError, match="weight codes: expected int8"):
        cuda_backend.llm_int8_linear(x, codes)
