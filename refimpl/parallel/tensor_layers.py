"""A decoder block split over ranks: which weights a rank has, where it meets the others, forward and back.

The first matrix of each sublayer is split by columns (a head's columns stay together), the second by rows,
so that a nonlinearity sees whole sums and a sublayer ends with one sum over ranks, to which its bias is added
once.  What is between is the unsplit layer of `refimpl.transformer.layers`, on fewer heads or hidden units.

With sequence parallelism a rank has the tokens of its part of the sequence outside of the sublayers: the sum
becomes a reduce-scatter over tokens, and an all-gather stands where nothing was sent before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray
from refimpl.parallel.collectives import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from refimpl.parallel.comm import Comm
from refimpl.parallel.passes import Back, Part, Weights, around, in_sequence, local
from refimpl.transformer.activations import Activation
from refimpl.transformer.layers import (
    Gradients,
    Layer,
    Norm,
    Order,
    feed_forward_layer,
    norm_layer,
    self_attention_layer,
)
from refimpl.transformer.rotary import Rope

__all__ = [
    "SPLIT",
    "copied",
    "gathered",
    "gradients_summed",
    "joined_weights",
    "own_weights",
    "scattered",
    "summed",
    "tensor_block",
]

# The axis along which a weight is cut; whatever is not named here, every rank has whole.
SPLIT = {
    "w_q": 1, "w_k": 1, "w_v": 1, "b_q": 0, "b_k": 0, "b_v": 0, "w_o": 0,
    "w_1": 1, "b_1": 0, "w_2": 0, "w_gate": 1, "w_up": 1, "w_down": 0,
    "embedding": 0, "head": 0,
}  # fmt: skip


def own_weights(weights: Weights, rank: int, ranks: int) -> dict[str, FloatArray]:
    """Return the weights that one rank has; a name counts from its last dot.

    Raises
    ------
    ShapeError
        If an axis that is cut does not divide.

    Examples
    --------
    >>> whole = {"layers.0.w_1": np.arange(4).reshape(1, 4), "layers.0.b_2": np.ones(1)}
    >>> own_weights(whole, 1, 2)
    {'layers.0.w_1': array([[2, 3]]), 'layers.0.b_2': array([1.])}
    """
    own = {}
    for name, array in weights.items():
        axis = SPLIT.get(name.rpartition(".")[2])
        if axis is None:
            own[name] = array
            continue
        if array.shape[axis] % ranks:
            raise ShapeError(
                f"{name}: axis {axis} must divide into {ranks} ranks; got shape {array.shape}; pad it"
            )
        size = array.shape[axis] // ranks
        own[name] = np.take(array, range(rank * size, (rank + 1) * size), axis=axis)
    return own


def joined_weights(parts: Sequence[Weights]) -> dict[str, FloatArray]:
    """Return the whole weights of which each rank has a part: the inverse of `own_weights`.

    Examples
    --------
    >>> joined_weights([{"w_2": np.zeros((1, 1)), "b_2": np.ones(1)}, {"w_2": np.ones((1, 1))}])["w_2"]
    array([[0.],
           [1.]])
    """
    whole = {}
    for name, array in parts[0].items():
        axis = SPLIT.get(name.rpartition(".")[2])
        whole[name] = array if axis is None else np.concatenate([part[name] for part in parts], axis=axis)
    return whole


def _all_reduced(comm: Comm, x: FloatArray) -> FloatArray:
    with comm.phase("tensor all-reduce"):
        return ring_all_reduce(comm, x)


def _all_gathered(comm: Comm, x: FloatArray) -> FloatArray:
    """Return the tokens of all ranks, (B, T, M), of which each has T / p."""
    with comm.phase("tensor all-gather"):
        return ring_all_gather(comm, x.swapaxes(0, 1)).swapaxes(0, 1)


def _reduce_scattered(comm: Comm, x: FloatArray) -> FloatArray:
    """Return this rank's part of the tokens of the sum over ranks."""
    B, T, M = x.shape
    with comm.phase("tensor reduce-scatter"):
        chunk = ring_reduce_scatter(comm, x.swapaxes(0, 1))
    return chunk.reshape(T // comm.size, B, M).swapaxes(0, 1)


def copied(comm: Comm) -> Part:
    """Return the start of a split sublayer (f): nothing forward, an all-reduce of gradients back."""
    return lambda _, x: (x, lambda _, dy: (_all_reduced(comm, dy), {}))


def summed(comm: Comm) -> Part:
    """Return the end of a split sublayer (g): an all-reduce forward, nothing back."""
    return lambda _, x: (_all_reduced(comm, x), lambda _, dy: (dy, {}))


def gathered(comm: Comm) -> Part:
    """Return the start with sequence parallelism: an all-gather of tokens, back a reduce-scatter."""
    return lambda _, x: (_all_gathered(comm, x), lambda _, dy: (_reduce_scattered(comm, dy), {}))


def scattered(comm: Comm) -> Part:
    """Return the end with sequence parallelism: a reduce-scatter over tokens, back an all-gather."""
    return lambda _, x: (_reduce_scattered(comm, x), lambda _, dy: (_all_gathered(comm, dy), {}))


def gradients_summed(comm: Comm, part: Part) -> Part:
    """Return a part whose weights every rank has, but applied to its own tokens: gradients are summed."""

    def summing(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        y, back = part(weights, x)

        def back_and_sum(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            dx, found = back(weights, dy)
            if not found:
                return dx, found
            names, arrays = list(found), list(found.values())
            with comm.phase("sequence gradients"):
                total = ring_all_reduce(comm, np.concatenate([array.ravel() for array in arrays]))
            ends = np.cumsum([array.size for array in arrays])[:-1]
            parts = zip(names, arrays, np.split(total, ends), strict=True)
            return dx, {name: piece.reshape(array.shape) for name, array, piece in parts}

        return y, back_and_sum

    return summing


def tensor_block(
    comm: Comm,
    *,
    num_heads: int,
    num_kv_heads: int,
    order: Order,
    norm: Norm,
    eps: float,
    activation: Activation,
    rope: Rope | None = None,
    alibi_slopes: FloatArray | None = None,
    sequence_parallel: bool = False,
) -> Part:
    """Return a decoder block as one rank runs it, on the weights that `own_weights` gives it.

    Parameters
    ----------
    comm : Comm
        This rank among those that share the block.
    num_heads, num_kv_heads : int
        Hq and Hkv of the whole block; both divide by the ranks.
    order, norm, eps, activation, rope
        As for `refimpl.transformer.decoder`.
    alibi_slopes : ndarray of float, shape (Hq,), optional
        Of all heads.
    sequence_parallel : bool
        Whether tokens are split outside of the sublayers.

    Returns
    -------
    Part
        From tokens (B, T, M), or with sequence parallelism this rank's (B, T / p, M), to the same.

    Raises
    ------
    ShapeError
        If heads do not divide by the ranks.

    Notes
    -----
    Of b·s·h activations the block sends 2 all-reduces forward and 2 back, or as many pairs of a
    reduce-scatter and an all-gather, which are the same bytes.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3 and Figure 3.
    .. [2] Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2 and Figure 5.
    """
    size = comm.size
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if heads % size:
            raise ShapeError(f"{name}: {heads} heads do not divide into {size} ranks")
    own = slice(comm.rank * num_heads // size, (comm.rank + 1) * num_heads // size)
    slopes = {} if alibi_slopes is None else {"alibi_slopes": np.asarray(alibi_slopes)[own]}

    def attention(weights: Weights) -> Layer:
        return self_attention_layer(
            _without(weights, "b_o"),
            num_heads=num_heads // size,
            num_kv_heads=num_kv_heads // size,
            rope=rope,
            causal="bottom_right",
            **slopes,  # type: ignore[arg-type]
        )

    def whole(part: Part) -> Part:
        return gradients_summed(comm, part) if sequence_parallel else part

    def normalised(n: int) -> Part:
        return whole(local(lambda weights: norm_layer(weights, f"gamma_{n}", f"beta_{n}", norm, eps)))

    def split(layer: Part, bias: str) -> Part:
        start, end = (gathered, scattered) if sequence_parallel else (copied, summed)
        return in_sequence(start(comm), layer, end(comm), whole(local(lambda weights: _bias(weights, bias))))

    hidden = local(lambda weights: feed_forward_layer(_without(weights, "b_2"), activation))
    return in_sequence(
        around(split(local(attention), "b_o"), normalised(1), order),
        around(split(hidden, "b_2"), normalised(2), order),
    )


def _without(weights: Weights, name: str) -> Mapping[str, FloatArray]:
    return {key: array for key, array in weights.items() if key != name}


def _bias(weights: Weights, name: str) -> Layer:
    if name not in weights:
        return Layer(lambda x: x, lambda _, dy: (dy, {}))
    return Layer(lambda x: x + weights[name], lambda _, dy: (dy, {name: dy.sum(axis=(0, 1))}))
