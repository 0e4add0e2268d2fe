"""The Hopper int8 kernels on a Hopper GPU: products and codes equal, layers, streams, graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from refimpl import quant
from refimpl.errors import OptionError, UnsupportedError
from tests.cuda.hopper_torch import hopper_torch

pytestmark = pytest.mark.cuda
torch: Any = None
judge: Any = None
HALVES = ("float16", "bfloat16")


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Import the kernels only where they run: the import decides between GPU and simulator."""
    global judge, torch
    torch = hopper_torch()
    from tests.cuda import int8_judge

    judge = int8_judge


def codes(seed: int, *shape: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda", generator=generator)


def exact(a: Any, b: Any) -> Any:
    """Return the product in float64, which is exact."""
    return (a.double() @ b.double()).round().to(torch.int32)


SIZES = [
    (0, 4, 4), (4, 0, 4), (4, 4, 0), (1, 1, 1), (1, 4096, 4096), (5, 35, 9), (17, 100, 48), (33, 130, 161),
    (64, 1000, 257), (200, 700, 300), (128, 128, 4096), (129, 35, 4100), (300, 4096, 5001), (1000, 640, 4104),
    (2048, 4096, 4096), (64, 133_144, 40), (257, 131_072, 4352), (130, 133_141, 4353),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_exact(sizes: tuple[int, int, int]) -> None:
    """In int32, and with scales and bias in the reference's order of rounding; in poisoned memory, twice."""
    from cuda_backend.arrays import poisoned_outputs

    M, K, N = sizes
    a, b = codes(M, M, K), codes(N + 1, N, K).T
    expected = exact(a, b)
    a_absmax, b_absmax = torch.rand(M, device="cuda"), torch.rand(N, device="cuda")
    for _ in range(2):
        with poisoned_outputs():
            assert torch.equal(cuda_backend.int8_matmul_hopper(a, b), expected)
        for kind in HALVES:
            bias = torch.randn(N, device="cuda").to(getattr(torch, kind))
            y = expected.float() * a_absmax[:, None] * b_absmax * float(np.float32(1 / 127**2))
            with poisoned_outputs():
                scales = {"a_absmax": a_absmax, "b_absmax": b_absmax, "dtype": kind}
                found = cuda_backend.scaled_int8_matmul(a, b, **scales)
                shifted = cuda_backend.scaled_int8_matmul(a, b, bias=bias, **scales)
            assert torch.equal(found, y.to(bias.dtype))
            assert torch.equal(shifted, (y + bias.float()).to(bias.dtype))


@pytest.mark.parametrize("orders", ["CC", "FF", "FC"])
def test_codes_in_any_order_are_copied(orders: str) -> None:
    rng = np.random.default_rng(0)
    for M, K, N in ((5, 64, 9), (130, 100, 4200)):
        a = np.array(rng.integers(-127, 128, (M, K)), np.int8, order=orders[0])  # type: ignore[call-overload]
        b = np.array(rng.integers(-127, 128, (K, N)), np.int8, order=orders[1])  # type: ignore[call-overload]
        found = cuda_backend.int8_matmul_hopper(torch.tensor(a).cuda(), torch.tensor(b).cuda())
        assert np.array_equal(found.cpu().numpy(), quant.int8_matmul(a, b))
        assert np.array_equal(cuda_backend.int8_matmul_hopper(a, b), quant.int8_matmul(a, b))


def test_the_largest_sums() -> None:
    a = torch.full((200, 133_144), 127, device="cuda", dtype=torch.int8)
    b = torch.full((4224, 133_144), -127, device="cuda", dtype=torch.int8).T
    for rows in (2, 200):
        assert (cuda_backend.int8_matmul_hopper(a[:rows], b) == -133_144 * 127**2).all()


@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("threshold", [None, 2.5, 6.0, 1e-60])
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_equal_the_reference(dtype: str, threshold: Any, convention: Any) -> None:
    options = {"threshold": threshold, "convention": convention}
    for shape in ((1, 1), (0, 5), (5, 0), (33, 257), (70, 1024), (513, 4104), (3, 20_000), (2, 70_000)):
        for special in (0.0, 1e-3, 0.3):
            x = judge.matrix(shape[1], shape, dtype, special)
            with np.errstate(all="ignore"):
                expected = quant.quantize_rows(x, **options)
            assert judge.differing(cuda_backend.quantize_rows_hopper(x, **options), expected) is None, shape


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_a_narrow_format(dtype: str) -> None:
    """All 65,536 bit patterns, each beside an absmax that makes many of them tie."""
    numbers = np.arange(2**16, dtype=np.uint16).view(judge.DTYPES[dtype]).reshape(-1, 64)
    x = np.concatenate([numbers, np.full((numbers.shape[0], 8), 127, numbers.dtype)], axis=1)
    for threshold in (None, 127.5):
        with np.errstate(all="ignore"):
            expected = quant.quantize_rows(x, threshold=threshold)
        assert judge.differing(cuda_backend.quantize_rows_hopper(x, threshold=threshold), expected) is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outliers", ["none", "some", "all", "zero_row"])
@pytest.mark.parametrize("convention", ["released", "paper"])
def test_linear_layers(convention: str, outliers: str, dtype: str) -> None:
    """Few rows and many, ragged and not, fewer outliers than find room side by side and more."""
    for T, K, N in (
        (1, 64, 33),
        (5, 33, 7),
        (9, 1504, 40),
        (7, 304, 1100),
        (30, 520, 40),
        (60, 304, 130),
        (140, 304, 4500),
        (140, 1504, 4500),
        (300, 1100, 257),
    ):
        for bias in (False, True):
            case = judge.case_of(K, dtype, T=T, K=K, N=N, convention=convention, outliers=outliers, bias=bias)
            f, name = cuda_backend.llm_int8_linear_hopper, "llm_int8_linear_fused"
            assert judge.linear_difference(f, name, case, dtype) is None, (T, K, N)


@pytest.mark.parametrize("number", [1, 4, 31, 32, 33, 70])
@pytest.mark.parametrize("convention", ["released", "paper"])
def test_outliers_around_what_shared_memory_holds(convention: str, number: int) -> None:
    for T, N in ((6, 1100), (16, 1100), (25, 130), (64, 4096)):
        case = judge.case_of(number, "float16", T=T, K=304, N=N, convention=convention, outliers="none")
        x = case.args[0].copy()
        x[np.arange(number) % T, 3 * np.arange(number)] = 9.0 + np.arange(number)
        f, name = cuda_backend.llm_int8_linear_hopper, "llm_int8_linear_fused"
        assert judge.linear_difference(f, name, case.replace(x, case.args[1]), "float16") is None, (T, N)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_sizes_of_nothing(sizes: tuple[int, int, int]) -> None:
    T, K, N = sizes
    case = judge.case_of(3, "float16", T=T, K=K, N=N)
    f = cuda_backend.llm_int8_linear_hopper
    assert judge.linear_difference(f, "llm_int8_linear_fused", case, "float16") is None


def layer(seed: int, T: int, K: int, N: int, kind: str = "float16") -> tuple[Any, Any, Any]:
    """Return x with outlier columns, a weight and a bias."""
    generator = torch.Generator("cuda").manual_seed(seed)
    make = {"device": "cuda", "dtype": getattr(torch, kind), "generator": generator}
    x = torch.randn(T, K, **make).clamp_(-5, 5)
    x[:, torch.randperm(K, device="cuda", generator=generator)[: max(1, K // 100)]] = 20.0
    return x, torch.randn(K, N, **make) / K**0.5, torch.randn(N, **make)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4096, 300),
        (16, 1000, 513),
        (16, 8192, 8200),
        (300, 4096, 4096),
        (4, 8192, 8192),
        (3, 4096, 11008),
    ],
)
def test_all_ways_to_give_a_weight_agree(sizes: tuple[int, int, int]) -> None:
    from cuda_backend.arrays import poisoned_outputs

    x, weight, bias = layer(0, *sizes)
    stored = cuda_backend.quantize_columns(weight)
    prepared, again = cuda_backend.prepare_weight(weight), cuda_backend.prepare_weight(stored)
    assert torch.equal(prepared.codes, stored.codes)
    assert prepared.codes.stride(1) % 16 == 0
    expected = cuda_backend.llm_int8_linear_fused(x, stored, bias=bias)
    with poisoned_outputs():
        found = [
            cuda_backend.llm_int8_linear_hopper(x, w, bias=bias) for w in (weight, stored, prepared, again)
        ]
    for each in found:
        assert torch.equal(each, found[0])
    error = (found[0].double() - expected.double()).abs().max()
    assert error <= 2.0**-9 * expected.double().abs().max()
    for _ in range(20):
        assert torch.equal(cuda_backend.llm_int8_linear_hopper(x, prepared, bias=bias), found[0])
    kept = cuda_backend.prepare_weight(weight, keep=True)
    paper = cuda_backend.llm_int8_linear_hopper(x, kept, convention="paper")
    assert torch.equal(paper, cuda_backend.llm_int8_linear_hopper(x, weight, convention="paper"))


def test_marks_do_not_outlive_a_call() -> None:
    """Outliers of one call are none of the next, in other sizes and without a product too."""
    weight = cuda_backend.prepare_weight(torch.randn(512, 4400, device="cuda", dtype=torch.float16))
    for T in (2, 7, 40, 300):
        x = torch.randn(T, 512, device="cuda", dtype=torch.float16).clamp_(-4, 4)
        plain = cuda_backend.llm_int8_linear_hopper(x, weight)
        wild = x.clone()
        wild[0, ::3] = 50.0
        disturb: Any
        for disturb in (
            lambda: cuda_backend.llm_int8_linear_hopper(wild, weight),  # noqa: B023
            lambda: cuda_backend.quantize_rows_hopper(wild, threshold=6.0),  # noqa: B023
        ):
            disturb()
            assert torch.equal(cuda_backend.llm_int8_linear_hopper(x, weight), plain)
            assert cuda_backend.quantize_rows_hopper(x, threshold=6.0).outliers.numel() == 0


@pytest.mark.parametrize(("T", "N"), [(2, 1024), (2, 4400), (40, 4400), (300, 4400)])
def test_a_refused_call_leaves_no_marks(T: int, N: int) -> None:
    """Codes at an odd address are refused when x is quantised already, except in a layer of one kernel."""
    K = 504
    prepared = cuda_backend.prepare_weight(torch.randn(512, N, device="cuda", dtype=torch.float16))
    weight, odd = (prepared._replace(codes=prepared.codes[first:][:K]) for first in (0, 3))
    x = torch.randn(T, K, device="cuda", dtype=torch.float16).clamp_(-4, 4)
    wild = x.clone()
    wild[0, ::3] = 50.0
    plain = cuda_backend.llm_int8_linear_hopper(x, weight)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        cuda_backend.llm_int8_linear_hopper(wild, odd)
    assert torch.equal(cuda_backend.llm_int8_linear_hopper(x, weight), plain)
    assert cuda_backend.quantize_rows_hopper(x, threshold=6.0).outliers.numel() == 0


def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight, _ = layer(1, 200, 256, 4500)
    x[17, 3], x[150, 9] = float("nan"), float("-inf")
    found = cuda_backend.llm_int8_linear_hopper(x, cuda_backend.prepare_weight(weight))
    assert found[17].isnan().all()
    assert not found[150].isfinite().any()
    others = torch.ones(200, dtype=torch.bool, device="cuda")
    others[[17, 150]] = False
    assert found[others].isfinite().all()


def test_streams_and_memory_between_kernels() -> None:
    x, weight, bias = layer(2, 256, 512, 4400)
    prepared = cuda_backend.prepare_weight(weight)
    expected = cuda_backend.llm_int8_linear_hopper(x, prepared, bias=bias)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = cuda_backend.llm_int8_linear_hopper(late, prepared, bias=bias)
    explicit = cuda_backend.llm_int8_linear_hopper(x, prepared, bias=bias, stream=stream)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert torch.equal(explicit, expected)


@pytest.mark.parametrize(("T", "N"), [(2, 1024), (2, 4400), (40, 4400), (300, 4400)])
def test_graphs(T: int, N: int) -> None:
    """A captured call follows its inputs, outliers and their number among them; nothing waits in it."""
    x, weight, _ = layer(3, T, 512, N)
    prepared = cuda_backend.prepare_weight(weight)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        cuda_backend.llm_int8_linear_hopper(x, prepared)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = cuda_backend.llm_int8_linear_hopper(x, prepared)
    for columns in (0, 1, 30, 400):
        x.normal_().clamp_(-5, 5)
        x[:, :columns] = -9.0
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, cuda_backend.llm_int8_linear_hopper(x, prepared)), columns
    fresh, other = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(other, stream=fresh):
        later = cuda_backend.llm_int8_linear_hopper(x, prepared)
    for columns in (5, 0):
        x.normal_().clamp_(-5, 5)
        x[:, :columns] = -9.0
        other.replay()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(later, cuda_backend.llm_int8_linear_hopper(x, prepared)), columns
        assert torch.equal(later, out), columns


def test_other_libraries() -> None:
    case = judge.case_of(0, "float16", T=33, K=64, N=40)
    x, weight = case.args
    expected = cuda_backend.llm_int8_linear_hopper(x, weight)
    cupy = pytest.importorskip("cupy")
    found = cuda_backend.llm_int8_linear_hopper(cupy.asarray(x), cupy.asarray(weight))
    assert np.array_equal(found.get(), expected)
    jax = pytest.importorskip("jax")
    found = cuda_backend.llm_int8_linear_hopper(jax.device_put(x), jax.device_put(weight))
    assert np.array_equal(np.asarray(found), expected)


def test_refusals() -> None:
    x, weight, _ = layer(4, 8, 64, 40)
    prepared = cuda_backend.prepare_weight(weight)
    with pytest.raises(UnsupportedError, match="inputs are float32"):
        cuda_backend.llm_int8_linear_hopper(x.float(), prepared)
    with pytest.raises(UnsupportedError, match="strides"):
        cuda_backend.llm_int8_linear_hopper(x.T.contiguous().T, prepared)
    with pytest.raises(UnsupportedError, match="keep=True"):
        cuda_backend.llm_int8_linear_hopper(x, prepared, convention="paper")
    with pytest.raises(OptionError, match="int8 codes need 'released'"):
        cuda_backend.llm_int8_linear_hopper(x, cuda_backend.quantize_columns(weight), convention="paper")
    with pytest.raises(OptionError, match="nothing to keep"):
        cuda_backend.prepare_weight(cuda_backend.quantize_columns(weight), keep=True)
