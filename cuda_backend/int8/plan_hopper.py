"""What layouts settle of a Hopper call, found once: a product of codes, rows to quantise, a linear layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import ITEMSIZE, Layout, View, laid_out
from cuda_backend.capture import capturing
from cuda_backend.int8.few_hopper import few_layer
from cuda_backend.int8.memory_hopper import Arena, Shared, shared_by
from cuda_backend.int8.operands import check_inner, check_threshold
from cuda_backend.int8.product_hopper import MISALIGNED, NOTHING, After, Product
from cuda_backend.int8.rows_hopper import Rows, gpu_reasons, reasons
from cuda_backend.int8.variant_hopper import Narrow, Wide, choose
from refimpl.errors import DTypeError, UnsupportedError
from refimpl.quant.absmax import Convention
from refimpl.validation import bind_axes

__all__ = ["LinearPlan", "ProductPlan", "RowsPlan", "linear_plan", "product_plan", "rows_plan"]


class _Plan:
    """A launch on one stream, or under capture on it: room in the memory that it shares with others."""

    def __init__(self, caller: str, stream: int, device: int) -> None:
        self.caller, self.stream, self._device = caller, stream, device
        self.scratch, self.zeros = Arena(), Arena()
        self._lock = Lock()
        self._rooms: dict[bool, tuple[Shared, int, int]] = {}
        self.where: dict[str, Any] = {
            "scratch": self.scratch,
            "device": device,
            "processors": int(cuda.get_current_device().MULTIPROCESSOR_COUNT),
        }

    @contextmanager
    def room(self) -> Iterator[tuple[Shared, int, int]]:
        """Give one call what it shares with others, and where its scratch and its zeros begin.

        Other calls wait until its kernels are queued: they write the same memory, and those of this plan
        pack their arguments where it does.
        """
        with self._lock:
            captured = capturing(self.stream)
            room = self._rooms.get(captured)
            if room is None:
                shared = shared_by(self.stream, self._device, captured)
                room = shared, shared.scratch(self.scratch.size), shared.zeros(self.zeros.size)
                self._rooms[captured] = room
            with room[0].lock:
                yield room

    def check(self, *addresses: int) -> None:
        """Raise UnsupportedError for an address that wide loads cannot take."""
        for address in addresses:
            if address % 16:
                raise UnsupportedError(f"{self.caller}: {MISALIGNED}")


class ProductPlan(_Plan):
    """A product of codes with int32 sums, or with scales and bias."""

    def __init__(
        self, a: View, b: View, kind: str, stream: int, device: int, variant: Wide | Narrow | None
    ) -> None:
        super().__init__("int8_matmul_hopper", stream, device)
        _refuse(self.caller, gpu_reasons())
        self.shape = a.shape[0], b.shape[0]
        self.product = Product(a, b, kind, "released", variant=variant, **self.where)

    def run(self, a: int, b: int, out: int, after: After) -> None:
        """Queue it; nothing waits."""
        with self.room() as (shared, scratch, _):
            self.product.run(shared, self.stream, scratch, a, b, out, after)


class RowsPlan(_Plan):
    """Rows quantised."""

    def __init__(
        self, x: View, threshold: float | None, convention: Convention, stream: int, device: int
    ) -> None:
        super().__init__("quantize_rows_hopper", stream, device)
        _refuse(self.caller, reasons(x))
        self.rows_count = x.shape[0]
        self.rows = Rows(x, threshold, convention, 0, zeros=self.zeros, **self.where)

    def run(self, x: int, codes: int, absmax: int) -> After:
        """Queue it; nothing waits."""
        if not self.rows_count:
            return NOTHING
        self.check(codes, x if self.rows.aligned else 0)
        with self.room() as (_, scratch, zeros):
            after = self.rows.run(self.stream, (scratch, zeros), x, codes, absmax)
            self.rows.clear(self.stream, zeros)
            return after


class LinearPlan(_Plan):
    """LLM.int8(): rows quantised into memory of the stream, one product, which sees to outliers."""

    def __init__(
        self,
        x: View,
        codes: View,
        weight: View | None,
        threshold: float | None,
        convention: Convention,
        stream: int,
        device: int,
        *,
        in_steps: bool = False,
    ) -> None:
        super().__init__("llm_int8_linear_hopper", stream, device)
        found = reasons(x)
        if weight is None and convention == "paper" and threshold is not None:
            found.append("outliers meet the weight as given under 'paper': prepare_weight(..., keep=True)")
        _refuse(self.caller, found)
        (T, K), N = x.shape, codes.shape[0]
        self.shape, self.dtype = (T, N), x.dtype
        self.few = None if in_steps else few_layer(x, codes, threshold, convention, **self.where)
        if self.few is not None:
            self._asked = x, codes, weight, threshold, convention, stream, device
            return
        variant = choose(x.dtype, convention, T, N, K, self.where["processors"])
        beside, wide = threshold is not None, isinstance(variant, Wide)
        self.rows = Rows(
            x, threshold, convention, N if wide else 0, zeros=self.zeros, beside=beside, sharing=not wide,
            **self.where,
        )  # fmt: skip
        pitch = self.rows.pitch
        self._codes, self._absmax = self.scratch.reserve(T * pitch), self.scratch.reserve(4 * T)
        quantised = View((T, K), (pitch, 1), "int8", 0, None)
        self.product = Product(
            quantised, codes, x.dtype, convention, early=True, variant=variant._replace(beside=beside),
            **self.where,
        )  # fmt: skip
        self._met = (1, codes.strides[0]) if weight is None else (weight.strides[0], weight.strides[1])
        if weight is None:
            self._met = codes.strides[1], codes.strides[0]

    def run(
        self,
        x: int,
        codes: int,
        absmax: int,
        weight: int,
        bias: int,
        out: int,
        kept: tuple[int, int] | None = None,
    ) -> After:
        """Queue it; `kept` is where the codes and absmax of x go if they are wanted.  Nothing waits."""
        if not self.shape[0]:
            return NOTHING
        if self.few is not None:
            if kept is not None:
                return self._in_steps.run(x, codes, absmax, weight, bias, out, kept)
            self.check(out, x)
            with self.room() as (shared, scratch, _):
                self.few.run(shared, self.stream, scratch, x, codes, absmax, bias, out)
            return NOTHING
        self.check(out, x if self.rows.aligned else 0)
        feature, column = self._met
        met = After(b_absmax=absmax, bias=bias, w=weight or codes, w_feature=feature, w_column=column)
        with self.room() as (shared, scratch, zeros):
            memory = scratch, zeros
            x_codes, x_absmax = kept or (scratch + self._codes, scratch + self._absmax)
            after = self.rows.run(self.stream, memory, x, x_codes, x_absmax, met, kept is not None)
            try:
                if self.shape[1]:
                    self.product.run(shared, self.stream, scratch, x_codes, codes, out, after)
                else:
                    self.rows.clear(self.stream, zeros)
            except BaseException:  # the product clears the marks, if it is queued
                self.rows.clear(self.stream, zeros)
                raise
        return after

    @functools.cached_property
    def _in_steps(self) -> LinearPlan:
        """The same layer by kernels that leave codes in memory."""
        return LinearPlan(*self._asked, in_steps=True)


def _turned(given: View) -> View:
    """Return the layout of the transpose."""
    return given._replace(shape=given.shape[::-1], strides=given.strides[::-1])


def _refuse(caller: str, found: list[str]) -> None:
    if found:
        raise UnsupportedError(f"{caller}: {'; '.join(found)}")


@functools.lru_cache(maxsize=1024)
def product_plan(
    a: Layout, b: Layout, kind: str, stream: int, device: int, variant: Wide | Narrow | None = None
) -> ProductPlan:
    """Return the plan of a product of codes of these layouts, [M, K] and [K, N]."""
    return ProductPlan(laid_out("a", a), _turned(laid_out("b", b)), kind, stream, device, variant)


@functools.lru_cache(maxsize=1024)
def rows_plan(
    x: Layout, threshold: float | None, convention: Convention, stream: int, device: int
) -> RowsPlan:
    """Return the plan that quantises the rows of an array of this layout."""
    return RowsPlan(laid_out("x", x), threshold, convention, stream, device)


@functools.lru_cache(maxsize=1024)
def linear_plan(
    x: Layout,
    codes: Layout,
    weight: Layout | None,
    absmax: Layout,
    bias: Layout | None,
    threshold: float | None,
    convention: Convention,
    stream: int,
    device: int,
) -> LinearPlan:
    """Return the plan of a linear layer whose weight has codes [K, N] of this layout.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the layouts do not fit together, or an option is none.
    UnsupportedError
        With the reasons.
    """
    check_threshold(threshold, convention)
    views = {"x": laid_out("x", x), "weight codes": laid_out("weight codes", codes)}
    views["weight absmax"] = laid_out("weight absmax", absmax)
    if weight is not None:
        views["weight"] = laid_out("weight", weight)
    if bias is not None:
        views["bias"] = laid_out("bias", bias)
    axes = {"x": "T K", "weight codes": "K N", "weight absmax": "N", "weight": "K N", "bias": "N"}
    stubs = {name: np.broadcast_to(np.zeros(()), each.shape) for name, each in views.items()}
    check_inner(bind_axes({name: (each, axes[name]) for name, each in stubs.items()})["K"])
    dtype = views["x"].dtype
    expected = {"weight codes": "int8", "weight absmax": "float32"}
    for name, each in views.items():
        if each.dtype != expected.get(name, dtype):
            raise DTypeError(f"{name}: expected {expected.get(name, dtype)}, got {each.dtype}")
        if len(each.shape) == 1 and each.shape[0] > 1 and each.strides[0] != ITEMSIZE[each.dtype]:
            raise UnsupportedError(f"llm_int8_linear_hopper: {name} is not contiguous")
    stored = _turned(views["weight codes"])
    met = views.get("weight")
    return LinearPlan(views["x"], stored, met, threshold, convention, stream, device)
