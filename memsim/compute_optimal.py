"""The budget of a training run: what it costs, and how Chinchilla's law splits it between size and data.

>>> [round(float(estimate.total) / 1e9, 1) for estimate in compute_optimal(compute=5.76e23, fit="besiroglu")]
[72.4, 1326.8]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.scaling_laws import HOFFMANN, Fit, fit_constants, real_term
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.registry import Case, technique

__all__ = [
    "Optimum",
    "compute_optimal",
    "compute_share",
    "forward_flops",
    "optimal_parameters",
    "optimal_tokens",
    "training_flops",
]


def _sample_budget(rng: np.random.Generator, *, teraflop: int, fit: str) -> Case:  # noqa: ARG001 (the contract)
    return Case((), {"compute": teraflop * 10**12, "fit": fit})


class Optimum(NamedTuple):
    """The compute-optimal number of parameters, and of tokens."""

    parameters: Estimate
    tokens: Estimate


@technique(
    "cost.chinchilla.optimal",
    entries=(6,),
    kind="cost",
    source=HOFFMANN,
    axes={"teraflop": (1, 10**14)},
    options={"fit": ("hoffmann", "besiroglu")},
    sample=_sample_budget,
    edges=({"teraflop": 576 * 10**9, "fit": "hoffmann"}, {"teraflop": 576 * 10**9, "fit": "besiroglu"}),
    exact=True,
)
def compute_optimal(*, compute: Quantity, fit: Fit = "hoffmann") -> Optimum:
    """Return the N and D of lowest loss among those that cost `compute` = 6ND.

    Parameters
    ----------
    compute : int or float
        C, in FLOP.
    fit : {"hoffmann", "besiroglu"}
        As for `chinchilla`.

    Returns
    -------
    Optimum
        ``parameters``: G (C/6)^(β/(α+β)); ``tokens``: (C/6)^(α/(α+β)) / G; G = (αA/βB)^(1/(α+β)).

    Raises
    ------
    OptionError
        If `compute` is not positive, or the fit unknown.

    Notes
    -----
    **The published constants do not give the paper's own recommendation**: at Gopher's 5.76e23 FLOP they give
    32B parameters and 3.0T tokens, the refit 72B and 1.3T, and Chinchilla is 70B and 1.4T.

    References
    ----------
    .. [1] Hoffmann et al., 2022, arXiv:2203.15556, eq. 4.

    Examples
    --------
    >>> print(*(one.explain()[0].rpartition("= ")[2] for one in compute_optimal(compute=5.76e23)))
    32.19 B parameters 2.982 T tokens
    """
    return Optimum(optimal_parameters(compute=compute, fit=fit), optimal_tokens(compute=compute, fit=fit))


def optimal_parameters(*, compute: Quantity, fit: Fit = "hoffmann") -> Estimate:
    """Return `Optimum.parameters` of `compute_optimal`.

    Examples
    --------
    >>> round(float(optimal_parameters(compute=5.76e23).total) / 1e9, 1)
    32.2
    """
    formula = "(α*A/(β*B))**(1/(α + β))*(C/6)**(β/(α + β))"
    return _optimal("parameters", formula, compute, fit)


def optimal_tokens(*, compute: Quantity, fit: Fit = "hoffmann") -> Estimate:
    """Return `Optimum.tokens` of `compute_optimal`.

    Examples
    --------
    >>> round(float(optimal_tokens(compute=5.76e23, fit="besiroglu").total) / 1e12, 2)
    1.33
    """
    return _optimal("tokens", "(β*B/(α*A))**(1/(α + β))*(C/6)**(α/(α + β))", compute, fit)


def _optimal(unit: str, formula: str, compute: Quantity, fit: Fit) -> Estimate:
    constants, source = fit_constants(fit)
    values = constants | positive_values(C=compute)
    return estimate(
        f"compute-optimal {unit}", [real_term(unit, formula, values, unit, source)], leaves_out="inference"
    )


def training_flops(*, parameters: Quantity, tokens: Quantity) -> Estimate:
    """Return the FLOP of training, 6ND: 2N forward and 4N backward for each token.

    Raises
    ------
    OptionError
        If a number is not positive.

    Examples
    --------
    >>> float(training_flops(parameters="174.6B", tokens="300B").total)
    3.1428e+23
    """
    values = positive_values(N=parameters, D=tokens)
    product = term("training", "6N*D", values, "FLOP", "arXiv:2001.08361, section 2.1")
    return estimate(
        "training FLOP", [product], leaves_out="attention over the context, embeddings, recomputation"
    )


def forward_flops(*, layers: Quantity, width: Quantity, context: Quantity) -> Estimate:
    """Return the FLOP of one token's forward pass: 2N for the weights, 2 L n_ctx d for attention.

    Raises
    ------
    OptionError
        If a number is not positive.

    References
    ----------
    .. [1] Kaplan et al., 2020, arXiv:2001.08361, Table 1 and eq. 2.2, with N = 12 L d².

    Examples
    --------
    >>> forward_flops(layers=12, width=768, context=1024).total
    188743680
    """
    values = positive_values(L=layers, d=width, n=context)
    source = "arXiv:2001.08361, Table 1"
    return estimate(
        "forward FLOP of a token",
        [
            term("weights", "2*12L*d²", values, "FLOP", source),
            term("attention", "2L*n*d", values, "FLOP", source),
        ],
        leaves_out="embeddings, norms, biases",
    )


def compute_share(
    *, parameters: Quantity, tokens: Quantity, of_parameters: Quantity, of_tokens: Quantity
) -> Estimate:
    """Return the compute of one training run as a share of another's, both 6ND.

    Raises
    ------
    OptionError
        If a number is not positive.

    Examples
    --------
    >>> share = compute_share(parameters="2.7B", tokens="50.4B", of_parameters="3.4B", of_tokens="1T")
    >>> round(float(share.total), 3)
    0.04
    """
    values = positive_values(n=parameters, t=tokens, N=of_parameters, D=of_tokens)
    share = term("share", "6n*t/(6N*D)", values, "1", "C = 6ND, arXiv:2001.08361, section 2.1")
    return estimate("share of the compute", [share], leaves_out="training of the source model")
