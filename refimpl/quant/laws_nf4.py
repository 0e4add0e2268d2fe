"""Laws of NF4, of the quantisation of its scales, and of QLoRA's linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, in_float64, round_to, widen
from refimpl.quant.double_quantization import double_dequantize, dynamic_map
from refimpl.quant.nf4 import LEVELS, NF4, nf4_dequantize, unpack_nibbles
from refimpl.quant.qlora import qlora_dequantize, qlora_quantize
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]


def _blocks(case: Case) -> int:
    return int(case.kwargs.get("block_size", 64))


# NF4 (quant.nf4)


def _restored(case: Case, f: Function) -> tuple[NF4, FloatArray]:
    stored = NF4(*case.call(f))
    shape = case.args[0].shape
    return stored, in_float64(
        nf4_dequantize(stored.codes, in_float64(stored.absmax), shape=shape, block_size=_blocks(case))
    )


@law("quant.nf4")
def no_other_level_is_nearer(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every number takes the nearest of the 16 levels, the lower one midway between two."""
    (codes, absmax), x = NF4(*case.call(f)), in_float64(case.args[0]).reshape(-1)
    chosen = unpack_nibbles(codes, x.size)
    scale = np.repeat(in_float64(absmax), _blocks(case))[: x.size]
    far = np.abs(x[:, None] - scale[:, None] * LEVELS.astype(np.float64))
    mine = np.take_along_axis(far, chosen[:, None].astype(np.int64), axis=1)[:, 0]
    slack = 4 * float(np.finfo(absmax.dtype).eps) * scale
    live = scale > 1 / float(np.finfo(absmax.dtype).max)
    require(~live | (mine <= far.min(axis=1, initial=np.inf) + slack), "another level is nearer")


@law("quant.nf4")
def scales_are_the_largest_magnitudes(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The absmax of a block is its largest magnitude, exactly, and +-absmax comes back exactly."""
    stored, restored = _restored(case, f)
    x = in_float64(case.args[0]).reshape(-1)
    size = _blocks(case)
    for index, absmax in enumerate(in_float64(stored.absmax)):
        block = x[index * size : (index + 1) * size]
        require(np.max(np.abs(block)) == absmax, f"block {index}: absmax {absmax}")
        largest = np.abs(block) == absmax
        back = restored.reshape(-1)[index * size : (index + 1) * size]
        if absmax > 1e-37:  # below that its reciprocal overflows in float32
            require(back[largest] == block[largest], f"block {index}: its largest number is not restored")


@law("quant.nf4")
def quantising_again_changes_nothing(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The codes of what the codes stand for are the same codes."""
    stored, restored = _restored(case, f)
    again = case.replace(round_to(restored, stored.absmax.dtype)).call(f)
    require(np.asarray(again[0]) == stored.codes, "the codes change when they are quantised again")


@law("quant.nf4")
def powers_of_two_scale(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Four times the numbers have the same codes and four times the absmax."""
    (x,) = case.args
    stored, larger = NF4(*case.call(f)), NF4(*case.replace(round_to(widen(x) * 4, x.dtype)).call(f))
    require(stored.codes == larger.codes, "the codes change with the scale")
    require(4 * in_float64(stored.absmax) == in_float64(larger.absmax), "the absmax does not scale")


@law("quant.nf4")
def zeros_stay_zero(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A number that is 0 comes back as 0: the level 0 is code 7."""
    x = case.args[0].copy()
    x.reshape(-1)[::2] = 0
    codes = unpack_nibbles(NF4(*case.replace(x).call(f)).codes, x.size)
    require(codes[::2] == 7, "a zero has another code than 7")


@law("quant.nf4")
def midway_the_lower_level(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Midway between two levels the lower one is taken."""
    middle = (LEVELS[:-1].astype(np.float64) + LEVELS[1:]) / 2
    x = np.concatenate([[1.0], middle])
    if case.args[0].dtype.itemsize < 4:  # these midpoints are no numbers of a narrow format
        return
    codes = NF4(*case.replace(x.astype(case.args[0].dtype), block_size=16).call(f)).codes
    require(unpack_nibbles(codes, 16)[1:] == np.arange(15), "a midpoint went up")


# Double quantisation (quant.double)


@law("quant.double")
def error_within_half_a_gap(f: Function, case: Case, close: Close) -> None:
    """A scale moves by at most half the gap between neighbouring levels, times its block's scale."""
    codes, scale, offset = case.call(f)
    (absmax,) = (in_float64(array) for array in case.args)
    size = _blocks(case) if "block_size" in case.kwargs else 256
    back = in_float64(double_dequantize(codes, in_float64(scale), in_float64(offset), block_size=size))
    levels = dynamic_map().astype(np.float64)
    gaps = np.diff(levels)
    reach = np.maximum(np.append(gaps, 0), np.append(0, gaps))[codes] / 2
    ends = (codes == 0) * (1 + levels[0])  # nothing lies below the lowest level, -0.993
    spread = np.repeat(in_float64(scale), size)[: absmax.size]
    rounding = 8 * float(np.finfo(np.asarray(scale).dtype).eps) * (spread + np.abs(in_float64(offset)).sum())
    excess = np.abs(back - absmax) - spread * (reach + ends) - rounding - 2 * close.tolerance
    require(excess <= 0, f"a scale moves by {np.max(excess, initial=0)} more than half a gap")


@law("quant.double")
def the_offset_is_the_mean(f: Function, case: Case, close: Close) -> None:
    """The offset is the mean, and a block's scale the largest distance from it."""
    _, scale, offset = case.call(f)
    absmax = in_float64(case.args[0])
    if not absmax.size:
        return
    close(in_float64(offset), np.asarray([absmax.mean()]), "the mean", of="offset")
    size = case.kwargs.get("block_size", 256)
    far = np.abs(absmax - in_float64(offset))
    largest = np.maximum.reduceat(far, np.arange(0, absmax.size, size))
    close(in_float64(scale), largest, "the largest distance from the mean", of="scale")


@law("quant.double")
def equal_scales_come_back(f: Function, case: Case, close: Close) -> None:
    """Equal scales differ from their mean by nothing, or by its rounding, and are restored."""
    (absmax,) = case.args
    if not absmax.size:
        return
    same = case.replace(np.full_like(absmax, absmax[0]))
    codes, scale, offset = same.call(f)
    size = case.kwargs.get("block_size", 256)
    back = double_dequantize(codes, in_float64(scale), in_float64(offset), block_size=size)
    eps = float(np.finfo(np.asarray(scale).dtype).eps)
    room = 4 * eps * absmax.size * abs(float(absmax[0])) + close.tolerance
    require(np.abs(back - float(absmax[0])) <= room, "equal scales do not come back")


@law("quant.double")
def doubling_scales_doubles_the_parts(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Twice the scales have the same codes, twice the block scales and twice the offset."""
    first = case.call(f)
    twice = case.replace(round_to(widen(case.args[0]) * 2, case.args[0].dtype)).call(f)
    require(np.asarray(first[0]) == np.asarray(twice[0]), "the codes change with the scale")
    for part in (1, 2):
        require(2 * in_float64(first[part]) == in_float64(twice[part]), "a part does not scale")


# QLoRA (quant.qlora)


@law("quant.qlora")
def a_zero_factor_leaves_the_base(f: Function, case: Case, close: Close) -> None:
    """With a factor of zeros the output is that of the dequantised base weight."""
    x, a, b, weight = case.args
    base = case.replace(x, a, b * 0, weight)
    stored = qlora_quantize(
        in_float64(weight),
        block_size=case.kwargs["block_size"],
        scale_block_size=case.kwargs["scale_block_size"],
    )
    close.on(base)(base.call(f), in_float64(x) @ qlora_dequantize(stored), "the base layer", factor=2.0)


@law("quant.qlora")
def the_low_rank_part_is_never_quantised(f: Function, case: Case, close: Close) -> None:
    """With a base weight of zeros the output is lora_alpha / R times x A B."""
    x, a, b, weight = case.args
    alone = case.replace(x, a, b, weight * 0)
    expected = (
        case.kwargs["lora_alpha"] / max(a.shape[1], 1) * (in_float64(x) @ in_float64(a) @ in_float64(b))
    )
    close.on(alone)(alone.call(f), expected, "the low-rank part", factor=2.0)


@law("quant.qlora")
def only_the_product_of_the_factors_matters(f: Function, case: Case, close: Close) -> None:
    """Four times A and a quarter of B give the same output."""
    x, a, b, weight = case.args
    other = case.replace(x, round_to(widen(a) * 4, a.dtype), round_to(widen(b) / 4, b.dtype), weight)
    close(other.call(f), case.call(f), "A times 4 and B over 4")


@law("quant.qlora")
def tokens_are_independent(f: Function, case: Case, close: Close) -> None:
    """Reversing the tokens reverses the output."""
    x, a, b, weight = case.args
    close(
        case.replace(x[::-1].copy(), a, b, weight).call(f), np.asarray(case.call(f))[::-1], "tokens reversed"
    )
