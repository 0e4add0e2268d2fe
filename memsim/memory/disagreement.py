"""The disagreement of estimators: the same run as each of them counts it, and why they differ.

>>> from memsim.memory.run import Run
>>> run = Run(gpus=8, stage=1, sequence=4096, recompute="selective")
>>> found = {view.name: view for view in disagreement(model="llama-2-7b", run=run)}
>>> megatron = found["megatron"]
>>> round(float(megatron.total) / 2**20), megatron.printed
(63497, '63497 MiB')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from memsim import data_files
from memsim.estimate import Estimate, estimate, term
from memsim.memory.allocator import play
from memsim.memory.rank_model import ENDS, block_layers
from memsim.memory.run import Run
from memsim.memory.step_memory import Step, step_memory
from memsim.model import Model
from memsim.parameters import model_of, parameters
from memsim.units import SCALES, Number

__all__ = ["COMPONENTS", "View", "disagreement"]

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "buffers")
# Where the kinds of a step's events belong.
_COMPONENT = {
    "weights": "weights",
    "gathered weights": "weights",
    "gradients": "gradients",
    "optimizer states": "optimizer",
    "activations": "activations",
    "gradients of activations": "activations",
    "logits and loss": "activations",
    "buffers": "buffers",
}
_STAGES = (0, 1, 2, 3)
_OURS = "what PyTorch takes, tensor by tensor: memsim.memory.step_memory, held to autograd"


@dataclass(frozen=True, slots=True)
class View:
    """The run as one source counts it.

    Attributes
    ----------
    name, title, source : str
        Its key, its name, and where it stands.
    parts : mapping of str to int or Fraction
        Bytes of each of `COMPONENTS`.
    why : tuple of str
        What it counts otherwise.
    counted : Estimate or None
        Its formulas with the numbers in them; ours have events instead.
    printed, deviation, note : str, float or None, str
        What the tool itself printed for this run, ours by its formulas over that less one, and by whom.
    """

    name: str
    title: str
    source: str
    parts: Mapping[str, Number]
    why: tuple[str, ...]
    counted: Estimate | None = None
    printed: str = ""
    deviation: float | None = None
    note: str = ""

    @property
    def total(self) -> Number:
        """All bytes."""
        return sum(self.parts.values())


def disagreement(*, model: str | Model, run: Run, index: int = 0, step: Step | None = None) -> list[View]:
    """Return how each source counts the memory of one rank in a step.

    Parameters
    ----------
    model : str or Model
        A name, or a description.
    run : Run
        How it is trained.
    index : int
        The stage of the pipeline, for our own counts; the others know one rank of the model only.
    step : Step, optional
        What `memsim.memory.step_memory.step_memory` says of just this, if it is known already.

    Returns
    -------
    list of View
        Ours at the peak, ours if all were alive at once, PyTorch without ZeRO, and the other estimators as
        far as they can count such a run.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If the run does not divide the model, or nothing is known of a part of it.
    """
    described = model_of(model)
    step = step or step_memory(model=described, run=run, index=index)
    views = [*_ours(step, run), _pytorch(described, run)]
    if run.tensor == run.pipeline == 1:
        letters = _letters(described, run)
        if letters is not None:
            known = [
                name for name, entry in _estimators().items() if run.stage in entry.get("stages", _STAGES)
            ]
            views += [_view(name, letters, run) for name in known]
    return [_with_printed(view, described, run) for view in views]


def _ours(step: Step, run: Run) -> list[View]:
    played = play(step)
    at_once = _by_component(step.each_at_most())
    peak = _by_component(step.at_peak())
    after = f"gradients appear as activations go: the peak is in the {step.when}"
    granules = (
        f"PyTorch's allocator makes {played.allocated / 2**30:.2f} GiB of it, and reserves "
        f"{played.reserved / 2**30:.2f} GiB"
    )
    states = f"{run.convention}'s bytes a parameter; every operator's own tensors"
    return [
        View("frugal", "frugal, over time", _OURS, peak, (states, after, granules)),
        View("frugal_at_once", "frugal, all at once", _OURS, at_once, ("the most of each kind, whenever",)),
    ]


def _pytorch(model: Model, run: Run) -> View:
    """Return one rank that trains all in bfloat16 with transformers' own norms and no ZeRO."""
    plain = Run(
        batch=run.batch, sequence=run.sequence, convention="bf16", fused_norm=False,
        recompute="none" if run.recompute == "selective" else run.recompute,
    )  # fmt: skip
    step = step_memory(model=model, run=plain)
    why = (
        "no ZeRO, and nothing in fp32: 8 bytes a parameter, of which gradients come last",
        "norms written out keep their input in fp32; flash attention; an optimizer in one kernel",
        "without a GPU its tracker plays attention, which then keeps two more tensors of the stream a "
        f"layer: {_more(model, run) / 2**30:.2f} GiB",
    )
    return View("pytorch", "PyTorch, all in bfloat16", _OURS, _by_component(step.at_peak()), why)


def _more(model: Model, run: Run) -> int:
    """Return the bytes of two tensors of the stream of each layer."""
    return 2 * 2 * run.batch * run.sequence * model.width * block_layers(model)


def _by_component(kinds: Mapping[str, int]) -> dict[str, Number]:
    parts: dict[str, Number] = dict.fromkeys(COMPONENTS, 0)
    for kind, size in kinds.items():
        parts[_COMPONENT[kind]] += size
    return parts


def _estimators() -> dict[str, dict[str, Any]]:
    data = data_files.read("estimators")
    return {name: entry for name, entry in data.items() if isinstance(entry, dict)}


def _letters(model: Model, run: Run) -> dict[str, Number] | None:
    """Return the letters of the formulas, or None where layers are not those of a dense decoder."""
    parts = {part.kind: part for stack in model.stacks for part in stack.parts}
    for stack in model.stacks:
        if stack.name not in ENDS:
            kinds = [part.kind for part in stack.parts if part.kind != "norm"]
            if sorted(kinds) != ["attention", "ffn"]:
                return None
    if not {"attention", "ffn", "head"} <= set(parts):
        return None
    attention = parts["attention"].sizes
    heads = attention["heads"]
    return {
        "Ψ": parameters(model=model).total,
        "L": block_layers(model),
        "h": model.width,
        "a": heads,
        "G": attention.get("key_heads", heads),
        "k": attention.get("head_width", model.width // heads),
        "f": parts["ffn"].sizes["width"],
        "V": parts["head"].sizes["rows"],
        "b": run.batch,
        "s": run.sequence,
        "w": run.data if run.stage >= 3 else 1,
        "g": run.data if run.stage >= 2 else 1,
        "o": run.data if run.stage >= 1 else 1,
    }


def _view(name: str, letters: Mapping[str, Number], run: Run) -> View:
    entry = _estimators()[name]
    source = entry["source"]
    count = term("parameters", entry["parameters"], letters, "parameters", source)
    values = {**letters, "N": count.value}
    formulas = {
        **{part: entry[part] for part in ("weights", "gradients", "optimizer")},
        "activations": entry["activations"][run.recompute],
        "buffers": entry["buffers"],
    }
    terms = [term(part, formula, values, "B", source) for part, formula in formulas.items()]
    counted = estimate(entry["title"], [count, *terms])
    parts = {item.name: item.value for item in terms}
    return View(name, entry["title"], source, parts, tuple(entry["why"]), counted)


def _with_printed(view: View, model: Model, run: Run) -> View:
    """Add what the tool printed, if it was run on just this."""
    here = {**asdict(run), "model": model.name}
    alike = {"tensor": 1, "pipeline": 1, "offload": "none", "attention": "flash", "dropout": False}
    for entry in data_files.read("estimators")["printed"]:
        wanted = {**alike, **entry["case"]}
        if entry["estimator"] == view.name and all(here[key] == value for key, value in wanted.items()):
            printed = Fraction(entry["value"]) * SCALES[entry["unit"]][1]
            return replace(
                view,
                printed=f"{entry['value']} {entry['unit']}",
                deviation=float(Fraction(view.total) / printed - 1),
                note=entry["source"],
            )
    return view
