"""Mutants: functions that are wrong in one way, each of which the records must catch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention import flash_attention, scaled_dot_product_attention
from refimpl.attention.scores import score_rule
from refimpl.registry import Case
from refimpl.testing import check, dtype_named
from refimpl.tolerances import baseline_limits, cast, mismatch

registry.load()

Mutant = Callable[..., Any]
MUTANTS: dict[str, Mutant] = {}
EXTRA: dict[str, str] = {}


def mutant(f: Mutant) -> Mutant:
    MUTANTS[f.__name__] = f
    return f


def mutant_of(extra: str) -> Callable[[Mutant], Mutant]:
    """Register a mutant of one option, which only cases with that option can show."""

    def register(f: Mutant) -> Mutant:
        EXTRA[f.__name__] = extra
        return mutant(f)

    return register


@mutant
def scale_dropped(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return scaled_dot_product_attention(q, k, v, **{"scale": 1.0, **options})


@mutant
def scale_of_the_value_width(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return scaled_dot_product_attention(q, k, v, **{"scale": v.shape[3] ** -0.5, **options})


@mutant_of("attn_mask")
def mask_inverted(q: Any, k: Any, v: Any, /, *, attn_mask: Any = None, **options: Any) -> Any:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=None if attn_mask is None else ~attn_mask, **options
    )


@mutant
def causal_off_by_one(q: Any, k: Any, v: Any, /, *, causal: Any = False) -> Any:
    if not causal:
        return scaled_dot_product_attention(q, k, v)
    offset = k.shape[1] - q.shape[1] if causal == "bottom_right" else 0
    return scaled_dot_product_attention(
        q, k, v, attn_mask=np.tri(q.shape[1], k.shape[1], offset - 1, dtype=bool)
    )


@mutant
def wrong_causal_corner(q: Any, k: Any, v: Any, /, *, causal: Any = False, **options: Any) -> Any:
    other = {"top_left": "bottom_right", "bottom_right": "top_left"}.get(causal, causal)
    return scaled_dot_product_attention(q, k, v, causal=other, **options)


@mutant
def last_tile_dropped(q: Any, k: Any, v: Any, /) -> Any:
    whole = k.shape[1] // 4 * 4
    return scaled_dot_product_attention(q, k[:, :whole], v[:, :whole])


@mutant
def heads_interleaved(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    group = q.shape[2] // k.shape[2]
    return scaled_dot_product_attention(
        q, np.tile(k, (1, 1, group, 1)), np.tile(v, (1, 1, group, 1)), **options
    )


@mutant_of("softcap_and_bias")
def softcap_after_bias(
    q: Any, k: Any, v: Any, /, *, softcap: Any = None, bias: Any = None, scale: Any = None
) -> Any:
    rule = score_rule(q, k, v, scale=scale)
    s = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2)) * rule.scale
    s = s + (0 if bias is None else bias)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    return scaled_dot_product_attention(np.zeros_like(q), k, v, bias=s)


@mutant_of("dropout")
def dropout_not_scaled_up(q: Any, k: Any, v: Any, /, *, dropout_p: float = 0.0, rng: Any = None) -> Any:
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, rng=rng) * (1 - dropout_p)


@mutant
def lse_in_base_two(q: Any, k: Any, v: Any, /, *, return_lse: bool = False) -> Any:
    result = scaled_dot_product_attention(q, k, v, return_lse=True)
    return result._replace(lse=result.lse / np.log(2)) if return_lse else result.out


@mutant_of("attn_mask")
def masked_rows_get_the_mean(q: Any, k: Any, v: Any, /, *, attn_mask: Any = None) -> Any:
    bias = None if attn_mask is None else np.where(attn_mask, 0.0, -1e30)
    return scaled_dot_product_attention(q, k, v, bias=bias)


@mutant_of("lengths")
def lengths_ignored(q: Any, k: Any, v: Any, /, *, q_lengths: Any = None, k_lengths: Any = None) -> Any:
    return scaled_dot_product_attention(q, k, v, q_lengths=q_lengths)


@mutant
def one_cell_never_written(q: Any, k: Any, v: Any, /) -> Any:
    out = np.empty((*q.shape[:3], v.shape[3]))
    result = scaled_dot_product_attention(q, k, v)
    out.ravel()[1:] = result.ravel()[1:]
    return out


@mutant
def arguments_changed(q: Any, k: Any, v: Any, /) -> Any:
    result = scaled_dot_product_attention(q, k, v)
    q *= 2.0
    return result


@mutant
def rounded_to_float16(q: Any, k: Any, v: Any, /) -> Any:
    halves = (x.astype(np.float16) for x in (q, k, v))
    return scaled_dot_product_attention(*halves).astype(np.float64)


@mutant
def wrong_dtype(q: Any, k: Any, v: Any, /) -> Any:
    return scaled_dot_product_attention(q, k, v).astype(np.float32)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    axes = {"extra": EXTRA[name]} if name in EXTRA else None
    report = check("attention.dense", MUTANTS[name], examples=5, axes=axes)
    assert report.failed, f"{name} survived {report.counts()}"
    assert all(outcome.reproducer for outcome in report.failed)


@pytest.mark.parametrize("erratum", registry.ERRATA, ids=lambda item: item.name)
def test_mistake_of_the_lecture_breaks_its_law(erratum: registry.Erratum) -> None:
    if erratum.mutant is None:
        pytest.skip("a mistake in words: nothing to run")
    report = check(erratum.technique, erratum.mutant, examples=3)
    assert erratum.breaks in {outcome.check for outcome in report.failed}, report.counts()


def test_the_unbroken_ones_pass() -> None:
    for name, f in (("attention.dense", scaled_dot_product_attention), ("attention.flash", flash_attention)):
        assert check(name, f, examples=3).ok


def test_a_reproducer_reproduces() -> None:
    """Running the printed seed and axes alone fails in the same check."""
    failed = check("attention.dense", MUTANTS["causal_off_by_one"], examples=4).failed[0]
    words = failed.reproducer.split()
    seed = int(words[words.index("--seed") + 1])
    axes: dict[str, Any] = {}
    for pair in words[words.index("--axes") + 1].split(","):
        key, _, text = pair.partition("=")
        axes[key] = {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)
    again = check("attention.dense", MUTANTS["causal_off_by_one"], seed=seed, axes=axes)
    assert failed.check in {outcome.check for outcome in again.failed}


def test_nothing_ran_is_not_ok() -> None:
    def refuses(q: Any, k: Any, v: Any, /) -> Any:
        raise NotImplementedError("not today")

    report = check("attention.dense", refuses, examples=2)
    assert report.counts()["refused"] > 0
    assert not report.ok


def test_changed_arguments_are_named() -> None:
    report = check("attention.dense", MUTANTS["arguments_changed"], examples=2)
    assert "it changed its arguments" in {outcome.detail for outcome in report.failed}


def test_changed_options_are_noticed() -> None:
    def clobbers(q: Any, k: Any, v: Any, /, *, attn_mask: Any = None) -> Any:
        out = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        if attn_mask is not None:
            attn_mask[...] = True
        return out

    report = check("attention.dense", clobbers, examples=3, axes={"extra": "attn_mask"})
    assert "it changed its arguments" in {outcome.detail for outcome in report.failed}


def test_an_option_at_its_default_is_not_asked_for() -> None:
    """A z-loss without options is held to the cases that need none, and overflows in some."""

    def plain(logits: Any, /) -> float:
        with np.errstate(all="ignore"):
            return float(np.mean(np.log(np.exp(logits).sum(axis=-1)) ** 2)) if len(logits) else 0.0

    report = check("moe.z_loss", plain, examples=30)
    assert report.counts()["refused"] > 0
    assert all("finite" in outcome.detail for outcome in report.failed if outcome.check == "reference")
    assert report.failed, "no case has logits that overflow"
    small = check("moe.z_loss", plain, axes={"values": "normal", "padded": False, "padding": "excluded"})
    assert small.ok


def test_a_case_without_floats_is_as_exact_in_every_format() -> None:
    for dtype in ("float64", "float16"):
        assert check("attention.rapid_mixing", examples=4, dtypes=[dtype]).ok


def test_refusing_all_but_empty_cases_is_not_ok() -> None:
    def only_empty(q: Any, k: Any, v: Any, /) -> Any:
        if min(q.size, k.size):
            raise NotImplementedError
        return np.zeros((*q.shape[:3], v.shape[3]), q.dtype)

    report = check("attention.dense", only_empty, examples=2)
    assert not report.ok
    assert {outcome.check for outcome in report.failed} == {"coverage"}


def test_a_candidate_that_exits_has_failed() -> None:
    def leaves(q: Any, k: Any, v: Any, /) -> Any:
        raise SystemExit(0)

    assert check("attention.dense", leaves, examples=1).failed


def test_small_rows_are_not_judged_by_large_ones() -> None:
    """Late causal rows that never see one key: wrong by 1 in 700 where the first rows are 30 times larger."""
    rng = np.random.default_rng(0)
    T = 400
    q, k, v = rng.standard_normal((3, 1, T, 1, 16))
    record = registry.get("attention.dense")
    dtype = dtype_named("bfloat16")
    case = cast(Case((q, k, v), {"causal": True}), dtype)
    truth, _, limits, invalid = baseline_limits(record, case, dtype)
    assert invalid is None
    mask = np.tri(T, dtype=bool)
    good = Case(case.args, {"attn_mask": mask}).call(record.function)
    assert mismatch(good, truth["output"], limits["output"]) is None
    mask[300:, 3] = False
    bad = Case(case.args, {"attn_mask": mask}).call(record.function)
    assert mismatch(bad, truth["output"], limits["output"]) is not None


def test_poisoning_is_undone() -> None:
    before = np.empty, np.empty_like
    check("attention.dense", MUTANTS["one_cell_never_written"], examples=1)
    assert (np.empty, np.empty_like) == before
    assert "numpy" in sys.modules
