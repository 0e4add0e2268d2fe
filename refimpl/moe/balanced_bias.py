"""Balance without a loss: a bias on the scores that choose experts, moved a step against their load."""

from __future__ import annotations

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, finite, floating

__all__ = ["balanced_bias"]


def _sample_bias(rng: np.random.Generator, *, E: int, spread: str) -> Case:
    load = rng.integers(0, {"even": 1, "some": 3, "much": 1000}[spread], E)
    return Case((rng.standard_normal(E), load), {"speed": float(rng.choice([0.001, 0.25]))})


@technique(
    "moe.deepseek_v3.bias",
    entries=(34,),
    kind="function",
    source=Source("Wang et al. 2024 (loss-free balancing)", "arXiv:2408.15664", "Algorithm 1"),
    axes={"E": (1, 9)},
    options={"spread": ("even", "some", "much")},
    edges=({"E": 1, "spread": "much"}, {"E": 4, "spread": "even"}, {"E": 8, "spread": "much"}),
    sample=_sample_bias,
)
def balanced_bias(bias: FloatArray, load: IntArray, /, *, speed: float = 0.001) -> FloatArray:
    """Return the bias after a step: up by `speed` for experts below the mean load, down for those above.

    Parameters
    ----------
    bias : ndarray of float, shape (E,)
        Of the step that has ended.
    load : ndarray of int, shape (E,)
        How many tokens of the whole batch each expert got.
    speed : float
        DeepSeek-V3's γ: 0.001 for most of its training, then 0.

    Returns
    -------
    ndarray of float, shape (E,)
        In the dtype of the bias.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, `load` holds no counts, or `speed` is not finite.

    Notes
    -----
    Only the sign of the error counts, as in the algorithm; an expert with exactly the mean load stays.

    References
    ----------
    .. [1] Wang et al., 2024, arXiv:2408.15664, Algorithm 1.
    .. [2] DeepSeek-AI, 2024, arXiv:2412.19437, section 2.1.2, "Auxiliary-Loss-Free Load Balancing".

    Examples
    --------
    >>> balanced_bias(np.zeros(3), np.array([5, 3, 1]), speed=0.25)
    array([-0.25,  0.  ,  0.25])
    """
    (bias,), load = floating(bias=bias), as_array("load", load)
    bind_axes({"bias": (bias, "E"), "load": (load, "E")})
    if not np.issubdtype(load.dtype, np.integer):
        raise OptionError(f"load: expected whole numbers, got {load.dtype}")
    counts = load.astype(object)  # exact, however many tokens there are
    error = np.array([int(np.sign(counts.sum() - len(counts) * count)) for count in counts], np.int8)
    wide = widen(bias).astype(wide_dtype(bias.dtype), copy=False)
    return round_to(wide + wide.dtype.type(finite("speed", speed)) * error, bias.dtype)
