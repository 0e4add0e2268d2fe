"""Flexible attention with the Hopper kernels on a GPU: outputs and gradients against float64."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import cuda_backend
from cuda_backend.arrays import poisoned_outputs
from cuda_backend.attention import plan_flexible_hopper, remembered
from refimpl.attention import mods
from refimpl.errors import UnsupportedError

pytestmark = pytest.mark.cuda

if os.environ.get("FRUGAL_TEST_GPU") == "1":
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU", allow_module_level=True)
    from cuda_backend.torch_ops import masked_attention

B, HQ, HKV, TQ, TK, CAP = 2, 4, 2, 333, 517, 2.0  # ragged for all tiles, two query heads a key head
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# Of the largest gradient: P, dS, O and dO are rounded, and a gradient sums hundreds of such products.
GRADIENT_UNITS = 8
LSE = 1e-3  # sums of products of rounded numbers in float32, and two special functions


class Form(NamedTuple):
    """Functions of a call; what its arrays are, on the host; the score as PyTorch computes it."""

    options: dict[str, Callable[..., Any]]
    arrays: tuple[Any, ...] = ()
    score: Callable[..., Any] | None = None


def holes(_b: Any, h: Any, i: Any, j: Any) -> Any:
    """Rows 64 to 199 see nothing, the others every key but for three."""
    return ((i < 64) | (i >= 200)) & (j != 5 + h) & (j != 130) & (j != TK - 1)


def nothing(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """No query sees a key."""
    return j < 0 * i


def bent(score: Any, *_: Any) -> Any:
    return CAP * torch.tanh(score / CAP)


def forms() -> dict[str, Form]:
    rng = np.random.default_rng(3)
    numbers = np.sort(rng.integers(0, 5, (B, TK)), axis=1).astype(np.int32)
    layout = rng.random((HQ, -(-TQ // 64), -(-TK // 64))) < 0.4
    slopes = (2.0 ** -np.arange(1, HQ + 1)).astype(np.float32)
    softcap = {"score_mod": mods.softcap(CAP), "score_mod_vjp": mods.softcap_vjp(CAP)}
    alibi = {"score_mod": mods.alibi(), "score_mod_vjp": mods.alibi_vjp}
    return {
        "none": Form({}),
        "sliding": Form({"mask_mod": mods.both(mods.causal, mods.sliding(90))}),
        "documents": Form({"mask_mod": mods.documents()}, (numbers,)),
        "bigbird": Form({"mask_mod": mods.bigbird(64)}, (layout,)),
        "holes": Form({"mask_mod": holes}),
        "nothing": Form({"mask_mod": nothing}),
        "alibi": Form({"mask_mod": mods.causal, **alibi}, (slopes,), mods.alibi()),
        "softcap": Form({"mask_mod": mods.sliding(100), **softcap}, (), bent),
    }


NAMES = ("none", "sliding", "documents", "bigbird", "holes", "nothing", "alibi", "softcap")
WIDTHS = ((64, 64), (128, 128), (40, 72))


def draw(kind: str, D: int, Dv: int) -> list[Any]:
    """Return q, k, v and dO."""
    generator = torch.Generator("cuda").manual_seed(D)
    shapes = (B, TQ, HQ, D), (B, TK, HKV, D), (B, TK, HKV, Dv), (B, TQ, HQ, Dv)
    made = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    return [x.to(getattr(torch, kind)) for x in made]


def on_gpu(form: Form) -> dict[str, Any]:
    return {**form.options, "aux": tuple(torch.from_numpy(array).cuda() for array in form.arrays)}


def exact(form: Form, q: Any, k: Any, v: Any, do: Any) -> tuple[Any, Any, list[Any]]:
    """Return output, log-sum-exp and gradients in float64."""
    aux = on_gpu(form)["aux"]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    i, j = torch.arange(TQ, device="cuda")[:, None], torch.arange(TK, device="cuda")[None]
    outs, sums = [], []
    for b, h in np.ndindex(B, HQ):
        score = leaves[0][b, :, h] @ leaves[1][b, :, h // (HQ // HKV)].T * q.shape[3] ** -0.5
        if form.score is not None:
            score = form.score(score, b, h, i, j, *([aux] if aux else []))
        if "mask_mod" in form.options:
            allowed = form.options["mask_mod"](b, h, i, j, *([aux] if form.arrays and not form.score else []))
            score = score.masked_fill(~allowed, -math.inf)
        most = score.detach().amax(1, keepdim=True).clamp(min=-1e30)
        p = torch.exp(score - most)
        total = p.sum(1, keepdim=True)
        outs.append((p / torch.where(total > 0, total, 1.0)) @ leaves[2][b, :, h // (HQ // HKV)])
        sums.append((most + torch.log(total.detach()))[:, 0])
    out = torch.stack(outs).view(B, HQ, TQ, -1).transpose(1, 2)
    return (
        out.detach(),
        torch.stack(sums).view(B, HQ, TQ),
        list(torch.autograd.grad(out, leaves, do.double())),
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str, width: tuple[int, int]) -> None:
    kind = "bfloat16" if (NAMES.index(name) + WIDTHS.index(width)) % 2 else "float16"
    form, (q, k, v, do) = forms()[name], draw(kind, *width)
    options = on_gpu(form)
    with poisoned_outputs():
        out, lse = cuda_backend.flexible_attention(q, k, v, **options, return_lse=True, tier="hopper")
    truth, sums, wanted = exact(form, q, k, v, do)
    # P and the output are rounded once each, and weights sum to 1.
    assert (out.double() - truth).abs().max() <= 2 * UNIT[kind] * v.abs().max() + 1e-4
    empty = torch.isneginf(sums)
    assert torch.equal(torch.isneginf(lse), empty)
    assert bool(((lse - sums).abs()[~empty] <= LSE).all())
    assert not out.transpose(1, 2)[empty].any(), "a query without keys"
    for deterministic in (False, True):
        with poisoned_outputs():
            found = cuda_backend.flexible_attention_vjp(
                q, k, v, out, lse, do, **options, tier="hopper", deterministic=deterministic
            )
        for label, x, y in zip("qkv", found[:3], wanted, strict=True):
            limit = GRADIENT_UNITS * UNIT[kind] * max(1.0, float(y.abs().max()))
            error = float((x.double() - y).abs().max())
            assert error <= limit, f"d{label}: {error:.2e} of {limit:.2e}"


def test_dq_repeats_where_it_is_asked_for() -> None:
    form, (q, k, v, do) = forms()["bigbird"], draw("float16", 64, 64)
    options = {**on_gpu(form), "tier": "hopper"}
    out, lse = cuda_backend.flexible_attention(q, k, v, return_lse=True, **options)
    vjp = cuda_backend.flexible_attention_vjp
    first, *others = [vjp(q, k, v, out, lse, do, deterministic=True, **options) for _ in range(4)]
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first[:3], other[:3], strict=True))


@pytest.mark.parametrize("name", ["sliding", "documents", "bigbird", "holes"])
@pytest.mark.parametrize("D", [64, 128])
def test_bits_say_what_the_function_says(monkeypatch: pytest.MonkeyPatch, name: str, D: int) -> None:
    """Masks that are too large to keep are asked for each score; every tile is as it was."""
    form, (q, k, v, _) = forms()[name], draw("float16", D, D)
    found, plan = [], vars(plan_flexible_hopper)
    for most in (plan["MOST_BYTES"], 0):
        monkeypatch.setitem(plan, "MOST_BYTES", most)
        monkeypatch.setattr(remembered, "_answers", OrderedDict())
        found.append(cuda_backend.flexible_attention(q, k, v, **on_gpu(form), tier="hopper"))
    assert torch.equal(*found)


@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (48, 80)])
def test_block_masks(sizes: tuple[int, int]) -> None:
    form, (q, k, v, do) = forms()["documents"], draw("float16", 64, 64)
    options = on_gpu(form)
    blocks = cuda_backend.block_mask(
        options["mask_mod"], B, HQ, TQ, TK, block_sizes=sizes, aux=options["aux"]
    )
    pairs = []
    for given in (options, {**options, "block_mask": blocks}):
        out, lse = cuda_backend.flexible_attention(q, k, v, **given, return_lse=True, tier="hopper")
        more = {**given, "tier": "hopper", "deterministic": True}
        pairs.append((out, lse, *cuda_backend.flexible_attention_vjp(q, k, v, out, lse, do, **more)[:3]))
    for x, y in zip(*pairs, strict=True):
        assert (x - y).abs().max() <= 2e-2, "other tiles, other order of sums"


def test_arrays_that_change_are_read_again() -> None:
    form, (q, k, v, _) = forms()["documents"], draw("float16", 64, 64)
    options = on_gpu(form)
    call = cuda_backend.flexible_attention
    before = call(q, k, v, **options, tier="hopper")
    options["aux"][0].zero_()
    after = call(q, k, v, **options, tier="hopper")
    assert not torch.equal(before, after)
    assert (after - call(q, k, v, tier="hopper")).abs().max() <= 2e-3


def test_training_runs_on_them() -> None:
    """A causal window as the operator takes it, whose gradients go through both kernels."""
    q, k, v, do = draw("float16", 64, 64)
    q, do = (torch.cat([x, x[:, : TK - TQ]], 1) for x in (q, do))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    i = torch.arange(TK, device="cuda")
    mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 90)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    repeated = [x.repeat_interleave(HQ // x.shape[2], 2).transpose(1, 2) for x in wide]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = torch.autograd.grad(sdpa(*repeated, attn_mask=mask), wide, do.transpose(1, 2).double())
    got = torch.autograd.grad(masked_attention(*leaves, causal="top_left", window=90), leaves, do)
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).abs().max() <= GRADIENT_UNITS * UNIT["float16"] * float(y.abs().max())


def test_what_the_tier_cannot_do_it_refuses() -> None:
    x = torch.ones(1, 4, 2, 8, device="cuda")
    with pytest.raises(UnsupportedError, match="float32"):
        cuda_backend.flexible_attention(x, x, x, mask_mod=mods.causal, tier="hopper")
    lse = torch.zeros(1, 2, 4, device="cuda")
    with pytest.raises(UnsupportedError, match="float32"):
        cuda_backend.flexible_attention_vjp(x, x, x, x, lse, x, mask_mod=mods.causal, tier="hopper")
    both = [
        cuda_backend.flexible_attention(x, x, x, mask_mod=mods.causal, tier=t) for t in ("auto", "portable")
    ]
    assert torch.equal(*both)
