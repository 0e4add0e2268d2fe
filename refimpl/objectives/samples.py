"""Cases on which losses are judged, their arrays drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case

__all__ = [
    "AXES",
    "EDGES",
    "INSTRUCTION_EDGES",
    "OPTIONS",
    "loss_terms",
    "sample_instruction",
    "sample_next_token",
]

AXES: Mapping[str, tuple[int, int]] = {"B": (0, 3), "T": (0, 8), "V": (1, 11)}
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "values": ("normal", "large", "padded"),
    "weighting": ("none", "mask", "whole"),
    "packed": (False, True),
    "reduction": ("token", "sequence", "sum"),
}
# No batch, no token, nothing to predict, one class, no weight anywhere, overflow without a shift.
INSTRUCTION_EDGES: tuple[Mapping[str, Any], ...] = (
    {"B": 0, "T": 4},
    {"B": 2, "T": 0},
    {"B": 2, "T": 1},
    {"B": 2, "T": 5, "V": 1},
    {"B": 3, "T": 8, "V": 7, "values": "large", "reduction": "token"},
    {"B": 3, "T": 8, "V": 7, "values": "padded", "reduction": "sequence"},
    {"B": 2, "T": 8, "V": 5, "packed": True, "reduction": "sum"},
)
EDGES: tuple[Mapping[str, Any], ...] = (
    *INSTRUCTION_EDGES,
    {"B": 3, "T": 6, "V": 5, "weighting": "mask", "reduction": "sequence"},
    {"B": 3, "T": 6, "V": 5, "weighting": "whole", "reduction": "token", "packed": True},
)


def _logits(rng: np.random.Generator, B: int, T: int, V: int, values: str) -> FloatArray:
    z = rng.standard_normal((B, T, V)) * (1e3 if values == "large" else 2.0)
    if values == "padded" and V > 2:
        z[..., -1] = -np.inf  # no label: the vocabulary is padded to a round size
    return z


def _tokens(rng: np.random.Generator, B: int, T: int, V: int, values: str) -> Any:
    return rng.integers(0, V - 1 if values == "padded" and V > 2 else V, (B, T))


def _documents(rng: np.random.Generator, B: int, T: int) -> Any:
    return np.cumsum(rng.random((B, T)) < 0.3, axis=1)


def sample_next_token(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    V: int,
    values: str,
    weighting: str,
    packed: bool,
    **options: Any,
) -> Case:
    """Return a call of `next_token_loss`.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    B, T, V : int
        Shape.
    values : {"normal", "large", "padded"}
        Logits near 2, near 1000, or with a class of logit -inf.
    weighting : {"none", "mask", "whole"}
        No weights, True and False, or integers with zeros among them.
    packed : bool
        Whether rows hold several documents.
    **options
        Passed on.

    Returns
    -------
    Case

    Examples
    --------
    >>> shape = dict(B=1, T=2, V=3, values="normal", weighting="mask", packed=True)
    >>> sorted(sample_next_token(np.random.default_rng(0), **shape).kwargs)
    ['document_ids', 'weights']
    """
    args = _logits(rng, B, T, V, values), _tokens(rng, B, T, V, values)
    if weighting != "none":
        mask = rng.random((B, T)) < 0.6
        # Whole numbers: what perturbs the inputs of a case must not turn "no label" into "hardly a label".
        options["weights"] = mask if weighting == "mask" else mask * rng.integers(1, 9, (B, T))
    if packed:
        options["document_ids"] = _documents(rng, B, T)
    return Case(args, options)


def sample_instruction(
    rng: np.random.Generator, *, B: int, T: int, V: int, values: str, packed: bool, **options: Any
) -> Case:
    """Return a call of `instruction_loss`: as `sample_next_token`, each row a prompt and its response.

    Examples
    --------
    >>> case = sample_instruction(np.random.default_rng(0), B=1, T=4, V=3, values="normal", packed=False)
    >>> case.args[2]
    array([[False,  True,  True,  True]])
    """
    logits, tokens = _logits(rng, B, T, V, values), _tokens(rng, B, T, V, values)
    ids = _documents(rng, B, T) if packed else np.zeros((B, T), np.int64)
    # Each document is a prompt of up to two tokens, and a response.
    starts = np.ones((B, T), bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    second = np.zeros((B, T), bool)
    second[:, 1:] = starts[:, :-1] & (rng.random((B, max(T - 1, 0))) < 0.5)
    prompt = (starts & (rng.random((B, T)) < 0.7)) | second
    if packed:
        options["document_ids"] = ids
    return Case((logits, tokens, ~prompt), options)


def loss_terms(case: Case) -> tuple[int, float]:
    """Return the length of the sums in a loss, and the size of what they add: logits and their logsumexp."""
    logits, tokens = case.args[:2]
    finite = np.abs(logits[np.isfinite(logits)])
    size = 2 * float(np.max(finite, initial=0.0)) + float(np.log(max(logits.shape[-1], 2)))
    share = float(tokens.size * 8) if case.kwargs.get("reduction") == "sum" else 1.0  # weights are at most 8
    return tokens.size + logits.shape[-1], size * share
