"""Scaling laws: the loss of a model from its size, its data and its compute.

The constants are data (``memsim/data/scaling_laws.toml``).  Losses are in nats a token, compute in FLOP.

>>> print(kaplan(parameters="1.5B").explain()[0])
loss: (N_c/N)**α_N = (8.8e13/1.5e9)**0.076 = 2.304 nats
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from memsim.data_files import read
from memsim.estimate import Estimate, Term, estimate, term
from memsim.formula import evaluate_real, substitute
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = [
    "HOFFMANN",
    "Fit",
    "chinchilla",
    "fit_constants",
    "kaplan",
    "pruning_tokens",
    "real_term",
    "scaling_constants",
]

Fit = Literal["hoffmann", "besiroglu"]
_ABOUT = ("work", "identifier", "locator")
_KAPLAN = Source("Kaplan et al. 2020", "arXiv:2001.08361", "eq. 1.1 to 1.5")
HOFFMANN = Source("Hoffmann et al. 2022", "arXiv:2203.15556", "eq. 2, 4 and 10, appendix D.3")
_LEAVES_OUT = "everything but size and data: architecture, data quality, schedule"


def scaling_constants(name: str) -> tuple[dict[str, Number], str]:
    """Return the constants of a law, exactly as printed, and where they stand.

    Raises
    ------
    OptionError
        If there is no such law.

    Examples
    --------
    >>> constants, source = scaling_constants("hoffmann")
    >>> float(constants["E"]), source.split(", ")[1]
    (1.69, 'arXiv:2203.15556')
    """
    laws = read("scaling_laws")
    if name not in laws:
        raise OptionError(f"fit: expected one of {', '.join(laws)}; got {name!r}")
    values = {key: exact(text, key) for key, text in laws[name].items() if key not in _ABOUT}
    return values, ", ".join(laws[name][key] for key in _ABOUT)


def real_term(name: str, formula: str, values: Mapping[str, Number], unit: str, source: str) -> Term:
    """Return a term whose formula has powers that are no whole numbers.

    Examples
    --------
    >>> float(real_term("loss", "x**α", {"x": 2, "α": exact(0.5)}, "nats", "nobody").value)
    1.4142135623730951
    """
    return Term(name, evaluate_real(formula, values), unit, formula, substitute(formula, values), source)


def _sample_kaplan(
    rng: np.random.Generator,  # noqa: ARG001 (the contract)
    *,
    given: str,
    teraflop: int,
    **axes: int,
) -> Case:
    chosen = {"both": ("parameters", "tokens")}.get(given, (given,))
    everything = axes | {"compute": teraflop * 10**12}
    return Case((), {name: everything[name] for name in chosen})


@technique(
    "cost.kaplan",
    entries=(5,),
    kind="cost",
    source=_KAPLAN,
    axes={"parameters": (1, 10**13), "tokens": (1, 10**14), "teraflop": (1, 10**14)},
    options={"given": ("parameters", "tokens", "compute", "both")},
    sample=_sample_kaplan,
    edges=(
        {"parameters": 1, "given": "parameters"},
        {"parameters": 88 * 10**12, "given": "parameters"},
        {"tokens": 1, "parameters": 1, "given": "both"},
    ),
    exact=True,
)
def kaplan(
    *, parameters: Quantity | None = None, tokens: Quantity | None = None, compute: Quantity | None = None
) -> Estimate:
    """Return the loss that Kaplan's laws predict when what is given limits the training.

    Parameters
    ----------
    parameters : int or str, optional
        N, *without* embeddings (12 L d² for a plain Transformer): counting them breaks the fit.
    tokens : int or str, optional
        D, of the training data.  With `parameters` the joint law holds, which has constants of its own.
    compute : int or float, optional
        C_min in FLOP (the paper's unit, a PF-day, is 8.64e19), alone.

    Returns
    -------
    Estimate
        In nats a token of the paper's data and vocabulary of 50257, rounded correctly to a float64.

    Raises
    ------
    OptionError
        If a number is not positive, or the combination is none of N, D, C and N with D.

    References
    ----------
    .. [1] Kaplan et al., 2020, arXiv:2001.08361, eq. 1.1 to 1.3 and 1.5.

    Examples
    --------
    >>> [round(float(kaplan(parameters=n).total), 3) for n in ("85M", 1_474_560_000, "174B")]
    [2.865, 2.307, 1.605]
    >>> kaplan(compute=3.1e8 * 8.64e19).total
    1
    """
    given = {name for name, value in (("N", parameters), ("D", tokens), ("C", compute)) if value is not None}
    constants, source = scaling_constants("kaplan_joint" if given == {"N", "D"} else "kaplan")
    match parameters, tokens, compute:
        case _, None, None if parameters is not None:
            values, formula = positive_values(N=parameters), "(N_c/N)**α_N"
        case None, _, None if tokens is not None:
            values, formula = positive_values(D=tokens), "(D_c/D)**α_D"
        case None, None, _ if compute is not None:
            values, formula = positive_values(C=compute), "(C_c*PF_day/C)**α_C"
        case _, _, None if parameters is not None and tokens is not None:
            values = positive_values(N=parameters, D=tokens)
            formula = "((N_c/N)**(α_N/α_D) + D_c/D)**α_D"
        case _:
            known = "parameters, tokens, compute, or parameters and tokens"
            raise OptionError(f"expected {known}; got {', '.join(sorted(given)) or 'nothing'}")
    loss = real_term("loss", formula, constants | values, "nats", source)
    return estimate("Kaplan's loss", [loss], leaves_out=_LEAVES_OUT)


def _sample_fit(rng: np.random.Generator, **options: Any) -> Case:  # noqa: ARG001 (the contract)
    return Case((), options)


@technique(
    "cost.chinchilla",
    entries=(6,),
    kind="cost",
    source=HOFFMANN,
    axes={"parameters": (1, 10**13), "tokens": (1, 10**14)},
    options={"fit": ("hoffmann", "besiroglu")},
    sample=_sample_fit,
    edges=({"parameters": 1, "tokens": 1}, {"parameters": 70 * 10**9, "tokens": 14 * 10**11}),
    exact=True,
)
def chinchilla(*, parameters: Quantity, tokens: Quantity, fit: Fit = "hoffmann") -> Estimate:
    r"""Return the loss E + A/N^α + B/D^β of a model of N parameters trained on D tokens.

    Parameters
    ----------
    parameters, tokens : int or str
        N, embeddings included, and D.
    fit : {"hoffmann", "besiroglu"}
        Whose constants: the paper's, rounded in print, or the refit of its data.

    Returns
    -------
    Estimate
        In nats a token, a term each for what no model can learn, for the size and for the data.

    Raises
    ------
    OptionError
        If a number is not positive, or the fit unknown.

    References
    ----------
    .. [1] Hoffmann et al., 2022, arXiv:2203.15556, eq. 2 and 10.
    .. [2] Besiroglu et al., 2024, arXiv:2404.10102.

    Examples
    --------
    >>> print(*chinchilla(parameters="70B", tokens="1.4T").explain(), sep="\n")
    irreducible: E = 1.69 = 1.69 nats
    model size: A/N**α = 406.4/7e10**0.34 = 0.08349 nats
    data: B/D**β = 410.7/1.4e12**0.28 = 0.1632 nats
    total: E + A/N**α + B/D**β = 1.69 + 406.4/7e10**0.34 + 410.7/1.4e12**0.28 = 1.937 nats
    """
    constants, source = fit_constants(fit)
    values = constants | positive_values(N=parameters, D=tokens)
    return estimate(
        "Chinchilla's loss",
        [
            real_term(name, formula, values, "nats", source)
            for name, formula in (("irreducible", "E"), ("model size", "A/N**α"), ("data", "B/D**β"))
        ],
        leaves_out=_LEAVES_OUT,
    )


def fit_constants(fit: str) -> tuple[dict[str, Number], str]:
    """Return the constants of a Chinchilla law, and where they stand.

    Raises
    ------
    OptionError
        If `fit` is unknown.

    Examples
    --------
    >>> sorted(fit_constants("besiroglu")[0])
    ['A', 'B', 'E', 'α', 'β']
    """
    if fit not in ("hoffmann", "besiroglu"):
        raise OptionError(f"fit: expected 'hoffmann' or 'besiroglu'; got {fit!r}")
    return scaling_constants(fit)


@technique(
    "cost.pruning_tokens",
    entries=(83,),
    kind="cost",
    source=Source("Xia et al. 2023", "arXiv:2310.06694", "section 3.1 and Table 7"),
    axes={"steps": (1, 10**4), "batch": (1, 4096), "length": (1, 10**5)},
    sample=_sample_fit,
    edges=({"steps": 3200, "batch": 32, "length": 4096}, {"steps": 1, "batch": 1, "length": 1}),
    exact=True,
)
def pruning_tokens(*, steps: Quantity, batch: Quantity, length: Quantity) -> Estimate:
    """Return the tokens that a stage of pruning or of continued pretraining reads.

    Parameters
    ----------
    steps : int
        Optimizer steps.
    batch : int
        Sequences a step, over all devices.
    length : int
        Tokens a sequence.

    Returns
    -------
    Estimate
        In tokens.

    Raises
    ------
    OptionError
        If a number is not positive.

    References
    ----------
    .. [1] Xia et al., 2023, arXiv:2310.06694, section 3.1: 0.4B tokens of pruning before 50B of
       continued pretraining; Table 7: 3200 steps of 131K tokens.

    Examples
    --------
    >>> pruning_tokens(steps=3200, batch=32, length=4096).total
    419430400
    """
    values = positive_values(S=steps, b=batch, T=length)
    product = term("tokens", "S*b*T", values, "tokens", "arXiv:2310.06694")
    return estimate("tokens read", [product], leaves_out="padding")
