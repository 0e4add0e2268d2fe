"""Rotary positions (RoPE): pairs of features of queries and keys, turned by an angle for each position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, positive, whole

__all__ = ["Pairing", "Rope", "RotaryGradients", "rotary", "rotary_vjp"]

Pairing: TypeAlias = Literal["half_split", "interleaved"]


@dataclass(frozen=True, slots=True)
class Rope:
    """The settings of rotary positions, which are part of a model.

    Attributes
    ----------
    pairing : {"half_split", "interleaved"}
        Which features make a pair.
    base : float
        Pair i of n turns by ``position / base**(i / n)``.
    rotated : int, optional
        Features that turn, the first ones of a head; the rest pass.  Default: all.

    Raises
    ------
    OptionError
        If a value is outside its range.

    Examples
    --------
    >>> Rope().pairing
    'half_split'
    """

    pairing: Pairing = "half_split"
    base: float = 10000.0
    rotated: int | None = None

    def __post_init__(self) -> None:
        positive("base", self.base)
        if self.pairing not in ("half_split", "interleaved"):
            raise OptionError(f'pairing: expected "half_split" or "interleaved", got {self.pairing!r}')
        if self.rotated is not None and whole("rotated", self.rotated, 2) % 2:
            raise OptionError(f"rotated: expected an even number, got {self.rotated}")


class RotaryGradients(NamedTuple):
    """Gradient of the queries or keys; positions have none."""

    dx: FloatArray


def _sample(
    rng: np.random.Generator, *, B: int, T: int, H: int, pairs: int, pairing: str, partial: bool, far: bool
) -> Case:
    x = rng.standard_normal((B, T, H, 2 * pairs))
    first = int(rng.integers(0, 5000)) if far else 0
    options = {"pairing": pairing} | ({"rotated": 2 * ((pairs + 1) // 2)} if partial else {})
    return Case((x, first + np.arange(T)), options)


@technique(
    "transformer.positions.rotary",
    entries=(106,),
    kind="function",
    source=Source("Su et al. 2021", "arXiv:2104.09864", "eq. 15 and 34"),
    axes={"B": (1, 2), "T": (1, 8), "H": (1, 3), "pairs": (1, 5)},
    options={
        "pairing": ("half_split", "interleaved"),
        "partial": (False, True),
        "far": (False, True),
    },
    edges=(
        {"B": 0},
        {"T": 0},
        {"B": 1, "T": 1, "H": 1, "pairs": 1},
        {"T": 8, "pairs": 5, "pairing": "interleaved", "partial": True, "far": True},
        {"T": 8, "pairs": 5, "pairing": "half_split", "partial": True, "far": True},
    ),
    sample=_sample,
    vjp="refimpl.transformer.rotary:rotary_vjp",
)
def rotary(
    x: FloatArray,
    positions: IntArray,
    /,
    *,
    pairing: Pairing = "half_split",
    base: float = 10000.0,
    rotated: int | None = None,
) -> FloatArray:
    """Return queries or keys with each pair of features turned by ``position / base**(i / n)``.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, H, D)
        Queries or keys; values are not turned.
    positions : ndarray of int, shape (T,) or (B, T)
        Of the tokens.  Fractions are allowed (interpolated positions).
    pairing : {"half_split", "interleaved"}
        With n pairs, ``"half_split"`` pairs features i and i + n (GPT-NeoX, LLaMA in transformers), and
        ``"interleaved"`` features 2i and 2i + 1 (the paper, GPT-J, LLaMA's own code).  A permutation of the
        columns of W^Q and W^K turns one into the other; weights made for one are wrong in the other.
    base : float
        10000 in the paper, 500000 in LLaMA 3.
    rotated : int, optional
        How many features turn, the first ones; default D.  ``D / 4`` in GPT-NeoX, 64 in GPT-J.

    Returns
    -------
    ndarray of float, shape (B, T, H, D)
        In the dtype of `x`.

    Raises
    ------
    ShapeError
        If shapes do not fit, or the turned width is odd or beyond D.
    OptionError
        If an option is out of range.
    DTypeError
        If an array is not real.

    Notes
    -----
    Norms stay, and the product of a turned query and a turned key depends on the difference of their
    positions only; so a cache may hold turned keys.  Angles are taken in float64; transformers takes them in
    float32, which at position 65,536 is off by some thousandths.

    References
    ----------
    .. [1] Su et al., 2021, arXiv:2104.09864, eq. 15 and 34.
    .. [2] github.com/huggingface/transformers, ``models/{llama,gptj}/modeling_*.py``: rotate_half and
           rotate_every_two.

    Examples
    --------
    A quarter turn of the pair (1, 0):

    >>> x = np.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotary(x, np.array([np.pi / 2])).round(6).ravel()
    array([0., 1.])
    """
    (x,) = floating(x=x)
    rope = Rope(pairing, base, rotated)
    first, second, rest = _pairs(x, rope)
    cos, sin = _angles(x, positions, rope)
    turned = first * cos - second * sin, first * sin + second * cos
    return round_to(_joined(*turned, rest, rope), x.dtype)


def rotary_vjp(
    x: FloatArray,
    positions: IntArray,
    dy: FloatArray,
    /,
    *,
    pairing: Pairing = "half_split",
    base: float = 10000.0,
    rotated: int | None = None,
) -> RotaryGradients:
    """Return the gradient of ``sum(dy * rotary(x, positions, ...))``: `dy` turned back.

    Parameters
    ----------
    x, positions, pairing, base, rotated
        As for `rotary`.
    dy : ndarray of float, shape (B, T, H, D)
        Gradient of the output.

    Returns
    -------
    RotaryGradients
        In the dtype of `x`.

    Examples
    --------
    >>> dy = np.array([0.0, 1.0]).reshape(1, 1, 1, 2)
    >>> rotary_vjp(dy, np.array([np.pi / 2]), dy).dx.round(6).ravel()
    array([1., 0.])
    """
    x, dy = floating(x=x, dy=dy)
    if dy.shape != x.shape:
        raise ShapeError(f"dy: expected the shape of x, {x.shape}, got {dy.shape}")
    back = np.negative(np.asarray(positions, dtype=np.float64))
    return RotaryGradients(rotary(dy, back, pairing=pairing, base=base, rotated=rotated))


def _pairs(x: FloatArray, rope: Rope) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the first and second features of all pairs, and the features that do not turn."""
    if x.ndim != 4:
        raise ShapeError(f"x: expected 4 axes (B, T, H, D), got shape {x.shape}")
    width = x.shape[3] if rope.rotated is None else rope.rotated
    if width % 2 or width > x.shape[3]:
        raise ShapeError(f"x: {width} features of {x.shape[3]} cannot turn in pairs (x has shape {x.shape})")
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    turning, rest = wide[..., :width], wide[..., width:]
    if rope.pairing == "half_split":
        return turning[..., : width // 2], turning[..., width // 2 :], rest
    return turning[..., ::2], turning[..., 1::2], rest


def _joined(first: FloatArray, second: FloatArray, rest: FloatArray, rope: Rope) -> FloatArray:
    """Put pairs and the rest together again: the reverse of `_pairs`."""
    if rope.pairing == "half_split":
        return np.concatenate([first, second, rest], axis=-1)
    turned = np.stack([first, second], axis=-1)
    return np.concatenate([turned.reshape(*turned.shape[:-2], 2 * turned.shape[-2]), rest], axis=-1)


def _angles(x: FloatArray, positions: IntArray, rope: Rope) -> tuple[FloatArray, FloatArray]:
    """Return cosines and sines, shape (1 or B, T, 1, pairs), in the wide dtype of `x`."""
    (p,) = floating(positions=positions)
    if p.shape not in (x.shape[1:2], x.shape[:2]):
        raise ShapeError(f"positions: expected shape {x.shape[1:2]} or {x.shape[:2]}, got {p.shape}")
    width = x.shape[3] if rope.rotated is None else rope.rotated
    frequencies = rope.base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    p = widen(p if p.ndim == 2 else p[None]).astype(np.float64)
    angles = p[..., None, None] * frequencies
    wide = wide_dtype(x.dtype)
    return np.cos(angles).astype(wide), np.sin(angles).astype(wide)
