"""The lecture's slides on speculative sampling, run as they are printed: each breaks a law."""

from __future__ import annotations

import numpy as np

from refimpl.decoding.speculative import NO_TOKEN, Speculated
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import erratum

__all__ = ["letters_of_the_results_table", "residual_not_normalised"]


def _first_over(weights: FloatArray, u: float) -> int:
    """Return the first index at which the running sum passes `u`; the last one if it never does."""
    total = 0.0
    for index, weight in enumerate(weights):
        total += float(weight)
        if u < total:
            return index
    return len(weights) - 1


@erratum(
    "decoding.speculative",
    slide="Speculative Sampling: Rejection Sampling",
    says="the token after a rejection is sampled from (q(x) - p(x))_+",
    should_say="from (q(x) - p(x))_+ divided by its sum: what is printed sums to less than 1",
    breaks="decoding.the_output_follows_the_target",
)
def residual_not_normalised(
    drafted: IntArray, draft: FloatArray, target: FloatArray, /, *, uniforms: FloatArray
) -> Speculated:
    """Draw from the positive part as it is, the last token taking the mass that it lacks."""
    B, K = drafted.shape
    tokens, accepted = np.full((B, K + 1), NO_TOKEN), np.zeros(B, np.int64)
    for b in range(B):
        n = 0
        while n < K and uniforms[b, n] * draft[b, n, drafted[b, n]] < target[b, n, drafted[b, n]]:
            n += 1
        rest = target[b, n] if n == K else np.maximum(target[b, n] - draft[b, n], 0)
        tokens[b, :n], accepted[b] = drafted[b, :n], n
        tokens[b, n] = _first_over(rest, float(uniforms[b, K]))
    return Speculated(tokens, accepted)


@erratum(
    "decoding.speculative",
    slide="Speculative Sampling: Algorithm, and the second table of results",
    says="q is the target on the algorithm slides, and M_q the draft in the table of results",
    should_say="two papers, two letterings: the algorithm is Chen et al.'s, the table Leviathan's with "
    "M_q the draft; the algorithm read with the table's letters samples from the wrong model",
    breaks="decoding.the_output_follows_the_target",
)
def letters_of_the_results_table(
    drafted: IntArray, draft: FloatArray, target: FloatArray, /, *, uniforms: FloatArray
) -> Speculated:
    """Follow the algorithm slides with q the draft and p the target, as the table of results has them."""
    B, K = drafted.shape
    tokens, accepted = np.full((B, K + 1), NO_TOKEN), np.zeros(B, np.int64)
    for b in range(B):
        n = 0
        while n < K and uniforms[b, n] * target[b, n, drafted[b, n]] < draft[b, n, drafted[b, n]]:
            n += 1
        rest = target[b, n] if n == K else np.maximum(draft[b, n] - target[b, n], 0)
        tokens[b, :n], accepted[b] = drafted[b, :n], n
        total = rest.sum()
        tokens[b, n] = _first_over(rest / total if total > 0 else target[b, n], float(uniforms[b, K]))
    return Speculated(tokens, accepted)
