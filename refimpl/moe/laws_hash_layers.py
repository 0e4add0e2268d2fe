"""Laws of hash layers and MultiHash layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.numerics import round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]


def _dense(x: Any, w_in: Any, w_out: Any, options: Mapping[str, Any]) -> Any:
    """Return the feed-forward layer that one expert is by itself."""
    from refimpl.transformer.ffn import ffn, gated_ffn

    activation = options.get("activation", "relu")
    if options.get("w_gate") is not None:
        return gated_ffn(x, options["w_gate"], w_in, w_out, activation=activation)
    return ffn(x, w_in, w_out, activation=activation)


@law("moe.hash")
def equal_experts_are_a_dense_layer(f: Function, case: Case, close: Close) -> None:
    """With the same weights in all experts the hash does not matter, and the layer is the dense one."""
    x, w_in, w_out = case.args
    options = {key: value[:1] for key, value in case.kwargs.items() if key == "w_gate"}
    copies = {key: np.repeat(value, len(w_in), axis=0) for key, value in options.items()}
    same = case.replace(x, *(np.repeat(w[:1], len(w_in), axis=0) for w in (w_in, w_out))).replace(**copies)
    one = {"activation": case.kwargs["activation"], **{key: value[0] for key, value in options.items()}}
    close.on(same)(same.call(f), _dense(x, w_in[0], w_out[0], one), "equal experts against one dense layer")


@law("moe.hash")
def a_token_has_one_expert_in_any_context(f: Function, case: Case, close: Close) -> None:
    """A token alone, its expert alone, gives what it gives among the others."""
    x, w_in, w_out = case.args
    y = np.asarray(case.call(f))
    for t in range(min(len(x), 3)):
        e = int(case.kwargs["experts"][t])
        options = {key: value[e : e + 1] for key, value in case.kwargs.items() if key == "w_gate"}
        alone = case.replace(x[t : t + 1], w_in[e : e + 1], w_out[e : e + 1])
        alone = alone.replace(experts=np.zeros(1, int), **options)
        close(alone.call(f), y[t : t + 1], f"token {t} alone with its expert {e}")


@law("moe.hash")
def hashed_experts_may_be_renumbered(f: Function, case: Case, close: Close) -> None:
    """Renumbering the experts and what the hash names changes nothing."""
    x, w_in, w_out = case.args
    options = {key: value[::-1] for key, value in case.kwargs.items() if key == "w_gate"}
    moved = case.replace(x, w_in[::-1], w_out[::-1])
    moved = moved.replace(experts=len(w_in) - 1 - case.kwargs["experts"], **options)
    close.on(moved)(moved.call(f), case.call(f), "experts renumbered")


@law("moe.hash.multi")
def each_segment_has_choices_of_its_own(f: Function, case: Case, close: Close) -> None:
    """Renumbering the choices of the last segment, and what its hash names, changes nothing."""
    x, *weights = case.args
    other = [np.concatenate([w[:-1], w[-1:, ::-1]]) for w in weights]
    experts = case.kwargs["experts"].copy()
    experts[-1] = weights[0].shape[1] - 1 - experts[-1]
    moved = case.replace(x, *other).replace(experts=experts)
    close.on(moved)(moved.call(f), case.call(f), "choices of the last segment renumbered")


@law("moe.hash", "moe.hash.multi")
def hashed_tokens_do_not_meet(f: Function, case: Case, close: Close) -> None:
    """Tokens and their hashes in another order give the outputs in that order."""
    x, *weights = case.args
    moved = case.replace(x[::-1], *weights).replace(experts=case.kwargs["experts"][..., ::-1])
    close.on(moved)(moved.call(f), np.asarray(case.call(f))[::-1], "tokens reversed")


@law("moe.hash.multi")
def one_hash_for_all_segments_is_a_hash_layer(f: Function, case: Case, close: Close) -> None:
    """If all segments hash alike, the layer is a hash layer whose experts are the segments side by side."""
    from refimpl.moe.hash_layers import hash_layer

    x, w_in, w_out = case.args
    same = case.replace(experts=np.broadcast_to(case.kwargs["experts"][:1], case.kwargs["experts"].shape))
    whole = [np.concatenate(list(w), axis=2) for w in (w_in, w_out)]
    one = hash_layer(x, *whole, experts=same.kwargs["experts"][0], activation=case.kwargs["activation"])
    close.on(same)(same.call(f), one, "segments that hash alike against one hash layer")


@law("moe.hash.multi")
def a_segment_of_the_output_is_its_own(f: Function, case: Case, close: Close) -> None:
    """Doubling the last segment's output weights doubles the last D / n features and leaves the others."""
    x, w_in, w_out = case.args
    factor = np.ones((len(w_out), 1, 1, 1))
    factor[-1] = 2.0
    other = case.replace(x, w_in, round_to(widen(w_out) * factor, w_out.dtype))
    features = np.repeat(factor.ravel(), w_out.shape[3])
    expected = widen(np.asarray(case.call(f))) * features
    close.on(other)(other.call(f), expected, "last segment doubled", factor=2.0)
