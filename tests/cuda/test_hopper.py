"""Hopper kernels on a GPU: against float64, outputs poisoned, over ragged shapes, masks, heads and widths."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.cuda

if os.environ.get("FRUGAL_TEST_GPU") == "1":
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU", allow_module_level=True)
    from cuda_backend.arrays import poisoned_outputs
    from cuda_backend.attention.call_hopper import flash_attention_hopper

DROPPED = 0.3, 2**63 + 5  # probability and seed
LENGTHS = (1, 17, 63, 64, 65, 127, 129, 1000, 4097)


def reference(q: Any, k: Any, v: Any, causal: str | bool, dtype: Any) -> tuple[Any, Any]:
    """Attention by definition in PyTorch, in `dtype`; a row without keys is 0, its log-sum-exp -inf."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        tq, tk = scores.shape[-2:]
        offset = tk - tq if causal == "bottom_right" else 0
        allowed = torch.arange(tk, device="cuda") <= torch.arange(tq, device="cuda")[:, None] + offset
        scores = scores.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(scores.double(), -1)
    weights = torch.softmax(scores, -1)
    weights = torch.where(torch.isneginf(lse)[..., None], torch.zeros_like(weights), weights)
    return (weights @ v).transpose(1, 2), lse


def draw(seed: int, kind: str, *shape: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, kind))


def judge(q: Any, k: Any, v: Any, causal: str | bool) -> None:
    """Error at most twice the baseline's, in the maximum and in the mean; two runs agree bit for bit."""
    with poisoned_outputs():
        out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
    again = flash_attention_hopper(q, k, v, causal=causal)
    assert torch.equal(out, again)
    exact, exact_lse = reference(q, k, v, causal, torch.float64)
    baseline, _ = reference(q, k, v, causal, q.dtype)
    error, allowed = (out.double() - exact).abs(), (baseline.double() - exact).abs()
    ulp = torch.finfo(q.dtype).eps * exact.abs().max()
    assert not out.isnan().any()
    assert error.max() <= 2 * allowed.max() + ulp
    assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + ulp / 10
    seen = ~torch.isneginf(exact_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert ((lse.double() - exact_lse)[seen].abs() <= 1e-5 * (1 + exact_lse[seen].abs())).all()


@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [64, 128])
def test_ragged_lengths(width: int, length: int, causal: str | bool) -> None:
    kind = "float16" if length % 2 else "bfloat16"
    judge(*(draw(length + i, kind, 2, length, 2, width) for i in range(3)), causal)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize(("tq", "tk"), [(65, 300), (300, 65), (1, 500), (1000, 1), (129, 4097), (513, 700)])
def test_unequal_lengths_and_grouped_heads(tq: int, tk: int, causal: str | bool) -> None:
    for width in (64, 128):
        q, k, v = draw(1, "float16", 1, tq, 4, width), *(draw(i, "float16", 1, tk, 2, width) for i in (2, 3))
        judge(q, k, v, causal)


@pytest.mark.parametrize(
    ("width", "value_width"),
    [(8, 8), (40, 40), (80, 80), (96, 64), (192, 128), (256, 256), (1, 1), (60, 60), (33, 65), (100, 255)],
)
def test_widths(width: int, value_width: int) -> None:
    for causal in (False, "top_left"):
        q, k = (draw(i, "bfloat16", 2, 333, 2, width) for i in (1, 2))
        judge(q, k, draw(3, "bfloat16", 2, 333, 2, value_width), causal)


@pytest.mark.parametrize("length", [64, 129, 191, 193, 1000])
@pytest.mark.parametrize("consumers", [2, 3])
def test_both_tiles_of_heads_of_64(consumers: int, length: int) -> None:
    """`choose` takes one or the other by the number of tiles."""
    from cuda_backend.arrays import view
    from cuda_backend.attention.call_hopper import launch_hopper
    from cuda_backend.attention.variant_hopper import choose

    q, k, v = (draw(i, "float16", 2, length, 3, 64) for i in range(3))
    for causal in (False, "top_left", "bottom_right"):
        variant = choose("f16", 64, 64, bool(causal))._replace(consumers=consumers)
        out = torch.full_like(q, float("nan"))
        arrays = [view("x", x, 0) for x in (q, k, v, out)]
        launch_hopper(*arrays, None, causal=causal, scale=None, stream=0, variant=variant)
        exact, _ = reference(q, k, v, causal, torch.float64)
        assert (out.double() - exact).abs().max() < 4e-3


def test_strides_are_read_where_they_lie() -> None:
    q, k, v = (draw(i, "float16", 2, 8, 300, 64).transpose(1, 2) for i in range(3))
    judge(q, k[:, :, ::4], v[:, :, ::4], "top_left")


def test_new_arrays_at_old_addresses_and_many_at_once() -> None:
    """More sets of descriptors than the cache keeps, without a synchronisation between launches."""
    whole = draw(1, "float16", 3, 600, 128, 1, 64)
    outs = [flash_attention_hopper(*(whole[i, n : n + 1] for i in range(3))) for n in range(600)]
    exact, _ = reference(*(whole[i] for i in range(3)), False, torch.float64)
    assert (torch.cat(outs).double() - exact).abs().max() < 2e-3


def test_refusals_are_named() -> None:
    from refimpl.errors import OptionError, UnsupportedError

    x, short = draw(1, "float16", 1, 16, 2, 64), draw(2, "float16", 1, 8, 2, 64)
    with pytest.raises(OptionError, match="say 'top_left' or 'bottom_right'"):
        flash_attention_hopper(x, short, short, causal=True)
    with pytest.raises(UnsupportedError, match="up to 256"):
        flash_attention_hopper(*[draw(3, "float16", 1, 16, 2, 264)] * 3)
    with pytest.raises(UnsupportedError, match="has strides"):
        flash_attention_hopper(*[draw(3, "float16", 1, 16, 4, 62)[:, ::2]] * 3)
    with pytest.raises(UnsupportedError, match="no softcap"):
        flash_attention_hopper(x, x, x, softcap=30.0)
    with pytest.raises(UnsupportedError, match="float16 or bfloat16"):
        flash_attention_hopper(x.float(), x.float(), x.float())
    with pytest.raises(UnsupportedError, match="positive"):
        flash_attention_hopper(x, x, x, scale=-1.0)


def test_numpy_goes_there_and_back() -> None:
    x = np.random.default_rng(0).standard_normal((1, 70, 2, 64)).astype(np.float16)
    out = flash_attention_hopper(x, x, x, causal=True)
    exact, _ = reference(*(torch.from_numpy(x).cuda() for _ in range(3)), "top_left", torch.float64)
    assert isinstance(out, np.ndarray)
    assert np.abs(out - exact.cpu().numpy()).max() < 4e-3


def test_rows_that_the_copy_engine_reads_where_they_lie() -> None:
    """60 of 64 columns: the width is odd, the strides are not, and what lies between is not read."""
    whole = [draw(i, "float16", 2, 300, 2, 64) for i in range(3)]
    for x in whole:
        x[..., 60:] = float("nan")
    judge(*(x[..., :60] for x in whole), "top_left")


def test_the_tier_is_chosen_and_only_auto_falls_back() -> None:
    from cuda_backend import flash_attention, flash_attention_vjp
    from cuda_backend.attention.tiers import warn_slow
    from refimpl.errors import OptionError, SlowPathWarning, UnsupportedError

    x = draw(1, "float16", 1, 100, 2, 64)
    assert torch.equal(flash_attention(x, x, x, tier="auto"), flash_attention_hopper(x, x, x))
    assert torch.equal(flash_attention(x, x, x, tier="hopper"), flash_attention_hopper(x, x, x))
    single = x.float()
    assert torch.equal(
        flash_attention(single, single, single, tier="auto"), flash_attention(single, single, single)
    )
    with pytest.raises(UnsupportedError, match="no softcap; tier='portable'"):
        flash_attention(x, x, x, tier="hopper", softcap=30.0)
    warn_slow.cache_clear()
    out, lse = flash_attention(x, x, x, softcap=30.0, return_lse=True)
    with pytest.warns(SlowPathWarning, match="no softcap; the portable kernels run"):
        assert torch.equal(flash_attention(x, x, x, tier="auto", softcap=30.0), out)
    portable = flash_attention_vjp(x, x, x, out, lse, x, softcap=30.0)
    found = flash_attention_vjp(x, x, x, out, lse, x, softcap=30.0, tier="auto")  # the warning came already
    assert all(torch.equal(a, b) for a, b in zip(found[:3], portable[:3], strict=True))
    one, other = (
        flash_attention_vjp(x, x, x, *flash_attention(x, x, x, return_lse=True, tier=t), x, tier=t)
        for t in ("auto", "hopper")
    )
    assert torch.equal(one.dk, other.dk)
    with pytest.raises(OptionError, match="tier"):
        flash_attention(x, x, x, tier="fast")


def test_graphs_replay_side_by_side() -> None:
    """Each captured launch has its own arguments and its own tile counter."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    x = [[draw(10 * n + i, "float16", 2, 1000, 8, 128) for i in range(3)] for n in range(2)]
    expected = [flash_attention_hopper(*arrays, causal=True) for arrays in x]
    capture = torch.cuda.Stream()
    graphs, outs = [], []
    with torch.cuda.stream(capture):
        flash_attention_hopper(*x[0], causal=True)
        torch.cuda.synchronize()
        for arrays in x:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=capture):
                outs.append(flash_attention_hopper(*arrays, causal=True))
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        flash_attention_hopper(*x[0], causal=True)
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out, want in zip(outs, expected, strict=True))


def test_launches_behind_each_other_do_not_overtake() -> None:
    """The next launch begins early: it must still wait for what the one before it writes, and reads."""
    x = draw(1, "float16", 1, 2048, 32, 64)
    once = flash_attention_hopper(x, x, x)
    twice = flash_attention_hopper(once, once, once)
    for _ in range(50):
        first = flash_attention_hopper(x, x, x)
        assert torch.equal(flash_attention_hopper(first, first, first), twice)


@pytest.mark.parametrize("causal", [False, "bottom_right"])
@pytest.mark.parametrize("width", [64, 128, 200])
def test_dropout_drops_what_the_reference_drops(width: int, causal: Any) -> None:
    """Values that are rows of the identity show each weight: kept ones are as they should be, others 0."""
    from refimpl.random import dropout_keep

    dropout_p, seed = DROPPED
    B, Tq, Tk, Hq, Hkv = 2, 150, 250, 4, 2
    q, k = draw(1, "float16", B, Tq, Hq, width), draw(2, "float16", B, Tk, Hkv, width)
    v = torch.eye(Tk, device="cuda").half()[None, :, None].expand(B, Tk, Hkv, Tk).contiguous()
    how: dict[str, Any] = {"causal": causal, "return_lse": True}
    out, lse = flash_attention_hopper(q, k, v, dropout_p=dropout_p, rng=seed, **how)
    exact, exact_lse = reference(q, k, v, causal, torch.float64)
    heads, batches = np.arange(Hq), np.arange(B)[:, None]
    kept = dropout_keep(seed, dropout_p, batches, heads, np.arange(Tq), np.arange(Tk))
    exact = exact * torch.from_numpy(kept).cuda().transpose(1, 2) / (1 - dropout_p)
    large = exact > 1e-4
    assert (out[exact == 0] == 0).all()
    assert (out[large] > 0).all()
    assert (out.double() - exact).abs().max() <= 2e-3 * exact.abs().max()
    assert (lse.double() - exact_lse).abs().max() <= 1e-4
    again = flash_attention_hopper(q, k, v, dropout_p=dropout_p, rng=seed, **how)
    assert torch.equal(out, again[0])
