"""Laws of positions, embedding and output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, FloatArray, in_float64
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
ROTARY = "transformer.positions.rotary"
SINUSOIDAL = "transformer.positions"


def _equal(actual: Any, expected: Any, what: str) -> None:
    if not np.array_equal(in_float64(actual), in_float64(expected)):
        raise LawViolation(f"{what}: not equal")


# Sinusoidal, learned, ALiBi


@law(SINUSOIDAL)
def products_depend_on_the_distance(f: Function, case: Case, close: Close) -> None:
    """The product of two positions' vectors depends on their difference only."""
    (p,) = case.args
    here, there = (in_float64(case.replace(p + shift).call(f)) for shift in (0, 23))
    close.on(case.replace(p + 23))(there @ there.T, here @ here.T, "moved by 23", factor=4.0 * here.shape[-1])


@law(SINUSOIDAL)
def every_pair_has_norm_one(f: Function, case: Case, close: Close) -> None:
    """sin² + cos² of every pair is 1, and position 0 is made of sines 0 and cosines 1."""
    y = in_float64(case.call(f))
    close(np.sum(np.square(y), axis=-1), np.full(y.shape[:-1], y.shape[-1] / 2), "squares of a row")
    start = in_float64(case.replace(np.zeros_like(case.args[0])).call(f))
    if not np.all((start == 0) | (start == 1)) or np.any(start.sum(axis=-1) != start.shape[-1] / 2):
        raise LawViolation("position 0 is not made of zeros and ones")


@law(SINUSOIDAL)
def wave_lengths_grow_geometrically(f: Function, case: Case, close: Close) -> None:
    """At position 1, pair i of M / 2 holds the sine and the cosine of base^(-2i/M)."""
    one = case.replace(np.ones(1))
    y = in_float64(one.call(f))[0]
    pairs = (
        y.reshape(-1, 2).T if case.kwargs.get("layout", "interleaved") == "interleaved" else y.reshape(2, -1)
    )
    angles = case.kwargs.get("base", 10000.0) ** (-np.arange(0, y.size, 2) / y.size)
    close.on(one)(pairs, np.stack([np.sin(angles), np.cos(angles)]), "position 1")


@law("transformer.positions.learned")
def offset_skips_rows(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """An offset is the same as a table without its first rows."""
    table, p = case.args
    cut = case.replace(table[case.kwargs["offset"] :], p).replace(offset=0)
    _equal(case.call(f), cut.call(f), "table cut against offset")


@law("transformer.positions.learned")
def positions_pick_their_rows(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """All positions in order give the table behind the offset, exactly."""
    table, offset = case.args[0], case.kwargs["offset"]
    _equal(case.replace(table, np.arange(len(table) - offset)).call(f), table[offset:], "all positions")


@law("transformer.positions.alibi")
def slopes_of_a_power_of_two_are_geometric(f: Function, case: Case, close: Close) -> None:
    """Where H is a power of two, slope h is the first one to the power h, and the last is 2^-8."""
    heads = 1 << (case.kwargs["num_heads"].bit_length() - 1)
    slopes = in_float64(f(num_heads=heads))
    close.on(Case((), {"num_heads": heads}))(slopes, slopes[0] ** np.arange(1, heads + 1), "powers")
    if slopes[-1] != 2.0**-8:
        raise LawViolation(f"the last slope is {slopes[-1]}, expected 2**-8")


@law("transformer.positions.alibi")
def slopes_differ_and_are_below_one(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """All slopes differ and lie in [2^-8, 1)."""
    slopes = in_float64(case.call(f))
    if len(set(slopes.tolist())) != case.kwargs["num_heads"]:
        raise LawViolation("two heads have the same slope")
    if not np.all((slopes >= 2.0**-8) & (slopes < 1)):
        raise LawViolation(f"slopes from {slopes.min()} to {slopes.max()}, expected in [2**-8, 1)")


@law("transformer.positions.alibi")
def slopes_between_powers_come_from_both(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The first slopes are those of the power of two below, the others come from the one above."""
    heads = case.kwargs["num_heads"]
    below = 1 << (heads.bit_length() - 1)
    slopes = in_float64(case.call(f))
    _equal(slopes[:below], f(num_heads=below), "first slopes")
    above = set(in_float64(f(num_heads=2 * below)).tolist())
    if not set(slopes[below:].tolist()) <= above:
        raise LawViolation("a slope is of neither power of two")


# Rotary


def _turned(case: Case, f: Function, x: Array, p: Array) -> FloatArray:
    return in_float64(case.replace(x, p).call(f))


@law(ROTARY)
def scores_depend_on_the_distance(f: Function, case: Case, close: Close) -> None:
    """The product of a turned query and a turned key depends on the difference of their positions only."""
    x, p = case.args
    moved = case.replace(x, p + 17)
    here, there = in_float64(case.call(f)), in_float64(moved.call(f))
    products = [np.einsum("bihd,bjhd->bhij", y, np.flip(y, axis=1)) for y in (here, there)]
    close.on(moved)(products[1], products[0], "both moved by 17", factor=16.0 * x.shape[-1])


@law(ROTARY)
def norms_stay(f: Function, case: Case, close: Close) -> None:
    """Turning changes no norm of a head's vector."""
    x = case.args[0]
    before, after = (np.sqrt(np.sum(np.square(in_float64(y)), axis=-1)) for y in (x, case.call(f)))
    close(after, before, "norms", factor=4.0)


@law(ROTARY)
def position_zero_is_the_identity(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """At position 0 nothing turns, exactly."""
    x, p = case.args
    _equal(_turned(case, f, x, np.zeros_like(p)), x, "position 0")


@law(ROTARY)
def pairings_differ_by_a_permutation(f: Function, case: Case, close: Close) -> None:
    """Putting features 2i, 2i + 1 at i, i + n turns one pairing into the other; the rest passes unchanged."""
    x, p = case.args
    width = case.kwargs.get("rotated") or x.shape[-1]
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2), np.arange(width, x.shape[-1])])
    split = _turned(case.replace(pairing="half_split"), f, x[..., order], p)
    mixed = _turned(case.replace(pairing="interleaved"), f, x, p)
    close(split, mixed[..., order], "the two pairings")
    _equal(mixed[..., width:], x[..., width:], "features that do not turn")


@law(ROTARY)
def angles_fall_geometrically(f: Function, case: Case, close: Close) -> None:
    """At position 1, pair i of n turns by base^(-i/n), from its first feature towards its second."""
    x, p = case.args
    width = case.kwargs.get("rotated") or x.shape[-1]
    order = np.arange(width)
    split = case.kwargs.get("pairing", "half_split") == "half_split"
    first, second = np.split(order, 2) if split else (order[::2], order[1::2])
    unit = np.zeros_like(x)
    unit[..., first] = 1
    case = case.replace(unit, np.ones_like(p))
    y = in_float64(case.call(f))
    angles = case.kwargs.get("base", 10000.0) ** (-np.arange(width // 2) / (width // 2))
    for part, expected in ((first, np.cos(angles)), (second, np.sin(angles))):
        close.on(case)(y[..., part], np.broadcast_to(expected, y[..., part].shape), "position 1")


# Embedding and output head


@law("transformer.embedding")
def vocabulary_may_be_renumbered(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Reversing the rows of the table, and the numbers of the tokens, changes nothing."""
    table, tokens = case.args
    _equal(case.replace(table[::-1], len(table) - 1 - tokens).call(f), case.call(f), "table reversed")


@law("transformer.embedding")
def embedding_is_a_product_with_one_hot_rows(f: Function, case: Case, close: Close) -> None:
    """Embedding is the product of one-hot rows with the table, times the scale."""
    table, tokens = case.args
    expected = np.eye(len(table))[tokens] @ in_float64(table) * case.kwargs.get("scale", 1.0)
    close(case.call(f), expected, "one-hot rows")


@law("transformer.output_head")
def logits_are_renumbered_with_the_table(f: Function, case: Case, close: Close) -> None:
    """Reversing the rows of the table and of the bias reverses the logits."""
    hidden, table = case.args
    moved = case.replace(hidden, table[::-1])
    if case.kwargs.get("bias") is not None:
        moved = moved.replace(bias=case.kwargs["bias"][::-1])
    close(moved.call(f), np.asarray(case.call(f))[..., ::-1], "table reversed")


@law("transformer.output_head")
def head_over_unit_rows_reads_the_state(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With the unit matrix as table and no bias the logits are the state itself, times no factor."""
    hidden = case.args[0]
    eye = np.eye(hidden.shape[-1]).astype(hidden.dtype)
    _equal(case.without("bias").replace(hidden, eye).call(f), hidden, "unit rows")
