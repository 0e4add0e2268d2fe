"""What a model is made of: one description, as data, from which every cost is computed.

A model is a few stacks of parts; a stack stands for its layers, a part for one kind of tensors, such as an
embedding, an attention or a feed-forward network.  The descriptions ship as ``memsim/data/models/*.toml``, a
family of models a file, sizes as numbers or as formulas of the family's letters.

>>> gpt2 = model("gpt2")
>>> [(stack.name, stack.layers) for stack in gpt2.stacks]
[('embeddings', 1), ('block', 12), ('output', 1)]
>>> gpt2.part("block", "attention").sizes
{'heads': 12}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from memsim import data_files
from memsim.formula import evaluate
from memsim.units import Quantity, exact
from refimpl.errors import OptionError, UnknownNameError

__all__ = ["Model", "Part", "Stack", "dense", "model", "model_names"]

# Settings of a part that are no sizes.
CHOICES = (
    "activation", "bias", "cap", "convolution_bias", "gated", "own", "sinks", "style", "tied", "vocabulary",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of tensors in a layer.

    Attributes
    ----------
    kind : str
        What counts it: a key of `memsim.parameters.PARTS`, such as ``"attention"``.
    name : str
        Its name in the layer; the kind, if there is only one.
    sizes : mapping of str to int
        Such as ``{"heads": 12, "key_heads": 4}``.
    choices : mapping of str to str or bool
        Such as ``{"bias": "qkv"}`` or ``{"gated": True}``.
    """

    kind: str
    name: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    choices: Mapping[str, str | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stack:
    """`layers` layers of the same parts."""

    name: str
    layers: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model: its name, where its description stands, its width d, and its stacks from input to output."""

    name: str
    source: str
    width: int
    stacks: tuple[Stack, ...]

    def part(self, stack: str, part: str) -> Part:
        """Return a part by the names of its stack and of itself.

        Raises
        ------
        UnknownNameError
            If there is none.
        """
        found = {f"{s.name}: {p.name}": p for s in self.stacks for p in s.parts}
        if f"{stack}: {part}" not in found:
            raise UnknownNameError(f"part of {self.name}", f"{stack}: {part}", found)
        return found[f"{stack}: {part}"]


def model_names() -> list[str]:
    """Return the names that `model` knows, sorted.

    >>> {"gpt2", "opt-125m", "bert-base", "llama-2-7b"} <= set(model_names())
    True
    """
    return sorted(_families())


@lru_cache(maxsize=1)
def _families() -> dict[str, str]:
    """Return the family, a data file, of each model."""
    found: dict[str, str] = {}
    for family in data_files.names("models"):
        for name in data_files.read(family, "models")["models"]:
            if name in found:
                raise ValueError(f"model {name!r} is described twice, in {found[name]} and {family}")
            found[name] = family
    return found


def model(name: str) -> Model:
    """Return the model called `name` (see `model_names`), in lower case.

    Raises
    ------
    UnknownNameError
        If there is none; the message offers the nearest names.
    """
    key = name.lower()
    if key not in _families():
        raise UnknownNameError("model", name, _families())
    family = data_files.read(_families()[key], "models")
    letters = {letter: int(value) for letter, value in family["models"][key].items()}
    stacks = tuple(
        Stack(entry["name"], _size(entry.get("layers", 1), letters), _parts(entry["parts"], letters))
        for entry in family["stack"]
    )
    return Model(key, family["source"], letters["d"], stacks)


def _parts(entries: list[dict[str, Any]], letters: Mapping[str, int]) -> tuple[Part, ...]:
    return tuple(_part(dict(entry), letters) for entry in entries)


def _part(entry: dict[str, Any], letters: Mapping[str, int]) -> Part:
    """Return a part: what is a number or a formula of the letters is a size, the rest are choices."""
    kind = entry.pop("kind")
    name = entry.pop("name", kind)
    choices: dict[str, str | bool] = {}
    for key in CHOICES:
        if key in entry:
            choices[key] = entry.pop(key)
    return Part(kind, name, {key: _size(value, letters) for key, value in entry.items()}, choices)


def _size(value: int | str, letters: Mapping[str, int]) -> int:
    size = value if isinstance(value, int) else evaluate(value, letters)
    if not isinstance(size, int):
        raise ValueError(f"{value!r} is no whole number for {letters}")
    return size


def dense(
    *,
    layers: Quantity,
    width: Quantity,
    heads: Quantity,
    ffn: Quantity,
    vocabulary: Quantity,
    positions: Quantity = 0,
    key_heads: Quantity | None = None,
    head_width: Quantity | None = None,
    gated: bool = False,
    bias: bool = True,
    norm: Literal["layer", "rms"] = "layer",
    tied: bool = True,
) -> Model:
    """Return a decoder that ships with nobody: pre-norm blocks of attention and a feed-forward network.

    Parameters
    ----------
    layers, width, heads, ffn, vocabulary : int
        L, d, H, width of the feed-forward network, and V.
    positions : int
        Rows of a learned table of positions; 0 for rotary ones or ALiBi.
    key_heads, head_width : int, optional
        Default `heads`, and ``width / heads``.
    gated, bias, tied : bool
        Three matrices in the feed-forward network; biases on every linear map of a block; the output head
        is the embedding.
    norm : {"layer", "rms"}
        LayerNorm has a weight and a bias, RMSNorm a weight.

    Returns
    -------
    Model

    Raises
    ------
    OptionError
        If a size is no whole number above 0, or `norm` is unknown.

    Examples
    --------
    >>> shape = dict(layers=12, width=768, heads=12, ffn=3072, vocabulary=50257, positions=1024)
    >>> dense(**shape).stacks[1] == model("gpt2").stacks[1]
    True
    """
    required = {"layers": layers, "width": width, "heads": heads, "ffn": ffn, "vocabulary": vocabulary}
    optional = {"key_heads": key_heads, "head_width": head_width, "positions": positions or None}
    given = required | {name: value for name, value in optional.items() if value is not None}
    sizes = {name: _whole(name, value) for name, value in given.items()}
    if norm not in ("layer", "rms"):
        raise OptionError(f"norm: expected 'layer' or 'rms'; got {norm!r}")
    style: dict[str, str | bool] = {} if norm == "layer" else {"style": norm}
    biased: dict[str, str | bool] = {"bias": "all"} if bias else {}
    attention = {name: size for name, size in sizes.items() if name in ("heads", "key_heads", "head_width")}
    rows = {"rows": sizes["vocabulary"]}
    embeddings = [Part("embedding", "tokens", rows, {"vocabulary": True})]
    if "positions" in sizes:
        embeddings.append(Part("embedding", "positions", {"rows": sizes["positions"]}))
    block = (
        Part("norm", "attention norm", {}, style),
        Part("attention", "attention", attention, biased),
        Part("norm", "ffn norm", {}, style),
        Part("ffn", "ffn", {"width": sizes["ffn"]}, ({"gated": True} if gated else {}) | biased),
    )
    output = (
        Part("norm", "final norm", {}, style),
        Part("head", "head", rows, {"vocabulary": True, "tied": tied}),
    )
    return Model(
        "dense model",
        "as described by the caller",
        sizes["width"],
        (
            Stack("embeddings", 1, tuple(embeddings)),
            Stack("block", sizes["layers"], block),
            Stack("output", 1, output),
        ),
    )


def _whole(name: str, value: Quantity) -> int:
    number = exact(value, name)
    if not isinstance(number, int) or number < 1:
        raise OptionError(f"{name}: expected a whole number above 0; got {value!r}")
    return number
