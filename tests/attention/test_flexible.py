"""Ready-made functions are the patterns of this family; wrong attentions and decoders are caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refimpl import attention, registry
from refimpl.attention import block_mask, mods
from refimpl.attention.bigbird_plan import bigbird_block_mask, bigbird_plan
from refimpl.attention.function_keys import function_key
from refimpl.attention.user_functions import as_mod, check_reads
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.testing import check

registry.load()
T, H = 12, 2
CLOSE = 1e-12  # float64, sums of 12 terms of size 1


def draws() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((1, T, H, 3)) for _ in range(3))


PLAN = bigbird_plan(4, heads=H, random_blocks=1, rng=0)
LAYOUT: dict[str, Any] = {"window_blocks": 3, "global_blocks": (0, -1)}
SLOPES = np.array([0.5, 0.25])
FIRST = np.arange(T) < 2
SAME: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "causal": (
        {"mask_mod": mods.causal},
        lambda *x: attention.scaled_dot_product_attention(*x, causal=True),
    ),
    "sliding": (
        {"mask_mod": mods.sliding(2)},
        lambda *x: attention.sliding_window_attention(*x, radius=2),
    ),
    "dilated": (
        {"mask_mod": mods.dilated(2, 3)},
        lambda *x: attention.dilated_window_attention(*x, radius=2, dilation=3),
    ),
    "global": (
        {"mask_mod": mods.either(mods.sliding(1), mods.global_tokens(2))},
        lambda *x: attention.global_tokens_attention(*x, radius=1, is_global=FIRST),
    ),
    "bigbird": (
        {"mask_mod": mods.bigbird(3), "aux": (bigbird_block_mask(4, PLAN, **LAYOUT),)},
        lambda *x: attention.bigbird_attention(*x, plan=PLAN, block_size=3, **LAYOUT),
    ),
    "groups": (
        {"mask_mod": mods.shifted_groups(4, H, T)},
        lambda *x: attention.shifted_groups_attention(*x, group_size=4),
    ),
    "softcap": (
        {"score_mod": mods.softcap(0.7)},
        lambda *x: attention.scaled_dot_product_attention(*x, softcap=0.7),
    ),
    "alibi": (
        {"mask_mod": mods.causal, "score_mod": mods.alibi(), "aux": (SLOPES,)},
        lambda *x: attention.scaled_dot_product_attention(*x, causal=True, alibi_slopes=SLOPES),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_ready_made_functions_are_the_patterns(name: str) -> None:
    options, other = SAME[name]
    x = draws()
    assert np.abs(attention.flexible_attention(*x, **options) - other(*x)).max() < CLOSE


def test_documents_do_not_meet() -> None:
    x: Any = draws()
    together: Any = attention.flexible_attention(
        *x, mask_mod=mods.documents(), aux=(np.repeat([0, 1], [5, 7])[None],)
    )
    for part in (slice(0, 5), slice(5, None)):
        alone = attention.scaled_dot_product_attention(*(array[:, part] for array in x))
        assert np.abs(together[:, part] - alone).max() < CLOSE


def test_masks_with_and_without_arrays_join() -> None:
    """Causal inside documents; or the first tokens of all."""
    x: Any = draws()
    numbers = np.repeat([0, 1, 2], [5, 4, 3])[None]
    i, j = np.arange(T)[:, None], np.arange(T)
    same = numbers[0][:, None] == numbers[0]
    inside, first = (
        mods.both(mods.causal, mods.documents()),
        mods.either(mods.documents(), mods.global_tokens(1)),
    )
    for mask, meant in ((inside, (j <= i) & same), (first, same | (i < 1) | (j < 1))):
        found = attention.flexible_attention(*x, mask_mod=mask, aux=(numbers,))
        assert np.abs(found - attention.scaled_dot_product_attention(*x, attn_mask=meant)).max() < CLOSE
    assert as_mod("mask_mod", inside)[3:] == (True, False)  # read b, and no h


def test_keys_tell_functions_apart() -> None:
    assert function_key(mods.sliding(2)) == function_key(mods.sliding(2))
    others = [mods.sliding(2), mods.sliding(3), mods.dilated(2, 1), mods.both(mods.causal, mods.sliding(2))]
    assert len({function_key(f) for f in others}) == len(others)


def holds(where: Any, name: str) -> Callable[..., Any]:
    """Return a mask that reads a value which may change behind its back."""
    if name == "attribute":
        return lambda b, h, i, j: i - j < where.width
    if name == "key":
        return lambda b, h, i, j: i - j < where["width"]
    return lambda b, h, i, j: i - j < where[0]


@pytest.mark.parametrize("kind", ["module", "object", "class", "dict", "list", "array"])
def test_keys_follow_what_a_function_reads(kind: str) -> None:
    """A kernel holds the values that it was compiled with: another value is another function."""
    where: Any = {
        "module": ModuleType("settings"), "object": SimpleNamespace(), "class": type("Settings", (), {}),
        "dict": {}, "list": [3], "array": np.array([3]),
    }[kind]  # fmt: skip
    name = {"dict": "key", "list": "index", "array": "index"}.get(kind, "attribute")

    def put(value: int) -> None:
        if name == "attribute":
            where.width = value
        else:
            where["width" if name == "key" else 0] = value

    f = holds(where, name)
    put(3)
    first = function_key(f)
    assert function_key(f) == first
    put(9)
    assert function_key(f) != first
    put(3)
    assert function_key(f) == first


def test_keys_of_functions_that_call_each_other() -> None:
    def even(b: int, h: int, i: int, j: int) -> bool:
        return j == 0 or odd(b, h, i, j - 1)

    def odd(b: int, h: int, i: int, j: int) -> bool:
        return j > 0 and even(b, h, i, j - 1)

    assert function_key(even) == function_key(even) != function_key(odd)


def test_states_cannot_change_behind_a_kernel() -> None:
    mask = block_mask(mods.causal, 1, 1, 4, 4, block_sizes=(2, 2))
    with pytest.raises(ValueError, match="read-only"):
        mask.states[:] = 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 1, -8, 8), "Tq: expected at least 0"), ((-1, 1, 8, 8), "B: expected at least 0"),
        ((1, 2.5, 8, 8), "Hq: expected a whole number"),
    ],
)  # fmt: skip
def test_sizes_of_a_block_mask(arguments: Any, words: str) -> None:
    with pytest.raises((OptionError, DTypeError), match=words):
        block_mask(mods.causal, *arguments)


def test_what_is_no_block_mask() -> None:
    with pytest.raises(DTypeError, match="expected a BlockMask"):
        attention.flexible_attention(*draws(), mask_mod=mods.causal, block_mask=np.ones((1, 1, 3, 3)))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="block_sizes: expected two"):
        block_mask(mods.causal, 1, 1, 4, 4, block_sizes=4)  # type: ignore[arg-type]


def test_wrong_functions_are_refused() -> None:
    x = draws()
    with pytest.raises(OptionError, match=r"mask_mod: expected a function of \(b, h, i, j\).*test_flexible"):
        attention.flexible_attention(*x, mask_mod=lambda i, j: j <= i)
    with pytest.raises(OptionError, match="gives w a default; kernels pass every argument"):
        attention.flexible_attention(*x, mask_mod=lambda b, h, i, j, w=3: i - j < w)
    with pytest.raises(DTypeError, match="expected True or False, got int64"):
        attention.flexible_attention(*x, mask_mod=lambda b, h, i, j: i - j)
    with pytest.raises(DTypeError, match="plain Python function"):
        attention.flexible_attention(*x, mask_mod=np.equal)


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {}


def mutant(technique: str) -> Callable[[Any], Any]:
    def add(f: Any) -> Any:
        MUTANTS[f.__name__] = (f"attention.{technique}", f)
        return f

    return add


@mutant("flexible")
def mask_is_forgotten(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return attention.flexible_attention(q, k, v, **{**options, "mask_mod": None})


@mutant("flexible")
def score_is_forgotten(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return attention.flexible_attention(q, k, v, **{**options, "score_mod": None, "score_mod_vjp": None})


@mutant("flexible")
def heads_of_keys_for_heads(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    if options.get("mask_mod") is None:
        raise NotImplementedError
    given, group = options.pop("mask_mod"), q.shape[2] // k.shape[2]
    if given.__code__.co_argcount == 5:
        return attention.flexible_attention(
            q, k, v, mask_mod=lambda b, h, i, j, aux: given(b, h // group, i, j, aux), **options
        )
    return attention.flexible_attention(
        q, k, v, mask_mod=lambda b, h, i, j: given(b, h // group, i, j), **options
    )


@mutant("flexible")
def block_mask_is_forgotten(q: Any, k: Any, v: Any, /, *, block_mask: Any = None, **options: Any) -> Any:
    if block_mask is not None:
        options.setdefault("mask_mod", block_mask.mod and block_mask.mod.function)
    return attention.flexible_attention(q, k, v, **options)


@mutant("flexible")
def partial_tiles_are_full(q: Any, k: Any, v: Any, /, *, block_mask: Any = None, **options: Any) -> Any:
    if block_mask is not None:
        block_mask = dataclasses.replace(block_mask, states=2 * block_mask.live.astype(np.uint8))
    return attention.flexible_attention(q, k, v, block_mask=block_mask, **options)


@mutant("split_kv")
def parts_weigh_the_same(q: Any, k: Any, v: Any, /, *, splits: int = 1, **options: Any) -> Any:
    size = -(-k.shape[1] // splits)
    if options or size == 0:
        raise NotImplementedError
    parts = [slice(s, s + size) for s in range(0, k.shape[1], size)]
    return np.mean([attention.scaled_dot_product_attention(q, k[:, s], v[:, s]) for s in parts], axis=0)


@mutant("split_kv")
def the_first_query_sees_all(q: Any, k: Any, v: Any, /, *, splits: int = 1, **options: Any) -> Any:
    return attention.scaled_dot_product_attention(q, k, v, **options)


@mutant("paged")
def pages_in_the_order_of_memory(q: Any, k: Any, v: Any, table: Any, /, **options: Any) -> Any:
    return attention.paged_attention(q, k, v, np.where(table < 0, -1, np.sort(table, axis=1)), **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    technique, f = MUTANTS[name]
    assert check(technique, f, examples=12).failed


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        ((), r"aux: tuple index out of range; read by reading in .*.py, line \d+, given 0 arrays: none"),
        ((np.zeros(T - 1),), r"aux: tuple .* given 1 arrays: \(11,\)"),
        ((np.arange(T), np.zeros(T - 1)), r"aux\[1\]: index 11 is out of bounds .* \(12,\), \(11,\)"),
        ((np.arange(T) + 1, np.zeros(T)), r"aux\[1\]: index 12 is out of bounds"),
        ((np.arange(T), np.array(1.0)), r"aux\[1\]: too many indices"),
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_lies_behind_aux_is_an_error(aux: Any, message: str, one_by_one: bool) -> None:
    """The array that is read is named, not the one that gave the index."""

    def reading(_b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        if one_by_one and i < 0:
            return False
        return aux[1][aux[0][j]] >= 0

    with pytest.raises(ShapeError, match=message):
        attention.flexible_attention(*draws(), mask_mod=reading, aux=aux)
    with pytest.raises(ShapeError, match=message):
        check_reads(as_mod("mask_mod", reading), 0, (1, H, T, T), aux)


def test_an_index_error_that_is_not_of_aux_stays() -> None:
    values = np.zeros(T - 1)
    with pytest.raises(IndexError):
        attention.flexible_attention(*draws(), mask_mod=lambda b, h, i, j: values[j] >= 0)
