"""Laws of mixture-of-experts models: what more experts, wider ones and longer sequences add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from memsim.estimate import Estimate
from memsim.model import Model, Part
from memsim.units import printed_decimals, round_half_up
from refimpl.registry import Case, law
from refimpl.testing import require

Count = Callable[..., Any]


def _with(model: Model, kind: str, **sizes: int) -> Model:
    """Return the model with other sizes in all parts of a kind, and routers that fit."""

    def changed(part: Part) -> Part:
        if part.kind == kind:
            return replace(part, sizes={**part.sizes, **sizes})
        if part.name == "router" and "experts" in sizes:
            return replace(part, sizes={**part.sizes, "outputs": sizes["experts"]})
        return part

    stacks = (replace(s, parts=tuple(map(changed, s.parts))) for s in model.stacks)
    return replace(model, stacks=tuple(stacks))


def _experts(model: Model) -> list[tuple[int, Part]]:
    """Return the parts that are experts, with the number of their layers."""
    return [(stack.layers, part) for stack in model.stacks for part in stack.parts if part.kind == "experts"]


def _counts(f: Count, case: Case, model: Model) -> tuple[Any, Any]:
    total, activated = case.replace(model=model).call(f)
    return total.total, activated.total


def _matrices(part: Part) -> int:
    return 3 if part.choices.get("gated") else 2


@law("cost.moe_parameters")
def activated_are_some_of_all(f: Count, case: Case, _close: object) -> None:
    """A token activates at most all parameters, and all of them if and only if it goes to every expert."""
    model = case.kwargs["model"]
    total, activated = _counts(f, case, model)
    require(activated <= total, f"{activated} of {total} are activated")
    chosen = all(part.sizes["active"] == part.sizes["experts"] for _, part in _experts(model))
    require(
        (activated == total) == chosen, f"{activated} of {total} activated, every expert chosen: {chosen}"
    )


@law("cost.moe_parameters")
def an_expert_more_costs_memory_alone(f: Count, case: Case, _close: object) -> None:
    """One expert more adds its matrices and a column of the router in all, and the column to a token."""
    model = case.kwargs["model"]
    parts = _experts(model)
    if not parts:
        return
    layers, part = parts[0]
    before = _counts(f, case, model)
    after = _counts(f, case, _with(model, "experts", experts=part.sizes["experts"] + 1))
    column = layers * model.width
    matrices = _matrices(part) * layers * model.width * part.sizes["width"]
    require(after[0] - before[0] == matrices + column, f"an expert more adds {after[0] - before[0]}")
    require(after[1] - before[1] == column, f"an expert more activates {after[1] - before[1]}")


@law("cost.moe_parameters")
def an_activated_expert_more_costs_compute_alone(f: Count, case: Case, _close: object) -> None:
    """One more expert a token adds its matrices to what is activated, and nothing to the total."""
    model = case.kwargs["model"]
    parts = _experts(model)
    if not parts or parts[0][1].sizes["active"] == parts[0][1].sizes["experts"]:
        return
    layers, part = parts[0]
    before = _counts(f, case, model)
    after = _counts(f, case, _with(model, "experts", active=part.sizes["active"] + 1))
    matrices = _matrices(part) * layers * model.width * part.sizes["width"]
    require(after[0] == before[0], f"the total changed by {after[0] - before[0]}")
    require(after[1] - before[1] == matrices, f"a choice more activates {after[1] - before[1]}")


@law("cost.moe_parameters")
def half_as_wide_and_twice_as_many(f: Count, case: Case, _close: object) -> None:
    """Experts cut in two, twice as many of them activated, hold the same: only the router grows."""
    model = case.kwargs["model"]
    parts = _experts(model)
    if not parts:
        return
    layers, part = parts[0]
    sizes = part.sizes
    whole = _with(model, "experts", width=2 * sizes["width"])
    halves = _with(model, "experts", experts=2 * sizes["experts"], active=2 * sizes["active"])
    a, b = _counts(f, case, whole), _counts(f, case, halves)
    columns = layers * model.width * sizes["experts"]
    require(b[0] - a[0] == columns and b[1] - a[1] == columns, f"cut in two, experts hold {b}, not {a}")


@law("cost.moe_parameters")
def one_expert_is_a_dense_network(f: Count, case: Case, _close: object) -> None:
    """With one expert a layer all parameters are activated, a network and a router's column in each layer."""
    model = _with(case.kwargs["model"], "experts", experts=1, active=1)
    total, activated = _counts(f, case, model)
    none = replace(model, stacks=tuple(
        replace(s, parts=tuple(p for p in s.parts if p.kind != "experts" and p.name != "router"))
        for s in model.stacks
    ))  # fmt: skip
    each = sum(n * model.width * (_matrices(p) * p.sizes["width"] + 1) for n, p in _experts(model))
    require(total == activated == _counts(f, case, none)[0] + each, f"{total}, {activated} with one expert")


# Total and activated parameters in billions, as the reports print them.
_NAMES = {
    "deepseekmoe-2b": ("2.0", "0.3"),
    "deepspeed-moe-52b": ("52", "1.3"),
    "mixtral-8x7b": ("47", "13"),
    "qwen1.5-moe": ("14.3", "2.7"),
    "switch-395b": ("395", None),
}


@law("cost.moe_parameters")
def a_name_says_the_size(f: Count, case: Case, _close: object) -> None:  # noqa: ARG001
    """Described models have the total and activated parameters that their reports print, once rounded."""
    for name, printed in _NAMES.items():
        for found, text in zip(f(model=name), printed, strict=True):
            if text is not None:
                billions = round_half_up(Fraction(found.total) / 10**9, printed_decimals(text))
                require(f"{billions}" == text, f"{name}: {found.name} are {billions}B, printed {text}B")


def _flops(f: Callable[..., Estimate], case: Case, **changed: Any) -> Any:
    return case.replace(**changed).call(f).total


@law("cost.moe_flops")
def flops_are_linear_in_layers(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Each layer costs the same; the head is there once."""
    L = case.kwargs["layers"]
    one, two, three = (_flops(f, case, layers=n * L) for n in (1, 2, 3))
    require(two - one == three - two, "layers are not alike")
    head = 6 * case.kwargs["sequence"] * case.kwargs["width"] * case.kwargs["vocabulary"]
    require(one - (two - one) == head, f"without layers {one - (two - one)} FLOP are left, not {head}")


@law("cost.moe_flops")
def a_network_costs_six_times_its_weights(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """One more network a token costs 6 FLOP for each of its weights and each token, in every layer."""
    given = case.kwargs
    more = _flops(f, case, activated=given["activated"] + 1) - _flops(f, case)
    d, sized = given["width"], "expert_width" in given
    weights = 3 * d * given["expert_width"] if sized else 8 * d**2
    require(more == 6 * given["sequence"] * given["layers"] * weights, f"a network more costs {more}")


@law("cost.moe_flops")
def a_network_may_be_cut(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Four networks of a fourth of the width cost what one does: 8/3 d is the width of a standard one."""
    whole = _flops(f, case.without("expert_width"), activated=1)
    cut = _flops(f, case, activated=4, expert_width=Fraction(2 * case.kwargs["width"], 3))
    require(whole == cut, f"cut in four, a network costs {cut}, not {whole}")


@law("cost.moe_flops")
def only_scores_grow_with_the_square(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Twice the sequence costs twice as much and another 24 L d l² for scores and mixing."""
    given = case.kwargs
    extra = _flops(f, case, sequence=2 * given["sequence"]) - 2 * _flops(f, case)
    expected = 24 * given["layers"] * given["width"] * given["sequence"] ** 2
    require(extra == expected, f"twice the sequence costs {extra} more than twice, not {expected}")


@law("cost.moe_flops.matrices")
def a_backward_pass_is_two_forward_ones(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Forward and backward cost three times the forward pass."""
    both, forward = _flops(f, case, direction="both"), _flops(f, case, direction="forward")
    require(both == 3 * forward, f"{both} is not three times {forward}")


@law("cost.moe_flops.matrices")
def experts_that_are_not_chosen_cost_nothing(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """An expert more costs its column of the router only, an activated one its matrices."""
    model, l = case.kwargs["model"], case.kwargs["sequence"]  # noqa: E741 (the sequence length of the formulas)
    parts = _experts(model)
    if not parts:
        return
    (layers, part), per_weight = parts[0], 2 if case.kwargs["direction"] == "forward" else 6
    larger = _with(model, "experts", experts=part.sizes["experts"] + 1)
    more = _flops(f, case, model=larger) - _flops(f, case)
    require(more == per_weight * l * layers * model.width, f"an idle expert costs {more}")
    chosen = _with(larger, "experts", active=part.sizes["active"] + 1)
    matrices = _matrices(part) * model.width * part.sizes["width"]
    most = _flops(f, case, model=chosen) - _flops(f, case, model=larger)
    require(most == per_weight * l * layers * matrices, f"an activated expert costs {most}")


@law("cost.moe_flops.matrices")
def scores_alone_see_other_tokens(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Twice the sequence costs twice as much, and two more products of l x l with all heads."""
    model, l = case.kwargs["model"], case.kwargs["sequence"]  # noqa: E741 (the sequence length of the formulas)
    extra = _flops(f, case, sequence=2 * l) - 2 * _flops(f, case)
    heads = sum(
        stack.layers * part.sizes["heads"] * part.sizes["head_width"]
        for stack in model.stacks
        for part in stack.parts
        if part.kind == "attention"
    )
    per_weight = 2 if case.kwargs["direction"] == "forward" else 6
    require(extra == 2 * per_weight * 2 * l**2 * heads, f"twice the sequence costs {extra} more than twice")


@law("cost.moe_communication")
def what_is_sent_out_comes_back(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Over all ranks as many bytes go to experts as come back, for each expert p - 1 buffers."""
    given = {**case.kwargs, "direction": "forward"}
    E, p = given["experts"], given["ranks"]
    held = [E // p + (rank < E % p) for rank in range(p)]
    ranks = [f(**{**given, "held": own}) for own in held]
    out, back = (sum(rank[f"forward, {way}"] for rank in ranks) for way in ("dispatch", "combine"))
    buffers = given["capacity"] * given["width"] * given["itemsize"]
    require(out == back == (p - 1) * E * buffers, f"{out} bytes go out, {back} come back")


@law("cost.moe_communication")
def an_expert_more_is_sent_less_and_sends_more(
    f: Callable[..., Estimate], case: Case, _close: object
) -> None:
    """A rank with one expert more keeps a buffer at home and sends p - 1 back."""
    given = {**case.kwargs, "direction": "forward"}
    if not given["held"]:
        return
    more, fewer = f(**given), f(**{**given, "held": given["held"] - 1})
    buffer = given["capacity"] * given["width"] * given["itemsize"]
    steps = [more[f"forward, {way}"] - fewer[f"forward, {way}"] for way in ("dispatch", "combine")]
    require(steps == [-buffer, (given["ranks"] - 1) * buffer], f"an expert more changes {steps} bytes")


@law("cost.moe_communication")
def both_passes_send_alike(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """Gradients of outputs and tokens are as large as these: both passes send twice what one does."""
    one, back, both = (
        f(**{**case.kwargs, "direction": way}).total for way in ("forward", "backward", "both")
    )
    require(one == back and both == 2 * one, f"{one} bytes forward, {back} backward, {both} together")


@law("cost.moe_communication")
def one_rank_sends_nothing(f: Callable[..., Estimate], case: Case, _close: object) -> None:
    """A single rank has all experts and sends nothing."""
    alone = f(**{**case.kwargs, "ranks": 1, "held": case.kwargs["experts"]}).total
    require(alone == 0, f"one rank sends {alone} bytes")
