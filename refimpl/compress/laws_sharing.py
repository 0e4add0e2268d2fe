"""Laws of shared layers and of factorised stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]


@law("compress.layer_sharing")
def layers_come_one_after_another(f: Function, case: Case, close: Close) -> None:
    """All layers at once are the first ones, and then the rest on their output."""
    layers = case.kwargs["num_layers"]
    if layers < 2 or not case.args[0].size:
        return
    first = np.asarray(case.replace(num_layers=1).call(f))
    rest = case.replace(first, num_layers=layers - 1).call(f)
    close(rest, case.call(f), "layer by layer", factor=8.0)


@law("compress.layer_sharing")
def copies_of_the_block_are_the_same_model(f: Function, case: Case, close: Close) -> None:
    """It is an encoder whose layers hold copies of the weights."""
    from refimpl.transformer.blocks import encoder

    x = in_float64(case.args[0])
    for _ in range(case.kwargs["num_layers"]):
        copies: dict[str, Any] = {
            name: in_float64(value).copy() if isinstance(value, np.ndarray) else value
            for name, value in case.without("num_layers").kwargs.items()
        }
        x = encoder(x, **copies)
    close(case.call(f), x, "untied copies", factor=2.0)


@law("compress.layer_sharing")
def tokens_may_be_permuted(f: Function, case: Case, close: Close) -> None:
    """Without positions, tokens in reverse order give outputs in reverse order, at any depth."""
    (x,) = case.args
    close(
        case.replace(x[:, ::-1].copy()).call(f),
        np.asarray(case.call(f))[:, ::-1],
        "tokens reversed",
        factor=4.0,
    )


@law("compress.factorization")
def full_ranks_lose_nothing(f: Function, case: Case, close: Close) -> None:
    """With a direction for every row, column and block the weights come back."""
    (blocks,) = case.args
    full = case.replace(ranks=blocks.shape)
    close.on(full)(full.call(f), in_float64(blocks), "full ranks")


@law("compress.factorization")
def the_error_is_bounded(f: Function, case: Case, close: Close) -> None:
    """The squared error is at most the sum of the squared singular values left out, over the axes."""
    blocks = in_float64(case.args[0])
    if not blocks.size:
        return
    out = in_float64(case.call(f))
    left = 0.0
    for axis, rank in enumerate(case.kwargs["ranks"]):
        rows = np.moveaxis(blocks, axis, 0).reshape(blocks.shape[axis], -1)
        left += float(np.sum(np.linalg.svd(rows, compute_uv=False)[rank:] ** 2))
    error = float(np.sum((out - blocks) ** 2))
    room = (blocks.size * close.tolerance) ** 2 + 2 * np.sqrt(left) * blocks.size * close.tolerance
    if not error <= left + room:
        raise LawViolation(f"squared error {error}, at most {left} expected")
    # A projection: what is left out is orthogonal to what is kept.
    kept = float(np.sum(out**2))
    if not abs(kept + error - float(np.sum(blocks**2))) <= 64 * blocks.size * close.tolerance * (
        1 + np.sqrt(kept)
    ):
        raise LawViolation("what is left out is not orthogonal to what is kept")


@law("compress.factorization")
def axes_may_be_exchanged(f: Function, case: Case, close: Close) -> None:
    """Transposed blocks in reverse order have the transposed results in that order."""
    (blocks,) = case.args
    n, k, m = case.kwargs["ranks"]
    turned = case.replace(np.ascontiguousarray(blocks[::-1].transpose(0, 2, 1)), ranks=(n, m, k))
    close(
        in_float64(turned.call(f))[::-1].transpose(0, 2, 1),
        in_float64(case.call(f)),
        "transposed blocks",
        factor=4.0,
    )


@law("compress.factorization")
def twice_is_once(f: Function, case: Case, close: Close) -> None:
    """What is already of these ranks stays as it is."""
    once = round_to(in_float64(case.call(f)), case.args[0].dtype)
    again = case.replace(once)
    close(in_float64(again.call(f)), in_float64(once), "factorised again", factor=8.0)
