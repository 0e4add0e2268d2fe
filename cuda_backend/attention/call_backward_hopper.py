"""Calling the Hopper backward kernels with arrays of any library."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from cuda_backend.arrays import empty, is_host, library_of, view
from cuda_backend.attention.call_hopper import refuse
from cuda_backend.attention.padding import aligned_rows
from cuda_backend.attention.plan_backward_hopper import Inputs, Outputs, enqueue_backward, make_backward_plan
from cuda_backend.attention.variant_backward_hopper import BackwardVariant
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.context import current_device
from cuda_backend.launch import stream_of, wait_for
from refimpl.attention import AttentionGradients
from refimpl.attention.scores import Causal, backward_rule
from refimpl.errors import DTypeError
from refimpl.numerics import widen
from refimpl.random import drop_threshold

__all__ = ["flash_attention_vjp_deterministic", "flash_attention_vjp_hopper"]


def flash_attention_vjp_hopper(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    do: Any,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Any = None,
    deterministic: bool = False,
    stream: Any = None,
    variant: BackwardVariant | WideBackwardVariant | None = None,
    **others: Any,
) -> AttentionGradients:
    """Return the gradients of attention of GPU arrays, on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    q, k, v : array of float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `flash_attention_hopper`.
    o : array, shape (B, Tq, Hq, Dv)
        Its output.
    lse : array of float32, shape (B, Hq, Tq)
        Its log-sum-exp, natural logarithm, -inf where a query attends to no key.
    do : array, shape (B, Tq, Hq, Dv)
        Gradient of the output.  `o` and `do` have the dtype and library of `q`.
    causal, scale, stream
        As for `flash_attention_hopper`.
    dropout_p, rng
        As for `refimpl.attention.flash_attention_vjp`: probability and the integer seed of the forward call.
    deterministic : bool
        Whether dQ repeats bit for bit; dK and dV always do.
    variant : BackwardVariant, optional
        In place of the one chosen by D and Dv, for measurements.
    **others
        Further options of `cuda_backend.flash_attention_vjp`, at their defaults: the kernel has none of them.

    Returns
    -------
    AttentionGradients
        dq, dk and dv in the shapes of q, k and v, in `q`'s dtype and library.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if the inputs are of several libraries or devices.
    UnsupportedError
        With the reasons.
    BackendUnavailableError
        If there is no GPU.

    Notes
    -----
    P and dS are rounded to `q`'s dtype before they are multiplied; sums are in float32, those of dK and dV
    over the query heads of a key head too.  The call needs ``B Hq Tq (4 D + 8)`` bytes for itself, D and Tq
    filled up to whole tiles.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, appendix B.4, Algorithm 4.
    .. [2] Shah et al., 2024, arXiv:2407.08608, section 3.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None and cuda_backend.context.is_hopper():
    ...     import numpy as np
    ...     x = np.ones((1, 2, 1, 8), np.float16)
    ...     out, lse = cuda_backend.flash_attention_hopper(x, x, x, return_lse=True)
    ...     assert flash_attention_vjp_hopper(x, x, x, out, lse, x).dv.shape == x.shape
    """
    refuse(others)
    drop = (0, 0)
    if dropout_p:
        nothing = np.zeros((1, 1, 1, 1), np.float32)
        rule = backward_rule(nothing, nothing, nothing, dropout_p=dropout_p, rng=rng)
        drop = rule.seed, drop_threshold(rule.dropout_p)
    if is_host(lse):
        lse = widen(np.asarray(lse)).astype(np.float32, copy=False)
    given = {"q": q, "k": k, "v": v, "o": o, "do": do, "lse": lse}
    libraries = {name: library_of(array) for name, array in given.items()}
    if len(set(libraries.values())) > 1:
        raise DTypeError(f"q, k, v, o, lse and do: expected arrays of one library, got {libraries}")
    on = stream_of(q, stream)
    views = [view(name, array, on) for name, array in given.items()]
    wait_for(views, on)
    with ExitStack() as copies:
        aligned = [copies.enter_context(aligned_rows(x, on)) for x in views[:5]]
        inputs = Inputs._make((*aligned, views[5]))
        layouts = tuple(x.layout for x in inputs)
        plan = make_backward_plan(
            layouts, causal, scale, deterministic, on, current_device(), variant, dropout_p
        )
        made = [empty(shape, plan.dtype, q, on) for shape in plan.shapes]
        outputs = Outputs(*(given.address for given, _ in made))
        enqueue_backward(plan, Inputs(*(x.address for x in inputs)), outputs, drop)
    dq, dk, dv = (
        result() if given.shape[3] == x.shape[3] else result()[..., : x.shape[3]]
        for (given, result), x in zip(made, views, strict=False)
    )
    return AttentionGradients(dq, dk, dv)


def flash_attention_vjp_deterministic(*arrays: Any, **options: Any) -> AttentionGradients:
    """Return what `flash_attention_vjp_hopper` does, dQ bit for bit alike in every call.

    Parameters
    ----------
    *arrays, **options
        As `flash_attention_vjp_hopper` takes them, without `deterministic`.

    Returns
    -------
    AttentionGradients
        As from there.

    Raises
    ------
    FrugalError
        As there.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 2, 1, 8), np.float16)
    >>> flash_attention_vjp_deterministic(x, x, x, x, np.zeros((1, 1, 2)), x, softcap=1.0)
    Traceback (most recent call last):
    refimpl.errors.UnsupportedError: flash_attention_hopper: the kernel has no softcap
    """
    return flash_attention_vjp_hopper(*arrays, deterministic=True, **options)
