"""The kernels for quantised weights in the simulator: decoding, gradients, QLoRA, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.arrays import poisoned_outputs
from cuda_backend.weight_only import call, pack, plan, prepared
from cuda_backend.weight_only.variant import Variant, Wide, choose, choose_nf4_hopper
from refimpl import quant
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.numerics import round_to, widen
from refimpl.quant import Int8Groups, nf4_quantize, qlora_quantize, quantize_groups
from tests.cuda.judge import DTYPES
from tests.cuda.weight_only_judge import case_of, decoding, decoding_difference, taking

pytestmark = pytest.mark.cudasim

NARROW = ("float16", "bfloat16")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("weight", "sizes"),
    [
        ("int8", {"M": 1, "K": 384, "N": 17, "group_size": 128}),  # an odd number of chunks, a ragged tile
        ("int8", {"M": 9, "K": 256, "N": 16, "group_size": 256}),
        ("int8", {"M": 16, "K": 128, "N": 5, "group_size": 4096, "bias": False}),
        ("nf4", {"M": 16, "K": 256, "N": 16, "scale_block_size": 8, "bias": False}),
    ],
)
def test_decoding_obeys_its_record(weight: str, sizes: dict[str, Any], dtype: str) -> None:
    assert decoding_difference(weight, case_of(weight, dtype, **sizes), dtype) is None


@pytest.mark.parametrize(
    ("kernel", "dtype", "sizes"),
    [
        # Two blocks of two warps: tiles that two warps share, warps with parts of several tiles, ragged ends.
        ("stream", "float16", {"M": 1, "K": 512, "N": 81, "scale_block_size": 256}),
        ("stream", "bfloat16", {"M": 2, "K": 256, "N": 5, "scale_block_size": 4, "values": "scaled"}),
        ("stream", "float16", {"M": 3, "K": 1280, "N": 17, "scale_block_size": 8, "bias": False}),
        ("stream", "bfloat16", {"M": 4, "K": 512, "N": 48}),
        ("stream", "float16", {"M": 7, "K": 768, "N": 33, "scale_block_size": 16}),
        ("stream", "bfloat16", {"M": 8, "K": 256, "N": 17, "scale_block_size": 4, "values": "scaled"}),
        ("wide", "float16", {"M": 1, "K": 256, "N": 321, "scale_block_size": 4}),
        ("wide", "bfloat16", {"M": 8, "K": 512, "N": 66, "scale_block_size": 256, "bias": False}),
        ("wide", "float16", {"M": 9, "K": 512, "N": 17, "values": "scaled"}),
        ("wide", "bfloat16", {"M": 16, "K": 256, "N": 5, "scale_block_size": 8}),
        ("portable", "float16", {"M": 1, "K": 768, "N": 17, "scale_block_size": 256}),
        ("portable", "bfloat16", {"M": 8, "K": 256, "N": 17, "scale_block_size": 4, "values": "scaled"}),
    ],
)
def test_kernels_of_nf4_obey_the_record(kernel: str, dtype: str, sizes: dict[str, Any]) -> None:
    with taking(kernel):
        assert decoding_difference("nf4", case_of("nf4", dtype, **sizes), dtype) is None


@pytest.mark.parametrize("weight", ["int8", "nf4"])
def test_activations_from_global_memory(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into shared memory is read as it is needed, and gives the same bits."""
    for M in (1, 11):
        case = case_of(weight, "float16", M=M, K=256, N=20)
        with taking("portable"):
            resident = case.call(decoding(weight))
        with monkeypatch.context() as patch, taking("portable"):
            patch.setattr(plan, "choose", lambda *a: choose(*a)._replace(resident=False))
            assert np.array_equal(case.call(decoding(weight)), resident)


def test_rows_with_a_pitch_and_nothing_to_do() -> None:
    x = np.random.default_rng(0).standard_normal((3, 264)).astype(np.float16)
    weight = prepared.prepare_nf4(nf4_quantize(np.eye(256, 20, dtype=np.float32)))
    assert np.array_equal(call.nf4_linear_decode(x[:, 4:260], weight), x[:, 4:24])
    assert call.nf4_linear_decode(x[:0, :256], weight).shape == (0, 20)


def test_packing_is_the_permutation_that_it_says() -> None:
    """The order in which lanes read, written out by NumPy from the figures of the PTX ISA."""
    K, N = 512, 16
    rng = np.random.default_rng(0)
    stored = Int8Groups(rng.integers(-127, 128, (K, N)).astype(np.int8), np.ones((4, N), np.float32))
    found = prepared.prepare_int8_groups(stored).codes.reshape(4, 2, 2, 8, 4, 4, 4)
    for chunk, part, half, g, t, step, i in [
        (0, 0, 0, 0, 0, 0, 0),
        (3, 1, 1, 7, 3, 3, 3),
        (2, 0, 1, 5, 1, 2, 3),
    ]:
        k = 128 * chunk + 64 * part + 16 * step + 4 * t + i
        assert found[chunk, part, half, g, t, step, i] == int(stored.codes[k, 8 * half + g]) + 128
    weight = nf4_quantize(rng.standard_normal((K, N)).astype(np.float32))
    bytes_ = weight.codes.reshape(N, K // 2)
    lanes = prepared.prepare_nf4(weight).codes.view(np.uint8).reshape(2, 2, 2, 8, 4, 8, 2)
    for chunk, part, half, g, t, step, i in [
        (0, 0, 0, 0, 0, 0, 0),
        (1, 1, 1, 7, 3, 7, 1),
        (1, 0, 1, 2, 1, 5, 0),
    ]:
        k = 256 * chunk + 128 * part + 16 * step + 4 * t + 2 * i
        assert lanes[chunk, part, half, g, t, step, i] == bytes_[8 * half + g, k // 2]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_gradients(dtype: str) -> None:
    """Of x and bias, within the error that the reference itself has in this format, three times."""
    rng = np.random.default_rng(0)
    x, dy, bias = (round_to(rng.standard_normal(s), DTYPES[dtype]) for s in ((5, 13), (5, 6), (6,)))
    weight = rng.standard_normal((13, 6)).astype(np.float32)
    stored = quantize_groups(weight, group_size=4)
    packed = nf4_quantize(weight, block_size=8, scale_block_size=4)
    for name, args, options in (
        ("int8_weight_linear_vjp", (x, stored, dy), {"group_size": 4, "bias": bias}),
        ("nf4_linear_vjp", (x, packed, dy), {"bias": bias}),
    ):
        with poisoned_outputs():
            found = getattr(cuda_backend, name)(*args, **options)
        _assert_near(found, getattr(quant, name), args, options, dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_qlora_backward(dtype: str) -> None:
    rng = np.random.default_rng(1)
    shapes = (5, 11), (11, 3), (3, 6), (5, 6)
    x, a, b, dy = (round_to(rng.standard_normal(s), DTYPES[dtype]) for s in shapes)
    stored = quant.qlora_quantize(
        rng.standard_normal((11, 6)).astype(np.float32), block_size=8, scale_block_size=4
    )
    for rank in (3, 0):
        args = (x, a[:, :rank], b[:rank], stored, dy)
        with poisoned_outputs():
            found = cuda_backend.qlora_linear_vjp(*args, lora_alpha=2.0)
        _assert_near(found, quant.qlora_linear_vjp, args, {"lora_alpha": 2.0}, dtype)


def _assert_near(found: Any, reference: Any, args: Any, options: dict[str, Any], dtype: str) -> None:
    """Hold outputs to the reference in float64, with three times the error that the reference has itself."""

    def exact(value: Any) -> Any:
        floats = getattr(value, "dtype", None) is not None and value.dtype.name in (*DTYPES, "bfloat16")
        if isinstance(value, tuple):
            return type(value)(*map(exact, value)) if hasattr(value, "_fields") else value
        return widen(value).astype(np.float64) if floats else value

    truth = reference(*map(exact, args), **{key: exact(value) for key, value in options.items()})
    baseline = reference(*args, **options)
    for name, wanted, own, mine in zip(truth._fields, truth, baseline, found, strict=True):
        if wanted is None:
            assert mine is None
            continue
        assert mine.dtype == own.dtype, name
        assert mine.shape == wanted.shape, name
        size = float(np.abs(wanted).max(initial=0.0))
        error = np.abs(widen(own).astype(np.float64) - wanted).max(initial=0.0)
        spacing = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype] * size
        assert np.abs(widen(mine).astype(np.float64) - wanted).max(initial=0.0) <= 3 * error + spacing, name


def test_weights_that_are_stored_otherwise() -> None:
    """A square weight's transpose, a prepared weight, a group of no rows."""
    square, x = np.eye(8, dtype=np.float32), np.zeros((1, 8), np.float32)
    zero: Any = np.zeros((8, 1), np.float32)
    rows, columns = qlora_quantize(square), nf4_quantize(square)
    for product in (cuda_backend.nf4_linear, quant.nf4_linear):
        with pytest.raises(OptionError, match="one that nf4_quantize has stored, got one of qlora_quantize"):
            product(x, rows)
    for product in (cuda_backend.qlora_linear, quant.qlora_linear):
        with pytest.raises(OptionError, match="one that qlora_quantize has stored, got one of nf4_quantize"):
            product(x, zero, zero.T, columns)
    ready = prepared.prepare_nf4(nf4_quantize(np.zeros((256, 4), np.float32)))
    with pytest.raises(DTypeError, match="expected NF4Weight or an array, got PreparedNF4"):
        cuda_backend.nf4_linear(np.zeros((1, 256), np.float32), ready)
    groups = quantize_groups(square, group_size=4)
    with pytest.raises(OptionError, match="group_size: expected at least 1, got 0"):
        cuda_backend.int8_weight_linear(x, groups, group_size=0)
    with pytest.raises(DTypeError, match="group_size: expected a whole number"):
        cuda_backend.int8_weight_linear(x, groups, group_size=2.5)


def test_clear_refusals() -> None:
    x = np.zeros((1, 256), np.float16)
    weight = prepared.prepare_nf4(nf4_quantize(np.zeros((256, 4), np.float32)))
    with pytest.raises(UnsupportedError, match="17 tokens; the kernel takes up to 16"):
        call.nf4_linear_decode(np.zeros((17, 256), np.float16), weight)
    with pytest.raises(UnsupportedError, match="inputs are float32; the kernel takes float16, bfloat16"):
        call.nf4_linear_decode(x.astype(np.float32), weight)
    with pytest.raises(ShapeError, match="axis K must equal that of x"):
        call.nf4_linear_decode(x[:, 1:], weight)
    with pytest.raises(UnsupportedError, match="K is 320; the kernel takes multiples of 256"):
        prepared.prepare_nf4(nf4_quantize(np.zeros((320, 4), np.float32)))
    with pytest.raises(UnsupportedError, match="group_size is 96"):
        prepared.prepare_int8_groups(
            quantize_groups(np.zeros((256, 4), np.float32), group_size=96), group_size=96
        )
    with pytest.raises(DTypeError, match="weight scale: expected float32, got float64"):
        prepared.prepare_int8_groups(quantize_groups(np.zeros((128, 4))))
    with pytest.raises(OptionError, match="one that nf4_quantize has stored, got one of qlora_quantize"):
        prepared.prepare_nf4(qlora_quantize(np.zeros((256, 256), np.float32)))
    other: Any = x
    for function, given, expected in (
        (prepared.prepare_nf4, (other,), "NF4Weight, got ndarray"),
        (prepared.prepare_int8_groups, (weight,), "Int8Groups, got PreparedNF4"),
        (call.nf4_linear_decode, (x, (1, 2)), "NF4Weight or an array, got tuple"),
        (call.int8_linear_decode, (x, weight), "Int8Groups or an array, got PreparedNF4"),
    ):
        wrong: Any = function
        with pytest.raises(DTypeError, match=f"weight: expected {expected}"):
            wrong(*given)


@pytest.mark.parametrize("kind", ["given", "stored", "prepared"])
def test_a_weight_is_prepared_by_the_call_if_it_is_not(kind: str) -> None:
    x, w = np.ones((2, 256), np.float16), np.random.default_rng(0).standard_normal((256, 5))
    eight = [w, quantize_groups(w.astype(np.float32), group_size=256)]
    four = [w, nf4_quantize(w.astype(np.float32), scale_block_size=8)]
    eight.append(prepared.prepare_int8_groups(eight[1], group_size=256))
    four.append(prepared.prepare_nf4(four[1]))
    at = ("given", "stored", "prepared").index(kind)
    bias = np.arange(5, dtype=np.float16)
    found = call.int8_linear_decode(x, _half(eight[at]), bias=bias, group_size=256)
    assert np.abs(found - cuda_backend.int8_weight_linear(x, eight[1], bias=bias, group_size=256)).max() < 0.1
    found = call.nf4_linear_decode(x, _half(four[at]), bias=bias, scale_block_size=8)
    assert np.abs(found - cuda_backend.nf4_linear(x, four[1], bias=bias)).max() < 0.1


def _half(weight: Any) -> Any:
    return weight.astype(np.float16) if isinstance(weight, np.ndarray) else weight


def _on_gpu(array: Any, dtype: str | None = None) -> Any:
    """Return what says of itself that it is PyTorch's tensor on a GPU, and has no numbers."""
    said = {"shape": array.shape, "dtype": f"torch.{dtype or array.dtype}", "is_cuda": True}
    return type("Tensor", (), {"__module__": "torch", **said})()


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_scales_on_a_gpu_are_float32(dtype: str) -> None:
    """A kernel would read others as float32 and return NaN, or numbers that look right."""
    x = _on_gpu(np.zeros((1, 256), np.float16))
    codes, scale = quantize_groups(np.ones((256, 4), np.float32))
    int8 = Int8Groups(_on_gpu(codes), _on_gpu(scale, dtype))
    nf4 = nf4_quantize(np.ones((256, 4), np.float32))
    parts = {name: _on_gpu(getattr(nf4, name)) for name in ("codes", "absmax_codes", "scale", "offset")}
    nf4 = nf4._replace(**parts | {"scale": _on_gpu(nf4.scale, dtype)})
    absmax, product = _on_gpu(np.zeros(4), dtype), _on_gpu(np.zeros((4, 4), np.int32))
    for refused in (
        lambda: prepared.prepare_int8_groups(int8),
        lambda: prepared.prepare_nf4(nf4),
        lambda: cuda_backend.int8_weight_linear(x, int8),
        lambda: cuda_backend.nf4_linear(x, nf4),
        lambda: cuda_backend.llm_int8_linear(x, quant.Int8Columns(int8.codes, absmax)),
        lambda: cuda_backend.dequantize_product(product, absmax, absmax, dtype=np.float16),
    ):
        with pytest.raises(DTypeError, match=f"(scale|absmax): expected float32, got {dtype}"):
            refused()


def test_shared_memory_suffices() -> None:
    """Every layer of usual models fits, with its activations if they are few."""
    for weight in ("int8", "nf4"):
        for tokens in (1, 4, 8, 16):
            for K in (2048, 4096, 8192, 14336, 28672):
                variant = choose(weight, "f16", tokens, K)
                assert variant.blocks * (variant.shared_bytes(tokens, K) + 1024) <= 233_472
                assert variant.table_at % 256 == variant.x_at % 16 == 0
    assert choose("nf4", "f16", 1, 8192) == Variant("nf4", "f16", 8, wide=False, resident=True)
    for tokens in range(1, 17):
        for K in (256, 2048, 8192, 14336, 28672, 1 << 17):
            for N in (1, 4096, 28672, 128256):
                found = choose_nf4_hopper("f16", tokens, K, N, 132)
                grid = found.grid(tokens, K, N, 132)
                assert found.blocks * (grid.shared_bytes + 1024) <= 233_472
                assert not isinstance(found, Wide) or found.depth >= 2


def test_padding_repeats_a_row() -> None:
    order = pack.int8_order(128, 17)
    assert order.sizes[0] == 2
    packed = prepared.prepare_int8_groups(quantize_groups(np.eye(128, 17, dtype=np.float32)))
    assert packed.codes.nbytes == 2 * 16 * 128
