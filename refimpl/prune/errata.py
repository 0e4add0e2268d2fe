"""What the lecture prints wrongly about pruning, as programs that fail."""

from __future__ import annotations

from refimpl.numerics import BoolArray, FloatArray
from refimpl.prune.constrained import constrained
from refimpl.registry import erratum

__all__ = ["fewer_than_allowed", "parameters_returned"]


@erratum(
    "prune.constrained",
    slide="Neural Network Pruning - How should we formulate pruning",
    says="arg min L(x; W_p) subject to |W_p|_0 < N",
    should_say="at most N, |W_p|_0 <= N: as printed one weight fewer stays than may",
    breaks="prune.no_other_choice_costs_less",
)
def fewer_than_allowed(weights: FloatArray, hessian: FloatArray, /, *, keep: int) -> BoolArray:
    """Return the best choice of fewer than `keep` weights.

    Examples
    --------
    >>> fewer_than_allowed([3.0, 1.0, 2.0], [1.0, 1.0, 1.0], keep=2)
    array([ True, False, False])
    """
    return constrained(weights, hessian, keep=max(keep - 1, 0))


@erratum(
    "prune.dynamic_batch_loading",
    slide="Sheared LLaMA, Algorithm 1: Dynamic Batch Loading",
    says="UpdateWeight returns θ",
    should_say="UpdateWeight returns w: the caller would sample by the old shares for ever",
    breaks="prune.lagging_domains_gain",
)
def parameters_returned(weights: FloatArray, loss: FloatArray, reference: FloatArray, /) -> FloatArray:  # noqa: ARG001
    """Return the shares that the caller is left with: those it had.

    Examples
    --------
    >>> parameters_returned([0.5], [1.0], [0.0])
    [0.5]
    """
    return weights
