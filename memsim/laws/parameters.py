"""Laws of parameter counts: what each choice of an architecture adds, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from memsim.estimate import Estimate
from memsim.model import Model, Part, dense
from refimpl.registry import Case, law
from refimpl.testing import require

Count = Callable[..., Estimate]


def _with_layers(model: Model, factor: int) -> Model:
    stacks = (replace(s, layers=s.layers * factor) if s.name == "block" else s for s in model.stacks)
    return replace(model, stacks=tuple(stacks))


def _with(model: Model, name: str, choices: Mapping[str, str | bool] | None = None, **sizes: int) -> Model:
    """Return the model with other choices and sizes in every part called `name`."""

    def changed(part: Part) -> Part:
        if part.name != name:
            return part
        return replace(part, sizes={**part.sizes, **sizes}, choices={**part.choices, **(choices or {})})

    stacks = (replace(s, parts=tuple(map(changed, s.parts))) for s in model.stacks)
    return replace(model, stacks=tuple(stacks))


@law("cost.parameters")
def twelve_times_width_squared(f: Count, case: Case, _close: object) -> None:
    """Plain attention and a feed-forward network of 4d hold 12 d² weights a layer: 4 d² and 8 d²."""
    given = case.kwargs["model"]
    d, layers = given.width, given.stacks[1].layers
    plain = dense(layers=layers, width=d, heads=1, ffn=4 * d, vocabulary=1, bias=False)
    found = case.replace(model=plain).call(f)
    parts = (found["block: attention"], found["block: ffn"])
    require(parts == (4 * layers * d**2, 8 * layers * d**2), f"{layers} layers of width {d} hold {parts}")


@law("cost.parameters")
def every_layer_adds_the_same(f: Count, case: Case, _close: object) -> None:
    """Twice and three times the layers add the layers' parameters once and twice."""
    given = case.kwargs["model"]
    one, two, three = (case.replace(model=_with_layers(given, n)).call(f) for n in (1, 2, 3))
    require(two.total - one.total == three.total - two.total, "layers are not alike")
    layers = sum(item.value for item in one.terms if item.name.startswith("block: "))
    require(
        two.total - one.total == layers, f"as many layers again add {two.total - one.total}, not {layers}"
    )


@law("cost.parameters")
def an_untied_head_is_another_embedding(f: Count, case: Case, _close: object) -> None:
    """A head of its own holds as much as the embedding, padding included; a tied one nothing."""
    given = case.kwargs["model"]
    tied, untied = (
        case.replace(model=_with(given, "head", {"tied": choice})).call(f) for choice in (True, False)
    )
    require(untied.total - tied.total == tied["embeddings: tokens"], "a head unlike the embedding")
    require(tied["output: head"] == 0, f"a tied head holds {tied['output: head']}")


@law("cost.parameters")
def key_heads_save_their_projections(f: Count, case: Case, _close: object) -> None:
    """One key head fewer saves two projections of width k, with their biases, in each layer."""
    given = case.kwargs["model"]
    attention, layers = given.part("block", "attention"), given.stacks[1].layers
    models = (_with(given, "attention", heads=6, key_heads=heads, head_width=5) for heads in (3, 2))
    counts = [case.replace(model=item).call(f)["block: attention"] for item in models]
    rows = given.width + (attention.choices.get("bias") == "all")
    require(counts[0] - counts[1] == layers * 2 * 5 * rows, f"a key head less saves {counts[0] - counts[1]}")


@law("cost.parameters")
def a_gate_is_a_third_matrix(f: Count, case: Case, _close: object) -> None:
    """A gated feed-forward network has another matrix of d x f, with its bias."""
    given = case.kwargs["model"]
    ffn, layers = given.part("block", "ffn"), given.stacks[1].layers
    models = (_with(given, "ffn", {"gated": choice}) for choice in (False, True))
    plain, gated = (case.replace(model=item).call(f)["block: ffn"] for item in models)
    third = layers * ffn.sizes["width"] * (given.width + (ffn.choices.get("bias") == "all"))
    require(gated - plain == third, f"a gate adds {gated - plain}, not {third}")


@law("cost.parameters")
def rms_norm_has_no_bias(f: Count, case: Case, _close: object) -> None:
    """Both norms of a layer hold 4 d parameters as LayerNorm, 2 d as RMSNorm."""
    given = case.kwargs["model"]
    for style, each in (("layer", 2), ("rms", 1)):
        model = _with(given, "ffn norm", {"style": style})
        found = case.replace(model=model).call(f)["block: ffn norm"]
        require(found == given.stacks[1].layers * each * given.width, f"norms of style {style} hold {found}")


@law("cost.parameters")
def padding_adds_rows_of_the_width(f: Count, case: Case, _close: object) -> None:
    """A padded vocabulary has the next multiple of rows, and less than a multiple more of them."""
    pad, given = case.kwargs["pad_vocabulary"], case.kwargs["model"]
    rows = given.part("embeddings", "tokens").sizes["rows"]
    plain, padded = (case.replace(pad_vocabulary=m).call(f)["embeddings: tokens"] for m in (1, pad))
    held, rest = divmod(padded, given.width)
    require(plain == rows * given.width, f"{rows} rows of {given.width} hold {plain}")
    require(rest == 0 and held % pad == 0 and rows <= held < rows + pad, f"{rows} rows padded to {held}")
