"""Laws of full updates and of LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array, in_float64, round_to, widen
from refimpl.peft.lora import scaling
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]


def _scaled(x: Array, factor: float) -> Array:
    """Return `x` times a power of two, exactly."""
    return round_to(widen(x) * np.float32(factor), x.dtype)


@law("peft.full")
def the_update_may_lie_in_the_weight(f: Function, case: Case, close: Close) -> None:
    """Update and weight change places."""
    x, delta, weight = case.args
    close(case.replace(x, weight, delta).call(f), case.call(f), "weight and update exchanged")


@law("peft.full")
def a_low_rank_can_be_full(f: Function, case: Case, close: Close) -> None:
    """LoRA of rank K with A = 1 represents any update."""
    from refimpl.peft.lora import lora_linear

    x, delta, weight = (in_float64(array) for array in case.args)
    close(case.call(f), lora_linear(x, np.eye(x.shape[1]), delta, weight), "LoRA of full rank")


@law("peft.full", "peft.lora")
def tokens_are_independent(f: Function, case: Case, close: Close) -> None:
    """Reversing the tokens reverses the output."""
    x, *rest = case.args
    options = {}
    if "dropout_mask" in case.kwargs:
        options["dropout_mask"] = case.kwargs["dropout_mask"][::-1].copy()
    turned = case.replace(x[::-1].copy(), *rest, **options).call(f)
    close(turned, np.asarray(case.call(f))[::-1], "tokens reversed")


@law("peft.lora", "peft.lora.fused")
def a_zero_factor_is_the_base(f: Function, case: Case, close: Close) -> None:
    """With B = 0, as at the start, and with A = 0, the output is that of the base layer."""
    x, a, b, weight = case.args
    for factors in ((a, b * 0), (a * 0, b)):
        start = case.replace(x, *factors, weight)
        close.on(start)(start.call(f), in_float64(x) @ in_float64(weight), "the base layer", factor=2.0)


@law("peft.lora", "peft.lora.merge", "peft.lora.embedding", "peft.lora.fused")
def only_the_product_matters(f: Function, case: Case, close: Close) -> None:
    """Four times A and a quarter of B are the same update."""
    args = list(case.args)
    first = 1 if close.technique.name in ("peft.lora", "peft.lora.fused") else 0  # after the input
    args[first], args[first + 1] = _scaled(args[first], 4.0), _scaled(args[first + 1], 0.25)
    close(case.replace(*args).call(f), case.call(f), "A times 4 and B over 4")


@law("peft.lora")
def the_factor_is_alpha_over_rank(f: Function, case: Case, close: Close) -> None:
    """A rank doubled by zeros halves the update; twice the alpha doubles it."""
    x, a, b, weight = case.args
    if not a.shape[1]:
        return
    wider = np.concatenate([a, a * 0], axis=1), np.concatenate([b, b * 0], axis=0)
    alpha = case.kwargs["lora_alpha"]
    close(
        case.replace(x, *wider, weight, lora_alpha=2 * alpha).call(f), case.call(f), "rank and alpha doubled"
    )
    base = case.replace(x, a, b * 0, weight).call(f)
    update = in_float64(case.call(f)) - in_float64(base)
    twice = case.replace(lora_alpha=2 * alpha)
    close.on(twice)(in_float64(twice.call(f)) - in_float64(base), 2 * update, "alpha doubled", factor=4.0)


@law("peft.lora")
def merged_it_is_one_matrix(f: Function, case: Case, close: Close) -> None:
    """Without dropout the layer is a product with the merged weight."""
    from refimpl.peft.merge import lora_merge

    plain = case.without("dropout_mask")
    x, a, b, weight = (in_float64(array) for array in case.args)
    merged = lora_merge(a, b, weight, lora_alpha=case.kwargs["lora_alpha"])
    close.on(plain)(plain.call(f), x @ merged, "the merged weight", factor=2.0)


@law("peft.lora")
def dropout_acts_on_the_branch_alone(f: Function, case: Case, close: Close) -> None:
    """A mask of zeros leaves the base layer."""
    x, a, b, weight = case.args
    silent = case.replace(dropout_mask=np.zeros(x.shape, x.dtype))
    base = case.without("dropout_mask").replace(x, a, b * 0, weight)
    close.on(base)(silent.call(f), base.call(f), "the branch masked out")


@law("peft.lora.merge")
def merging_can_be_undone(f: Function, case: Case, close: Close) -> None:
    """Merging the negative factor afterwards restores the weight, up to rounding."""
    a, b, weight = case.args
    merged = np.asarray(case.call(f))
    back = case.replace(a, -b, merged)
    close.on(back)(back.call(f), weight, "merged and unmerged", factor=2.0)


@law("peft.lora.merge")
def what_is_added_is_the_scaled_product(f: Function, case: Case, close: Close) -> None:
    """Merged into a weight of zeros it is lora_alpha / R times A B."""
    a, b, weight = case.args
    alone = case.replace(a, b, weight * 0)
    expected = scaling(case.kwargs["lora_alpha"], a.shape[1]) * (in_float64(a) @ in_float64(b))
    close.on(alone)(alone.call(f), expected, "the update alone", factor=2.0)


@law("peft.lora.merge")
def updates_add(f: Function, case: Case, close: Close) -> None:
    """Two updates one after the other are one whose factors stand side by side."""
    a, b, weight = case.args
    once = case.replace(a, b, np.asarray(case.call(f)))
    both = case.replace(
        np.concatenate([a, a], axis=1), np.concatenate([b, b], axis=0), weight,
        lora_alpha=2 * case.kwargs["lora_alpha"],
    )  # fmt: skip
    close.on(once)(once.call(f), both.call(f), "two updates", factor=2.0)


@law("peft.lora.embedding")
def a_token_reads_one_row(f: Function, case: Case, close: Close) -> None:
    """The same token gives the same vector, that of the merged table."""
    a, b, table, tokens = case.args
    merged = in_float64(table) + scaling(case.kwargs["lora_alpha"], a.shape[1]) * (
        in_float64(a) @ in_float64(b)
    )
    close(case.call(f), merged[tokens], "rows of the merged table")


@law("peft.lora.fused")
def parts_are_layers_of_their_own(f: Function, case: Case, close: Close) -> None:
    """An adapted part is LoRA on its columns, the others are the base layer."""
    from refimpl.peft.lora import lora_linear

    x, a, b, weight = (in_float64(array) for array in case.args)
    parts = np.split(weight, len(case.kwargs["enabled"]), axis=1)
    found, adapted = [], 0
    for part, on in zip(parts, case.kwargs["enabled"], strict=True):
        if on:
            alpha = case.kwargs["lora_alpha"]
            found.append(lora_linear(x, a[adapted], b[adapted], part, lora_alpha=alpha))
            adapted += 1
        else:
            found.append(x @ part)
    close(case.call(f), np.concatenate(found, axis=1), "part by part", factor=2.0)
