"""Tensor parallelism: a decoder block whose heads and hidden units are spread over ranks.

What a rank does stands in `refimpl.parallel.tensor_layers`; embedding and loss, whose vocabulary is spread,
in `refimpl.parallel.vocabulary`.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, widen
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.passes import Part
from refimpl.parallel.tensor_layers import joined_weights, own_weights, tensor_block
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.transformer.block_samples import sample_decoder
from refimpl.transformer.block_weights import (
    BlockGradients,
    BlockInput,
    BlockOptions,
    block_gradients,
    block_input,
    weight_names,
)
from refimpl.transformer.layers import Gradients, Norm, Order
from refimpl.transformer.rotary import Rope
from refimpl.validation import floating, whole

__all__ = ["tensor_parallel", "tensor_parallel_vjp"]


class TensorOptions(TypedDict, total=False):
    """The make of the block, and how it is split."""

    num_heads: int
    num_kv_heads: int | None
    order: Order
    norm: Norm
    eps: float
    activation: Activation
    rope: Rope | None
    sequence_parallel: bool


def sample_tensor(
    rng: np.random.Generator, *, ranks: int, tokens: int, heads: int, units: int, split: str, **shape: Any
) -> Case:
    """Return one call of `tensor_parallel`; "sequence" splits the tokens too.

    Examples
    --------
    >>> shape = dict(ranks=2, tokens=1, heads=1, units=2, split="sequence")
    >>> shape |= dict(B=1, M=4, group=1, make="llama", extra="none")
    >>> case = sample_tensor(np.random.default_rng(0), **shape)
    >>> case.args[0].shape, case.kwargs["w_up"].shape
    ((1, 2, 4), (4, 4))
    """
    sizes: dict[str, Any] = {
        "T": tokens * (ranks if split == "sequence" else 1),
        "Hkv": ranks * heads,
        "F": ranks * units,
    }
    case = sample_decoder(rng, pairs=1, **sizes, **shape)
    return case.replace(ranks=ranks, sequence_parallel=split == "sequence")


def _sample_backward(rng: np.random.Generator, **shape: Any) -> Case:
    case = sample_tensor(rng, **shape)
    return case.replace(*case.args, rng.standard_normal(case.args[0].shape))


_SMALL = {"B": 2, "tokens": 2, "M": 4, "heads": 1, "group": 1, "units": 2, "extra": "none"}
_RECORD: dict[str, Any] = {
    "entries": (94,),
    "kind": "function",
    "source": Source("Shoeybi et al. 2019", "arXiv:1909.08053", "section 3, Figure 3"),
    # Rows of few features may be nearly constant, and too curved for finite differences.
    "axes": {
        "ranks": (1, 4),
        "B": (1, 2),
        "tokens": (1, 3),
        "M": (4, 6),
        "heads": (1, 2),
        "group": (1, 2),
        "units": (1, 3),
    },
    "options": {
        "make": ("original", "gpt2", "llama"),
        "extra": ("none", "alibi"),
        "split": ("tensor", "sequence"),
    },
    "edges": (
        {**_SMALL, "ranks": 1, "make": "llama", "split": "sequence"},
        {**_SMALL, "ranks": 3, "make": "gpt2", "split": "tensor"},
        {**_SMALL, "ranks": 4, "make": "original", "split": "sequence"},
        {**_SMALL, "ranks": 2, "B": 0, "make": "llama", "split": "sequence"},
        {**_SMALL, "ranks": 2, "tokens": 0, "make": "gpt2", "split": "tensor"},
        {**_SMALL, "ranks": 2, "make": "gpt2", "split": "tensor", "extra": "alibi"},
    ),
}


@technique(
    "parallel.tensor",
    sample=sample_tensor,
    vjp="refimpl.parallel.tensor:tensor_parallel_vjp",
    **_RECORD,
)
def tensor_parallel(
    x: FloatArray,
    /,
    *,
    ranks: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    order: Order = "post",
    norm: Norm = "layer_norm",
    eps: float = 1e-5,
    activation: Activation = "relu",
    rope: Rope | None = None,
    sequence_parallel: bool = False,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
    **weights: Unpack[BlockOptions],
) -> FloatArray:
    """Return what a decoder block gives whose heads and hidden units are spread over ranks.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens; every rank has them all, or with sequence parallelism T / p of each sequence.
    ranks : int
        p.
    num_heads, num_kv_heads, order, norm, eps, activation, rope
        As for `refimpl.transformer.decoder`.
    sequence_parallel : bool
        Whether norms, biases and residuals are applied to a part of the sequence on each rank.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.
    **weights
        Whole weights by name, as for the unsplit block, and ``alibi_slopes``.  A rank takes its columns of
        ``w_q, w_k, w_v`` and of ``w_1``, or ``w_gate, w_up``, and its rows of ``w_o`` and ``w_2`` or
        ``w_down``.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        The unsplit block's, but for the order of its sums.

    Raises
    ------
    ShapeError
        If heads, hidden units or, with sequence parallelism, tokens do not divide by the ranks, or shapes do
        not fit.
    OptionError
        If a weight is missing, or has no place, or there is no rank.
    DTypeError
        If an array is not real.

    Notes
    -----
    A rank sends two ring all-reduces of the tokens, or two all-gathers and two reduce-scatters of them:
    ``4 (p - 1) / p B T M`` elements in both cases.

    **Special cases**

    - Biases of the second matrices are added after the sum, once.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3.
    .. [2] Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2.

    Examples
    --------
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> traffic = Traffic()
    >>> tensor_parallel(np.array([[[3.0, 1.0]]]), ranks=2, num_heads=2, traffic=traffic, **weights).round(3)
    array([[[ 1., -1.]]])
    >>> traffic.sent(0)  # 4 halves of 2 elements
    Sent(messages=4, bytes=32)
    """
    options: TensorOptions = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "order": order,
        "norm": norm,
        "eps": eps,
        "activation": activation,
        "rope": rope,
        "sequence_parallel": sequence_parallel,
    }
    block = _checked(x, ranks, {**options, **weights})

    def run(comm: Comm) -> FloatArray:
        own = own_weights(block.weights, comm.rank, ranks)
        return _part(comm, block)(own, _tokens(block, block.x, comm.rank, ranks))[0]

    outputs = launch(ranks, run, traffic=traffic)
    y = np.concatenate(outputs, axis=1) if sequence_parallel else outputs[0]
    return y.astype(block.dtype, copy=False)


@technique("parallel.tensor.backward", sample=_sample_backward, **_RECORD)
def tensor_parallel_vjp(
    x: FloatArray,
    dy: FloatArray,
    /,
    *,
    ranks: int,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
    **options: Any,
) -> BlockGradients:
    """Return the gradients of ``sum(dy * tensor_parallel(x, ranks=ranks, ...))``, made on ranks.

    Parameters
    ----------
    x, ranks, traffic, launch, **options
        As for `tensor_parallel`.
    dy : ndarray of float, shape (B, T, M)
        Gradient of the output.

    Returns
    -------
    BlockGradients
        Of whole weights: the parts of the ranks one behind the other.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `tensor_parallel`.

    Notes
    -----
    The forward pass is run first.  The way back sends as much as it; with sequence parallelism the gradients
    of gains, shifts and biases that every rank has are summed besides.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3.

    Examples
    --------
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> x = np.array([[[3.0, 1.0]]])
    >>> tensor_parallel_vjp(x, np.ones((1, 1, 2)), ranks=2, num_heads=2, **weights).dbeta_2
    array([1., 1.])
    """
    block = _checked(x, ranks, options)
    (dy,) = floating(dy=dy)
    if dy.shape != block.x.shape:
        raise ShapeError(f"dy: expected the shape of x, {block.x.shape}, got {dy.shape}")
    wide = widen(dy).astype(block.x.dtype, copy=False)

    def run(comm: Comm) -> tuple[FloatArray, Gradients]:
        own = own_weights(block.weights, comm.rank, ranks)
        _, back = _part(comm, block)(own, _tokens(block, block.x, comm.rank, ranks))
        return back(own, _tokens(block, wide, comm.rank, ranks))

    found = launch(ranks, run, traffic=traffic)
    dx = [gradient for gradient, _ in found]
    whole_dx = np.concatenate(dx, axis=1) if block.options["sequence_parallel"] else dx[0]
    return block_gradients(whole_dx, joined_weights([weights for _, weights in found]), block.dtype)


def _checked(x: FloatArray, ranks: int, given: dict[str, Any]) -> BlockInput:
    """Return widened arrays and the options of `tensor_block`, with its defaults in place."""
    given = {"order": "post", "norm": "layer_norm", "eps": 1e-5, "activation": "relu", "rope": None, **given}
    given.setdefault("sequence_parallel", False)
    whole("ranks", ranks)
    needed = weight_names(norm=given["norm"], gated="w_gate" in given, biases=True, cross=False)
    block = block_input(x, given, needed)
    if block.options.get("num_kv_heads") is None:
        block.options["num_kv_heads"] = block.options["num_heads"]
    if block.options["sequence_parallel"] and block.x.shape[1] % ranks:
        raise ShapeError(f"x: axis T must divide into {ranks} ranks; got shape {block.x.shape}")
    return block


def _part(comm: Comm, block: BlockInput) -> Part:
    return tensor_block(comm, **block.options)


def _tokens(block: BlockInput, x: FloatArray, rank: int, ranks: int) -> FloatArray:
    """Return the tokens that a rank has outside of the sublayers."""
    return np.split(x, ranks, axis=1)[rank] if block.options["sequence_parallel"] else x
