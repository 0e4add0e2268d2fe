"""TinyBERT: a student layer learns the attention scores and the hidden states of a teacher layer."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import product
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "Convention",
    "LayerGradients",
    "LayerMap",
    "layer_map",
    "tinybert_layer_loss",
    "tinybert_layer_loss_vjp",
]

Convention = Literal["paper", "released"]

# The released code takes scores up to this for masked, and sets them to 0.
MASKED = -100.0


class LayerMap(NamedTuple):
    """Teacher layers, by student layer: whose attention, and after which the hidden states."""

    attention: tuple[int, ...]
    hidden: tuple[int, ...]


class LayerGradients(NamedTuple):
    """Gradients by argument; those of the teacher are None."""

    student_scores: FloatArray
    teacher_scores: None
    student_hidden: FloatArray
    teacher_hidden: None
    projection: FloatArray


def known_convention(convention: str) -> None:
    """Refuse anything but "paper" and "released".

    Raises
    ------
    OptionError
        If it is neither.

    Examples
    --------
    >>> known_convention("paper")
    """
    if convention not in get_args(Convention):
        raise OptionError(f"convention: expected 'paper' or 'released', got {convention!r}")


def layer_map(student_layers: int, teacher_layers: int) -> LayerMap:
    """Return which teacher layers a student's layers learn from: every k-th, k = L_T / L_S.

    Parameters
    ----------
    student_layers, teacher_layers : int
        L_S divides L_T.

    Returns
    -------
    LayerMap
        ``attention`` counts layers from 0, and takes the last of each k; ``hidden`` counts hidden states, 0
        being the embedding, and has one more.

    Raises
    ------
    OptionError, DTypeError
        If a number is below 1, no integer, or L_S does not divide L_T.

    References
    ----------
    .. [1] Jiao et al., 2020, arXiv:1909.10351, section 4.1: g(m) = 3 m; task_distill.py.

    Examples
    --------
    >>> layer_map(2, 6)
    LayerMap(attention=(2, 5), hidden=(0, 3, 6))
    """
    whole("student_layers", student_layers)
    whole("teacher_layers", teacher_layers)
    k, rest = divmod(teacher_layers, student_layers)
    if rest:
        raise OptionError(
            f"student_layers: must divide teacher_layers; got {student_layers} and {teacher_layers}"
        )
    return LayerMap(
        tuple((i + 1) * k - 1 for i in range(student_layers)), tuple(i * k for i in range(student_layers + 1))
    )


def sample_layers(
    rng: np.random.Generator, *, B: int, H: int, T: int, Ms: int, Mt: int, values: str, convention: str
) -> Case:
    """Return a call of `tinybert_layer_loss`; `values` "masked" holds scores near -200, "same" equal ones.

    Examples
    --------
    >>> shape = dict(B=1, H=2, T=3, Ms=2, Mt=4, values="random", convention="paper")
    >>> [a.shape for a in sample_layers(np.random.default_rng(0), **shape).args]
    [(1, 2, 3, 3), (1, 2, 3, 3), (1, 3, 2), (1, 3, 4), (2, 4)]
    """
    shapes = ((B, H, T, T), (B, H, T, T), (B, T, Ms), (B, T, Mt), (Ms, Mt))
    scores_s, scores_t, hidden_s, hidden_t, w = (rng.standard_normal(shape) for shape in shapes)
    if values == "same":
        scores_s, hidden_t = scores_t.copy(), hidden_s @ w
    if values == "masked":
        hidden_keys = rng.random((B, 1, 1, T)) < 0.5
        scores_s, scores_t = (np.where(hidden_keys, -200.0 + s, s) for s in (scores_s, scores_t))
    return Case((scores_s, scores_t, hidden_s, hidden_t, w), {"convention": convention})


def _layer_terms(case: Case) -> tuple[int, float]:
    scores_s, scores_t, hidden_s, hidden_t, w = (np.abs(array) for array in case.args)
    largest = [np.max(x, initial=0.0) for x in (scores_s + scores_t, hidden_s @ w + hidden_t)]
    return scores_s.size + hidden_t.size + w.shape[0], float(sum(2 * x**2 for x in largest))


@technique(
    "distill.tinybert",
    entries=(85,),
    kind="function",
    source=Source("Jiao et al. 2020", "arXiv:1909.10351", "eq. 7 and 8"),
    axes={"B": (1, 2), "H": (1, 2), "T": (1, 3), "Ms": (1, 3), "Mt": (1, 4)},
    options={"values": ("random", "masked", "same"), "convention": ("paper", "released")},
    edges=(
        {"B": 0},
        {"B": 1, "T": 0},
        {"B": 1, "H": 1, "T": 1, "Ms": 1, "Mt": 1, "values": "random", "convention": "paper"},
        {"B": 2, "T": 3, "values": "masked", "convention": "released"},
        {"B": 2, "T": 3, "values": "masked", "convention": "paper"},
    ),
    sample=sample_layers,
    terms=_layer_terms,
    vjp="refimpl.distill.tinybert:tinybert_layer_loss_vjp",
)
def tinybert_layer_loss(
    student_scores: FloatArray,
    teacher_scores: FloatArray,
    student_hidden: FloatArray,
    teacher_hidden: FloatArray,
    projection: FloatArray,
    /,
    *,
    convention: Convention = "paper",
) -> float:
    """Return the mean squared errors of attention scores and of projected hidden states, added.

    Parameters
    ----------
    student_scores, teacher_scores : ndarray of float, shape (B, H, T, T)
        Attention scores *before* the softmax.
    student_hidden, teacher_hidden : ndarray of float, shapes (B, T, Ms) and (B, T, Mt)
        Hidden states, or embeddings; for these alone pass scores of no heads.
    projection : ndarray of float, shape (Ms, Mt)
        From the student's width to the teacher's.  The paper trains one for the embedding and one for the
        hidden states of all layers, the released code one for both.
    convention : {"paper", "released"}
        ``"released"`` sets scores of at most -100, which are masked, to 0 on both sides first.

    Returns
    -------
    float
        ``mean((S_s - S_t)²) + mean((H_s W - H_t)²)``, means over all elements; 0 for no elements.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If `convention` is unknown.

    Notes
    -----
    Scores are compared unnormalised: a constant added to a row changes the loss and not the attention.
    Losses add over layers (`layer_map`).

    References
    ----------
    .. [1] Jiao et al., 2020, arXiv:1909.10351, eq. 7 to 9; task_distill.py.

    Examples
    --------
    >>> zero, one = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1))
    >>> tinybert_layer_loss(zero, zero + 2, one, 3 * one, one[0])
    8.0
    """
    _, (s_s, s_t, h_s, h_t, w) = _layer(
        student_scores, teacher_scores, student_hidden, teacher_hidden, projection
    )
    s_s, s_t = _unmasked(s_s, convention), _unmasked(s_t, convention)
    rows = int(np.prod(h_s.shape[:2]))
    projected = product(h_s.reshape(rows, w.shape[0]), w)
    return _mean_square(s_s - s_t) + _mean_square(projected - h_t.reshape(projected.shape))


def tinybert_layer_loss_vjp(
    student_scores: FloatArray,
    teacher_scores: FloatArray,
    student_hidden: FloatArray,
    teacher_hidden: FloatArray,
    projection: FloatArray,
    dloss: float,
    /,
    *,
    convention: Convention = "paper",
) -> LayerGradients:
    """Return the gradients of the student's scores and hidden states and of the projection.

    Parameters
    ----------
    student_scores, teacher_scores, student_hidden, teacher_hidden, projection, convention
        As for `tinybert_layer_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    LayerGradients
        0 where the released code has set a score to 0.

    Examples
    --------
    >>> zero, one = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1))
    >>> tinybert_layer_loss_vjp(zero, zero + 2, one, 3 * one, one[0], 1.0).projection
    array([[-4.]])
    """
    dtype, (s_s, s_t, h_s, h_t, w) = _layer(
        student_scores, teacher_scores, student_hidden, teacher_hidden, projection
    )
    far = _unmasked(s_s, convention) - _unmasked(s_t, convention)
    if convention == "released":
        far = np.where(s_s <= MASKED, 0, far)
    dscores = far * (2 * float(dloss) / max(far.size, 1))
    rows = int(np.prod(h_s.shape[:2]))
    flat, target = h_s.reshape(rows, w.shape[0]), h_t.reshape(rows, w.shape[1])
    gap = (product(flat, w) - target) * (2 * float(dloss) / max(target.size, 1))
    dhidden = product(gap, w.T).reshape(h_s.shape)
    found = (round_to(np.asarray(g), dtype) for g in (dscores, dhidden, product(flat.T, gap)))
    scores, hidden, projected = found
    return LayerGradients(scores, None, hidden, None, projected)


def _layer(*arrays: FloatArray) -> tuple[np.dtype[np.floating], list[FloatArray]]:
    """Return the dtype, and the arrays, checked and widened."""
    names = ("student_scores", "teacher_scores", "student_hidden", "teacher_hidden", "projection")
    axes = ("B H T U", "B H T U", "B T Ms", "B T Mt", "Ms Mt")
    given = floating(**dict(zip(names, arrays, strict=True)))
    size = bind_axes({name: (a, axis) for name, a, axis in zip(names, given, axes, strict=True)})
    bind_axes({names[0]: (given[0], "B H T U"), "square": (np.empty((size["T"],) * 2), "T U")})
    wide = wide_dtype(given[0].dtype)
    return given[0].dtype, [widen(array).astype(wide, copy=False) for array in given]


def _unmasked(scores: FloatArray, convention: Convention) -> FloatArray:
    known_convention(convention)
    return np.where(scores <= MASKED, 0, scores).astype(scores.dtype) if convention == "released" else scores


def _mean_square(x: FloatArray) -> float:
    return float(np.mean(np.square(x))) if x.size else 0.0
