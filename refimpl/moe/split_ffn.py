"""A dense layer taken apart into experts (LLaMA-MoE): its hidden units are dealt out, none is copied."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.segments import join_columns, join_rows, segment_columns, segment_rows
from refimpl.numerics import FloatArray, IntArray, round_to
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = ["SplitExperts", "SplitGradients", "split_ffn", "split_ffn_vjp", "split_weights"]


class SplitExperts(NamedTuple):
    """Experts, shapes (E, D, F / E), (E, F / E, D), and the gates' half if the layer was gated."""

    w_in: FloatArray
    w_out: FloatArray
    w_gate: FloatArray | None = None


class SplitGradients(NamedTuple):
    """Gradients of tokens and of the dense layer's weights; those of options only where they were given."""

    dx: FloatArray
    dw_1: FloatArray
    dw_2: FloatArray
    dgates: FloatArray | None = None
    dw_gate: FloatArray | None = None


def _sample(
    rng: np.random.Generator, *, T: int, D: int, E: int, f: int, shuffled: bool, gates: str, experts: str
) -> Case:
    F = E * f
    x, w_1, w_2 = (rng.standard_normal(shape) for shape in ((T, D), (D, F), (F, D)))
    options: dict[str, Any] = {"num_experts": E, "activation": experts.removeprefix("gated ")}
    if experts.startswith("gated "):
        options["w_gate"] = rng.standard_normal((D, F))
    if shuffled:
        options["order"] = rng.permutation(F)
    if gates == "some":
        options["gates"] = rng.random((T, E)) * (rng.random((T, E)) < 0.6)
    return Case((x, w_1, w_2), options)


def _terms(case: Case) -> tuple[int, Any]:
    x, w_1, w_2 = (np.abs(array) for array in case.args)
    hidden = x @ w_1
    if case.kwargs.get("w_gate") is not None:
        hidden = hidden * (x @ np.abs(case.kwargs["w_gate"]))
    return 2 * x.shape[1] + w_1.shape[1], hidden @ w_2


@technique(
    "moe.split_ffn",
    entries=(56,),
    kind="identity",
    source=Source("Zhu et al. 2024 (LLaMA-MoE)", "arXiv:2406.16554", "section 3.1, Expert Construction"),
    axes={"T": (0, 4), "D": (1, 4), "E": (1, 4), "f": (1, 3)},
    options={"shuffled": (False, True), "gates": ("all", "some"), "experts": ("relu", "gelu", "gated silu")},
    edges=(
        {"T": 0},
        {"T": 1, "D": 1, "E": 1, "f": 1},
        {"E": 4, "f": 1, "gates": "all", "shuffled": True},
        {"E": 4, "f": 2, "gates": "some", "experts": "gated silu"},
    ),
    sample=_sample,
    terms=_terms,
    vjp="refimpl.moe.split_ffn:split_ffn_vjp",
)
def split_ffn(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    /,
    *,
    num_experts: int,
    order: IntArray | None = None,
    gates: FloatArray | None = None,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return a dense layer as a sum over experts that share out its hidden units.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_1, w_2 : ndarray of float, shapes (D, F), (F, D)
        The dense layer.
    num_experts : int
        E; it divides F.
    order : ndarray of int, shape (F,), optional
        A permutation of the hidden units: the first F / E of it make expert 0, and so on.  Default: as they
        stand.  LLaMA-MoE draws it at random, which its paper finds best.
    gates : ndarray of float, shape (T, E), optional
        Weight of each expert; those with 0 do not run.  Default: 1 for all, which is the dense layer.
    w_gate : ndarray of float, shape (D, F), optional
        Makes it a gated layer, as in LLaMA.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        As for `refimpl.transformer.ffn`.
    memory : Memory, optional
        Counts the operations: ``(4 D F / E + 2 D) n`` for n gates that are not 0, gated ``6 D F / E``.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, are not real, or E does not divide F.
    OptionError
        If `order` is no permutation, or the activation is unknown.

    Notes
    -----
    With all gates 1 the layer is the dense one, whatever the order: a sum over hidden units may be taken in
    groups.  With k of E gates its scale falls to about k / E, so LLaMA-MoE multiplies by E / k, and trains
    on.  LLaMA 7B's 11,008 units make 16 experts of 688 or 8 of 1376.

    References
    ----------
    .. [1] Zhu et al., 2024, arXiv:2406.16554, section 3.

    Examples
    --------
    >>> eye = np.eye(2)
    >>> split_ffn(np.array([[1.0, 3.0]]), eye, eye, num_experts=2)
    array([[1., 3.]])
    >>> split_ffn(np.array([[1.0, 3.0]]), eye, eye, num_experts=2, gates=np.array([[0.0, 2.0]]))
    array([[0., 6.]])
    """
    x, weights, experts = _checked(x, w_1, w_2, num_experts, order, gates, w_gate)
    return mixture(
        x,
        weights,
        experts.w_in,
        experts.w_out,
        selected=weights != 0,
        w_gate=experts.w_gate,
        activation=activation,
        memory=memory,
    )


def split_ffn_vjp(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    dy: FloatArray,
    /,
    *,
    num_experts: int,
    order: IntArray | None = None,
    gates: FloatArray | None = None,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
) -> SplitGradients:
    """Return the gradients of ``sum(dy * split_ffn(x, w_1, w_2, ...))``.

    Parameters
    ----------
    x, w_1, w_2, num_experts, order, gates, w_gate, activation
        As for `split_ffn`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    SplitGradients
        Of the dense weights, in their order.  A gate of 0 has the gradient that its expert would give it.

    Examples
    --------
    >>> eye, x = np.eye(2), np.array([[1.0, 3.0]])
    >>> split_ffn_vjp(x, eye, eye, np.ones((1, 2)), num_experts=2, gates=np.array([[0.0, 2.0]])).dgates
    array([[1., 3.]])
    """
    x, weights, experts = _checked(x, w_1, w_2, num_experts, order, gates, w_gate)
    back = mixture_vjp(
        x, weights, experts.w_in, experts.w_out, dy, w_gate=experts.w_gate, activation=activation
    )
    E = len(experts.w_in)
    places = np.arange(E * experts.w_in.shape[2]) if order is None else np.argsort(order)
    dw_gate = None if back.dw_gate is None else join_columns(back.dw_gate, E)[0][:, places]
    dgates = None if gates is None else round_to(back.dgates, floating(gates=gates)[0].dtype)
    dw_1, dw_2 = join_columns(back.dw_in, E)[0][:, places], join_rows(back.dw_out, E)[0][places]
    return SplitGradients(back.dx, dw_1, dw_2, dgates, dw_gate)


def split_weights(
    w_1: FloatArray,
    w_2: FloatArray,
    *,
    num_experts: int,
    order: IntArray | None = None,
    w_gate: FloatArray | None = None,
) -> SplitExperts:
    """Return the experts of a dense layer, as `split_ffn` cuts them.

    Examples
    --------
    >>> split_weights(np.array([[1.0, 2.0]]), np.ones((2, 1)), num_experts=2, order=np.array([1, 0])).w_in
    array([[[2.]],
    <BLANKLINE>
           [[1.]]])
    """
    whole("num_experts", num_experts)
    units = np.arange(w_2.shape[0]) if order is None else as_array("order", order)
    if not np.array_equal(np.sort(units), np.arange(w_2.shape[0])):
        raise OptionError(f"order: expected a permutation of the {w_2.shape[0]} hidden units")
    cut = [
        segment_columns(w[None, :, units], num_experts, name=name)
        for name, w in (("w_1", w_1), ("w_gate", w_gate))
        if w is not None
    ]
    return SplitExperts(cut[0], segment_rows(w_2[None, units], num_experts, name="w_2"), *cut[1:])


def _checked(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    num_experts: int,
    order: IntArray | None,
    gates: FloatArray | None,
    w_gate: FloatArray | None,
) -> tuple[FloatArray, FloatArray, SplitExperts]:
    """Return tokens, gates (T, E) and experts, once all fit together."""
    given = {"x": x, "w_1": w_1, "w_2": w_2} | ({} if w_gate is None else {"w_gate": w_gate})
    a = dict(zip(given, floating(**given), strict=True))
    axes = {"x": "T D", "w_1": "D F", "w_2": "F D", "w_gate": "D F"}
    bind_axes({name: (array, axes[name]) for name, array in a.items()})
    experts = split_weights(a["w_1"], a["w_2"], num_experts=num_experts, order=order, w_gate=a.get("w_gate"))
    shape = len(a["x"]), num_experts
    weights = np.ones(shape) if gates is None else floating(gates=gates)[0]
    if weights.shape != shape:
        raise ShapeError(f"gates: expected shape {shape}, got {weights.shape}")
    return a["x"], weights, experts
