"""Laws of the attention router, by itself and in its layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_assignment import with_a_feature_of_one
from refimpl.moe.laws_gating import slack
from refimpl.moe.samples import observed_weights
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]


@law("moe.attention_router")
def no_queries_make_all_experts_equal(f: Function, case: Case, close: Close) -> None:
    """With ``W_q = 0`` every expert's logit is the mean of v."""
    x, w_q, w_k, w_v = case.args
    flat = case.replace(x, np.zeros_like(w_q), w_k, w_v)
    mean = (in_float64(x) @ in_float64(w_v)).mean(axis=1, keepdims=True)
    close.on(flat)(flat.call(f), np.broadcast_to(mean, (len(x), w_v.shape[1])), "queries of 0")


@law("moe.attention_router")
def logits_lie_between_the_values(f: Function, case: Case, close: Close) -> None:
    """A logit is a mean of the token's values, so none is beyond the least and the largest."""
    x, *_, w_v = case.args
    values = in_float64(x) @ in_float64(w_v)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    logits = in_float64(case.call(f))
    require(
        (logits >= low - close.tolerance) & (logits <= high + close.tolerance), "a logit beyond all values"
    )


@law("moe.attention_router")
def attending_experts_may_be_renumbered(f: Function, case: Case, close: Close) -> None:
    """Experts renumbered in the queries are renumbered in the logits; in keys and values it is no matter."""
    x, w_q, w_k, w_v = case.args
    moved = case.replace(x, w_q[:, ::-1], w_k[:, ::-1], w_v[:, ::-1])
    close.on(moved)(moved.call(f), np.asarray(case.call(f))[:, ::-1], "experts reversed")
    paired = case.replace(x, w_q, w_k[:, ::-1], w_v[:, ::-1])
    close.on(paired)(paired.call(f), case.call(f), "keys and values reversed together")


@law("moe.attention_router")
def sharp_diagonals_are_a_plain_router(f: Function, case: Case, close: Close) -> None:
    """If every expert looks at itself alone, the logits are ``x W_v``."""
    x, *_, w_v = case.args
    E = w_v.shape[1]
    x = with_a_feature_of_one(x)
    # q_a k_b = c s_a s_b with signs s of one or two experts: the largest b is a itself.
    signs = np.array([1.0, -1.0])[:E]
    project = np.zeros((x.shape[1], len(signs)))
    project[-1] = 100.0 * signs
    w_v = np.pad(w_v, ((0, 1), (0, 0)))[:, : len(signs)]
    sharp = case.replace(x, *(round_to(w, x.dtype) for w in (project, project)), w_v)
    close.on(sharp)(sharp.call(f), in_float64(x) @ in_float64(w_v), "sharp attention")


@law("moe.attention_router")
def attention_is_the_softmax_of_products(f: Function, case: Case, close: Close) -> None:
    """With queries of 1 and keys of ``log b`` an expert attends to expert b in proportion to b."""
    x, *_, w_v = case.args
    E = w_v.shape[1]
    x, w_v = with_a_feature_of_one(x), np.pad(w_v, ((0, 1), (0, 0)))
    w_q, w_k = np.zeros((2, x.shape[1], E))
    w_q[-1], w_k[-1] = 1.0, np.log(np.arange(1, E + 1))
    w_q, w_k = (round_to(w, x.dtype) for w in (w_q, w_k))
    given = case.replace(x, w_q, w_k, w_v)
    powers = np.exp(in_float64(w_k)[-1])  # b, but for what the format rounds
    mean = in_float64(x) @ in_float64(w_v) @ powers / powers.sum()
    close.on(given)(given.call(f), np.repeat(mean[:, None], E, axis=1), "keys of log b")


def _layer_weights(f: Function, case: Case) -> FloatArray:
    x, *router, w_in, w_out = case.args

    def with_router(x: Any, _: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
        return f(x, *router, w_in, w_out, **options)

    return observed_weights(with_router, Case((x, router[0], w_in, w_out), case.kwargs))


@law("moe.attention_router.layer")
def gates_come_from_attended_logits(f: Function, case: Case, close: Close) -> None:
    """The k largest logits of the attention router have gates, in the softmax's proportions."""
    from refimpl.moe.attention_router import attention_router

    x, w_q, w_k, w_v, *_ = case.args
    logits = in_float64(attention_router(*(in_float64(array) for array in (x, w_q, w_k, w_v))))
    weights = _layer_weights(f, case)
    kept = weights != 0
    require(np.count_nonzero(kept, axis=1) == case.kwargs["k"], "a token has not k experts")
    worst = np.where(kept, logits, np.inf).min(axis=1, initial=np.inf)
    best = np.where(kept, -np.inf, logits).max(axis=1, initial=-np.inf)
    require(worst >= best, "a better expert was left out")
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    among = powers if case.kwargs["convention"] == "switch" else np.where(kept, powers, 0)
    expected = np.where(kept, powers, 0) / among.sum(axis=1, keepdims=True)
    require(abs(weights - expected) <= slack(close), "gates are not those of the softmax")


@law("moe.attention_router.layer")
def attended_tokens_do_not_meet(f: Function, case: Case, close: Close) -> None:
    """Attention is over experts: tokens reversed give outputs reversed, and a token alone the same."""
    x, *rest = case.args
    y = np.asarray(case.call(f))
    back, alone = case.replace(x[::-1], *rest), case.replace(x[:1], *rest)
    close.on(back)(back.call(f), y[::-1], "tokens reversed")
    close(alone.call(f), y[:1], "first token alone")
