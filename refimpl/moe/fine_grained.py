"""Fine-grained experts (DeepSeekMoE): each is cut into segments that are chosen one by one."""

from __future__ import annotations

from typing import Any, Unpack, get_args

import numpy as np

from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.routing import Convention, router_logits
from refimpl.moe.samples import EXPERTS, layer_terms, routers_apart, sample_layer
from refimpl.moe.segments import join_columns, join_rows, segment_columns, segment_rows
from refimpl.moe.sparse_mixture import sparse_mixture, sparse_mixture_vjp, through_logits
from refimpl.numerics import FloatArray
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, whole

__all__ = ["fine_grained", "fine_grained_vjp"]


def _sample(
    rng: np.random.Generator, *, T: int, D: int, E: int, f: int, k: int, segments: int, **options: Any
) -> Case:
    convention = options.pop("convention")
    case = sample_layer(rng, T=T, D=D, E=E, F=f * segments, **options)
    x, w_router = routers_apart(rng, T, D, E * segments)
    case = case.replace(x, w_router, *case.args[2:])
    return case.replace(k=min(k, E), segments=segments, convention=convention)


@technique(
    "moe.fine_grained",
    entries=(46,),
    kind="function",
    source=Source("Dai et al. 2024 (DeepSeekMoE)", "arXiv:2401.06066", "section 3.1, eq. 6 to 8"),
    axes={"T": (0, 4), "D": (1, 4), "E": (1, 3), "f": (1, 3), "k": (1, 3), "segments": (1, 3)},
    options={"experts": EXPERTS, "convention": get_args(Convention)},
    edges=(
        {"T": 0},
        {"T": 1, "D": 1, "E": 1, "f": 1, "segments": 1},
        {"T": 4, "E": 3, "k": 3, "segments": 3},
        {"T": 4, "E": 1, "k": 1, "segments": 3, "convention": "switch"},
    ),
    sample=_sample,
    terms=layer_terms,
    vjp="refimpl.moe.fine_grained:fine_grained_vjp",
)
def fine_grained(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    k: int,
    segments: int,
    convention: Convention = "switch",
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return a top-k layer whose N experts are cut into m segments each: m k of m N are chosen.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, m N)
        One column for each segment: those of expert n are ``m n`` to ``m n + m - 1``.
    w_in, w_out : ndarray of float, shapes (N, D, F), (N, F, D)
        The experts before they are cut; m divides F.
    k : int
        Experts a token before the cut.
    segments : int
        m.
    convention : {"switch", "gshard", "mixtral"}
        DeepSeekMoE takes "switch": a softmax over all m N segments, not renormalized.
    memory : Memory, optional
        Counts the operations: ``2 T D m N`` of the router and ``T k (4 D F + 2 D m)``, gated ``6 D F``.
    w_gate : ndarray of float, shape (N, D, F), optional
        Makes gated experts.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the experts.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.  The ``+ u`` of eq. 6 is the residual around the layer, and not part of it.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit together, are not real, or an option is out of range.

    Notes
    -----
    Parameters and operations of the experts stay the same, the choices multiply: 16 experts, 2 a token, have
    120 combinations, 64 segments, 8 a token, 4,426,165,368.  In practice F / m is rounded up to a multiple of
    64 (1408 for 1365.3), which changes both a little.

    If the segments of an expert share its logit, each has 1 / m of its gate, and the layer is 1 / m of the
    layer that is not cut: `refimpl.moe.upcycling` makes up for it.

    References
    ----------
    .. [1] Dai et al., 2024, arXiv:2401.06066, section 3.1.

    Examples
    --------
    >>> w_in, w_out = np.array([[[1.0, 10.0]]]), np.ones((1, 2, 1))  # one expert, cut in two
    >>> router = np.log([[3.0, 1.0]])
    >>> fine_grained(np.ones((1, 1)), router, w_in, w_out, k=1, segments=2)  # 3/4 of 1 and 1/4 of 10
    array([[3.25]])
    """
    w_in, w_out, options = _segmented(w_in, w_out, segments, options)
    logits = router_logits(x, w_router, memory=memory)
    chosen = whole("k", k) * segments
    return sparse_mixture(x, logits, w_in, w_out, k=chosen, convention=convention, memory=memory, **options)


def fine_grained_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    k: int,
    segments: int,
    convention: Convention = "switch",
    **options: Unpack[ExpertOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * fine_grained(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, k, segments, convention, **options
        As for `fine_grained`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Of the experts in the shapes before the cut.

    Examples
    --------
    >>> w_in, w_out = np.array([[[1.0, 10.0]]]), np.ones((1, 2, 1))
    >>> one, router = np.ones((1, 1)), np.log([[3.0, 1.0]])
    >>> fine_grained_vjp(one, router, w_in, w_out, one, k=1, segments=2).dw_out[0, :, 0]
    array([0.75, 2.5 ])
    """
    w_in, w_out, options = _segmented(w_in, w_out, segments, options)
    logits = router_logits(x, w_router)
    back = sparse_mixture_vjp(
        x, logits, w_in, w_out, dy, k=whole("k", k) * segments, convention=convention, **options
    )
    found = through_logits(back, x, w_router, back.dlogits)
    return found._replace(
        dw_in=join_columns(found.dw_in, segments),
        dw_out=join_rows(found.dw_out, segments),
        dw_gate=None if found.dw_gate is None else join_columns(found.dw_gate, segments),
    )


def _segmented(
    w_in: FloatArray, w_out: FloatArray, segments: int, options: ExpertOptions
) -> tuple[FloatArray, FloatArray, ExpertOptions]:
    gate = options.get("w_gate")
    if gate is not None:
        options = {**options, "w_gate": segment_columns(as_array("w_gate", gate), segments, name="w_gate")}
    cut_in = segment_columns(as_array("w_in", w_in), segments)
    return cut_in, segment_rows(as_array("w_out", w_out), segments), options
