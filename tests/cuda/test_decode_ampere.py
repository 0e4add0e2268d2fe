"""The decoding kernel for tensor cores, played without a GPU: against its record, its plan, its mistakes."""

from __future__ import annotations

import inspect
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend import arrays as gpu_arrays
from cuda_backend._numba import cuda
from cuda_backend.arrays import View, contiguous
from cuda_backend.attention import (
    decode,
    decode_ampere,
    decode_call_ampere,
    decode_loader_ampere,
    decode_merge_ampere,
    decode_step_ampere,
    decode_variant_ampere,
)
from cuda_backend.attention.decode_variant_ampere import MOST_PARTS, choose, parts
from cuda_backend.int8 import launches_hopper
from cuda_backend.launch import simulation
from refimpl.attention import split_kv_attention
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.registry import Case
from tests.cuda.decode_played import SWITCH, play, player
from tests.cuda.judge import arrays, difference

pytestmark = pytest.mark.cudasim

NARROW = ("float16", "bfloat16")
LIMITS = {"A100": 166_912, "H200": 232_448, "RTX 4090": 101_376, "T4-like": 65_536}


def whole(shape: tuple[int, ...], dtype: str, **options: Any) -> Case:
    """Return a call with a whole cache, rounded to `dtype`: (B, Tq, Tk, Hq, Hkv, D, Dv)."""
    q, k, v = arrays(shape, dtype, seed=sum(shape))
    return Case((q, k, v), {"return_lse": True, **options})


def paged(shape: tuple[int, ...], dtype: str, page: int, lengths: list[int], **options: Any) -> Case:
    """Return a call with the pages of such a cache out of order; what no key needs is 0."""
    q, k, v = arrays(shape, dtype, seed=sum(shape))
    B, count = k.shape[0], k.shape[1] // page
    order = np.random.default_rng(0).permutation(B * count + 2)[: B * count].reshape(B, count)
    pages = []
    for x in (k, v):
        lying = np.full((B * count + 2, page, *x.shape[2:]), 0, x.dtype)
        lying[order] = x.reshape(B, count, page, *x.shape[2:])
        for b, length in enumerate(lengths):
            inside = np.arange(count * page).reshape(count, page) < length
            lying[order[b]] *= inside[..., None, None].astype(x.dtype)
        pages.append(lying)
    needed = np.arange(count) * page < np.array(lengths)[:, None]
    table = np.where(needed, order, -1)
    return Case((q, *pages, table), {"return_lse": True, "k_lengths": np.array(lengths), **options})


def unread(played: Any) -> Any:
    """Return the kernel with NaN wherever a cache is 0: the reference multiplies what lies there by 0."""

    def attention(q: Any, k: Any, v: Any, *table: Any, **options: Any) -> Any:
        return played(q, *(np.where(x == 0, x.dtype.type(np.nan), x) for x in (k, v)), *table, **options)

    return attention


@pytest.mark.parametrize(
    ("shape", "options", "fields"),
    [
        ((1, 1, 90, 2, 1, 32, 32), {}, {"warps": 4}),  # more turns than stages, the last one ragged
        ((1, 1, 40, 4, 2, 32, 16), {"splits": 3}, {}),  # three parts of one turn
        ((2, 2, 70, 4, 1, 16, 48), {"splits": 2, "k_lengths": np.array([33, 0])}, {"keys": 32, "stages": 2}),
        ((1, 3, 70, 4, 1, 32, 16), {"splits": 2, "k_lengths": np.array([61])}, {"rows": 16, "keys": 32}),
        ((1, 3, 130, 6, 1, 16, 16), {"scale": -0.5}, {"keys": 32, "stages": 4}),  # three tiles of rows
        # Parts that differ by a turn.
        ((1, 1, 75, 2, 1, 64, 64), {"splits": 2}, {"keys": 32, "early": True, "hinted": 1}),
        ((1, 1, 16 * 34, 1, 1, 16, 16), {"splits": 34}, {"warps": 1}),  # more parts than a warp has lanes
        ((1, 5, 3, 2, 2, 16, 16), {"splits": 2}, {}),  # queries that see no key, parts without a turn
    ],
)
def test_whole_caches(
    shape: Any, options: dict[str, Any], fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = player(monkeypatch, late=shape[2] != 70, **fields)
    dtype = NARROW[shape[2] % 2]
    assert difference(played, whole(shape, dtype, **options), dtype, technique="attention.split_kv") is None


@pytest.mark.parametrize(
    ("page", "lengths", "splits", "fields"),
    [
        (16, [80, 3], 1, {"early": True}),
        (48, [95, 0], 2, {"keys": 32}),  # a turn lies in two pages
    ],
)
def test_pages(
    page: int, lengths: list[int], splits: int, fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = paged((2, 2, 96, 4, 2, 16, 16), "float16", page, lengths, splits=splits)
    played = unread(player(monkeypatch, **fields))
    assert difference(played, case, "float16", technique="attention.paged") is None


def test_strided_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V side by side in one array, as they come out of one product, and queries among others."""
    q, k, v = arrays((1, 1, 33, 4, 2, 16, 16), "float16")
    both, queries = np.concatenate([k, v], axis=3), np.concatenate([q, q], axis=2)
    played = player(monkeypatch)
    found = played(queries[:, :, 4:], both[..., :16], both[..., 16:])
    assert np.array_equal(found, played(q, k, v))


def test_what_lies_behind_a_length_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays((2, 1, 48, 2, 1, 16, 16), "float16")
    lengths = np.array([17, 40], np.int32)
    played = player(monkeypatch)
    expected = played(q, k, v, k_lengths=lengths, splits=2)
    for x in (k, v):
        x[0, 17:] = x[1, 40:] = np.nan
    assert np.array_equal(played(q, k, v, k_lengths=lengths, splits=2), expected)


class Device:
    """What stands for a GPU: the driver's launch is the played kernel, device memory is the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counters, self.launches = np.zeros(1 << 12, np.int32), []  # type: ignore[var-annotated]
        device = self

        class Launch:
            def __init__(self, variant: Any, addresses: int, numbers: Any, **grid: Any) -> None:
                assert addresses == decode_ampere.ADDRESSES
                self.variant, self.numbers, self.grid = variant, numbers, grid

            def __call__(self, stream: int, *addresses: int) -> None:
                device.launches.append((stream, self.grid))
                kernel = cuda.jit(decode_ampere.build(self.variant))
                with simulation():
                    sys.setswitchinterval(SWITCH)
                    kernel[self.grid["blocks"], self.grid["threads"], 0, self.grid["shared_bytes"]](
                        *map(np.uint64, addresses), *map(np.int32, self.numbers)
                    )

        play(monkeypatch)
        counters = SimpleNamespace(address=lambda: self.counters.ctypes.data)
        for module, name, value in (
            (launches_hopper, "Launch", Launch),
            (decode_call_ampere, "SIMULATOR", False),
            (decode_call_ampere, "_capability", lambda _: (8, 6)),
            # -1 is where PyTorch says that the host's memory is.
            (decode_call_ampere, "current_device", lambda: -1),
            (gpu_arrays, "current_device", lambda: -1),
            (decode_call_ampere, "torch_stream", lambda _: 7),
            (decode_call_ampere, "shared_memory_bytes", lambda: LIMITS["RTX 4090"]),
            (decode_call_ampere, "tile_counters", lambda *_: counters),
            (decode_call_ampere, "_function", lambda variant, _: variant),
        ):
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(cuda, "get_current_device", lambda: SimpleNamespace(MULTIPROCESSOR_COUNT=4))
        decode_call_ampere.make_plan.cache_clear()


def test_tensors_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    device = Device(monkeypatch)
    q, k, v = (torch.from_numpy(x) for x in arrays((2, 1, 64, 2, 1, 16, 32), "float16"))
    lengths = torch.tensor([61, 21])
    monkeypatch.setattr(decode_variant_ampere, "LEAST_KEYS", 32)
    expected: Any = split_kv_attention(
        *(x.numpy() for x in (q, k, v)), k_lengths=lengths.numpy(), return_lse=True
    )
    found = cuda_backend.split_kv_attention(q, k, v, k_lengths=lengths, return_lse=True)
    stream, grid = device.launches[0]
    assert (stream, grid["blocks"], grid["early"]) == (7, 4, False)  # two parts of two key heads
    assert np.abs(found.out.float().numpy() - expected.out.astype(np.float32)).max() < 2e-3
    assert np.abs(found.lse.numpy() - expected.lse).max() < 1e-3
    pages = [x.reshape(8, 16, *x.shape[2:]) for x in (k, v)]
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    paged_out = cuda_backend.paged_attention(q, *pages, table, k_lengths=lengths - 20, splits=1)
    expected_out: Any = split_kv_attention(*(x.numpy() for x in (q, k, v)), k_lengths=lengths.numpy() - 20)
    assert paged_out.dtype == torch.float16
    assert np.abs(paged_out.float().numpy() - expected_out.astype(np.float32)).max() < 2e-3
    assert not device.counters.any()
    decode_call_ampere.make_plan.cache_clear()


def _layout(shape: tuple[int, ...], dtype: str = "float16", strides: Any = None) -> Any:
    size = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8, "float64": 8}[dtype]
    return View(shape, strides or contiguous(shape, size), dtype, 0, None).layout


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"q": _layout((2, 1, 4, 24)), "k": _layout((2, 99, 2, 24))}, UnsupportedError, "D is 24"),
        ({name: _layout((2, 9, 2, 16), "float32") for name in "qkv"}, UnsupportedError, "are float32"),
        ({"k": _layout((2, 99, 2, 16), "bfloat16")}, DTypeError, "bfloat16, float16"),
        ({"v": _layout((2, 98, 2, 16))}, ShapeError, "Tk"),
        ({"k": _layout((2, 99, 2, 16), strides=(6344, 72, 32, 2))}, UnsupportedError, "multiples of 16"),
        ({"k_lengths": _layout((2,), "float64")}, UnsupportedError, "k_lengths is float64"),
        ({"k_lengths": _layout((3,), "int64")}, ShapeError, "k_lengths"),
        ({"splits": MOST_PARTS + 1}, UnsupportedError, "up to 256"),
        ({"splits": 0}, OptionError, "splits"),
        ({"k": _layout((2, 0, 2, 16)), "v": _layout((2, 0, 2, 16))}, UnsupportedError, "empty"),
        (
            {"table": _layout((2, 3), "int32"), "k_lengths": _layout((2,), "int32")},
            UnsupportedError,
            "pages have 99 keys",
        ),
    ],
)
def test_refusals(changed: dict[str, Any], error: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    plain = {
        "q": _layout((2, 1, 4, 16)), "k": _layout((2, 99, 2, 16)), "v": _layout((2, 99, 2, 16)),
        "table": None, "k_lengths": None, "splits": None,
    } | changed  # fmt: skip
    with pytest.raises(error, match=words):
        decode_call_ampere.make_plan("decode", *plain.values(), None, 0)


def test_a_tier_that_is_not_there() -> None:
    x = np.zeros((1, 1, 1, 16), np.float16)
    with pytest.raises(UnsupportedError, match="tensor cores, which the simulator has not; tier='portable'"):
        cuda_backend.split_kv_attention(x, x, x, tier="ampere")
    with pytest.raises(OptionError, match="expected one of portable, ampere, auto"):
        cuda_backend.split_kv_attention(x, x, x, tier="hopper")
    assert cuda_backend.split_kv_attention(x, x, x).shape == x.shape


def test_auto_takes_what_the_kernel_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    x, wide = np.zeros((1, 16, 1, 32), np.float16), np.zeros((1, 16, 1, 272), np.float16)
    table = np.zeros((1, 1), np.int64)
    assert decode._is_for_tensor_cores(x, x, x, None)
    assert decode._is_for_tensor_cores(x, x, x, table)
    for q, k, v, pages in (
        (x.astype(np.float32), x, x, None), (x[..., :8], x[..., :8], x, None), (wide, wide, x, None),
        (x, x[:, :8], x[:, :8], table), (x, x[:, :0], x[:, :0], None), (x, x, x, table[:, :0]),
        (x[0], x, x, None),
    ):  # fmt: skip
        assert not decode._is_for_tensor_cores(q, k, v, pages)


@pytest.mark.parametrize("memory", sorted(LIMITS))
@pytest.mark.parametrize("widths", [(16, 16), (64, 64), (96, 80), (128, 128), (192, 128), (256, 256)])
def test_shared_memory_suffices(memory: str, widths: tuple[int, int]) -> None:
    """Everything fits as often as it is to run on a multiprocessor, and a stage is under way at least."""
    for rows, in_pages in itertools.product((1, 4, 16), (False, True)):
        found = choose("f16", *widths, rows, in_pages, LIMITS[memory])
        assert found.blocks * (found.shared_bytes + 1024) <= LIMITS[memory] + 1024
        assert found.stages >= 2
        assert all(pitch // 16 % 2 for pitch in found.pitches)  # eight rows in all banks
        # Little's law: 4.3 TB/s and a microsecond are 33 KB for each of 132 multiprocessors.
        if memory == "H200" and widths[0] >= 64:
            flying = found.blocks * found.warps * (found.stages - 1) * found.keys * 2 * sum(widths)
            assert flying >= 64 << 10


def test_parts_fill_the_gpu() -> None:
    for units, keys in ((8, 32768), (128, 32768), (8, 131072), (1, 10_000), (7, 50_000), (300, 65536)):
        count = parts(units, keys, 132)
        assert 1 <= count <= MOST_PARTS
        blocks = units * count
        assert blocks / (-(-blocks // 132) * 132) >= 0.95 or count * 256 >= keys
    assert parts(8, 100, 132) == 1


# Mistakes: what stands in the source of the kernel, and what is put in its place.
MISTAKES = {
    "a barrier of the warp is missing": (decode_ampere, "            barrier.warp()", "            pass"),
    "one stage too many under way": (decode_ampere, "wait(STAGES - 2)", "wait(STAGES - 1)"),
    "copies into the stage that is read": (decode_ampere, "free * STAGE", "slot * STAGE"),
    "the first query sees all keys": (decode_ampere, "keys - queries + 1", "keys"),
    "a mask too late": (decode_ampere, "unseen + registers.quotient(int32(tile * ROWS), group)", "keys"),
    "rows of the first tile": (decode_ampere, "int32(tile * ROWS + (lane >> 2))", "int32(lane >> 2)"),
    "heads and queries exchanged": (decode_ampere, "head + of_row - i * group) * uint64(q_head)",
                                    "head + i) * uint64(q_head)"),
    "parts that overlap": (decode_ampere, "int32(begin + size + ", "int32(begin + size + 1 + "),
    "a turn that no part has": (decode_ampere, "part < longer), int32(1)", "part < longer), int32(0)"),
    "keys before the wait": (decode_ampere, "            grid.wait_for_earlier_grids()\n", ""),
    "a turn of the next warp": (decode_ampere, "turn, slot, free = int32(begin + warp)",
                                "turn, slot, free = int32(begin + (warp ^ 1))"),
    "the first block merges": (decode_ampere, "!= parts - 1", "!= 0"),
    "keys behind the end": (decode_loader_ampere, "int32(row < there), int32(16), int32(0)",
                            "int32(row < there), int32(16), int32(16)"),
    "columns without their bytes": (decode_loader_ampere, "int32(16 * (lane & mask))", "int32(lane & mask)"),
    "no rescaling": (decode_step_ampere, "*= factors[2 * c + (i & 1)]", "*= float32(1.0)"),
    "factors of the other query": (decode_step_ampere, "factors[2 * c + (i & 1)]",
                                   "factors[2 * c + 1 - (i & 1)]"),
    "maxima of some lanes": (decode_step_ampere, "range(3)", "range(2)"),
    "blocks of K exchanged": (decode_step_ampere, "(lane & 15) * PITCH_K + 16 * (lane >> 4)",
                              "((lane & 7) + 8 * (lane >> 4)) * PITCH_K + 16 * ((lane >> 3) & 1)"),
    "blocks of V as of K": (decode_step_ampere, "(lane & 7) + 8 * (lane >> 4)", "(lane & 15)"),
    "weights not turned": (decode_step_ampere, "matrix_load.turn_block(word)", "word"),
    "sums of one warp": (decode_merge_ampere, "total += weight * copy", "total = weight * copy"),
    "parts alike": (decode_merge_ampere, "registers.exp2(weights[i] - lowest)", "float32(1.0)"),
    "the last part again": (decode_merge_ampere, "int32(first + i < parts)", "int32(1)"),
    "weights of some lanes": (decode_merge_ampere, "range(5)", "range(4)"),
    "an earlier batch again": (decode_ampere, "own_row, column, int32(first)", "own_row, column, int32(0)"),
    "log-sum-exps to base 2": (decode_merge_ampere, "lse2 * float32(LN_2)", "lse2"),
}  # fmt: skip


def _changed(mistake: str) -> Any:
    """Return the kernel with a mistake in it, or none."""
    space = dict(vars(decode_ampere))
    if mistake:
        module, right, wrong = MISTAKES[mistake]
        text = inspect.getsource(module)
        assert right in text
        names = {"__name__": "changed"}
        exec(compile(text.replace(right, wrong), str(module.__file__), "exec"), names)
        made = {name: names[name] for name in module.__all__ if name.startswith("build")}
        if module is decode_ampere:
            return made["build"]
        space |= made
    found: dict[str, Any] = {}
    exec(compile(inspect.getsource(decode_ampere.build), decode_ampere.__file__, "exec"), space, found)
    return found["build"]


@pytest.mark.parametrize("mistake", ["", *MISTAKES])
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of three heads: two tiles of rows, or one.
    queries = 3 if mistake in ("rows of the first tile", "a mask too late") else 2
    q, k, v = arrays((1, queries, 75, 3, 1, 16, 16), "float16")  # five turns
    k[:, 50:] *= 3  # maxima grow
    k[:, 65:] = v[:, 65:] = 0  # the first query sees no key of the last turn, and not all before it
    case = Case((q, k, v), {"return_lse": True, "splits": 2, "k_lengths": np.array([65])})
    fields: dict[str, Any] = {"stages": 2, "early": True, "hinted": 1}
    if mistake == "an earlier batch again":
        case = Case(case.args, {**case.kwargs, "splits": 3})
        for module in (decode_ampere, decode_merge_ampere):
            monkeypatch.setattr(module, "AT_ONCE", 2)
    elif mistake == "weights of some lanes":
        case = whole((1, 1, 16 * 18, 1, 1, 16, 16), "float16", splits=18)
        fields["warps"] = 1
    played = unread(player(monkeypatch, build=_changed(mistake), **fields))
    try:
        found = difference(played, case, "float16", technique="attention.split_kv")
    except AssertionError as error:
        found = str(error)
    assert (found is None) == (not mistake)
