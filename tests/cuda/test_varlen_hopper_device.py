"""Packed sequences with the Hopper kernels on a GPU: output and gradients against float64, and their time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.arrays import poisoned_outputs
from cuda_backend.attention.tiers import warn_slow
from refimpl.errors import SlowPathWarning

# PyTorch says so once of its thread of gradients.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")]

if os.environ.get("FRUGAL_TEST_GPU") == "1":
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU", allow_module_level=True)
    from cuda_backend.torch_ops import varlen_attention
    from tests.cuda.int8_benchmark import milliseconds

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
GRADIENT_UNITS = 8  # of the largest gradient, as for flexible attention: P, dS, O and dO are rounded
LENGTHS = (40, 0, 517, 1, 130, 333), (40, 0, 517, 1, 130, 333)
OTHER_KEYS = LENGTHS[0], (64, 33, 300, 7, 0, 333)
TAIL, HQ, HKV = 9, 4, 2
TIMED = (700, 1, 2300, 4096, 900, 3000, 1500, 3887)  # 16384 tokens


def starts_of(lengths: Any) -> Any:
    return torch.tensor(np.cumsum([0, *lengths]), device="cuda", dtype=torch.int32)


def draw(kind: str, D: int, Dv: int, lengths: Any, heads: Any, tail: int) -> list[Any]:
    """Return q, k, v and dO."""
    generator = torch.Generator("cuda").manual_seed(D)
    (queries, keys), (Hq, Hkv) = (sum(each) + tail for each in lengths), heads
    shapes = (queries, Hq, D), (keys, Hkv, D), (keys, Hkv, Dv), (queries, Hq, Dv)
    made = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    return [x.to(getattr(torch, kind)) for x in made]


def exact(
    given: list[Any], lengths: Any, causal: str, cap: float | None, window: tuple[int, int] = (-1, -1)
) -> tuple[Any, list[Any]]:
    """Return output and gradients in float64, sequence by sequence."""
    leaves = [x.double().requires_grad_() for x in given[:3]]
    group, outs = given[0].shape[1] // given[1].shape[1], []
    at, key_at = (np.cumsum([0, *each]).tolist() for each in lengths)
    for (a, b), (c, d) in zip(pairwise(at), pairwise(key_at), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (leaves[0][a:b], leaves[1][c:d], leaves[2][c:d]))
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        score = q @ k.mT * q.shape[2] ** -0.5
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        offset = 0 if causal == "top_left" else d - c - (b - a)
        seen = torch.ones_like(score).bool()
        seen = seen if window[0] < 0 else seen.triu(offset - window[0])
        seen = seen if window[1] < 0 and not causal else seen.tril(offset + (0 if causal else window[1]))
        score = score.masked_fill(~seen, -torch.inf)
        most = score.detach().amax(2, keepdim=True).clamp(min=-1e30) if d > c else 0.0
        p = torch.exp(score - most)
        total = p.sum(2, keepdim=True)
        outs.append(((p / torch.where(total > 0, total, 1.0)) @ v).transpose(0, 1))
    out = torch.cat(outs)
    tail = out.new_zeros((given[0].shape[0] - out.shape[0], *out.shape[1:]))
    whole = torch.cat([out, tail])
    return whole.detach(), list(torch.autograd.grad(whole, leaves, given[3].double()))


@pytest.mark.parametrize("width", [(64, 64), (128, 128), (40, 72)])
@pytest.mark.parametrize(
    ("lengths", "causal", "cap", "window"),
    [
        (LENGTHS, "bottom_right", None, (-1, -1)),
        (OTHER_KEYS, "bottom_right", None, (90, -1)),
        (OTHER_KEYS, "top_left", 2.0, (-1, -1)),
        (OTHER_KEYS, "", None, (-1, -1)),
        (LENGTHS, "", None, (70, 33)),
    ],
)
def test_outputs_and_gradients(
    lengths: Any, causal: str, cap: float | None, window: tuple[int, int], width: tuple[int, int]
) -> None:
    kind = "bfloat16" if width[0] == 128 else "float16"
    given = draw(kind, *width, lengths, (HQ, HKV), TAIL)
    q, k, v, do = given
    starts = [starts_of(each) for each in lengths]
    options: dict[str, Any] = {"causal": causal or False, "softcap": cap, "window_size": window}
    options["tier"] = "hopper"
    with poisoned_outputs():
        out, lse = cuda_backend.varlen_attention(q, k, v, *starts, return_lse=True, **options)
    truth, wanted = exact(given, lengths, causal, cap, window)
    assert (out.double() - truth).abs().max() <= 2 * UNIT[kind] * v.abs().max() + 1e-4
    for deterministic in (False, True):
        with poisoned_outputs():
            found = cuda_backend.varlen_attention_vjp(
                q, k, v, *starts, out, lse, do, deterministic=deterministic, **options
            )
        for label, x, y in zip("qkv", found[:3], wanted, strict=True):
            limit = GRADIENT_UNITS * UNIT[kind] * max(1.0, float(y.abs().max()))
            error = float((x.double() - y).abs().max())
            assert error <= limit, f"d{label}: {error:.2e} of {limit:.2e}"
        assert not found.dq[sum(lengths[0]) :].any(), "padding has no gradient"
        assert not found.dk[sum(lengths[1]) :].any()


def test_training_runs_on_them() -> None:
    """By the operator, without the warning that the slow kernels run."""
    given = draw("float16", 64, 64, LENGTHS, (HQ, HKV), TAIL)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    starts = starts_of(LENGTHS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        q, k, v = leaves
        out = varlen_attention(q, k, v, starts, starts, max(LENGTHS[0]), max(LENGTHS[0]), causal=True)
        got = torch.autograd.grad(out, leaves, given[3])
    for x, y in zip(got, exact(given, LENGTHS, "bottom_right", None)[1], strict=True):
        assert (x.double() - y).abs().max() <= GRADIENT_UNITS * UNIT["float16"] * float(y.abs().max())


def test_heads_too_wide_for_the_backward_kernel_train() -> None:
    """As Gemma's: forward by Hopper's kernels, gradients by the portable ones, which is said."""
    given = draw("float16", 256, 256, LENGTHS, (HQ, HKV), TAIL)
    q, k, v = leaves = [x.clone().requires_grad_() for x in given[:3]]
    starts = starts_of(LENGTHS[0])
    warn_slow.cache_clear()
    out = varlen_attention(q, k, v, starts, starts, causal=True)
    with pytest.warns(SlowPathWarning, match="D is 256; the kernel with functions takes up to 128"):
        got = torch.autograd.grad(out, leaves, given[3])
    for x, y in zip(got, exact(given, LENGTHS, "bottom_right", None)[1], strict=True):
        assert (x.double() - y).abs().max() <= GRADIENT_UNITS * UNIT["float16"] * float(y.abs().max())


@pytest.mark.parametrize("D", [64, 128])
def test_backward_is_timed(D: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside SDPA of each sequence, and PyTorch's own for packed ones where it has it."""
    lengths, heads = (TIMED, TIMED), (16, 16)
    q, k, v, do = draw("float16", D, D, lengths, heads, 0)
    starts, longest = starts_of(TIMED), max(TIMED)
    calls: dict[str, Callable[[], Any]] = {}
    out, lse = cuda_backend.varlen_attention(
        q, k, v, starts, starts, causal="bottom_right", return_lse=True, tier="hopper"
    )
    for tier in ("hopper", "portable"):

        def vjp(tier: str = tier) -> Any:
            options: Any = {"causal": "bottom_right", "tier": tier}
            return cuda_backend.varlen_attention_vjp(q, k, v, starts, starts, out, lse, do, **options)

        calls[f"frugal {tier}"] = vjp
    parts = [slice(a, b) for a, b in pairwise(starts.tolist())]
    leaves = [[x[p].transpose(0, 1)[None].clone().requires_grad_() for x in (q, k, v)] for p in parts]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    outs = [sdpa(*each, is_causal=True) for each in leaves]
    dos = [do[p].transpose(0, 1)[None].clone() for p in parts]

    def each_alone() -> Any:
        return torch.autograd.grad(outs, [x for y in leaves for x in y], dos, retain_graph=True)

    calls["SDPA, one by one"] = each_alone
    try:
        from torch.nn.attention.varlen import varlen_attn

        packed = [x.clone().requires_grad_() for x in (q, k, v)]
        settled: Any = (*packed, starts, starts, longest, longest)
        theirs = varlen_attn(*settled, window_size=(-1, 0))
        calls["PyTorch varlen_attn"] = lambda: torch.autograd.grad(theirs, packed, do, retain_graph=True)
    except (ImportError, TypeError, RuntimeError):
        pass
    times = {name: milliseconds(call, 3 if "portable" in name else 20) for name, call in calls.items()}
    with capsys.disabled():
        said = ", ".join(f"{name} {took:.3f} ms" for name, took in times.items())
        print(f"\nvarlen backward, {sum(TIMED)} tokens, 16 heads, D {D}, causal, fp16: {said}")  # noqa: T201
    assert times["frugal hopper"] < times["frugal portable"] / 4
