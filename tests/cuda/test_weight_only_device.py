"""Quantised weights and attention in int8 on a GPU: decoding, any number of tokens, QLoRA, the Hopper kernel.

``FRUGAL_TEST_GPU=1 pytest -n 6 -s -m cuda tests/cuda/test_weight_only_device.py`` also prints errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import cuda_backend
from refimpl import quant
from refimpl.attention import scaled_dot_product_attention
from refimpl.errors import DTypeError, UnsupportedError
from refimpl.numerics import round_to, widen
from refimpl.quant import nf4_quantize, quantize_groups
from tests.cuda.int8_attention_judge import case_of as attention_case
from tests.cuda.int8_attention_judge import int8_difference
from tests.cuda.judge import DTYPES
from tests.cuda.test_device import on_torch
from tests.cuda.weight_only_judge import case_of, decoding, decoding_difference, moved, taking

pytestmark = pytest.mark.cuda

NARROW = ("float16", "bfloat16")


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    reason = cuda_backend.availability("cuda")
    if reason:
        pytest.skip(reason)


def _hopper() -> None:
    from cuda_backend.context import is_hopper

    if not is_hopper():
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("weight", ["int8", "nf4"])
@pytest.mark.parametrize("tokens", [(1, 2), (3, 4), (5, 6, 7, 8), range(9, 17)], ids=["2", "4", "8", "16"])
def test_decoding_obeys_its_record(tokens: Sequence[int], weight: str, dtype: str) -> None:
    """Ragged and whole tiles, parts of a tile for several warps, several tiles for one, bias or none."""
    shapes = ((256, 5), (512, 16), (1280, 33), (1536, 600), (8192, 50))
    for i, M in enumerate(tokens):
        for K, N in shapes if i == 0 else shapes[i % 3 : i % 3 + 2]:
            case = case_of(weight, dtype, seed=N, M=M, K=K, N=N, bias=(M + N) % 2 == 0)
            assert decoding_difference(weight, case, dtype) is None, (M, K, N)


@pytest.mark.parametrize("kernel", ["stream", "wide", "portable"])
def test_every_kernel_of_nf4(kernel: str) -> None:
    """Whichever the rule takes for a layer, all that fit compute it."""
    _hopper()
    for M, K, N in ((1, 1280, 8500), (4, 512, 40), (8, 4096, 200), (16, 256, 33)):
        if kernel == "stream" and M > 8:
            continue
        case = case_of("nf4", "float16", seed=M, M=M, K=K, N=N)
        with taking(kernel):
            assert decoding_difference("nf4", case, "float16") is None, (M, K, N)


@pytest.mark.parametrize("weight", ["int8", "nf4"])
@pytest.mark.parametrize("M", [1, 6, 16])
def test_long_rows(M: int, weight: str) -> None:
    """Activations that do not fit into shared memory come from global memory."""
    case = case_of(weight, "float16", M=M, K=28_672, N=64)
    assert decoding_difference(weight, case, "float16") is None


@pytest.mark.parametrize("weight", ["int8", "nf4"])
@pytest.mark.parametrize("M", [1, 5, 16])
def test_layers_in_a_row_and_in_a_graph(M: int, weight: str) -> None:
    """A grid that starts early sees what the layer before it has written: as when the host waits between."""
    torch = pytest.importorskip("torch")
    layers, K = 12, 2048
    generator = torch.Generator("cuda").manual_seed(0)

    def prepared() -> Any:
        values = torch.randn(K, K, device="cuda", generator=generator).cpu().numpy()
        values /= np.float32(np.sqrt(K))  # outputs stay of size 1 (and float32: scales are of this dtype)
        if weight == "int8":
            return cuda_backend.prepare_int8_groups(moved(quantize_groups(values), on_torch))
        return cuda_backend.prepare_nf4(moved(nf4_quantize(values), on_torch))

    weights = [prepared() for _ in range(2)]
    f = cuda_backend.int8_linear_decode if weight == "int8" else cuda_backend.nf4_linear_decode

    def chain(x: Any, *, wait: bool = False) -> Any:
        for i in range(layers):
            x = f(x, weights[i % 2])
            if wait:
                torch.cuda.synchronize()
        return x

    inputs = [torch.randn(M, K, device="cuda", generator=generator).half() for _ in range(3)]
    expected = [chain(x, wait=True) for x in inputs]
    for wanted in expected:
        assert torch.isfinite(wanted).all()
        assert 0.5 < float(wanted.float().std()) < 2
    for _ in range(20):
        for x, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(chain(x), wanted)
    given = torch.empty_like(inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(given)
    for _ in range(20):
        for x, wanted in zip(inputs, expected, strict=True):
            given.copy_(x)
            graph.replay()
            assert torch.equal(out, wanted)


def test_scales_of_another_format_are_refused() -> None:
    x, values = on_torch(np.zeros((1, 256), np.float16)), np.ones((256, 16))
    int8, nf4 = (moved(f(values), on_torch) for f in (quantize_groups, nf4_quantize))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: cuda_backend.prepare_int8_groups(int8),
        lambda: cuda_backend.prepare_nf4(nf4),
        lambda: cuda_backend.int8_weight_linear(x, int8),
        lambda: cuda_backend.nf4_linear(x, nf4),
    )
    for call in calls:
        with pytest.raises(DTypeError, match="scale: expected float32, got float64"):
            call()


def test_weights_are_not_prepared_under_capture() -> None:
    torch = pytest.importorskip("torch")
    packed = moved(nf4_quantize(np.ones((256, 16), np.float32)), on_torch)
    marker, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        marker += 1
        with pytest.raises(UnsupportedError, match="prepare weights ahead"):
            cuda_backend.prepare_nf4(packed)


@pytest.mark.parametrize("group_size", [128, 256, 4096])
def test_groups(group_size: int) -> None:
    case = case_of("int8", "float16", M=3, K=2048, N=130, group_size=group_size)
    assert decoding_difference("int8", case, "float16") is None


@pytest.mark.parametrize("weight", ["int8", "nf4"])
def test_torch_tensors_repeat_bit_for_bit(weight: str) -> None:
    torch = pytest.importorskip("torch")
    case = case_of(weight, "float16", M=5, K=4096, N=4096)
    expected = case.call(decoding(weight))
    f = decoding(weight, on_torch)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = [case.call(f) for _ in range(5)]
    stream.synchronize()
    for each in found:
        assert isinstance(each, torch.Tensor)
        assert np.array_equal(each.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_any_number_of_tokens(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for M, K, N in ((1, 70, 33), (65, 300, 129), (200, 1024, 384)):
        x = round_to(rng.standard_normal((M, K)), DTYPES[dtype])
        weight = rng.standard_normal((K, N)).astype(np.float32) / np.sqrt(K)
        bias = round_to(rng.standard_normal(N), DTYPES[dtype])
        for name, stored in (
            ("int8_weight_linear", quantize_groups(weight)),
            ("nf4_linear", nf4_quantize(weight)),
        ):
            found = getattr(cuda_backend, name)(x, stored, bias=bias)
            expected = getattr(quant, name)(x, stored, bias=bias)
            _assert_near(found, expected, dtype, name)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_qlora_forward_and_backward(dtype: str) -> None:
    rng = np.random.default_rng(1)
    M, K, N, R = 150, 512, 384, 16
    shapes = (M, K), (K, R), (R, N), (M, N)
    x, a, b, dy = (round_to(rng.standard_normal(s) / 4, DTYPES[dtype]) for s in shapes)
    stored = quant.qlora_quantize(rng.standard_normal((K, N)).astype(np.float32) / 20)
    options: dict[str, Any] = {"lora_alpha": 32.0}
    _assert_near(
        cuda_backend.qlora_linear(x, a, b, stored, **options),
        quant.qlora_linear(x, a, b, stored, **options),
        dtype,
        "forward",
    )
    found = cuda_backend.qlora_linear_vjp(x, a, b, stored, dy, **options)
    expected = quant.qlora_linear_vjp(x, a, b, stored, dy, **options)
    for name, mine, wanted in zip(expected._fields, found, expected, strict=True):
        _assert_near(mine, wanted, dtype, name)


def _assert_near(found: Any, expected: Any, dtype: str, what: str) -> None:
    """Two evaluations in one format: within two units in the last place of the largest output."""
    spacing = {"float32": 2.0**-18, "float16": 2.0**-9, "bfloat16": 2.0**-6}[dtype]
    wanted = widen(expected).astype(np.float64)
    assert found.dtype == expected.dtype, what
    assert np.abs(widen(found).astype(np.float64) - wanted).max() <= spacing * np.abs(wanted).max(), what


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_portable_attention_in_int8(dtype: str, causal: Any) -> None:
    for Tq, Tk in ((1, 1), (70, 131), (200, 200)):
        case = attention_case(
            dtype, Tq, B=2, Tq=Tq, Tk=Tk, Hkv=2, D=40, Dv=24, blocks="default", causal=causal
        )
        assert int8_difference(cuda_backend.int8_attention, case, dtype) is None, (Tq, Tk)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize(
    ("D", "dtype"), [(128, "float16"), (128, "bfloat16"), (64, "float16"), (40, "float16")]
)
def test_hopper_attention_in_int8(D: int, dtype: str, causal: Any) -> None:
    _hopper()
    for Tq, Tk in ((1, 1), (64, 128), (65, 129), (200, 70), (300, 700)):
        case = attention_case(
            dtype, Tq, B=2, Tq=Tq, Tk=Tk, Hkv=2, group=2, D=D, Dv=D, blocks="default", causal=causal
        )
        assert int8_difference(cuda_backend.int8_attention_hopper, case, dtype) is None, (Tq, Tk)


def test_zeros_and_masked_blocks() -> None:
    _hopper()
    q = np.zeros((1, 130, 2, 128), np.float16)
    assert not cuda_backend.int8_attention_hopper(q, q, q, causal=True).any()
    with pytest.raises(UnsupportedError, match="no keys"):
        cuda_backend.int8_attention_hopper(q, q[:, :0], q[:, :0])


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_and_their_error(causal: bool) -> None:
    """The error beside exact attention, smoothed or not, of keys that share a vector."""
    _hopper()
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, 8192, 4, 128, device="cuda", dtype=torch.float16, generator=generator) for _ in "qkv"
    )
    k += 2 * torch.randn(1, 1, 4, 128, device="cuda", dtype=torch.float16, generator=generator)
    rows = np.arange(0, 8192, 1021)
    host = [x[:, :, 1:2].double().cpu().numpy() for x in (q, k, v)]
    mask = np.arange(8192)[None, :] <= rows[:, None] if causal else None
    exact = scaled_dot_product_attention(host[0][:, rows], host[1], host[2], attn_mask=mask)
    errors = {}
    for name, f, options in (
        ("int8", cuda_backend.int8_attention_hopper, {}),
        ("int8, not smoothed", cuda_backend.int8_attention_hopper, {"smooth": False}),
        ("fp16", cuda_backend.flash_attention_hopper, {}),
    ):
        outs = [f(q, k, v, causal=causal, **options) for _ in range(3)]
        assert all(torch.equal(outs[0], out) for out in outs), "results repeat bit for bit"
        mine = outs[0][:, torch.from_numpy(rows).cuda(), 1:2].double().cpu().numpy()
        errors[name] = float(np.sqrt(np.mean(np.square(mine - exact)) / np.mean(np.square(exact))))
    print(causal, errors)  # noqa: T201
    assert errors["int8"] < 0.05
    assert errors["int8"] < errors["int8, not smoothed"]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_module_in_the_place_of_a_linear_layer(form: Any, dtype: str) -> None:
    """The definition's bits; few tokens and many, in a graph, after a state was loaded and it has moved."""
    torch = pytest.importorskip("torch")
    from cuda_backend.torch_ops import weight_only_linear
    from cuda_backend.torch_weight_only import groups_of, nf4_of

    make = {"device": "cuda", "dtype": getattr(torch, dtype)}
    layer, other = (torch.nn.Linear(1024, 300, **make) for _ in range(2))
    given = layer.weight.detach().float().cpu().numpy().T
    if form == "int8":
        mine: Any = groups_of(layer.weight.detach())
        wanted: Any = quantize_groups(given)
        values = quant.dequantize_groups(wanted).T
    else:
        mine, wanted = nf4_of(layer.weight.detach()), nf4_quantize(given)
        values = quant.qlora_dequantize(wanted)
    for part, known in zip(mine, wanted, strict=True):
        assert np.array_equal(part.cpu().numpy() if hasattr(part, "cpu") else part, known)
    module = weight_only_linear(other, weight=form)
    module.load_state_dict(layer.state_dict())
    wide = module.weight_in(torch.float32)
    torch.testing.assert_close(wide.cpu().numpy(), np.ascontiguousarray(values), rtol=2**-22, atol=0)
    rounding = 2**-10 if dtype == "float16" else 2**-7
    with torch.no_grad():
        for tokens in (1, 16, 37, 700):
            x = torch.randn(tokens, 1024, **make)
            found = module(x)
            exact = x.double() @ wide.double().T + layer.bias.double()
            torch.testing.assert_close(
                found.double(), exact, rtol=rounding, atol=rounding * float(exact.abs().max())
            )
            module.cpu().cuda()
            assert torch.equal(module(x), found)
            graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
            with torch.cuda.graph(graph):
                out = module(given)
            given.copy_(x)
            graph.replay()
            assert torch.equal(out, found)
