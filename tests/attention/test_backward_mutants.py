"""Backward passes that are wrong in one way: the laws of the records must catch each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import attention, registry
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
flexible: Any = attention.flexible_attention_backward
varlen: Any = attention.varlen_attention_backward


@MUTANTS.of("attention.flexible_backward")
def mask_forgotten(*args: Any, mask_mod: Any = None, **options: Any) -> Any:
    return flexible(*args, **options)


@MUTANTS.of("attention.flexible_backward")
def score_has_half_a_gradient(*args: Any, score_mod_vjp: Any = None, **options: Any) -> Any:
    def half(gradient: Any, score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return 0.5 * score_mod_vjp(gradient, score, b, h, i, j)

    return flexible(*args, score_mod_vjp=None if score_mod_vjp is None else half, **options)


@MUTANTS.of("attention.flexible_backward")
def keys_behind_the_mask_get_a_share(q: Any, k: Any, *args: Any, **options: Any) -> Any:
    found = flexible(q, k, *args, **options)
    return found._replace(dk=found.dk + 1e-3 * k, dv=found.dv)


@MUTANTS.of("attention.flexible_backward", "attention.varlen_backward")
def output_gradient_is_cut(*args: Any, **options: Any) -> Any:
    f = flexible if len(args) == 6 else varlen
    return f(*args[:-1], np.minimum(args[-1], np.asarray(0.5, args[-1].dtype)), **options)


@MUTANTS.of("attention.varlen_backward")
def sequences_see_each_other(q: Any, k: Any, v: Any, s: Any, t: Any, o: Any, lse: Any, do: Any, /) -> Any:
    one = (np.array([0, x[-1]], np.int32) for x in (s, t))
    return varlen(q, k, v, *one, o, lse, do)


@MUTANTS.of("attention.varlen_backward")
def padding_is_a_sequence(q: Any, k: Any, v: Any, s: Any, t: Any, *rest: Any, **options: Any) -> Any:
    found = varlen(q, k, v, s, t, *rest, **options)
    behind = np.arange(len(k)) >= t[-1]
    return found._replace(dv=found.dv + behind[:, None, None].astype(found.dv.dtype))


@pytest.mark.parametrize("name", MUTANTS)
def test_laws_catch_it(name: str) -> None:
    MUTANTS.assert_caught(name)
