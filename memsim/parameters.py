"""How many parameters a model has, to the last one, tensor by tensor.

>>> parameters(model="gpt2").total
124439808
>>> print(parameters(model="gpt2").explain()[3])
block: attention: L*(d*k*(H + 2G) + H*k*d + k*(H + 2G) + d) = \
12*(768*64*(12 + 2*12) + 12*64*768 + 64*(12 + 2*12) + 768) = 28350000 parameters
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.estimate import Estimate, Term, estimate, term
from memsim.model import Model, Part, Stack, dense, model_names
from memsim.model import model as named_model
from memsim.parts import PARTS
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = ["PARTS", "model_of", "non_embedding_parameters", "parameters"]


def _sample(rng: np.random.Generator, *, layers: int, heads: int, head_width: int, **options: Any) -> Case:
    shape: dict[str, Any] = {"layers": layers, "heads": heads, "width": heads * head_width}
    shape |= {"ffn": int(rng.integers(1, 200)), "vocabulary": int(rng.integers(1, 500))}
    if options["grouped"]:
        shape |= {"key_heads": 1, "head_width": head_width + 1}
    if rng.integers(2):
        shape["positions"] = int(rng.integers(1, 64))
    choices = {name: options[name] for name in ("gated", "bias", "norm", "tied")}
    return Case((), {"model": dense(**shape, **choices), "pad_vocabulary": options["pad_vocabulary"]})


@technique(
    "cost.parameters",
    entries=(17,),
    kind="cost",
    source=Source("Zhang et al. 2022", "arXiv:2205.01068", "Table 1; released configurations"),
    axes={"layers": (1, 8), "heads": (1, 6), "head_width": (1, 16), "pad_vocabulary": (1, 130)},
    options={
        "grouped": (False, True),
        "gated": (False, True),
        "bias": (False, True),
        "norm": ("layer", "rms"),
        "tied": (False, True),
    },
    sample=_sample,
    edges=(
        {"layers": 1, "heads": 1, "head_width": 1, "pad_vocabulary": 1},
        {"grouped": True, "gated": True, "bias": False, "norm": "rms", "tied": False, "pad_vocabulary": 128},
    ),
    exact=True,
)
def parameters(*, model: str | Model, pad_vocabulary: int = 1) -> Estimate:
    """Return the number of parameters of a model, a term for each kind of tensors.

    Parameters
    ----------
    model : str or Model
        A name (`memsim.model.model_names`), or a description, such as `memsim.model.dense` makes.
    pad_vocabulary : int
        Round the rows of embedding and head up to a multiple, as for tensor cores or tensor parallelism; the
        released count has what the data file says.

    Returns
    -------
    Estimate
        In parameters, exact.  A tied head is a term of 0.

    Raises
    ------
    UnknownNameError
        If no model or part has that name.
    OptionError
        If sizes do not fit together.

    Notes
    -----
    ``12 L d²`` alone, attention and a feed-forward network of 4d, misses embeddings, biases and norms:
    a third of OPT-125M, 0.6% of OPT-175B.  Buffers that are saved but not trained, such as masks, are not
    counted.

    References
    ----------
    .. [1] Zhang et al., 2022, arXiv:2205.01068, Table 1.

    Examples
    --------
    >>> parameters(model="opt-6.7b").total, parameters(model="llama-2-7b").total
    (6658473984, 6738415616)
    >>> parameters(model="gpt2", pad_vocabulary=64).total - parameters(model="gpt2").total
    36096
    """
    described = model_of(model)
    pad = whole("pad_vocabulary", pad_vocabulary)
    terms = [_term(described, stack, part, pad) for stack in described.stacks for part in stack.parts]
    return estimate(f"parameters of {described.name}", terms, leaves_out="buffers that are not trained")


def non_embedding_parameters(*, model: str | Model) -> Estimate:
    """Return the parameters of all but embeddings and output head: the N of Kaplan et al.

    Examples
    --------
    >>> non_embedding_parameters(model="gpt2-xl").total  # 12 L d² is 1,474,560,000
    1475561600
    """
    described = model_of(model)
    terms = [
        _term(described, stack, part, 1)
        for stack in described.stacks
        for part in stack.parts
        if part.kind not in ("embedding", "head")
    ]
    return estimate(f"non-embedding parameters of {described.name}", terms, leaves_out="embeddings, head")


def model_of(model: str | Model) -> Model:
    """Return a model by its name, or the description itself.

    Raises
    ------
    OptionError
        If it is neither.

    Examples
    --------
    >>> model_of("gpt2").width
    768
    """
    if isinstance(model, Model):
        return model
    if not isinstance(model, str):
        raise OptionError(f"model: expected one of {len(model_names())} names or a Model; got {model!r}")
    return named_model(model)


def _term(model: Model, stack: Stack, part: Part, pad: int) -> Term:
    if part.kind not in PARTS:
        raise OptionError(
            f"{model.name}, {stack.name}: expected one of {', '.join(PARTS)}; got {part.kind!r}"
        )
    formula, sizes = PARTS[part.kind](part, model.width, pad)
    values = dict(sizes)
    if stack.layers != 1 and formula != "0":
        formula, values = f"L*({formula})", values | {"L": stack.layers}
    return term(f"{stack.name}: {part.name}", formula, values, "parameters", model.source)
