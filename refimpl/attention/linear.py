"""Linear attention: a kernel for the softmax, so that keys and values sum up to a state of fixed size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.attention.linear_call import EPS, LinearHead, elu_feature_map, linear_call, normalized
from refimpl.attention.linear_samples import AXES, EDGES, OPTIONS, linear_terms, sample_linear
from refimpl.attention.scores import Causal
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, contract, round_to, widen
from refimpl.registry import Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["LinearState", "LinearStep", "linear_attention", "linear_attention_step"]


class LinearState(NamedTuple):
    """What is kept of the past: `S`, the sum of φ(k) vᵀ, and `z`, the sum of φ(k); float32 at least."""

    S: FloatArray
    z: FloatArray


class LinearStep(NamedTuple):
    """The output of one token, shape (B, Hq, Dv), and the state after it."""

    out: FloatArray
    state: LinearState


@technique(
    "attention.linear",
    entries=(23,),
    kind="function",
    source=Source("Katharopoulos et al. 2020", "arXiv:2006.16236", "eq. 4 to 7 and 9 to 12"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_linear,
    terms=linear_terms,
    vjp="refimpl.attention.linear_chunked:linear_attention_vjp",
)
def linear_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    causal: Causal = False,
    key_mask: BoolArray | None = None,
    eps: float = EPS,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``φ(q) (Σ φ(k) vᵀ) / (φ(q) · Σ φ(k) + eps)`` over the keys that a query sees, φ = elu + 1.

    Parameters
    ----------
    q : ndarray of float, shape (B, Tq, Hq, D)
        Queries.
    k : ndarray of float, shape (B, Tk, Hkv, D)
        Keys.  Hkv divides Hq; query head h reads key head ``h // (Hq // Hkv)`` and shares its state.
    v : ndarray of float, shape (B, Tk, Hkv, Dv)
        Values.
    causal : bool or {"top_left", "bottom_right"}
        As for `scaled_dot_product_attention`.  The authors' code is "top_left".
    key_mask : ndarray of bool, shape (B, Tk), optional
        True for a key, False for padding, whose features are set to 0.  The sums know no other masks.
    eps : float
        Added to the denominator; 1e-6 in the authors' code [2]_, 1e-10 in flash-linear-attention.
    memory : Memory, optional
        Counts what a kernel moves that keeps the state on chip, its FLOPs, and the state.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)
        In the common dtype of q, k and v.

    Raises
    ------
    ShapeError
        If shared axes differ, Hkv does not divide Hq, or `key_mask` does not fit.
    DTypeError
        If an array is not real, or `key_mask` is not bool.
    OptionError
        If `eps` is negative, or the causal alignment is ambiguous.

    Notes
    -----
    The causal form is the paper's recurrent network, one token at a time; `linear_attention_chunked` is the
    one that is fast.  There is no factor ``D ** -0.5``.  Features, sums and state are float32 at least.
    **Special cases**

    - `eps` makes the weights of a row sum to a little less than 1.
    - A row that sees no key gives 0, for ``eps=0`` too.
    - NaN in a value behind the mask makes NaN (0 * NaN).

    References
    ----------
    .. [1] Katharopoulos et al., 2020, arXiv:2006.16236, eq. 4 to 7, and 9 to 12 and 16 to 20 (causal).
    .. [2] github.com/idiap/fast-transformers, commit 2aa1368, attention/causal_linear_attention.py.

    Examples
    --------
    Features of 0 and 1 are 1 and 2, so the second key weighs twice as much:

    >>> q, k = np.zeros((1, 1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    >>> v = np.array([3.0, 6.0]).reshape(1, 2, 1, 1)
    >>> linear_attention(q, k, v, eps=0.0).item()
    5.0
    """
    call = linear_call(q, k, v, causal=causal, key_mask=key_mask, eps=eps)
    hbm, plan = memory or Memory(), call.plan
    for head in call.heads():
        with hbm.on_chip():
            state = _absorb(hbm, head, None, slice(0, plan.prefix))
            hbm.store("O", head.out, slice(0, plan.blind), head.out[: plan.blind])
            for t in range(plan.steps):
                with hbm.on_chip():
                    state = _absorb(hbm, head, state, slice(plan.prefix + t, plan.prefix + t + 1))
                    _answer(hbm, head, state, slice(plan.blind + t, plan.blind + t + 1), call.eps)
            _answer(hbm, head, state, slice(plan.blind + plan.steps, len(head.q)), call.eps)
    return call.out


def _absorb(hbm: Memory, head: LinearHead, state: LinearState | None, rows: slice) -> LinearState:
    """Add keys and values to the state, which begins as 0 (eq. 10, 11, 18, 19)."""
    features, v = head.keys(hbm, rows)
    S, z = hbm.contract("jd,je->de", features, v), features.sum(axis=0)
    if state is not None:
        S, z = state.S + S, state.z + z
    return LinearState(hbm.keep(f"S{head.name}", S), hbm.keep(f"z{head.name}", z))


def _answer(hbm: Memory, head: LinearHead, state: LinearState, rows: slice, eps: float) -> None:
    """Write the output of queries that see just what the state holds (eq. 6, 12, 20)."""
    features = head.queries(hbm, rows)
    numerator = hbm.contract("igd,de->ige", features, state.S)
    denominator = hbm.contract("igd,d->ig", features, state.z)
    hbm.store("O", head.out, rows, normalized(numerator, denominator, eps))


def linear_attention_step(
    q: FloatArray, k: FloatArray, v: FloatArray, state: LinearState | None = None, /, *, eps: float = EPS
) -> LinearStep:
    """Return the output of one more token and the state after it: decoding in constant time and memory.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Hq, D), (B, Hkv, D), (B, Hkv, Dv)
        The token's query, key and value.
    state : LinearState, optional
        `S` of shape (B, Hkv, D, Dv) and `z` of shape (B, Hkv, D); before the first token None.
    eps : float
        As for `linear_attention`.

    Returns
    -------
    LinearStep
        `out` of shape (B, Hq, Dv) in the dtype of q, k and v; the state in float32 at least.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `linear_attention`.

    References
    ----------
    .. [1] Katharopoulos et al., 2020, arXiv:2006.16236, eq. 16 to 20.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 3, 1, 4))
    >>> state = None
    >>> for t in range(3):
    ...     out, state = linear_attention_step(x[:, t], x[:, t], x[:, t], state)
    >>> bool(np.allclose(out, linear_attention(x, x, x, causal=True)[:, -1]))
    True
    """
    call = linear_call(*(np.expand_dims(x, 1) for x in floating(q=q, k=k, v=v)), eps=eps)
    features, values = elu_feature_map(call.k[:, 0]), widen(call.v[:, 0])
    S, z = contract("bhd,bhe->bhde", features, values), features
    if state is not None:
        bind_axes(
            {
                "k": (k, "B Hkv D"),
                "v": (v, "B Hkv Dv"),
                "S": (state.S, "B Hkv D Dv"),
                "z": (state.z, "B Hkv D"),
            }
        )
        S, z = state.S + S, state.z + z
    B, Hkv, D = z.shape
    queries = elu_feature_map(call.q[:, 0]).reshape(B, Hkv, -1, D)
    out = normalized(contract("bhgd,bhde->bhge", queries, S), contract("bhgd,bhd->bhg", queries, z), call.eps)
    return LinearStep(round_to(out.reshape(call.out[:, 0].shape), call.out.dtype), LinearState(S, z))
