"""Cases on which flexible attention is judged: ready-made functions, and some that branch."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention import mods
from refimpl.attention.bigbird_plan import bigbird_block_mask, bigbird_plan
from refimpl.attention.samples import sample_attention
from refimpl.registry import Case

__all__ = ["AXES", "EDGES", "MASKS", "OPTIONS", "SCORES", "flexible_terms", "sample_flexible"]

MASKS = (
    "none", "causal", "sliding", "dilated", "global", "bigbird", "groups", "documents", "prefix_lm",
    "branching",
)  # fmt: skip
SCORES = ("none", "alibi", "softcap", "branching")
AXES = {"B": (1, 2), "Tq": (1, 12), "Tk": (1, 12), "Hkv": (1, 2), "group": (1, 2), "D": (1, 5), "Dv": (1, 5)}
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "mask": MASKS,
    "score": SCORES,
    "extra": ("none", "scale"),
    "return_lse": (False, True),
}

_PLAIN: dict[str, int | str | bool] = {
    "B": 1, "Hkv": 1, "group": 1, "D": 3, "Dv": 2,
    "mask": "none", "score": "none", "extra": "none", "return_lse": False,
}  # fmt: skip
EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_PLAIN, "Tq": 1, "Tk": 1, "D": 1, "Dv": 1, "mask": "causal", "score": "softcap"},
    {**_PLAIN, "B": 0, "Tq": 3, "Tk": 3, "mask": "causal"},
    {**_PLAIN, "Tq": 0, "Tk": 3, "mask": "sliding", "score": "branching"},
    {**_PLAIN, "Tq": 3, "Tk": 0, "mask": "branching", "return_lse": True},
    {**_PLAIN, "Tq": 17, "Tk": 19, "group": 2, "mask": "documents", "score": "alibi"},
    {**_PLAIN, "B": 2, "Tq": 19, "Tk": 17, "mask": "branching", "score": "branching", "return_lse": True},
    {**_PLAIN, "Tq": 18, "Tk": 18, "group": 2, "mask": "groups"},
    {**_PLAIN, "Tq": 9, "Tk": 9, "group": 2, "mask": "bigbird", "score": "alibi", "return_lse": True},
    {**_PLAIN, "Tq": 7, "Tk": 11, "mask": "prefix_lm", "extra": "large", "return_lse": True},
    {**_PLAIN, "Tq": 6, "Tk": 6, "mask": "dilated", "extra": "ties"},
)


def _branching_mask(b: int, h: int, i: int, j: int) -> bool:
    """Queries in thirds: none, some, and all keys."""
    if i % 3 == 0:
        return False
    return i % 3 == 2 or (j <= i + b and (j + h) % 2 == 0)


def _branching_score(score: Any, b: int, h: int, i: int, j: int, aux: Any) -> Any:
    if score > 0 and i >= j:
        return 0.5 * score + aux[-1][h, b]
    return score * score - 1.0


def _branching_score_vjp(gradient: Any, score: Any, _b: int, _h: int, i: int, j: int) -> Any:
    return 0.5 * gradient if score > 0 and i >= j else 2.0 * score * gradient


def sample_flexible(
    rng: np.random.Generator, *, mask: str = "none", score: str = "none", **shape: Any
) -> Case:
    """Return one call of flexible attention with functions of these names, one of `MASKS` and of `SCORES`.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, Hkv=1, group=2, D=4, Dv=5)
    >>> sorted(sample_flexible(np.random.default_rng(0), mask="causal", score="alibi", **shape).kwargs)
    ['aux', 'mask_mod', 'score_mod', 'score_mod_vjp']
    """
    case = sample_attention(rng, **shape)
    q, k = case.args[:2]
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    longest = max(Tq, Tk)
    aux: list[Any] = []
    options: dict[str, Any] = {}
    match mask:
        case "causal":
            options["mask_mod"] = mods.causal
        case "sliding":
            options["mask_mod"] = mods.both(mods.causal, mods.sliding(2))
        case "dilated":
            options["mask_mod"] = mods.dilated(2, 3)
        case "global":
            options["mask_mod"] = mods.either(mods.sliding(1), mods.global_tokens(2))
        case "bigbird":
            count = -(-longest // 3)
            plan = bigbird_plan(count, heads=H, random_blocks=1, window_blocks=1, global_blocks=(), rng=rng)
            aux.append(bigbird_block_mask(count, plan, window_blocks=1, global_blocks=()))
            options["mask_mod"] = mods.bigbird(3)
        case "groups":
            options["mask_mod"] = mods.shifted_groups(4, H, max(4, -(-longest // 4) * 4))
        case "documents":
            aux.append(np.sort(rng.integers(0, 3, (B, longest)), axis=1))
            options["mask_mod"] = mods.documents()
        case "prefix_lm":
            options["mask_mod"] = mods.prefix_lm(3)
        case "branching":
            options["mask_mod"] = _branching_mask
    match score:
        case "alibi":
            aux.append(2.0 ** -np.arange(1.0, H + 1))
            options |= {"score_mod": mods.alibi(len(aux) - 1), "score_mod_vjp": mods.alibi_vjp}
        case "softcap":
            options |= {"score_mod": mods.softcap(2.0), "score_mod_vjp": mods.softcap_vjp(2.0)}
        case "branching":
            aux.append(rng.standard_normal((H, B)))
            options |= {"score_mod": _branching_score, "score_mod_vjp": _branching_score_vjp}
    if aux:
        options["aux"] = tuple(aux)
    return case.replace(**options)


def flexible_terms(case: Case) -> tuple[int, Any]:
    """Return the length of the reductions and the sums of absolute terms, as `attention_terms` does.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, Hkv=1, group=1, D=4, Dv=5)
    >>> flexible_terms(sample_flexible(np.random.default_rng(0), mask="causal", **shape))[0]
    7
    """
    from refimpl.attention.dense import AttentionOutput
    from refimpl.attention.flexible import flexible_attention

    q, k, v = case.args[:3]
    magnitude = case.replace(q, k, np.abs(v)).call(flexible_attention)
    if isinstance(magnitude, AttentionOutput):
        lse = np.where(np.isfinite(magnitude.lse), np.abs(magnitude.lse), 0.0) + 1.0
        magnitude = AttentionOutput(magnitude.out, lse)
    return k.shape[1] + q.shape[3], magnitude
