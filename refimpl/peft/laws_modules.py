"""Laws of adapters, prefixes, soft prompts, and of modules put together or retrieved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.numerics import Array, in_float64, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
COMPOSITIONS = ("peft.composition", "peft.composition.lorahub")


def _like(array: Any, like: Array) -> Array:
    return round_to(np.asarray(array, np.float64), like.dtype)


# Adapters


@law("peft.adapter")
def a_silent_adapter_is_the_identity(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With a way up of zeros the input comes back, bit for bit."""
    x, w_down, b_down, w_up, b_up = case.args
    require(
        in_float64(case.replace(x, w_down, b_down, w_up * 0, b_up * 0).call(f)) == in_float64(x), "x changes"
    )


@law("peft.adapter")
def units_of_the_bottleneck_add_up(f: Function, case: Case, close: Close) -> None:
    """Each unit adds a part of its own: the bottleneck in reverse order gives the same."""
    x, w_down, b_down, w_up, b_up = case.args
    turned = case.replace(x, w_down[:, ::-1].copy(), b_down[::-1].copy(), w_up[::-1].copy(), b_up)
    close(turned.call(f), case.call(f), "units reversed")


@law("peft.adapter")
def the_last_bias_shifts_the_output(f: Function, case: Case, close: Close) -> None:
    """The bias of the way up is added once."""
    x, w_down, b_down, w_up, b_up = case.args
    without = case.replace(x, w_down, b_down, w_up, b_up * 0).call(f)
    close(case.call(f), in_float64(without) + in_float64(b_up), "the bias of the way up", factor=2.0)


# Prefixes


@law("peft.prefix")
def the_order_of_a_prefix_does_not_matter(f: Function, case: Case, close: Close) -> None:
    """A prefix in reverse order gives the same output."""
    q, k, v, prefix_k, prefix_v = case.args
    turned = case.replace(q, k, v, prefix_k[::-1].copy(), prefix_v[::-1].copy())
    close(turned.call(f), case.call(f), "prefix reversed")


@law("peft.prefix")
def no_prefix_is_the_base_model(f: Function, case: Case, close: Close) -> None:
    """Without a prefix it is attention over the text under its mask."""
    q, k, v, prefix_k, prefix_v = case.args
    bare = case.replace(q, k, v, prefix_k[:0], prefix_v[:0])
    truth = scaled_dot_product_attention(in_float64(q), in_float64(k), in_float64(v), **case.kwargs)
    close.on(bare)(bare.call(f), truth, "no prefix", factor=2.0)


@law("peft.prefix")
def a_prefix_mixes_two_attentions(f: Function, case: Case, close: Close) -> None:
    """The output is (1 - λ) attention over the text + λ attention over the prefix, λ the prefix's mass."""
    q, k, v, prefix_k, prefix_v = (in_float64(array) for array in case.args)
    if not len(prefix_k):
        return
    B = len(q)
    shared = [np.broadcast_to(array, (B, *array.shape)) for array in (prefix_k, prefix_v)]
    text = scaled_dot_product_attention(q, k, v, return_lse=True, **case.kwargs)
    prefix = scaled_dot_product_attention(q, *shared, return_lse=True)
    mass = 1 / (1 + np.exp(text.lse - prefix.lse))
    mass = mass.transpose(0, 2, 1)[..., None]
    close(case.call(f), (1 - mass) * text.out + mass * prefix.out, "the mixture", factor=4.0)


@law("peft.prefix.reparametrized")
def positions_are_independent(f: Function, case: Case, close: Close) -> None:
    """Positions in reverse order give their vectors in reverse order."""
    e, *rest = case.args
    close(case.replace(e[::-1].copy(), *rest).call(f), np.asarray(case.call(f))[::-1], "positions reversed")


@law("peft.prefix.reparametrized")
def hidden_units_are_odd(f: Function, case: Case, close: Close) -> None:
    """A hidden unit with both its sides negated contributes the same: tanh is odd."""
    e, w_1, b_1, w_2, b_2 = case.args
    close(case.replace(e, -w_1, -b_1, -w_2, b_2).call(f), case.call(f), "units negated on both sides")


# Soft prompts


@law("peft.soft_prompt")
def real_tokens_are_a_prompt(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A prompt of the text's own first embeddings is that text, read again."""
    embedded = case.args[1][:1]
    P = min(2, embedded.shape[1])
    if not len(embedded):
        return
    whole = in_float64(case.replace(embedded[0, :P], embedded[:, P:]).call(f))
    require(whole == in_float64(embedded), "the text is not itself")


@law("peft.soft_prompt")
def every_sequence_gets_the_prompt(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The first P vectors of every sequence are the prompt, the others the text, unchanged."""
    prompt, embedded = case.args
    out = in_float64(case.call(f))
    require(out.shape[1] == len(prompt) + embedded.shape[1], f"length {out.shape[1]}")
    require(out[:, : len(prompt)] == in_float64(prompt), "the prompt changed")
    require(out[:, len(prompt) :] == in_float64(embedded), "the text changed")


# Compositions


@law(*COMPOSITIONS)
def one_module_alone_is_itself(f: Function, case: Case, close: Close) -> None:
    """A one-hot weight gives that module's update."""
    w, a, b = case.args
    if not len(w):
        return
    alone = case.replace(_like(np.arange(len(w)) == len(w) - 1, w), a, b)
    close.on(alone)(alone.call(f), in_float64(a[-1]) @ in_float64(b[-1]), "one module", factor=2.0)


@law(*COMPOSITIONS)
def the_order_of_modules_does_not_matter(f: Function, case: Case, close: Close) -> None:
    """Modules in reverse order give the same update."""
    close(case.replace(*(x[::-1].copy() for x in case.args)).call(f), case.call(f), "modules reversed")


@law(*COMPOSITIONS)
def doubled_weights(f: Function, case: Case, close: Close) -> None:
    """Twice the weights double a sum of updates, and quadruple a product of sums."""
    w, a, b = case.args
    power = 2.0 if close.technique.name == "peft.composition" else 4.0
    twice = case.replace(round_to(widen(w) * 2, w.dtype), a, b)
    close.on(twice)(twice.call(f), power * in_float64(case.call(f)), "weights doubled", factor=power)


@law("peft.composition")
def updates_stand_side_by_side(f: Function, case: Case, close: Close) -> None:
    """The sum is one update whose factors are side by side, of rank n R."""
    w, a, b = (in_float64(array) for array in case.args)
    n, K, R = a.shape
    wide_a = (w[:, None, None] * a).transpose(1, 0, 2).reshape(K, n * R)
    close(case.call(f), wide_a @ b.reshape(n * R, b.shape[2]), "factors side by side")


@law("peft.composition.lorahub")
def factors_meet_across_modules(f: Function, case: Case, close: Close) -> None:
    """Of two modules with A and B in one each, the sum of factors makes their product; a sum of updates 0."""
    w, a, b = case.args
    if len(w) < 2:
        return
    a, b = a.copy(), b.copy()
    a[1:], b[0], b[2:] = 0, 0, 0
    crossed = case.replace(_like(np.ones(len(w)), w), a, b)
    close.on(crossed)(crossed.call(f), in_float64(a[0]) @ in_float64(b[1]), "the cross term", factor=2.0)


@law("peft.composition.gated")
def equal_gates_are_one_update(f: Function, case: Case, close: Close) -> None:
    """Gates that are the same for every token are the weights of a sum of updates."""
    x, gates, a, b, weight = case.args
    if not len(x):
        return
    same = case.replace(x, np.repeat(gates[:1], len(x), axis=0), a, b, weight)
    update = np.einsum("n,nkr,nrm->km", in_float64(gates[0]), in_float64(a), in_float64(b))
    close.on(same)(same.call(f), in_float64(x) @ (in_float64(weight) + update), "one update", factor=2.0)


@law("peft.composition.gated")
def closed_gates_are_the_base(f: Function, case: Case, close: Close) -> None:
    """Gates of 0 leave the frozen layer, and modules in another order with their gates change nothing."""
    x, gates, a, b, weight = case.args
    base = case.replace(x, gates * 0, a, b, weight)
    close.on(base)(base.call(f), in_float64(x) @ in_float64(weight), "gates of 0", factor=2.0)
    turned = case.replace(x, gates[:, ::-1].copy(), a[::-1].copy(), b[::-1].copy(), weight)
    close(turned.call(f), case.call(f), "modules reversed")


@law("peft.composition.fusion")
def one_adapter_needs_no_attention(f: Function, case: Case, close: Close) -> None:
    """A single adapter, or several that agree, give its output times W_V."""
    x, adapted, w_q, w_k, w_v = case.args
    if not len(adapted):
        return
    alike = case.replace(x, np.repeat(adapted[:1], len(adapted), axis=0), w_q, w_k, w_v)
    close.on(alike)(
        alike.call(f), in_float64(adapted[0]) @ in_float64(w_v), "adapters that agree", factor=2.0
    )


@law("peft.composition.fusion")
def adapters_may_be_reordered(f: Function, case: Case, close: Close) -> None:
    """Adapters in reverse order give the same output; without queries it is their mean."""
    x, adapted, w_q, w_k, w_v = case.args
    close(case.replace(x, adapted[::-1].copy(), w_q, w_k, w_v).call(f), case.call(f), "adapters reversed")
    if len(adapted):
        even = case.replace(x, adapted, w_q * 0, w_k, w_v)
        mean = in_float64(adapted).mean(axis=0) @ in_float64(w_v)
        close.on(even)(even.call(f), mean, "no preference", factor=2.0)


# Retrieval


@law("peft.retrieval")
def directions_alone_count(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Query and keys times powers of two are the same query and keys."""
    query, keys = case.args
    scaled = case.replace(round_to(widen(query) * 4, query.dtype), round_to(widen(keys) / 2, keys.dtype))
    for part, other in zip(case.call(f), scaled.call(f), strict=True):
        require(in_float64(part) == in_float64(other), "the length of a vector counts")


@law("peft.retrieval")
def best_first_and_no_better_left(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Cosines fall, lie in [-1, 1], and no module that was allowed and left out has a larger one."""
    query, keys = (in_float64(array) for array in case.args)
    modules, scores = case.call(f)
    modules, scores = np.asarray(modules), in_float64(scores)
    require(len(modules) == case.kwargs["k"] == len(set(modules.tolist())), "not k different modules")
    require(np.diff(scores) <= 0, "scores rise")
    lengths = np.linalg.norm(keys, axis=1) * np.linalg.norm(query)
    cosines = np.where(lengths > 0, keys @ query / np.where(lengths > 0, lengths, 1), 0.0)
    room = 2e-2 if case.args[0].dtype.itemsize < 4 else 1e-5 if case.args[0].dtype.itemsize < 8 else 1e-12
    require(np.abs(cosines[modules] - scores) <= room, "a score is no cosine")
    excluded = case.kwargs.get("excluded", np.zeros(len(keys), bool))
    require(~excluded[modules], "an excluded module was chosen")
    left = ~excluded & ~np.isin(np.arange(len(keys)), modules)
    if len(modules):
        require(cosines[left] <= scores[-1] + room, "a better module was left out")


@law("peft.retrieval")
def of_equals_the_first(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Of equal keys the first comes first."""
    query, keys = case.args
    if not len(keys):
        return
    same = case.without("excluded").replace(query, np.repeat(keys[:1], 4, axis=0), k=3)
    require(np.asarray(same.call(f)[0]) == [0, 1, 2], "equal keys out of order")
