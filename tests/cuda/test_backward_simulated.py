"""The portable backward kernels in Numba's simulator: every option, every ragged shape, every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings

import cuda_backend
from cuda_backend.attention.backward import flash_attention_vjp, supports
from refimpl.attention import scaled_dot_product_attention
from refimpl.attention.samples import EXTRAS, sample_attention
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.numerics import round_to, widen
from refimpl.random import dropout_keep
from refimpl.registry import Case
from refimpl.testing import check
from refimpl.tolerances import cast
from tests.cuda.drawn_calls import calls
from tests.cuda.judge import DTYPES, INVALID, arrays
from tests.cuda.judge_backward import backward_of, gradient_difference

pytestmark = pytest.mark.cudasim


def case_of(shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> Case:
    """Return a backward call of shape (B, Tq, Tk, Hq, Hkv, D, Dv)."""
    return backward_of(Case(arrays(shape, dtype), options), dtype)


@settings(max_examples=8)
@given(calls(2))
def test_equals_the_reference(call: tuple[Case, str, int]) -> None:
    case, dtype, seed = call
    found = gradient_difference(flash_attention_vjp, backward_of(case, dtype, seed), dtype)
    assume(found is None or not found.startswith(INVALID))
    assert found is None


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_options(extra: str, causal: Any) -> None:
    dtype = sorted(DTYPES)[(EXTRAS.index(extra) + bool(causal)) % 3]
    axes: Any = {"B": 2, "Tq": 5, "Tk": 11, "Hkv": 1, "group": 2, "D": 3, "Dv": 4}
    drawn = sample_attention(np.random.default_rng(4), **axes, causal=causal, extra=extra)
    case = backward_of(cast(drawn.replace(block_sizes=(3, 4)), DTYPES[dtype]), dtype)
    assert gradient_difference(flash_attention_vjp, case, dtype) is None


@pytest.mark.parametrize(
    "shape", [(1, 0, 3), (1, 3, 0), (0, 3, 3), (1, 8, 8), (1, 9, 7), (1, 7, 17), (1, 16, 15)]
)
def test_sizes_around_a_tile(shape: tuple[int, int, int]) -> None:
    case = case_of((*shape, 2, 1, 4, 3))
    assert gradient_difference(flash_attention_vjp, case, "float32") is None


@pytest.mark.parametrize(
    ("n", "dtype"), [(17, "bfloat16"), (63, "float32"), (64, "float16"), (65, "bfloat16")]
)
def test_long_sequences(n: int, dtype: str) -> None:
    case = case_of((1, n, n, 1, 1, 2, 2), dtype, causal=True, block_sizes=(16, 16))
    assert gradient_difference(flash_attention_vjp, case, dtype) is None


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_single_key_passes_the_gradient_on(dtype: str) -> None:
    """Its weight is 1 whatever the score: dV is dO, and queries and keys have no gradient but rounding."""
    case = case_of((1, 1, 1, 1, 1, 16, 16), dtype)
    dq, dk, dv, _ = case.call(flash_attention_vjp)
    assert np.array_equal(widen(dv), widen(case.args[-1]))
    for gradient in (dq, dk):
        assert np.abs(widen(gradient)).max() < 64 * 2.0**-24


@pytest.mark.parametrize("blocks", [(1, 1), (2, 9), (9, 2), (16, 16)])
def test_any_block_sizes_give_the_same(blocks: tuple[int, int]) -> None:
    case = case_of((1, 11, 10, 1, 1, 5, 6), "float16", causal="bottom_right", block_sizes=blocks)
    assert gradient_difference(flash_attention_vjp, case, "float16") is None


@pytest.mark.parametrize("sram", [50, 200, 5000])
def test_block_sizes_from_sram(sram: int) -> None:
    case = case_of((1, 6, 9, 1, 1, 5, 4), sram=sram)
    assert gradient_difference(flash_attention_vjp, case, "float32") is None


@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (6, 2), (5, 1)])
def test_query_heads_share_the_gradient_of_their_key_head(heads: tuple[int, int]) -> None:
    case = case_of((1, 3, 5, *heads, 4, 3))
    assert gradient_difference(flash_attention_vjp, case, "float32") is None


def test_wide_heads() -> None:
    assert gradient_difference(flash_attention_vjp, case_of((1, 2, 3, 1, 1, 256, 250)), "float32") is None


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 1, 4), (1, 2, 3, 4), (2, 1, 1, 4), (2, 2, 3, 4)])
def test_the_bias_gradient_is_summed_over_repeated_axes(shape: tuple[int, ...]) -> None:
    bias = np.random.default_rng(3).standard_normal(shape).astype(np.float16)
    case = case_of((2, 3, 4, 2, 1, 3, 3), "float16", bias=bias, causal="bottom_right")
    assert case.call(flash_attention_vjp).dbias.shape == shape
    assert gradient_difference(flash_attention_vjp, case, "float16") is None


@pytest.mark.parametrize("shape", [(), (3, 1), (2, 1, 1)])
def test_a_bias_that_is_the_same_for_all_keys_has_no_gradient(shape: tuple[int, ...]) -> None:
    bias = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    dbias = case_of((1, 3, 4, 2, 1, 3, 3), bias=bias).call(flash_attention_vjp).dbias
    assert dbias.shape == shape
    assert np.abs(dbias).max() < 1e-5


def test_rows_without_keys_have_no_gradient() -> None:
    mask = np.ones((6, 5), bool)
    mask[2], mask[:, 3] = False, False
    case = case_of((1, 6, 5, 1, 1, 4, 4), attn_mask=mask)
    assert case.args[4][0, 0, 2] == -np.inf
    dq, dk, dv, _ = case.call(flash_attention_vjp)
    for nothing, something in ((dq[0, 2], dq[0, 1]), (dk[0, 3], dk[0, 2]), (dv[0, 3], dv[0, 2])):
        assert np.all(nothing == 0)
        assert np.all(something != 0)


def test_padding_is_not_read() -> None:
    lengths: Any = {"q_lengths": np.array([3, 6]), "k_lengths": np.array([7, 5])}
    case = case_of((2, 6, 7, 1, 1, 4, 4), **lengths)
    expected = case.call(flash_attention_vjp)
    q, k, v, o, lse, do = (array.copy() for array in case.args)
    q[0, 3:] = o[0, 3:] = do[0, 3:] = k[1, 5:] = v[1, 5:] = np.nan
    lse[0, :, 3:] = np.nan
    found = flash_attention_vjp(q, k, v, o, lse, do, **lengths)
    for name in ("dq", "dk", "dv"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_dropout_is_bit_equal_with_the_reference() -> None:
    """Equal weights and one-hot gradients show in dV which weights were kept."""
    q, k, v = arrays((2, 5, 9, 2, 2, 4, 5), "float32")
    do = np.broadcast_to(np.eye(5, dtype=np.float32)[None, :, None], (2, 5, 2, 5))
    options: Any = {"dropout_p": 0.4, "rng": 2**63 + 12345}
    out, lse = scaled_dot_product_attention(0 * q, k, v, return_lse=True, **options)
    dv = flash_attention_vjp(0 * q, k, v, out, lse, do, block_sizes=(2, 4), **options).dv
    every = np.arange
    kept = dropout_keep(options["rng"], 0.4, every(2)[:, None], every(2)[None], every(5), every(9))
    assert np.array_equal(dv.transpose(0, 2, 3, 1) > 0, kept)  # b, h, i, j


def test_dropout_mask_says_what_is_kept() -> None:
    mask = np.random.default_rng(0).random((1, 2, 5, 6)) < 0.6
    case = case_of((1, 5, 6, 2, 2, 4, 4), dropout_mask=mask, dropout_p=0.4, block_sizes=(4, 4))
    assert gradient_difference(flash_attention_vjp, case, "float32") is None


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
def test_the_log_sum_exp_may_have_any_floating_dtype(kind: str) -> None:
    q, k, v, o, lse, do = case_of((1, 4, 6, 2, 1, 4, 4), "float16").args
    lse = round_to(lse, DTYPES.get(kind, np.dtype(kind)))
    expected = flash_attention_vjp(q, k, v, o, widen(lse).astype(np.float32), do)
    found = flash_attention_vjp(q, k, v, o, lse, do)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert one.dtype == np.float16
        assert np.array_equal(one, other)


def test_repeated_backward_is_bitwise_equal() -> None:
    case = case_of((1, 9, 17, 2, 1, 4, 4), causal="bottom_right", dropout_p=0.2, rng=5)
    first, second = case.call(flash_attention_vjp), case.call(flash_attention_vjp)
    for one, other in zip(first[:3], second[:3], strict=True):
        assert one.tobytes() == other.tobytes()


def test_strided_inputs_are_read_where_they_lie_and_not_changed() -> None:
    packed = np.random.default_rng(0).standard_normal((1, 5, 3, 2, 4)).astype(np.float32)
    case = backward_of(Case((packed[:, :, 0], packed[:, :, 1], packed[:, ::-1, 2])), "float32")
    before = [array.tobytes() for array in case.args]
    assert gradient_difference(flash_attention_vjp, case, "float32") is None
    assert [array.tobytes() for array in case.args] == before


AXES: Any = {"B": 1, "Tq": 5, "Tk": 7, "Hkv": 1, "group": 2, "D": 3, "Dv": 4, "return_lse": False}


@pytest.mark.parametrize("blocks", ["3x5", "sram"])
def test_the_laws_hold(blocks: str) -> None:
    axes: Any = {**AXES, "causal": "bottom_right", "extra": "all", "blocks": blocks}
    report = check(
        "attention.flash_backward", flash_attention_vjp, backend="cudasim", axes=axes, dtypes=("float16",)
    )
    assert report.ok, report.failed


def test_refusals() -> None:
    q, k, v, o, lse, do = case_of((1, 3, 4, 2, 1, 4, 4)).args
    with pytest.raises(ShapeError, match="o: axis Dv must equal that of v"):
        flash_attention_vjp(q, k, v, o[..., :2], lse, do)
    with pytest.raises(ShapeError, match="lse: axis Hq must equal that of q"):
        flash_attention_vjp(q, k, v, o, lse.swapaxes(1, 2), do)
    with pytest.raises(DTypeError, match="lse: expected float64"):
        flash_attention_vjp(q, k, v, o, lse > 0, do)
    with pytest.raises(OptionError, match="ambiguous for Tq=3, Tk=4"):
        flash_attention_vjp(q, k, v, o, lse, do, causal=True)
    with pytest.raises(UnsupportedError, match="one query and one key fill 24 floats"):
        flash_attention_vjp(q, k, v, o, lse, do, sram=23)
    with pytest.raises(UnsupportedError, match="inputs are float64; the kernel takes float32"):
        flash_attention_vjp(q, k, v, o, lse, do.astype(np.float64))
    with pytest.raises(OptionError, match="rng: a backward pass needs the integer seed"):
        flash_attention_vjp(q, k, v, o, lse, do, dropout_p=0.5, rng=np.random.default_rng())


def test_arrays_of_other_libraries_are_refused_in_words() -> None:
    """Stand-ins for tensors: what the wrapper asks of PyTorch is a handful of attributes."""

    def tensor(shape: tuple[int, ...], dtype: str = "float16") -> Any:
        attributes = {"__module__": "torch", "dtype": f"torch.{dtype}", "is_cuda": True, "shape": shape}
        return type("Tensor", (), attributes)()

    ask: Any = supports
    x, statistic = (1, 3, 2, 4), (1, 2, 3)
    five: Any = [tensor(x) for _ in range(5)]
    host = np.zeros(statistic, np.float32)
    assert ask(*five[:4], tensor(statistic, "float32"), five[4]) == []
    assert ask(*five[:4], host, five[4]) == []
    assert ask(*five[:4], tensor(statistic), five[4]) == [
        "lse on the GPU is float16; the kernel takes float32"
    ]
    with pytest.raises(ShapeError, match="lse: axis Hq"):
        ask(*five[:4], tensor((1, 3, 3), "float32"), five[4])
    with pytest.raises(DTypeError, match="q, k, v, o and do: expected one dtype, got float16, float32"):
        ask(*five[:4], host, tensor(x, "float32"))
    with pytest.raises(DTypeError, match="q, k, v, o and do: expected arrays of one library"):
        ask(*five[:4], host, np.zeros(x, np.float32))
    with pytest.raises(DTypeError, match="lse: expected an array of numpy, got one of torch"):
        ask(*[np.zeros(x, np.float32)] * 4, tensor(statistic), np.zeros(x, np.float32))


def test_it_is_found_under_its_name() -> None:
    assert cuda_backend.flash_attention_vjp is flash_attention_vjp
