"""Residual MoE (DeepSpeed PR-MoE): a dense layer for every token, and one expert that corrects it.

A pyramid has few experts in its first layers and more in the last ones; nothing else differs between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refimpl.memory import Memory
from refimpl.moe.samples import VALUES, layer_terms, sample_layer
from refimpl.moe.shared_experts import shared_experts, shared_experts_vjp
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import floating

__all__ = [
    "RECORD",
    "ResidualGradients",
    "ResidualLayer",
    "pyramid",
    "residual",
    "residual_vjp",
    "sample_residual",
]

_PAPER = "Rajbhandari et al. 2022 (DeepSpeed-MoE)", "arXiv:2201.05596"


class ResidualLayer(NamedTuple):
    """Weights of one layer: the dense one, shapes (D, F'), (F', D), the router (D, E), the experts."""

    w_1: FloatArray
    w_2: FloatArray
    w_router: FloatArray
    w_in: FloatArray
    w_out: FloatArray


class ResidualGradients(NamedTuple):
    """Gradients of tokens, dense layer, router and experts."""

    dx: FloatArray
    dw_1: FloatArray
    dw_2: FloatArray
    dw_router: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray


def sample_residual(rng: np.random.Generator, *, D: int, F: int, **options: Any) -> Case:
    """Return one call of `residual`, its arrays drawn from `rng`.

    Examples
    --------
    >>> case = sample_residual(np.random.default_rng(0), T=1, D=2, E=3, F=4)
    >>> [array.shape for array in case.args]
    [(1, 2), (2, 5), (5, 2), (2, 3), (3, 2, 4), (3, 4, 2)]
    """
    case = sample_layer(rng, D=D, F=F, **options)
    dense = rng.standard_normal((D, F + 1)), rng.standard_normal((F + 1, D))
    return case.replace(case.args[0], *dense, *case.args[1:])


def _terms(case: Case) -> tuple[int, Any]:
    x, w_1, w_2, *experts = case.args[:6]
    n, routed = layer_terms(Case((x, *experts)))
    return n + sum(w_1.shape), routed + np.abs(x) @ np.abs(w_1) @ np.abs(w_2)


RECORD: dict[str, Any] = {
    "entries": (48,),
    "kind": "function",
    "axes": {"T": (0, 5), "D": (1, 4), "E": (1, 4), "F": (1, 3)},
    "options": {"values": VALUES, "experts": ("relu", "gelu")},
    "edges": ({"T": 0}, {"T": 1, "D": 1, "E": 1, "F": 1}, {"T": 5, "E": 4, "values": "large"}),
    "terms": _terms,
}


@technique(
    "moe.residual",
    source=Source(*_PAPER, "section 4.1.1, Residual-MoE, and Figure 3"),
    sample=sample_residual,
    vjp="refimpl.moe.residual:residual_vjp",
    **RECORD,
)
def residual(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``MLP(x) + g E(x)`` with E the best expert of each token and g its share of the softmax.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_1, w_2 : ndarray of float, shapes (D, F'), (F', D)
        The dense layer.
    w_router : ndarray of float, shape (D, E)
        One column for each expert.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of both.
    memory : Memory, optional
        Counts the operations: ``2 T D E + T (4 D F + 4 D F' + 4 D)``.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit together, are not real, or the activation is unknown.

    Notes
    -----
    One shared expert and one routed one: as good as top-2 in the paper, with the communication of top-1.

    Survey and lecture print 2 of 128 experts for DeepSpeed-MoE; the source takes one, and only that gives the
    activated sizes in the models' names.

    References
    ----------
    .. [1] Rajbhandari et al., 2022, arXiv:2201.05596, section 4.1.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> residual(one, 10 * one, one, np.log([[1.0, 3.0]]), w, np.ones((2, 1, 1)))  # 10 + 3/4 of 3
    array([[12.25]])
    """
    dense = _one_expert(w_1), _one_expert(w_2)
    return shared_experts(
        x,
        w_router,
        w_in,
        w_out,
        *dense,
        k=1,
        convention="switch",
        activation=activation,
        memory=memory,
    )


def residual_vjp(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    activation: Activation = "relu",
) -> ResidualGradients:
    """Return the gradients of ``sum(dy * residual(x, w_1, ..., w_out, ...))``.

    Parameters
    ----------
    x, w_1, w_2, w_router, w_in, w_out, activation
        As for `residual`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    ResidualGradients
        Each in the shape of its array.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> residual_vjp(one, 10 * one, one, np.log([[1.0, 3.0]]), w, np.ones((2, 1, 1)), one).dw_2
    array([[10.]])
    """
    dense = _one_expert(w_1), _one_expert(w_2)
    g = shared_experts_vjp(
        x, w_router, w_in, w_out, *dense, dy, k=1, convention="switch", activation=activation
    )
    return ResidualGradients(g.dx, g.dshared_in[0], g.dshared_out[0], g.dw_router, g.dw_in, g.dw_out)


def _one_expert(w: FloatArray) -> FloatArray:
    return np.asarray(w)[None]


def _sample_pyramid(
    rng: np.random.Generator, *, T: int, D: int, E: int, F: int, layers: int, activation: str
) -> Case:
    stack = []
    for index in range(layers):  # the last layers have twice the experts
        case = sample_residual(rng, T=T, D=D, E=E * (1 + (2 * index >= layers)), F=F, experts=activation)
        stack.append(ResidualLayer(*(0.5 * w for w in case.args[1:])))
    return Case((rng.standard_normal((T, D)),), {"layers": stack, "activation": activation})


@technique(
    "moe.residual.pyramid",
    entries=(48,),
    kind="function",
    source=Source(*_PAPER, "section 4.1.1, Pyramid-MoE, and Table 3"),
    axes={"T": (0, 3), "D": (1, 3), "E": (1, 2), "F": (1, 3), "layers": (0, 3)},
    options={"activation": ("relu", "gelu")},
    edges=({"T": 0}, {"T": 1, "D": 1, "E": 1, "F": 1, "layers": 1}, {"T": 2, "layers": 0}, {"layers": 3}),
    sample=_sample_pyramid,
)
def pyramid(
    x: FloatArray,
    /,
    *,
    layers: Sequence[ResidualLayer],
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return a stack of residual MoE layers, each around a skip: the last ones may have more experts.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    layers : sequence of ResidualLayer
        First to last: 10 of 32 experts and 2 of 64 in PR-MoE-350M.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of all layers.
    memory : Memory, optional
        Counts the operations of all layers.

    Returns
    -------
    ndarray of float, shape (T, D)
        ``x <- x + residual(x, *layer)`` for each layer in turn.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `residual`.

    Notes
    -----
    A token uses as many parameters as in a stack of equal layers, because every layer takes one expert;
    experts are spent where the paper found them to help, in the last layers.  Norms and attention between the
    layers are left out.  The gradient is that of `residual`, layer by layer.

    References
    ----------
    .. [1] Rajbhandari et al., 2022, arXiv:2201.05596, section 4.1.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.ones((1, 1, 1))
    >>> layer = ResidualLayer(one, one, one, w, w)
    >>> pyramid(one, layers=[layer, layer])
    array([[9.]])
    """
    for layer in layers:
        y = residual(x, *layer, activation=activation, memory=memory)
        (x,) = floating(x=x)
        x = round_to(widen(x) + widen(y), y.dtype)
    return np.array(floating(x=x)[0])
