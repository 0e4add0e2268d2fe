"""The decoding kernel for tensor cores on a GPU: right, and in its place among the launches of a stream."""

from __future__ import annotations

from typing import Any

import pytest

import cuda_backend
from tests.cuda import decode_table

pytestmark = pytest.mark.cuda

STEPS, HEADS, KV_HEADS, WIDTH = 64, 8, 2, 128
HELD = 50_000_000  # cycles that the GPU is held up: launches queue meanwhile, and follow each other at once


@pytest.fixture(scope="module", autouse=True)
def _torch() -> None:
    """Skip where there is no GPU, none with tensor cores of its kind, or no PyTorch for it."""
    torch = pytest.importorskip("torch")
    reason = cuda_backend.availability("cuda")
    if reason or not torch.cuda.is_available():
        pytest.skip(reason or "PyTorch sees no GPU")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("tensor cores of compute capability 8.0 or higher")


@pytest.mark.parametrize("case", decode_table.CHECKS, ids=str)
def test_as_pytorch_in_float32(case: tuple[Any, ...]) -> None:
    good, words = decode_table.verdict(case)
    assert good, words


def _cache(keys: int) -> tuple[Any, Any, Any, Any]:
    """Return an empty cache and what a model writes to it step by step."""
    import torch

    generator = torch.Generator("cuda").manual_seed(keys)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float16)

    k, v = (torch.full((1, keys, KV_HEADS, WIDTH), torch.nan, device="cuda").half() for _ in range(2))
    return k, v, normal(STEPS, 2, 1, KV_HEADS, WIDTH), normal(STEPS, 1, 1, HEADS, WIDTH)


def _step(k: Any, v: Any, new: Any, q: Any, lengths: Any, keys: int) -> Any:
    """Write the newest key and value, then attend, as a model does; nothing waits."""
    k[:, keys - 1 : keys] = new[0]
    v[:, keys - 1 : keys] = new[1]
    if lengths is None:
        return cuda_backend.split_kv_attention(q, k[:, :keys], v[:, :keys], tier="ampere")
    lengths.fill_(keys)
    return cuda_backend.split_kv_attention(q, k, v, k_lengths=lengths, tier="ampere")


@pytest.mark.parametrize("given", [False, True])
def test_a_launch_sees_what_was_written_just_before(given: bool) -> None:
    """A launch that began before the write ended would read a NaN, or a key too few."""
    import torch

    lengths = torch.zeros(1, dtype=torch.int32, device="cuda") if given else None
    found = []
    for waits in (True, False):  # at first, too, each length is planned
        k, v, new, q = _cache(STEPS)
        torch.cuda.synchronize()
        if not waits:
            torch.cuda._sleep(HELD)  # type: ignore[no-untyped-call]
        outs = []
        for i in range(STEPS):
            outs.append(_step(k, v, new[i], q[i], lengths, i + 1))
            if waits:
                torch.cuda.synchronize()
        found.append(torch.stack(outs))
    assert torch.isfinite(found[0]).all()
    assert torch.equal(*found)


def test_launches_of_many_parts_follow_each_other() -> None:
    """Launch after launch uses the same counters, and memory that the one before has just left."""
    import torch

    k, v = (torch.randn(1, 8192, KV_HEADS, WIDTH, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(STEPS, 1, 1, HEADS, WIDTH, device="cuda", dtype=torch.float16)
    cuda_backend.split_kv_attention(q[0], k, v, splits=24, tier="ampere")  # compiles
    torch.cuda._sleep(HELD)  # type: ignore[no-untyped-call]
    found = [cuda_backend.split_kv_attention(x, k, v, splits=24, tier="ampere") for x in q]
    torch.cuda.synchronize()
    for x, out in zip(q, found, strict=True):
        alone = cuda_backend.split_kv_attention(x, k, v, splits=24, tier="ampere")
        torch.cuda.synchronize()
        assert torch.equal(out, alone)


def test_graphs() -> None:
    """A captured step, replayed, reads what was written between."""
    import torch

    k, v, new, q = _cache(4096)
    k.normal_()
    v.normal_()
    torch.cuda.synchronize()  # another stream goes on
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        _step(k, v, new[0], q[0], None, 4096)  # compiles
        stream.synchronize()
        entry, query = new[1].clone(), q[1].clone()
        for capture in ({"stream": stream}, {}):  # PyTorch's own has not been seen before
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, **capture):
                out = _step(k, v, entry, query, None, 4096)
            for i in (2, 3):
                entry.copy_(new[i])
                query.copy_(q[i])
                graph.replay()
                stream.synchronize()
                assert torch.equal(out, _step(k, v, new[i], q[i], None, 4096))
