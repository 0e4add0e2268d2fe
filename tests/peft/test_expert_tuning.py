"""Experts as modules: PyTorch's gradients with frozen experts, new experts, refusals, and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.peft import expert_tuning, expert_tuning_vjp
from refimpl.testing import check

registry.load()
T, D, E, F = 7, 3, 4, 5
TRAINED = np.array([True, False, True, False])


def arrays(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    shapes = (T, D), (E, D, F), (E, F, D), (D, E), (E, D, F), (E, F, D)
    return tuple(rng.standard_normal(shape) for shape in shapes)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_are_those_of_autograd(k: int) -> None:
    """Experts as modules with `requires_grad` off where they are frozen; the router frozen too."""
    torch = pytest.importorskip("torch")
    x, delta_in, delta_out, w_router, w_in, w_out = arrays()
    dy = np.random.default_rng(1).standard_normal((T, D))
    leaf = torch.tensor(x, requires_grad=True)
    experts = []
    for e in range(E):
        first, second = (torch.nn.Linear(*size, bias=False, dtype=torch.float64) for size in ((D, F), (F, D)))
        for layer, w, delta in ((first, w_in, delta_in), (second, w_out, delta_out)):
            layer.weight.data = torch.tensor((w[e] + TRAINED[e] * delta[e]).T.copy())
            layer.weight.requires_grad_(bool(TRAINED[e]))
        experts.append((first, second))
    logits = leaf @ torch.tensor(w_router)
    values, chosen = logits.topk(k, dim=1)
    shares = torch.softmax(values, dim=1)
    y = torch.zeros(T, D, dtype=torch.float64)
    for e, (first, second) in enumerate(experts):
        share = (shares * (chosen == e)).sum(dim=1, keepdim=True)
        y = y + share * second(torch.relu(first(leaf)))
    y.backward(torch.tensor(dy))
    given = (x, delta_in, delta_out, w_router, w_in, w_out)
    np.testing.assert_allclose(expert_tuning(*given, trained=TRAINED, k=k), y.detach().numpy(), atol=1e-12)
    found = expert_tuning_vjp(*given, dy, trained=TRAINED, k=k)
    np.testing.assert_allclose(found.x, leaf.grad.numpy(), atol=1e-12)
    for e, layers in enumerate(experts):
        for layer, gradient in zip(layers, (found.delta_in[e], found.delta_out[e]), strict=True):
            if layer.weight.grad is None:
                assert not gradient.any()
                assert not TRAINED[e]
            else:
                np.testing.assert_allclose(gradient, layer.weight.grad.numpy().T, atol=1e-12)
    assert found.w_router is found.w_in is found.w_out is None


def test_training_moves_trained_experts_alone_and_learns() -> None:
    """Steps of gradient descent on new behaviour for the tokens of one expert."""
    x, delta_in, delta_out, *layer = arrays()
    delta_in, delta_out = delta_in * 0, delta_out * 0
    wanted = np.random.default_rng(2).standard_normal((T, D))
    losses = []
    for _ in range(60):
        error = expert_tuning(x, delta_in, delta_out, *layer, trained=TRAINED, k=2) - wanted
        losses.append(float(np.sum(error**2)))
        found = expert_tuning_vjp(x, delta_in, delta_out, *layer, 2 * error, trained=TRAINED, k=2)
        delta_in, delta_out = delta_in - 0.01 * found.delta_in, delta_out - 0.01 * found.delta_out
    assert losses[-1] < 0.95 * losses[0]
    assert not delta_in[~TRAINED].any()
    assert delta_in[TRAINED].any()


def test_a_token_of_frozen_experts_teaches_nothing_and_still_passes_its_gradient() -> None:
    given = arrays()
    alone = (given[0][:1], *given[1:])
    chosen = int(np.argmax(given[0][0] @ given[3]))
    trained = np.arange(E) != chosen
    found = expert_tuning_vjp(*alone, np.ones((1, D)), trained=trained, k=1)
    assert not found.delta_in.any()
    assert not found.delta_out.any()
    assert found.x.any()


def test_a_closed_expert_may_hold_anything() -> None:
    x, delta_in, delta_out, w_router, w_in, w_out = arrays()
    bias = np.array([0.0, 0.0, 0.0, -np.inf])
    w_in[3] = np.nan
    given = (x, delta_in, delta_out, w_router, w_in, w_out)
    assert np.isfinite(expert_tuning(*given, trained=TRAINED, k=4, router_bias=bias)).all()
    found = expert_tuning_vjp(*given, np.ones((T, D)), trained=TRAINED, k=4, router_bias=bias)
    assert np.isfinite(found.x).all()


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (DTypeError, "trained: expected booleans", {"trained": np.ones(E)}),
        (ShapeError, "trained", {"trained": np.ones(3, bool)}),
        (OptionError, "k", {"k": 5}),
        (OptionError, "router_bias: expected numbers or -inf", {"router_bias": np.full(E, -np.inf)}),
        (OptionError, "router_bias", {"router_bias": np.array([0, 0, 0, np.nan])}),
        (OptionError, "router_bias", {"router_bias": np.array([0, 0, 0, np.inf])}),
        (ShapeError, "router_bias", {"router_bias": np.zeros(3)}),
        (OptionError, "delta_gate: expected none", {"delta_gate": np.zeros((E, D, F))}),
        (OptionError, "convention", {"convention": "best"}),
    ],
)
def test_refusals(error: Any, match: str, options: Any) -> None:
    with pytest.raises(error, match=match):
        expert_tuning(*arrays(), **{"trained": TRAINED, "k": 2, **options})
    with pytest.raises(ShapeError, match="delta_in"):
        expert_tuning(arrays()[0], np.ones((1, D, F)), *arrays()[2:], trained=TRAINED, k=2)


def all_are_trained(*args: Any, trained: Any, **options: Any) -> Any:
    return expert_tuning(*args, trained=np.ones_like(trained), **options)


def mask_inverted(*args: Any, trained: Any, **options: Any) -> Any:
    return expert_tuning(*args, trained=~trained, **options)


def way_out_frozen(x: Any, delta_in: Any, delta_out: Any, *rest: Any, **options: Any) -> Any:
    return expert_tuning(x, delta_in, delta_out * 0, *rest, **options)


def multiplied_by_the_mask(
    x: Any, delta_in: Any, delta_out: Any, *layer: Any, trained: Any, **options: Any
) -> Any:
    """An infinite update of a frozen expert becomes NaN."""
    with np.errstate(invalid="ignore"):
        deltas = [delta * trained[:, None, None] for delta in (delta_in, delta_out)]
    return expert_tuning(x, *deltas, *layer, trained=np.ones_like(trained), **options)


def frozen_experts_dropped(x: Any, *args: Any, trained: Any, **options: Any) -> Any:
    w_out = args[-1] * trained[:, None, None].astype(args[-1].dtype)
    return expert_tuning(x, *args[:-1], w_out, trained=trained, **options)


def bias_forgotten(*args: Any, router_bias: Any = None, **options: Any) -> Any:
    return expert_tuning(*args, **options)


def closed_by_a_large_number(*args: Any, router_bias: Any = None, **options: Any) -> Any:
    soft = None if router_bias is None else np.maximum(router_bias, -2).astype(router_bias.dtype)
    return expert_tuning(*args, router_bias=soft, **options)


def one_expert_more(*args: Any, k: int, **options: Any) -> Any:
    return expert_tuning(*args, k=min(k + 1, args[3].shape[1]), **options)


def last_of_the_gates_frozen(*args: Any, delta_gate: Any = None, **options: Any) -> Any:
    return expert_tuning(*args, **options)


@pytest.mark.parametrize(
    "f",
    [
        all_are_trained,
        mask_inverted,
        way_out_frozen,
        multiplied_by_the_mask,
        frozen_experts_dropped,
        bias_forgotten,
        closed_by_a_large_number,
        one_expert_more,
        last_of_the_gates_frozen,
    ],
)
def test_mutant_is_caught(f: Callable[..., Any]) -> None:
    failed = {outcome.check for outcome in check("peft.expert_tuning", f, examples=12).failed}
    assert failed - {"reference"}, f"survived the laws; failed: {failed}"
