"""Sparse upcycling: a dense layer copied into every expert, so that training goes on from a trained model."""

from __future__ import annotations

import numpy as np

from refimpl.moe.segments import segment_columns, segment_rows
from refimpl.moe.split_ffn import SplitExperts
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["upcycling", "virtual_groups"]


def _sample(rng: np.random.Generator, *, D: int, f: int, copies: int, segments: int, gated: bool) -> Case:
    F = f * segments
    options = {"copies": copies, "segments": segments}
    case = Case((rng.standard_normal((D, F)), rng.standard_normal((F, D))), options)
    return case.replace(w_gate=rng.standard_normal((D, F))) if gated else case


@technique(
    "moe.upcycling",
    entries=(55,),
    kind="function",
    source=Source("Komatsuzaki et al. 2023", "arXiv:2212.05055", "section 3, Figure 1"),
    axes={"D": (1, 4), "f": (1, 3), "copies": (1, 4), "segments": (1, 3)},
    options={"gated": (False, True)},
    edges=(
        {"D": 1, "f": 1, "copies": 1, "segments": 1},
        {"copies": 4, "segments": 3, "gated": True},
        {"copies": 1, "segments": 3, "gated": False},
    ),
    sample=_sample,
)
def upcycling(
    w_1: FloatArray,
    w_2: FloatArray,
    /,
    *,
    copies: int,
    segments: int = 1,
    w_gate: FloatArray | None = None,
) -> SplitExperts:
    """Return experts that are copies of a dense layer, whole or cut into segments.

    Parameters
    ----------
    w_1, w_2 : ndarray of float, shapes (D, F), (F, D)
        The dense layer.
    copies : int
        How many of it.
    segments : int
        Cuts each copy into so many experts, for fine-grained upcycling; divides F.  Their output weights are
        multiplied by it, because a segment gets only its part of the gate.
    w_gate : ndarray of float, shape (D, F), optional
        Of a gated layer.

    Returns
    -------
    SplitExperts
        ``copies * segments`` experts; the segments of copy c follow one another.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the weights do not fit together, are not real, or an option is out of range.

    Notes
    -----
    The router is new and drawn at random; everything else of the model is copied.  The function is kept if
    the gates of a token sum to 1 ("gshard" or "mixtral") and nothing is dropped; under "switch" the first
    output is the dense one times the sum of the gates, and training has to make up for it.

    With segments a token must get all of a copy: give its segments one logit (`virtual_groups`) and choose
    ``k * segments`` experts.  Copies with equal gates have equal gradients: only the router tells them apart
    (Qwen also redraws half of the weights).  E copies add ``(E - 1) |FFN|`` parameters.

    References
    ----------
    .. [1] Komatsuzaki et al., 2023, arXiv:2212.05055, section 3.
    .. [2] He et al., 2024, "Upcycling large language models into mixture of experts", arXiv:2410.07524,
       section 4 (virtual groups, and scaled weights).

    Examples
    --------
    >>> experts = upcycling(np.array([[1.0, 2.0]]), np.ones((2, 1)), copies=2, segments=2)
    >>> experts.w_in[:, 0, 0], experts.w_out[:, 0, 0]
    (array([1., 2., 1., 2.]), array([2., 2., 2., 2.]))
    """
    a = _checked(w_1, w_2, w_gate)
    parts = {
        name: (segment_rows if name == "w_2" else segment_columns)(w[None], segments, name=name)
        for name, w in a.items()
    }
    w_out = widen(parts["w_2"]) * widen(parts["w_2"]).dtype.type(segments)
    parts["w_2"] = round_to(w_out, parts["w_2"].dtype)
    times = whole("copies", copies)
    copied = {name: np.tile(part, (times, 1, 1)) for name, part in parts.items()}
    return SplitExperts(copied["w_1"], copied["w_2"], copied.get("w_gate"))


def virtual_groups(w_router: FloatArray, *, segments: int) -> FloatArray:
    """Return a router for segmented copies: each column repeated for the segments of its copy.

    Parameters
    ----------
    w_router : ndarray of float, shape (D, copies)
        A router of whole copies.
    segments : int
        Segments of each.

    Returns
    -------
    ndarray of float, shape (D, copies * segments)
        Equal logits within a group, so that a token chooses all of a copy or nothing of it.

    Examples
    --------
    >>> virtual_groups(np.array([[1.0, 2.0]]), segments=2)
    array([[1., 1., 2., 2.]])
    """
    (w_router,) = floating(w_router=w_router)
    bind_axes({"w_router": (w_router, "D E")})
    return np.repeat(w_router, whole("segments", segments), axis=1)


def _checked(w_1: FloatArray, w_2: FloatArray, w_gate: FloatArray | None) -> dict[str, FloatArray]:
    given = {"w_1": w_1, "w_2": w_2} | ({} if w_gate is None else {"w_gate": w_gate})
    a = dict(zip(given, floating(**given), strict=True))
    axes = {"w_1": "D F", "w_2": "F D", "w_gate": "D F"}
    bind_axes({name: (array, axes[name]) for name, array in a.items()})
    return a
