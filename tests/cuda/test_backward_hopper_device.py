"""The Hopper backward kernels on a GPU: against float64 under the policy of gradients; training with them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.cuda.transformer_training import losses, sdpa

pytestmark = pytest.mark.cuda

if os.environ.get("FRUGAL_TEST_GPU") == "1":
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU", allow_module_level=True)
    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
    from cuda_backend.arrays import poisoned_outputs
    from cuda_backend.attention.variant_backward_hopper import choose_backward

POLICY = 3  # gradients may err this many times as much as the same computation in the inputs' format
SAMPLED = 256  # rows at large shapes


def draw(seed: int, kind: str, *shape: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, kind))


def inputs(kind: str, sizes: tuple[int, ...]) -> list[Any]:
    """Return q, k, v and dO for (B, Tq, Tk, Hq, Hkv, D, Dv)."""
    B, Tq, Tk, Hq, Hkv, D, Dv = sizes
    shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, Hq, Dv)
    return [draw(Tq + i, kind, *shape) for i, shape in enumerate(shapes)]


def gradients(
    q: Any, k: Any, v: Any, do: Any, allowed: Any, statistics: Any, dtype: Any
) -> tuple[Any, Any, Any]:
    """Return dQ, dK and dV of one head by the formulas, in `dtype`, P and dS rounded to it.

    `statistics` are log-sum-exp and rowsum(dO O) of the queries; `allowed` says what they see.
    """
    scale = q.shape[-1] ** -0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse, delta = (x.to(wide)[:, None] for x in statistics)
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    p = torch.exp((q @ k.T).to(wide) * scale - lse)
    p = torch.where(allowed & ~torch.isneginf(lse), p, 0)
    ds = (p * ((do @ v.T).to(wide) - delta)).to(dtype)
    return (ds @ k) * scale, (ds.T @ q) * scale, p.to(dtype).T @ do


def judge(kind: str, sizes: tuple[int, ...], causal: Any, *, heads: int = 2, **options: Any) -> None:
    """Error at most three times the baseline's, in the maximum and in the mean, for some heads."""
    q, k, v, do = inputs(kind, sizes)
    out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
    with poisoned_outputs():
        dq, dk, dv, _ = flash_attention_vjp_hopper(q, k, v, out, lse, do, causal=causal, **options)
    B, Tq, Tk, Hq, Hkv, _, _ = sizes
    group, offset = Hq // Hkv, Tk - Tq if causal == "bottom_right" else 0
    rows, columns = torch.arange(Tq, device="cuda"), torch.arange(Tk, device="cuda")
    some_rows, some_columns = (
        x if len(x) <= 1024 else x[torch.randperm(len(x))[:SAMPLED].cuda()] for x in (rows, columns)
    )
    for index in range(0, B * Hkv, max(1, B * Hkv // heads)):
        b, g = divmod(index, Hkv)
        sums: dict[Any, list[Any]] = {torch.float64: [0, 0], q.dtype: [0, 0]}
        for h in range(g * group, (g + 1) * group):
            delta = (do[b, :, h].double() * out[b, :, h].double()).sum(-1)
            exact = {}
            for dtype in sums:
                for chosen, own in (((some_rows, columns), "dq"), ((rows, some_columns), "dkv")):
                    i, j = chosen
                    allowed = (
                        (j <= i[:, None] + offset)
                        if causal
                        else torch.ones(len(i), len(j), device="cuda").bool()
                    )
                    arrays = q[b, i, h], k[b, j, g], v[b, j, g], do[b, i, h]
                    found = gradients(*arrays, allowed, (lse[b, h, i], delta[i]), dtype)
                    if own == "dq":
                        exact[dtype] = found[0]
                    else:
                        sums[dtype] = [
                            total + x.double() for total, x in zip(sums[dtype], found[1:], strict=True)
                        ]
            compare("dq", dq[b, some_rows, h], exact[torch.float64], exact[q.dtype])
        for name, array, truth, baseline in zip(
            ("dk", "dv"), (dk, dv), sums[torch.float64], sums[q.dtype], strict=True
        ):
            compare(name, array[b, some_columns, g], truth, baseline.to(q.dtype))


def compare(name: str, found: Any, truth: Any, baseline: Any) -> None:
    error, allowed = (found.double() - truth).abs(), (baseline.double() - truth).abs()
    ulp = torch.finfo(found.dtype).eps * truth.abs().max() + 1e-6
    assert not found.isnan().any(), name
    assert error.max() <= POLICY * allowed.max() + ulp, name
    assert error.square().mean().sqrt() <= POLICY * allowed.square().mean().sqrt() + ulp / 10, name


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 127, 129, 1000, 4097])
@pytest.mark.parametrize("width", [64, 128])
def test_ragged_lengths(width: int, length: int, causal: Any, deterministic: bool) -> None:
    kind = "float16" if length % 2 else "bfloat16"
    judge(kind, (2, length, length, 2, 2, width, width), causal, deterministic=deterministic)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize(("tq", "tk"), [(65, 300), (300, 65), (1, 500), (1000, 1), (129, 4097), (513, 700)])
def test_unequal_lengths_and_grouped_heads(tq: int, tk: int, causal: Any) -> None:
    for width in (64, 128):
        judge("float16", (2, tq, tk, 8, 2, width, width), causal)
        judge("float16", (1, tq, tk, 4, 1, width, width), causal, deterministic=True)


@pytest.mark.parametrize("widths", [(8, 8), (40, 24), (80, 80), (96, 64), (60, 60), (33, 65), (100, 128)])
def test_widths(widths: tuple[int, int]) -> None:
    for causal in (False, "bottom_right"):
        judge("bfloat16", (1, 200, 333, 4, 2, *widths), causal)


WIDE = [(256, 256), (192, 128), (136, 200), (129, 60), (72, 250)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("widths", WIDE)
def test_wide_heads(widths: tuple[int, int], deterministic: bool) -> None:
    """Lengths that fill tiles and do not, grouped heads, both alignments; D and Dv unequal."""
    kind = "float16" if widths[0] % 16 == 0 else "bfloat16"
    for causal, lengths in (
        (False, [(1, 1), (65, 300), (1000, 1000)]),
        ("top_left", [(63, 63), (300, 65), (1000, 333)]),
        ("bottom_right", [(129, 1025), (513, 129), (1000, 1000)]),
    ):
        for tq, tk in lengths:
            judge(kind, (2, tq, tk, 4, 2, *widths), causal, deterministic=deterministic)


@pytest.mark.parametrize("widths", [(256, 256), (192, 128), (128, 128), (64, 64)])
def test_dropout(widths: tuple[int, int]) -> None:
    """Autograd in float64, weights dropped by the reference's Philox: another one dropped is seen."""
    from refimpl.random import dropout_keep

    dropout_p, seed = 0.3, 2**63 + 5
    B, Tq, Tk, Hq, Hkv = 2, 200, 330, 4, 2
    q, k, v, do = inputs("float16", (B, Tq, Tk, Hq, Hkv, *widths))
    kept = dropout_keep(seed, dropout_p, np.arange(B)[:, None], np.arange(Hq), np.arange(Tq), np.arange(Tk))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(Hq // Hkv, 2) for x in leaves[1:])
    scores = torch.einsum("bihd,bjhd->bhij", leaves[0], keys) * widths[0] ** -0.5
    weights = scores.softmax(-1) * torch.from_numpy(kept).cuda() / (1 - dropout_p)
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    truth = torch.autograd.grad(out, leaves, do.double())
    given = q, k, v, out.half(), scores.logsumexp(-1).float(), do
    for deterministic in (False, True):
        how: dict[str, Any] = {"dropout_p": dropout_p, "rng": seed, "deterministic": deterministic}
        found = flash_attention_vjp_hopper(*(x.detach() for x in given), **how)
        for x, exact in zip(found[:3], truth, strict=True):
            assert (x.double() - exact).abs().max() <= 4e-3 * exact.abs().max()


def repeats(dtype: str, sizes: tuple[int, ...], causal: bool) -> bool:
    """Return whether dK and dV repeat bit for bit, and dQ with the option; launches may follow each other.

    Without a mask the option sums dK and dV in an order of its own: its bits are not those of the fast ones.
    """
    q, k, v, do = inputs(dtype, sizes)
    out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
    given = q, k, v, out, lse, do
    first = flash_attention_vjp_hopper(*given, causal=causal, deterministic=True)
    first_fast = flash_attention_vjp_hopper(*given, causal=causal)
    alike = True
    for _ in range(20):
        same = flash_attention_vjp_hopper(*given, causal=causal, deterministic=True)
        fast = flash_attention_vjp_hopper(*given, causal=causal)
        alike &= all(torch.equal(x, y) for x, y in zip(first[:3], same[:3], strict=True))
        alike &= all(torch.equal(x, y) for x, y in zip(first_fast[1:3], fast[1:3], strict=True))
    return alike


@pytest.mark.parametrize("causal", [False, True])
def test_wide_heads_repeat(causal: bool) -> None:
    assert repeats("bfloat16", (2, 1000, 1000, 8, 2, 256, 256), causal)


@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("widths", [(256, 256), (192, 128)])
def test_wide_heads_at_large_shapes(widths: tuple[int, int], causal: Any) -> None:
    judge("float16", (4, 4096, 4096, 16, 16, *widths), causal)


@pytest.mark.parametrize("block_m", [64, 80])
def test_turned_dq(block_m: int) -> None:
    variant = choose_backward("f16", 128, 128, True)._replace(block_m=block_m, swapped=True)
    judge("float16", (2, 700, 1000, 4, 2, 128, 128), "bottom_right", variant=variant)


@pytest.mark.parametrize("d", [64, 128])
def test_early_dv(d: int) -> None:
    variant = choose_backward("f16", d, d, True)._replace(early_dv=True)
    judge("float16", (2, 700, 1000, 4, 2, d, d), "bottom_right", variant=variant)


@pytest.mark.parametrize(
    "sizes",
    [(1, 16384, 16384, 16, 16, 128, 128), (4, 4096, 4096, 32, 8, 128, 128), (8, 4096, 4096, 16, 16, 64, 64)],
)
@pytest.mark.parametrize("causal", [False, "top_left"])
def test_large_shapes(sizes: Any, causal: Any) -> None:
    judge("float16", sizes, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_repeats(causal: bool) -> None:
    assert repeats("float16", (2, 2000, 2000, 8, 2, 64, 64), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_strides_streams_and_graphs(causal: bool) -> None:
    """Without a mask the launch is cooperative: a graph takes that, too."""
    q, k, v, do = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs("float16", (2, 300, 300, 4, 4, 64, 64))
    )
    out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
    expected = flash_attention_vjp_hopper(q, k, v, out, lse, do, causal=causal, deterministic=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(do)
        torch.cuda._sleep(50_000_000)
        late.copy_(do)
        found = flash_attention_vjp_hopper(q, k, v, out, lse, late, causal=causal, deterministic=True)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(expected[:3], found[:3], strict=True))
    for capture in ({"stream": stream}, {}):  # PyTorch's own has not been seen before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, **capture):
            again, sums = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
            found = flash_attention_vjp_hopper(q, k, v, again, sums, do, causal=causal, deterministic=True)
        for _ in range(3):
            for x in (again, *found[:3]):
                x.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(again, out)
            assert all(torch.equal(x, y) for x, y in zip(expected[:3], found[:3], strict=True))


BESIDE = """
import torch
from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
x = torch.randn(2, 2048, 8, 128, device="cuda", dtype=torch.float16)
out, lse = flash_attention_hopper(x, x, x, return_lse=True)
streams = [torch.cuda.Stream() for _ in range(2)]
torch.cuda.synchronize()
for stream in streams * 100:
    with torch.cuda.stream(stream):
        flash_attention_vjp_hopper(x, x, x, out, lse, x, deterministic=True)
torch.cuda.synchronize()
"""


def test_calls_that_wait_for_later_blocks_end_beside_each_other() -> None:
    """A hang ends with its process."""
    subprocess.run([sys.executable, "-c", BESIDE], timeout=120, check=True)


def test_refusals_are_named() -> None:
    from cuda_backend import flash_attention_vjp
    from refimpl.errors import ShapeError, UnsupportedError

    x, lse = draw(1, "float16", 1, 16, 2, 64), torch.zeros(1, 2, 16, device="cuda")
    with pytest.raises(UnsupportedError, match="no softcap"):
        flash_attention_vjp(x, x, x, x, lse, x, softcap=1.0, tier="hopper")
    wide = draw(1, "float16", 1, 16, 2, 264)
    with pytest.raises(UnsupportedError, match="up to 256"):
        flash_attention_vjp_hopper(wide, wide, wide, wide, lse, wide)
    with pytest.raises(ShapeError, match="lse"):
        flash_attention_vjp_hopper(x, x, x, x, lse[:, :1], x)


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_tracks_pytorch(deterministic: bool) -> None:
    """Two hundred steps: as near to SDPA's curve as SDPA's own kernels are to each other, twice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from cuda_backend.torch_ops import attention

    def ours(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, causal="top_left", tier="hopper", deterministic=deterministic)

    how: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "steps": 200}
    how |= {"length": 256, "batch": 16, "heads": 4, "width": 64}
    curves = {"ours": losses(ours, **how)}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            curves[backend.name] = losses(sdpa, **how)
    smooth = {name: np.convolve(curve, np.ones(10) / 10, "valid") for name, curve in curves.items()}
    between = np.abs(smooth["FLASH_ATTENTION"] - smooth["MATH"]).max()
    assert smooth["MATH"][-1] < 0.7 * smooth["MATH"][0], "something is learned"
    assert np.abs(smooth["ours"] - smooth["MATH"]).max() <= 2 * between + 0.02


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # its own
def test_under_compile_on_the_gpu() -> None:
    from cuda_backend.torch_ops import attention

    def layer(q: Any, k: Any, v: Any) -> Any:
        return (
            attention(q * 2, k, v, causal="top_left", tier="hopper", deterministic=True)
            .float()
            .square()
            .sum()
        )

    first, second = (
        [x.requires_grad_() for x in inputs("bfloat16", (1, 200, 200, 4, 2, 64, 64))[:3]] for _ in range(2)
    )
    layer(*first).backward()
    torch.compile(layer, fullgraph=True)(*second).backward()
    for x, y in zip(first, second, strict=True):
        assert (x.grad.float() - y.grad.float()).abs().max() <= 0.02 * x.grad.float().abs().max()
