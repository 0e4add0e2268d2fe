"""``frugal bench flexible``: attention with masks and scores in Python, beside compiled FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cli.flexible_check import check_backward, check_forward
from cli.flexible_forms import Form, form_of
from cli.parameters import PRECISIONS
from cli.problems import Arrays, Draw, Problem, kernel

if TYPE_CHECKING:
    from cuda_backend.torch_rivals import Rival

__all__ = ["flexible_problem"]

TILE = 128  # whose live tiles are the work that counts
LONG = 512  # tokens; the live tiles of fewer are counted sooner than a kernel is compiled
FLEX, MASKED = "torch FlexAttention", "torch SDPA with a mask"


def flexible_problem(form: Form | str, shape: Sequence[int], dtype: str, *, backward: bool) -> Problem:
    """Return a pass of attention in one form; `shape` is (B, H, N, D), or (B, H, Hkv, N, D).

    Operations are those of products in live tiles of 128 x 128: two forward, five backward.  Functions are
    judged by the reference on sampled rows of the very case, not by laws, which bring functions of their own
    and would compile dozens of kernels.

    >>> problem = flexible_problem("causal", (1, 2, 256, 8), "float16", backward=False)
    >>> problem.work == 4 * 2 * 3 * 128 * 128 * 8
    True
    """
    B, H, *rest, N, D = shape
    (kv_heads,) = rest or (H,)
    form = form_of(form, H, N) if isinstance(form, str) else form
    itemsize, precision = PRECISIONS[dtype]
    outer = B * (H + kv_heads) * N
    return Problem(
        operation=f"{form.name} {'backward' if backward else 'forward'}",
        shape=tuple(shape),
        dtype=dtype,
        causal=None,
        technique="attention.flexible",
        axes={},
        work=int((10 if backward else 4) * B * H * N * N * D * _density(form, B, H, N)),
        compulsory_bytes=(4 if backward else 2) * outer * D * itemsize + 4 * B * H * N * backward,
        precision=precision,
        options={},
        operands=partial(_operands, form, shape, dtype, backward),
        check=partial(check_backward if backward else check_forward, form, dtype),
        rival_names=(FLEX, MASKED),
        rivals=partial(_rivals, form, backward),
        functions=partial(_functions, form, backward),
    )


def _density(form: Form, B: int, H: int, N: int) -> float:
    """Return the share of live tiles, of long sequences counted on the GPU: a host takes seconds a form."""
    import cuda_backend
    from refimpl.attention import block_mask as on_host

    if "mask_mod" not in form.options:
        return 1.0
    mask = form.options["mask_mod"]
    on_gpu = N > LONG and cuda_backend.availability("cuda") is None
    block_mask = cuda_backend.block_mask if on_gpu else on_host
    return float(block_mask(mask, B, H, N, N, block_sizes=(TILE, TILE), aux=form.aux).density)


def _operands(
    form: Form, shape: Sequence[int], dtype: str, backward: bool, draw: Draw, seed: int
) -> tuple[Arrays, Arrays]:
    """Return q, k, v and the arrays of functions; for a backward pass with output, log-sum-exp, gradient."""
    from cuda_backend.torch_ops import beside

    B, H, *rest, N, D = shape
    (kv_heads,) = rest or (H,)
    heads = enumerate((H, kv_heads, kv_heads, H)[: 4 if backward else 3])
    q, k, v, *do = (draw((B, N, count, D), dtype, 4 * seed + index) for index, count in heads)
    aux = tuple(beside(array, q) for array in form.aux)
    if not backward:
        return (q, k, v, aux), (q, k, v, aux)
    from cuda_backend import flexible_attention

    options = {name: f for name, f in form.options.items() if name != "score_mod_vjp"}
    out, lse = flexible_attention(q, k, v, return_lse=True, aux=aux, tier="auto", **options)
    return (q, k, v, out, lse, *do, aux), (q, k, v, *do, aux)


def _functions(form: Form, backward: bool, backend: str) -> Mapping[str, Callable[..., Any]]:
    """Return ours by tier; they take the arrays of functions last."""
    options = {name: f for name, f in form.options.items() if backward or name != "score_mod_vjp"}
    function = kernel("flexible_attention_vjp" if backward else "flexible_attention")

    def called(tier: str, *operands: Any) -> Any:
        *arrays, aux = operands
        return function(*arrays, aux=aux, tier=tier, **options)

    tiers = ("portable",) if backend == "cudasim" else ("hopper", "portable")
    return {f"frugal {tier}": partial(called, tier) for tier in tiers}


def _rivals(form: Form, backward: bool) -> Mapping[str, Rival]:
    from cuda_backend.torch_rivals import flexible_rivals

    names = {"FlexAttention": FLEX, "SDPA": MASKED}
    found = flexible_rivals(form.options.get("mask_mod"), form.options.get("score_mod"), backward=backward)
    return {names[name]: rival for name, rival in found.items()}
