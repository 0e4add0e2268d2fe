"""Int8 layers under capture on a stream that has not seen them: nothing but their kernels is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cuda_backend import capture
from cuda_backend.int8 import call_hopper, descriptors_hopper, linear_hopper
from cuda_backend.int8.memory_hopper import Shared
from cuda_backend.int8.plan_hopper import linear_plan, rows_plan
from refimpl import quant
from refimpl.errors import UnsupportedError
from tests.cuda.capturing_driver import FULL, GLOBAL, CapturingDriver, Work, captures, encoder, forget
from tests.cuda.int8_hopper_played import aligned, at

WARM, CAPTURED = 5, 7  # streams
FORMS = {
    (2, 136, 40): ["layer_few"], (20, 136, 130): ["quantize", "narrow"],
    (300, 72, 4300): ["quantize", "product"],
}  # fmt: skip


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[CapturingDriver]:
    yield captures(monkeypatch)
    forget()


class Layer:
    """A layer of T rows, K features and N outputs, whose input and output stay where they are."""

    def __init__(self, T: int, K: int, N: int) -> None:
        self.rng = np.random.default_rng(T)
        self.weight = (self.rng.standard_normal((K, N)) / 16).astype(np.float16)
        codes, absmax = quant.quantize_columns(self.weight)
        self.x, self.out = aligned((T, K), np.float16), aligned((T, N), np.float16)
        pitch = -(-K // 16) * 16
        self.codes, self.absmax = aligned((N, pitch), np.int8), aligned((N,), np.float32)
        self.codes[:, :K], self.absmax[...] = codes.T, absmax
        self.layouts = (
            ((T, K), (2 * K, 2), "float16", None), ((K, N), (1, pitch), "int8", None), None,
            ((N,), (4,), "float32", None), None,
        )  # fmt: skip

    def draw(self, outliers: int) -> None:
        """Change the input, with as many columns of outliers."""
        self.x[...] = self.rng.standard_normal(self.x.shape).clip(-5, 5)
        self.x[:, :outliers] = 9.5

    def run(self, stream: int) -> None:
        self.out[...] = np.nan
        plan = linear_plan(*self.layouts, 6.0, "released", stream, 0)
        x, codes, absmax, out = (each.ctypes.data for each in (self.x, self.codes, self.absmax, self.out))
        plan.run(x, codes, absmax, 0, 0, out)

    def difference(self) -> float:
        """Return the distance of the output from the layer in floating point, and its share of the latter."""
        exact = self.x.astype(np.float64) @ self.weight
        return float(np.linalg.norm(self.out - exact) / np.linalg.norm(exact))


def replay(graph: list[Work]) -> None:
    for _, work in graph:
        work()


@pytest.mark.parametrize("sizes", FORMS)
def test_a_graph_follows_its_input(driver: CapturingDriver, sizes: Any, monkeypatch: Any) -> None:
    """Outliers and their number change between replays, and calls on both streams make room for others."""
    monkeypatch.setattr(descriptors_hopper, "SETS", 2)
    layer, other = Layer(*sizes), Layer(33, 64, 48)
    for each in (layer, other):
        each.draw(2)
        each.run(WARM)
    with driver.capture(CAPTURED) as graph:
        layer.run(CAPTURED)
    assert [name for name, _ in graph] == FORMS[sizes]
    for outliers in (0, 3, 40, 0):
        layer.draw(outliers)
        layer.run(WARM)
        assert layer.difference() < 0.03
        expected = layer.out.copy()
        for _ in range(2):
            layer.out[...] = np.nan
            replay(graph)
            assert np.array_equal(layer.out, expected)
        for each, stream in ((layer, CAPTURED), (other, CAPTURED), (other, WARM)):
            each.draw(1)
            each.run(stream)
            assert each.difference() < 0.03
            other = Layer(33, 64, 48 + stream + outliers)
            other.draw(outliers)
            other.run(stream)


def test_graphs_of_one_stream_replayed_in_turn(driver: CapturingDriver) -> None:
    """A later one asks for more memory than there was; the first keeps what it has."""
    layers = [Layer(20, 64, 130), Layer(300, 72, 4300), Layer(20, 64, 130)]
    graphs = []
    for layer in layers:
        with driver.capture(CAPTURED) as graph:
            layer.run(CAPTURED)
        graphs.append(graph)
    for outliers in (3, 0):
        for layer, graph in zip(layers, graphs, strict=True):
            layer.draw(outliers)
            layer.out[...] = np.nan
            replay(graph)
            assert layer.difference() < 0.03


@pytest.mark.parametrize("beside", ["a call on the same stream", "a graph of another stream"])
def test_what_may_run_beside_a_graph(driver: CapturingDriver, beside: str) -> None:
    """Between any two of its kernels."""
    layer, other = Layer(20, 136, 130), Layer(300, 72, 4300)
    layer.run(CAPTURED)
    with driver.capture(CAPTURED) as graph:
        layer.run(CAPTURED)
    with driver.capture(WARM) as second:
        other.run(WARM)
    layer.draw(3)
    layer.run(CAPTURED)
    expected = layer.out.copy()
    layer.out[...] = np.nan
    for _, work in graph:
        work()
        found = layer.out.copy()
        other.draw(5)
        if beside == "a graph of another stream":
            replay(second)
        else:
            other.run(CAPTURED)
        assert other.difference() < 0.03
    assert np.array_equal(found, expected)


def test_rows_under_capture(driver: CapturingDriver) -> None:
    x, codes, absmax = aligned((3, 64), np.float16), aligned((3, 64), np.int8), aligned((3,), np.float32)
    with driver.capture(CAPTURED) as graph:
        plan = rows_plan(((3, 64), (128, 2), "float16", None), None, "released", CAPTURED, 0)
        plan.run(x.ctypes.data, codes.ctypes.data, absmax.ctypes.data)
    x[...] = np.arange(192).reshape(3, 64) / 64
    replay(graph)
    expected = quant.quantize_rows(x)
    assert np.array_equal(codes, expected.codes)
    assert np.array_equal(absmax, expected.absmax)


def test_memory_under_capture(driver: CapturingDriver) -> None:
    with driver.capture(CAPTURED) as graph:
        address = capture.lasting(8, b"abc")
        shared = Shared(CAPTURED, captured=True)
        first = shared.zeros(5)
        assert not at(first, (5,), np.uint8).any()
        assert shared.zeros(4) == first
        assert not at(shared.zeros(6), (10,), np.uint8).any()
        assert shared.scratch(100) != shared.scratch(101)
    assert not graph
    assert at(address, (3,), np.uint8).tobytes() == b"abc"


def test_the_mode_is_as_before_after_a_failure(driver: CapturingDriver) -> None:
    driver.full = True
    with driver.capture(CAPTURED), pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        capture.lasting(8)
    driver.full = False
    driver.mode = 1  # PyTorch's own, say
    capture.lasting(8, b"1")
    assert driver.mode == 1
    driver.mode = GLOBAL


def test_another_stream_may_be_under_capture(driver: CapturingDriver) -> None:
    """A thread's capture forbids memory to all others; a call with new shapes asks for it all the same."""
    layer = Layer(20, 64, 130)
    layer.draw(2)
    with driver.capture(CAPTURED) as graph:
        layer.run(WARM)
    assert not graph
    assert layer.difference() < 0.03


@pytest.mark.parametrize("captured", [False, True])
def test_descriptors_that_are_replaced(
    driver: CapturingDriver, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    """The least recently used of those for calls; never those for graphs."""
    monkeypatch.setattr(descriptors_hopper, "SETS", 3)
    found = descriptors_hopper.Descriptors(CAPTURED, captured)

    def place(kind: int, address: int) -> int:
        return found.place(kind, (address, address + 1), [encoder(kind, 2, 3, 4, 5)] * 2)

    def numbers(where: int) -> list[list[int]]:
        return [at(where + i, (2,), np.int64).tolist() for i in (0, 128)]

    with driver.capture(CAPTURED if captured else 99) as graph:
        keys = [(0, 10), (1, 10), (0, 20)]
        held = [place(*key) for key in keys]
        assert len(set(held)) == 3
        assert [place(*key) for key in keys] == held
        assert place(0, 10) == held[0], "it is the one used last"
        later = [place(2, 10), place(0, 30)]
        assert place(0, 10) == held[0]
    assert not graph
    assert numbers(held[0]) == [[10, 0], [11, 0]]
    assert [numbers(each) for each in later] == [[[10, 2], [11, 2]], [[30, 0], [31, 0]]]
    if captured:
        assert not set(later) & set(held)
        assert [numbers(each) for each in held[1:]] == [[[10, 1], [11, 1]], [[20, 0], [21, 0]]]
    else:
        assert later == held[1:]


def test_calls_that_wait_are_refused_before_anything_is_recorded(
    driver: CapturingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver would end the capture."""
    for module in (call_hopper, linear_hopper):
        monkeypatch.setattr(module, "stream_of", lambda *_: CAPTURED)
    x, weight = np.ones((3, 64), np.float16), np.ones((64, 48), np.float16)
    codes = quant.quantize_columns(weight)
    with driver.capture(CAPTURED) as graph:
        with pytest.raises(UnsupportedError, match="quantize_rows_hopper: the stream is under capture, and"):
            call_hopper.quantize_rows_hopper(x, threshold=6.0)
        with pytest.raises(UnsupportedError, match="under capture, and return_parts waits"):
            linear_hopper.llm_int8_linear_hopper(x, codes, return_parts=True)
        with pytest.raises(UnsupportedError, match="under capture, and a weight that has no codes"):
            linear_hopper.llm_int8_linear_hopper(x, weight)
    assert not graph


def test_memory_is_given_back_if_its_contents_cannot_be_copied(
    driver: CapturingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    monkeypatch.setattr(driver, "cuMemFree", freed.append, raising=False)
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", lambda *_: (FULL,))
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        capture.lasting(64, bytes(64))
    assert len(freed) == 1
    assert driver.mode == GLOBAL
