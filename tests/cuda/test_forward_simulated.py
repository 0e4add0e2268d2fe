"""The portable forward kernel in Numba's simulator: every option, every ragged shape, every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings

import cuda_backend
from cuda_backend.arrays import View, broadcast
from cuda_backend.attention import forward
from cuda_backend.attention.forward import flash_attention, scaled_dot_product_attention, supports
from refimpl.attention.samples import EXTRAS, sample_attention
from refimpl.errors import CapacityError, DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.random import dropout_keep
from refimpl.registry import Case
from refimpl.testing import check
from refimpl.tolerances import cast
from tests.cuda.drawn_calls import calls
from tests.cuda.judge import DTYPES, INVALID, arrays, difference

pytestmark = pytest.mark.cudasim


@settings(max_examples=8)
@given(calls(3, return_lse=True))
def test_equals_the_reference(call: tuple[Case, str, int]) -> None:
    case, dtype, _ = call
    found = difference(flash_attention, case, dtype)
    assume(found is None or not found.startswith(INVALID))
    assert found is None


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_options(extra: str, causal: Any, dtype: str) -> None:
    axes = {"B": 2, "Tq": 5, "Tk": 11, "Hkv": 1, "group": 2, "D": 3, "Dv": 4}
    drawn = sample_attention(np.random.default_rng(1), **axes, causal=causal, extra=extra, return_lse=True)
    case = cast(drawn.replace(block_sizes=(3, 4)), DTYPES[dtype])
    assert difference(flash_attention, case, dtype) is None


@pytest.mark.parametrize(
    "shape", [(1, 0, 3), (1, 3, 0), (0, 3, 3), (1, 1, 1), (1, 8, 8), (1, 9, 7), (1, 7, 17)]
)
def test_sizes_around_a_tile(shape: tuple[int, int, int]) -> None:
    b, tq, tk = shape
    case = Case(arrays((b, tq, tk, 2, 1, 4, 3), "float32"), {"return_lse": True})
    assert difference(scaled_dot_product_attention, case, "float32") is None


@pytest.mark.parametrize("blocks", [(1, 1), (2, 9), (9, 2), (16, 16)])
def test_any_block_sizes_give_the_same(blocks: tuple[int, int]) -> None:
    case = Case(arrays((1, 11, 10, 1, 1, 5, 6), "float16"), {"causal": "bottom_right", "block_sizes": blocks})
    assert difference(flash_attention, case, "float16") is None


@pytest.mark.parametrize("sram", [50, 200, 5000])
def test_block_sizes_from_sram(sram: int) -> None:
    case = Case(arrays((1, 6, 9, 1, 1, 5, 4), "float32"), {"sram": sram})
    assert difference(flash_attention, case, "float32") is None


@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (6, 2), (5, 1)])
def test_query_heads_share_the_right_key_head(heads: tuple[int, int]) -> None:
    case = Case(arrays((2, 3, 5, *heads, 4, 3), "float32"))
    assert difference(flash_attention, case, "float32") is None


def test_wide_heads() -> None:
    case = Case(arrays((1, 2, 9, 1, 1, 256, 250), "float32"))
    assert difference(flash_attention, case, "float32") is None


def test_rows_without_keys_are_zero() -> None:
    q, k, v = arrays((1, 6, 5, 1, 1, 4, 4), "float32")
    mask = np.ones((6, 5), bool)
    mask[2] = False
    out, lse = flash_attention(q, k, v, attn_mask=mask, return_lse=True)
    assert np.all(out[0, 2] == 0)
    assert lse[0, 0, 2] == -np.inf
    assert np.isfinite(np.delete(lse[0, 0], 2)).all()


def test_tiles_after_the_diagonal_are_not_read() -> None:
    """NaN keys and values in a tile that no query sees stay unseen; in a tile that is read they would not."""
    q, k, v = arrays((1, 4, 8, 1, 1, 4, 4), "float32")
    expected = flash_attention(q, k, v, causal="top_left", block_sizes=(4, 4))
    k[:, 4:] = v[:, 4:] = np.nan
    assert np.array_equal(flash_attention(q, k, v, causal="top_left", block_sizes=(4, 4)), expected)


def test_scores_behind_a_mask_may_be_anything() -> None:
    q, k, v = arrays((1, 3, 5, 1, 1, 4, 4), "float32")
    mask = np.array([True, True, False, True, False])
    expected = flash_attention(q, k, v, attn_mask=mask)
    k[:, 2], k[:, 4] = np.inf, np.nan
    assert np.array_equal(flash_attention(q, k, v, attn_mask=mask), expected)


def test_dropout_is_bit_equal_with_the_reference() -> None:
    """Equal weights and one-hot values show which weights were kept."""
    q, k, _ = arrays((2, 5, 9, 2, 1, 4, 9), "float32")
    v = np.broadcast_to(np.eye(9, dtype=np.float32)[None, :, None], (2, 9, 1, 9))
    seed = 2**63 + 12345
    out = flash_attention(0 * q, k, v, dropout_p=0.4, rng=seed, block_sizes=(2, 4))
    every = np.arange
    kept = dropout_keep(seed, 0.4, every(2)[:, None], every(2)[None], every(5), every(9))  # b, h, i, j
    assert np.array_equal(out.transpose(0, 2, 1, 3) > 0, kept)


def test_a_generator_is_drawn_from_once_and_not_by_supports() -> None:
    q, k, v = arrays((1, 3, 4, 1, 1, 4, 4), "float32")
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    assert supports(q, k, v, dropout_p=0.5, rng=one) == []
    first = flash_attention(q, k, v, dropout_p=0.5, rng=one)
    seed = int(other.integers(2**64, dtype=np.uint64))
    assert np.array_equal(first, flash_attention(q, k, v, dropout_p=0.5, rng=seed))
    assert one.integers(2**64, dtype=np.uint64) == other.integers(2**64, dtype=np.uint64)


def test_dropout_mask_says_what_is_kept() -> None:
    q, k, v = arrays((1, 5, 6, 2, 2, 4, 4), "float32")
    mask = np.random.default_rng(0).random((1, 2, 5, 6)) < 0.6
    case = Case(
        (q, k, v), {"dropout_mask": mask, "dropout_p": 0.4, "block_sizes": (4, 4), "return_lse": True}
    )
    assert difference(flash_attention, case, "float32") is None


def test_strided_inputs_are_read_where_they_lie() -> None:
    packed = np.random.default_rng(0).standard_normal((1, 5, 3, 2, 4)).astype(np.float32)
    q, k, v = packed[:, :, 0], packed[:, :, 1], packed[:, ::-1, 2]
    bias = np.random.default_rng(1).standard_normal((2, 1, 5)).astype(np.float16)
    assert difference(flash_attention, Case((q, k, v), {"bias": bias}), "float32") is None


@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (3, 4), (1, 1), (2, 5, 3, 4), (4,)])
def test_broadcast_repeats_by_strides_as_numpy_does(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    given = View(array.shape, array.strides, "float32", 0, array)
    expected = np.broadcast_to(array, (2, 5, 3, 4))
    found = broadcast(given, expected.shape)
    assert found.shape == expected.shape
    assert found.strides == expected.strides


def test_arguments_are_not_changed() -> None:
    q, k, v = arrays((1, 3, 4, 1, 1, 4, 4), "float16")
    before = [array.tobytes() for array in (q, k, v)]
    flash_attention(q, k, v)
    assert [array.tobytes() for array in (q, k, v)] == before


def test_a_missing_key_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: keys after the first tile are left out, and outputs left unwritten."""
    case = Case(arrays((1, 4, 9, 1, 1, 4, 4), "float32"))
    q, k, v = case.args
    assert difference(lambda *a, **o: flash_attention(q, k[:, :8], v[:, :8]), case, "float32")
    monkeypatch.setattr(forward, "launch", lambda *a, **o: None)
    assert "finite" in (difference(flash_attention, case, "float32") or "")


AXES = {"B": 1, "Tq": 5, "Tk": 7, "Hkv": 1, "group": 2, "D": 3, "Dv": 4, "return_lse": True}


@pytest.mark.parametrize("blocks", ["3x5", "sram"])
def test_the_laws_hold(blocks: str) -> None:
    axes = {**AXES, "causal": "bottom_right", "extra": "all", "blocks": blocks}
    report = check("attention.flash", flash_attention, backend="cudasim", axes=axes, dtypes=("float16",))
    assert report.ok, report.failed


def test_refusals() -> None:
    q, k, v = arrays((1, 3, 4, 2, 1, 4, 4), "float32")
    with pytest.raises(ShapeError, match="axis D must equal that of q"):
        flash_attention(q, k[..., :2], v)
    with pytest.raises(OptionError, match="ambiguous for Tq=3, Tk=4"):
        flash_attention(q, k, v, causal=True)
    with pytest.raises(DTypeError, match="attn_mask: expected bool"):
        flash_attention(q, k, v, attn_mask=np.ones((3, 4), np.float32))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="both say how large a tile is"):
        flash_attention(q, k, v, sram=100, block_sizes=(2, 2))
    with pytest.raises(OptionError, match=r"expected \(Br, Bc\) in \[1, 128\], got \(0, 2\)"):
        flash_attention(q, k, v, block_sizes=(0, 2))
    with pytest.raises(CapacityError, match="one query and one key fill"):
        flash_attention(q, k, v, sram=3)
    with pytest.raises(UnsupportedError, match="inputs are float64; the kernel takes float32"):
        flash_attention(*(array.astype(np.float64) for array in (q, k, v)))
    wide = np.ones((1, 1, 1, 257), np.float32)
    assert supports(wide, wide, wide[..., :1]) == ["D is 257; the kernel takes up to 256"]


def test_arrays_of_other_libraries_are_refused_in_words() -> None:
    """Stand-ins for tensors: what the wrapper asks of PyTorch is a handful of attributes."""
    host = arrays((1, 3, 4, 2, 1, 4, 4), "float32")

    def tensors(**attributes: Any) -> list[Any]:
        kind = type("Tensor", (), {"__module__": "torch", "dtype": "torch.float32", **attributes})
        found = [kind() for _ in host]
        for tensor, array in zip(found, host, strict=True):
            tensor.shape = array.shape
        return found

    with pytest.raises(DTypeError, match="expected arrays of one library"):
        flash_attention(tensors(is_cuda=True)[0], *host[1:])
    with pytest.raises(DTypeError, match="q: expected a tensor on the GPU, got one on cpu"):
        flash_attention(*tensors(is_cuda=False, device="cpu"))
    with pytest.raises(DTypeError, match="attn_mask: expected an array of numpy, got one of torch"):
        flash_attention(*host, attn_mask=tensors(is_cuda=True)[0])
    with pytest.raises(DTypeError, match="q: the simulator takes NumPy arrays, got Tensor"):
        flash_attention(*tensors(is_cuda=True))
    assert supports(*tensors(is_cuda=True, dtype="torch.bfloat16")) == []
    assert "float64" in supports(*tensors(is_cuda=True, dtype="torch.float64"))[0]
    bias = tensors(is_cuda=True, dtype="torch.float64")[0]
    bias.shape = (2, 3, 4)
    assert supports(*tensors(is_cuda=True), bias=bias) == [
        "bias on the GPU is float64; the kernel takes float32, float16, bfloat16"
    ]


def test_availability_gives_reasons() -> None:
    assert cuda_backend.availability("cudasim") is None
    assert "simulates" in (cuda_backend.availability("cuda") or "")
    assert "unknown backend" in (cuda_backend.availability("rocm") or "")
