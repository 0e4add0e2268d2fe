"""Weight-only layers: stored weights, errors, bitsandbytes' own layer, and mistakes that laws must catch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from refimpl import quant, registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.quant import Int8Groups, int8_weight_linear, nf4_linear, nf4_quantize, quantize_groups
from refimpl.quant.absmax import quantize_columns
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


def _arrays(M: int, K: int, N: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(K)
    return rng.standard_normal((M, K)), rng.standard_normal((K, N))


def test_stored_weights_give_the_same_bits() -> None:
    x, weight = _arrays(3, 20, 5)
    stored = quantize_groups(weight, group_size=8)
    assert np.array_equal(
        int8_weight_linear(x, stored, group_size=8), int8_weight_linear(x, weight, group_size=8)
    )
    assert np.array_equal(nf4_linear(x, nf4_quantize(weight)), nf4_linear(x, weight))


def test_one_group_is_llm_int8s_column() -> None:
    """A group as long as a column is what LLM.int8() stores of it."""
    _, weight = _arrays(1, 20, 5)
    codes, absmax = quantize_columns(weight)
    stored = quantize_groups(weight, group_size=20)
    assert np.array_equal(stored.codes, codes)
    assert np.array_equal(stored.scale[0], absmax / 127)


def test_blocks_run_along_the_input_features() -> None:
    """A feature of size 1000 coarsens the weights of its own output only."""
    _, weight = _arrays(1, 64, 3)
    loud = weight.copy()
    loud[5, 1] = 1000.0
    codes = [nf4_quantize(w, block_size=64).codes.reshape(3, 32) for w in (weight, loud)]
    assert np.array_equal(codes[0][[0, 2]], codes[1][[0, 2]])


def test_bitsandbytes_layer() -> None:
    """Its 4-bit layer on a CPU, weights in blocks of 64 with compressed statistics, in float32."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        functional = pytest.importorskip("bitsandbytes.functional")
        rng = np.random.default_rng(0)
        x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((3, 256), (256, 96)))
        weights = torch.from_numpy(np.ascontiguousarray(weight.T))
        packed, state = functional.quantize_4bit(
            weights, quant_type="nf4", blocksize=64, compress_statistics=True
        )
        dense = functional.dequantize_4bit(packed, state).numpy()
    stored = nf4_quantize(weight)
    assert np.array_equal(stored.codes, packed.numpy().reshape(-1))
    # Its map of scales is made in float32 throughout, and differs by up to 6e-8.
    assert np.abs(quant.qlora_dequantize(stored) - dense).max() < 1e-6
    assert np.abs(nf4_linear(x, stored) - x @ dense.T).max() < 1e-4


def test_clear_errors() -> None:
    x, weight = _arrays(2, 8, 3)
    stored = quantize_groups(weight, group_size=4)
    with pytest.raises(ShapeError, match=r"weight scale: expected shape \(1, 3\) for groups of 8"):
        int8_weight_linear(x, stored, group_size=8)
    with pytest.raises(ShapeError, match="axis K must equal that of x"):
        int8_weight_linear(x[:, 1:], stored, group_size=4)
    with pytest.raises(DTypeError, match="weight codes: expected int8, got uint8"):
        int8_weight_linear(x, Int8Groups(stored.codes.view(np.uint8), stored.scale), group_size=4)
    with pytest.raises(ShapeError, match=r"stored as \(N, K\); got \(8, 3\)"):
        nf4_linear(x, nf4_quantize(weight.T))
    weight[1, 2] = np.nan
    with pytest.raises(OptionError, match=r"weight: expected finite numbers, got nan at \[1, 2\]"):
        quantize_groups(weight)
    with pytest.raises(OptionError, match="group_size"):
        quantize_groups(weight, group_size=0)


def _int8(x: Any, weight: Any, bias: Any, size: int, wrong: str) -> Any:
    """Weight-only int8 in plain NumPy, with one mistake."""
    K = weight.shape[0]
    if not K:
        return np.zeros((len(x), weight.shape[1])) + (0 if bias is None else bias)
    if wrong == "activations quantised":
        top = np.abs(x).max(axis=1, initial=0, keepdims=True) / 127
        x = np.rint(x / np.where(top > 0, top, 1)) * top
    starts = np.arange(0, K, size)
    absmax = np.maximum.reduceat(np.abs(weight), starts, axis=0)
    if wrong == "signed maximum":
        absmax = np.abs(np.maximum.reduceat(weight, starts, axis=0))
    if wrong == "first group's scale":
        absmax[:] = absmax[:1]
    if wrong == "scale of the row":
        absmax = np.broadcast_to(absmax.max(axis=1, keepdims=True), absmax.shape)
    spread = np.repeat(absmax, size, axis=0)[:K]
    steps = weight * (127 / np.where(spread > 0, spread, 1))
    codes = np.clip(np.trunc(steps) if wrong == "truncated" else np.rint(steps), -128, 127)
    if wrong == "unsigned codes":
        codes = np.where(codes < 0, codes + 256, codes)
    if wrong == "last group dropped" and K % size:
        codes[K // size * size :] = 0
    out = x @ (codes * spread / (128 if wrong == "128" else 127))
    if bias is not None and wrong != "bias lost":
        out = out + bias * (2 if wrong == "bias twice" else 1)
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        "activations quantised", "signed maximum", "first group's scale", "scale of the row", "truncated",
        "unsigned codes", "last group dropped", "128", "bias lost", "bias twice",
    ],
)  # fmt: skip
def test_mistakes_in_int8_are_caught(wrong: str) -> None:
    def f(x: Any, weight: Any, /, *, bias: Any = None, group_size: int = 128) -> Any:
        return _int8(x, weight, bias, group_size, wrong)

    mutant("quant.weight_only_int8")(f)
    MUTANTS.assert_caught("quant.weight_only_int8-f")


def _nf4(x: Any, weight: Any, bias: Any, sizes: tuple[int, int], wrong: str) -> Any:
    """NF4 with its scales quantised too, with one mistake."""
    turned = quant.qlora_quantize(weight if wrong == "blocks along N" else weight.T, block_size=sizes[0],
                                  scale_block_size=sizes[1])  # fmt: skip
    codes, indices, _, offset = turned[:4]
    if wrong == "low nibble first":
        codes = (codes << np.uint8(4)) | (codes >> np.uint8(4))
    if wrong == "offset forgotten":
        offset = offset * 0
    if wrong == "scales shifted":
        indices = np.roll(indices, 1)
    if wrong == "levels mirrored":
        codes = ~codes
    values = quant.qlora_dequantize(turned._replace(codes=codes, absmax_codes=indices, offset=offset))
    values = values if wrong == "blocks along N" else values.T
    if wrong == "last feature dropped":
        values[-1:] = 0
    out = x @ values
    return out if bias is None else out + bias


@pytest.mark.parametrize(
    "wrong",
    ["low nibble first", "offset forgotten", "scales shifted", "levels mirrored", "last feature dropped"],
)
def test_mistakes_in_nf4_are_caught(wrong: str) -> None:
    def f(
        x: Any, weight: Any, /, *, bias: Any = None, block_size: int = 64, scale_block_size: int = 256
    ) -> Any:
        return _nf4(x, weight, bias, (block_size, scale_block_size), wrong)

    mutant("quant.weight_only_nf4")(f)
    MUTANTS.assert_caught("quant.weight_only_nf4-f")


def test_the_other_order_of_blocks_is_seen() -> None:
    """Blocks along N keep every law of the error: the comparison with the definition sees them."""
    from refimpl.testing import check

    def f(
        x: Any, weight: Any, /, *, bias: Any = None, block_size: int = 64, scale_block_size: int = 256
    ) -> Any:
        return _nf4(x, weight, bias, (block_size, scale_block_size), "blocks along N")

    assert check("quant.weight_only_nf4", f, examples=4).failed
