"""Parts of a model that run once: forward, keeping what the way back needs, and backward from that.

A `refimpl.transformer.layers.Layer` computes its forward pass again when it goes back.  Between ranks that
would send everything again, so a part returns, with its output, the function that goes back.  Weights are
given both times, and never kept: whoever shards them may drop them in between.

>>> import numpy as np
>>> double = local(lambda weights: Layer(lambda x: 2 * x, lambda x, dy: (2 * dy, {})))
>>> y, back = in_sequence(double, added(double))({}, np.ones(1))
>>> y, back({}, np.ones(1))
(array([6.]), (array([6.]), {}))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray
from refimpl.transformer.layers import Gradients, Layer, Order

__all__ = ["Back", "Part", "Weights", "added", "around", "in_sequence", "local", "recomputed"]

Weights = Mapping[str, FloatArray]


class Back(Protocol):
    """The way back: gradients of the input, and of the weights by name."""

    def __call__(self, weights: Weights, dy: FloatArray, /) -> tuple[FloatArray, Gradients]:
        """Return the gradients, given that of the output."""
        ...


class Part(Protocol):
    """The way forward: the output, and the way back."""

    def __call__(self, weights: Weights, x: FloatArray, /) -> tuple[FloatArray, Back]:
        """Return the output, and what goes back from it."""
        ...


def local(layer_of: Callable[[Weights], Layer]) -> Part:
    """Return a layer in which nothing is sent as a part; it keeps its input."""

    def part(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        return layer_of(weights).forward(x), lambda weights, dy: layer_of(weights).vjp(x, dy)

    return part


def in_sequence(*parts: Part) -> Part:
    """Return parts one after the other; a name that occurs in several has its gradients added."""

    def part(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        backs: list[Back] = []
        for one in parts:
            x, back = one(weights, x)
            backs.append(back)

        def all_back(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            total: Gradients = {}
            for back in reversed(backs):
                dy, found = back(weights, dy)
                for name, gradient in found.items():
                    total[name] = total[name] + gradient if name in total else gradient
            return dy, total

        return x, all_back

    return part


def added(part: Part) -> Part:
    """Return ``x + part(x)``."""

    def residual(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        y, back = part(weights, x)

        def residual_back(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            dx, found = back(weights, dy)
            return dy + dx, found

        return x + y, residual_back

    return residual


def around(sublayer: Part, norm: Part, order: Order) -> Part:
    """Return ``norm(x + sublayer(x))`` for "post", and ``x + sublayer(norm(x))`` for "pre".

    Raises
    ------
    OptionError
        If the order is none of the two.
    """
    if order == "post":
        return in_sequence(added(sublayer), norm)
    if order == "pre":
        return added(in_sequence(norm, sublayer))
    raise OptionError(f'order: expected "post" or "pre", got {order!r}')


def recomputed(part: Part) -> Part:
    """Return a part that keeps its input alone, and runs once more on the way back.

    References
    ----------
    .. [1] Chen et al., 2016, arXiv:1604.06174, section 3.
    """

    def once_more(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        return part(weights, x)[0], lambda weights, dy: part(weights, x)[1](weights, dy)

    return once_more
