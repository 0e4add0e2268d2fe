"""One layer of Megatron's 22B model on a node of A100, in numbers; it shares nothing with memsim."""

from __future__ import annotations

from math import ceil

__all__ = ["layer_by_hand"]

# Table 3 of arXiv:2205.05198: h, heads, micro-batch, tensor-parallel ranks; A100-80GB: peak, HBM, NVLink.
H, HEADS, S, B, T = 6144, 64, 2048, 4, 8
PEAK, HBM, LINK = 312e12, 2.039e12, 300e9


def _product(m: int, n: int, k: int) -> float:
    """Return the operations that 108 multiprocessors do for a product, in whole waves of 256 x 128 tiles."""
    waves = min(ceil(ceil(m / a) * ceil(n / b) / 108) for a, b in ((256, 128), (128, 256)))
    return 2.0 * waves * 108 * 256 * 128 * k


def layer_by_hand(sequence_parallel: bool, share: dict[str, float]) -> list[float]:
    """Return the milliseconds of the forward and the backward pass, nothing recomputed."""
    rate, memory = PEAK * share["η_c"], HBM * share["η_m"]
    x = B * S
    forward = backward = 0.0
    weight_gradients = 0.0
    for place, (k, n) in enumerate(((H, 3 * H // T), (H // T, H), (H, 4 * H // T), (4 * H // T, H))):
        moved = 2 * (k * n + x * (k + n))
        forward += max(_product(x, n, k) / rate, moved / memory)
        backward += max((_product(x, k, n) + _product(k, n, x)) / rate, 2 * moved / memory)
        if place in (0, 2):  # as long as the forward product, beside which an all-reduce may run
            weight_gradients += max(_product(x, n, k) / rate, moved / memory)
    scores = B * S * S * HEADS // T
    products, operands = 4 * scores * (H // HEADS), 2 * 4 * x * H // T
    forward += max(products / (PEAK * share["η_a"]), (operands + 4 * scores) / memory)
    backward += max(2 * products / (PEAK * share["η_a"]), 2 * (operands + 4 * scores) / memory)
    forward += (4 + 5) * scores / memory  # softmax reads and writes; dropout too, with a byte of mask
    backward += (6 + 5) * scores / memory
    whole = x * H // T if sequence_parallel else x * H
    pointwise = (2 * (10 * whole + 2 * 4 * x * H // T) + 2 * whole) / memory
    forward += pointwise
    backward += 1.5 * pointwise
    sent = 2 * 2 * (T - 1) / T * 2 * x * H / (LINK * share["η_n"])  # two all-reduces
    hidden = min(weight_gradients, sent / 2 if sequence_parallel else sent)
    return [1e3 * (forward + sent), 1e3 * (backward + sent - hidden)]
