"""Inference: how much a model and its cache hold, how many sequences fit, how long prompt and answer take.

>>> kv_cache(model="llama-2-7b", tokens=4096).total  # 2 GiB
2147483648
>>> one = inference(Serving("llama-2-7b", "a100-80gb", prompt=512, generated=128))
>>> one.bound["weights_step"], one.bound["weights_prompt"]
('memory', 'compute')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from memsim import data_files
from memsim.decoder import decoder_letters
from memsim.derivation import derive
from memsim.estimate import Estimate, Term, estimate, term
from memsim.formula import evaluate
from memsim.hardware import hardware
from memsim.model import Model
from memsim.serving_formulas import CACHE, SERVING
from memsim.speculative import expected_tokens
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError, UnknownNameError

__all__ = [
    "LETTERS",
    "Inference",
    "Serving",
    "batch_limit",
    "bits_per_weight",
    "inference",
    "kv_cache",
    "quantized_weights",
    "served_speculation",
    "weight_formats",
]

LETTERS: dict[str, str] = {
    "b": "sequences at a time",
    "s": "tokens of a prompt",
    "g": "tokens of an answer",
    "a": "tokens of a sequence in a step of decoding: 1, or those that are verified",
    "t": "tensor-parallel ranks",
    "y": "bytes of an activation",
    "y_w": "bytes of a weight of a layer, with its share of scales",
    "y_h": "bytes of a weight of embedding, norms and head",
    "y_c": "bytes of an element of the cache",
    "κ": "share of the scores that a causal mask leaves",
    "capacity": "bytes of memory that may be filled",
}


def weight_formats() -> list[str]:
    """Return the formats of weights that `bits_per_weight` knows.

    >>> {"bf16", "int8", "nf4", "q4_k"} <= set(weight_formats())
    True
    """
    return list(data_files.read("weight_formats")["formats"])


def bits_per_weight(format: str) -> Estimate:  # noqa: A002 (the field's name)
    """Return the bits that a stored weight takes, its share of scales and zero points among them.

    Raises
    ------
    UnknownNameError
        If there is no such format.

    Examples
    --------
    >>> [bits_per_weight(format=name).total for name in ("nf4", "q6_k")]
    [Fraction(9, 2), Fraction(105, 16)]
    """
    known = data_files.read("weight_formats")["formats"]
    if format not in known:
        raise UnknownNameError("format of weights", format, known)
    found = known[format]
    return estimate(f"bits of {format}", [term("bits a weight", found["bits"], {}, "1", found["source"])])


def quantized_weights(*, parameters: Quantity, bits: Quantity) -> Estimate:
    """Return the bytes of weights at so many bits each.

    >>> quantized_weights(parameters="7B", bits=4.5).total
    3937500000
    """
    values = positive_values(Ψ=parameters, k=bits)
    return estimate("quantized weights", [term("weights", "Ψ*k/8", values, "B", "bits of a weight")])


def kv_cache(*, model: str | Model, tokens: Quantity = 1, itemsize: Quantity = 2) -> Estimate:
    """Return the bytes that a cache keeps of `tokens` tokens.

    Parameters
    ----------
    model : str or Model
        Grouped heads keep ``2 L G k`` elements a token, latent attention its latent and its rotary key.
    tokens : int
        Of all sequences.
    itemsize : float
        Bytes of an element.

    Returns
    -------
    Estimate

    Raises
    ------
    OptionError
        If the model is no decoder, or a number is not positive.

    Examples
    --------
    >>> [kv_cache(model=name).total for name in ("llama-2-70b", "deepseek-v2")]
    [327680, 69120]
    """
    values = positive_values(T=tokens, y_c=itemsize)
    letters = decoder_letters(model) | values
    one = derive(CACHE, letters)["token"]
    return estimate("cache", [term("cache", "T*A_c*L*y_c", letters, "B", one.source)], leaves_out="paging")


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, on what, and how.

    Attributes
    ----------
    model : str or Model
        A decoder, by name or description.
    hardware : str
        Its name.
    tensor : int
        Ranks among which the model is divided.
    batch, prompt, generated : int
        Sequences at a time, tokens of a prompt and of an answer.
    weights : str
        Format of the layers' weights, see `weight_formats`; products are in `precision`.
    cache : str
        Format of the cache.
    precision : str
        Whose peak rate holds.
    verified : int
        Tokens of a sequence that a step of decoding goes through: 1, or those of speculative decoding.
    capacity : float, optional
        Bytes that may be filled: all of an accelerator's.
    latency, compute, memory, network : float
        Seconds a message, and the share of its peak that each reaches.
    """

    model: str | Model
    hardware: str
    tensor: int = 1
    batch: int = 1
    prompt: int = 1
    generated: int = 1
    weights: str = "bf16"
    cache: str = "bf16"
    precision: str = "bf16"
    verified: int = 1
    capacity: Quantity | None = None
    latency: Quantity = 0
    compute: Quantity = 1
    memory: Quantity = 1
    network: Quantity = 1

    def letters(self) -> dict[str, Number]:
        """Return the values of all letters, exact.

        Raises
        ------
        OptionError
            If a number is out of range.
        UnknownNameError
            If a name is unknown.
        """
        card = hardware(self.hardware)
        counts = {
            "t": self.tensor,
            "b": self.batch,
            "s": self.prompt,
            "g": self.generated,
            "a": self.verified,
        }
        if not all(isinstance(count, int) for count in counts.values()):
            raise OptionError(f"ranks, batch and tokens: expected whole numbers; got {counts}")
        capacity = card.hbm.value if self.capacity is None else self.capacity
        shares = {"η_c": self.compute, "η_m": self.memory, "η_n": self.network}
        found = positive_values(**counts, capacity=capacity, **shares)
        if max(found[name] for name in shares) > 1:
            raise OptionError(f"efficiencies: expected shares up to 1; got {shares}")
        found |= {"α": exact(self.latency, "latency"), "R": card.peak(self.precision).value}
        if found["α"] < 0:
            raise OptionError(f"latency: expected a number from 0; got {self.latency!r}")
        found |= {"M": card.hbm_bandwidth.value, "N": card.node_size.value, "W": card.link.value}
        found |= {"w": card.network.value, "y": 2, "y_h": 2, "κ": Fraction(1, 2)}
        found |= {"y_w": Fraction(bits_per_weight(self.weights).total) / 8}
        found |= {"y_c": Fraction(bits_per_weight(self.cache).total) / 8}
        letters = decoder_letters(self.model)
        if evaluate("H % t", letters | found):
            raise OptionError(f"tensor ranks must divide {letters['H']} heads; got {self.tensor}")
        return letters | found


class Inference(NamedTuple):
    """What a serving takes; estimates, and every quantity by its name in the formulas.

    Attributes
    ----------
    memory : Estimate
        Of a rank.
    prefill, decode : Estimate
        The prompt's pass, and a step of decoding at the mean context.
    bound : mapping of str to str
        What limits a product: ``"compute"`` or ``"memory"``.
    quantities : mapping of str to Term
        All of them.
    """

    memory: Estimate
    prefill: Estimate
    decode: Estimate
    bound: Mapping[str, str]
    quantities: Mapping[str, Term]

    def value(self, name: str) -> Number:
        """Return the value of a quantity, such as ``"rate"``."""
        return self.quantities[name].value


def inference(serving: Serving) -> Inference:
    """Return memory and time of serving.

    Parameters
    ----------
    serving : Serving
        What is served, on what.

    Returns
    -------
    Inference
        Exact.

    Raises
    ------
    OptionError
        If a number is out of range, or the model is no decoder.

    Notes
    -----
    Every sequence has the same lengths.  Weights in few bits are read as such and multiplied in `precision`.
    A cache that ranks cannot divide, with fewer key heads than ranks or a latent, is held by each of them.

    References
    ----------
    .. [1] Pope et al. 2022, arXiv:2211.05102.

    Examples
    --------
    >>> served = Serving("llama-2-70b", "h100-sxm", tensor=8, batch=64, prompt=1024, generated=256)
    >>> inference(served).value("rate") > inference(replace(served, batch=1)).value("rate")
    True
    """
    letters = serving.letters()
    found = derive(SERVING, letters)

    def sum_of(name: str, parts: tuple[str, ...]) -> Estimate:
        return estimate(name, [found[part] for part in parts if found[part].value], leaves_out=left_out)

    left_out = "sampling, scheduling, kernels' launches"
    passes = dict.fromkeys(("prompt", "step"), ("weights", "attention", "links", "head"))
    bound = {
        f"weights_{name}": "memory"
        if found[f"weights_{name}"].value * letters["R"] * letters["η_c"] > found[f"FLOP_{name}"].value
        else "compute"
        for name in passes
    }
    prefill, decode = (
        sum_of(title, tuple(f"{part}_{name}" for part in passes[name]))
        for name, title in (("prompt", "time to the first token"), ("step", "step of decoding"))
    )
    memory = estimate(
        "memory of a rank",
        [found[part] for part in ("weights", "cache", "working")],
        leaves_out="paging of the cache, workspaces, the context of the driver",
    )
    return Inference(memory, prefill, decode, bound, found)


def batch_limit(serving: Serving) -> int:
    """Return how many sequences fit at a time; 0 if the weights alone do not.

    >>> batch_limit(Serving("llama-2-7b", "a100-80gb", prompt=3072, generated=1024))
    30
    """
    return max(0, int(inference(serving).value("limit")))


def served_speculation(target: Serving, draft: str | Model, *, alpha: Quantity, gamma: int) -> Estimate:
    """Return the improvement of walltime by speculative decoding, with times of both models on the hardware.

    Parameters
    ----------
    target : Serving
        The model that is sped up.
    draft : str or Model
        The model that drafts, served alike.
    alpha : float
        Acceptance rate.
    gamma : int
        Drafted tokens a pass of the target.

    Returns
    -------
    Estimate
        Of unit 1: ``E T(1) / (γ T_d + T(γ + 1))``.  A pass over γ + 1 tokens of many sequences can take
        longer than over one, which `memsim.speculative.speculative_speedup` leaves out.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, theorem 3.8.

    Examples
    --------
    >>> served = Serving("llama-2-70b", "h100-sxm", tensor=8, prompt=512, generated=128)
    >>> gain = served_speculation(served, "llama-2-7b", alpha=0.8, gamma=4).total
    >>> many = served_speculation(replace(served, batch=512), "llama-2-7b", alpha=0.8, gamma=4).total
    >>> gain > 2 > many
    True
    """
    plain = inference(target).decode.total
    verify = inference(replace(target, verified=gamma + 1)).decode.total
    drafted = inference(replace(target, model=draft)).decode.total
    values = {
        "E": expected_tokens(alpha=alpha, gamma=gamma).total,
        "γ": exact(gamma), "T": plain, "T_d": drafted, "T_v": verify,
    }  # fmt: skip
    source = "Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8"
    return estimate("walltime improvement", [term("speed-up", "E*T/(γ*T_d + T_v)", values, "1", source)])
