"""Routings worked out by hand from what the sources' code does: capacities, drops, weights."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.memory import Memory
from refimpl.moe.batch_priority import batch_priority_routing
from refimpl.moe.capacity import expert_capacity
from refimpl.moe.dispatch import combine_tensor, dispatch, dispatch_by_indices
from refimpl.moe.gshard import gshard_as_printed_routing
from refimpl.moe.gshard_as_coded import gshard_as_coded_routing
from refimpl.moe.samples import sample_layer, sample_routed
from refimpl.moe.switch import switch, switch_routing, switch_vjp
from refimpl.numerics import round_to

LOG3 = np.log(3.0)


def router(*wishes: int, experts: int, strength: float = LOG3) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with one feature each, and a router that gives token t the logit `strength` for its wish."""
    w_router = np.zeros((len(wishes), experts))
    w_router[np.arange(len(wishes)), wishes] = strength
    return np.eye(len(wishes)), w_router


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "mesh_tf", "flaxformer", "vmoe"),
    [
        # Mesh-TF: int() then the minimum; flaxformer: round() then the minimum; V-MoE: ceil() then fours.
        (26, 4, 1.0, 6, 6, 8),  # 6.5: down; to even; to 7, then 8
        (22, 4, 1.0, 5, 6, 8),  # 5.5: down; to even; to 6, then 8
        (27, 4, 1.0, 6, 7, 8),  # 6.75
        (8, 4, 1.0, 4, 4, 4),  # 2: the minimum of 4 in all three
        (32, 4, 1.25, 10, 10, 12),
        (1024, 128, 1.25, 10, 10, 12),
        (1024, 64, 2.0, 32, 32, 32),
        (3, 1, 2.0, 4, 6, 8),  # Mesh-TF: no more than the group, then no less than 4
        (100, 3, 1.0, 33, 33, 36),
    ],
)
def test_capacity_of_each_source(
    tokens: int, experts: int, factor: float, mesh_tf: int, flaxformer: int, vmoe: int
) -> None:
    found = [expert_capacity(tokens, experts, factor=factor, rounding="mesh_tf"),
             expert_capacity(tokens, experts, factor=factor, rounding="flaxformer"),
             expert_capacity(tokens, experts, factor=factor, rounding="vmoe")]  # fmt: skip
    assert found == [mesh_tf, flaxformer, vmoe]


def test_mesh_tensorflow_drops_behind_the_capacity() -> None:
    # Ten tokens, two experts, factor 1.0: int(10 / 2) = 5 places. Expert 0 is wanted by tokens 0 1 2 4 5 6 8.
    x, w_router = router(0, 0, 0, 1, 0, 0, 0, 1, 0, 1, experts=2)
    routing = switch_routing(x, w_router, capacity_factor=1.0, rounding="mesh_tf")
    assert routing.capacity == 5
    assert routing.expert[:, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 1]
    assert routing.slot[:, 0].tolist() == [0, 1, 2, 0, 3, 4, -1, 1, -1, 2]
    # The gate of every token is e^{log 3} / (e^{log 3} + 1).
    np.testing.assert_allclose(routing.weight[:, 0], [0.75] * 6 + [0, 0.75, 0, 0.75], rtol=1e-15)


def test_flaxformer_rounds_half_to_even_and_so_drops_one_less() -> None:
    # Eleven tokens, two experts: 5.5 places: int() gives 5, round() gives 6.
    wishes = (0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1)
    x, w_router = router(*wishes, experts=2)
    mesh, flax = (
        switch_routing(x, w_router, capacity_factor=1.0, rounding=name) for name in ("mesh_tf", "flaxformer")
    )
    assert mesh.slot[:, 0].tolist() == [0, 1, 2, 0, 3, 4, -1, 1, -1, 2, 3]
    assert flax.slot[:, 0].tolist() == [0, 1, 2, 0, 3, 4, 5, 1, -1, 2, 3]


def test_groups_are_routed_by_themselves() -> None:
    # Two groups of three: in each the first token of expert 0 is served; those of group 1 lie behind.
    x, w_router = router(0, 0, 1, 0, 0, 0, experts=2)
    routing = switch_routing(x, w_router, capacity=1, groups=2)
    assert routing.slot[:, 0].tolist() == [0, -1, 0, 1, -1, -1]
    assert routing.capacity == 2


def test_gshard_counts_as_printed_and_as_coded() -> None:
    # Four tokens, three experts, two places. First choices: 0 0 1 2; second: 1 1 0 0. Gates 3/4 and 1/4.
    x = np.eye(4)
    big, small = np.log(3.0), 0.0
    w_router = np.array([[big, small, -9e9], [big, small, -9e9], [small, big, -9e9], [small, -9e9, big]])
    u = np.array([0.6, 0.1, 0.1, 0.1])  # 2 g2 = 0.5: token 0's second choice is taken out
    printed = gshard_as_printed_routing(x, w_router, capacity=2, uniforms=u)
    # Printed: c = (2, 1, 1) after pass 1. Pass 2: token 0 names 1 (c=1, not sent, c becomes 2), token 1
    # names 1 (c=2, full), tokens 2 and 3 name 0 (c=2, full).
    assert printed.expert.tolist() == [[0, 1], [0, 1], [1, 0], [2, 0]]
    assert printed.kept.tolist() == [[True, False], [True, False], [True, False], [True, False]]
    # Coded: token 0 does not stand in line, so token 1 has the second place of expert 1.
    coded = gshard_as_coded_routing(
        x, w_router, capacity=2, second_policy="random", threshold=0.5, uniforms=u
    )
    assert coded.kept.tolist() == [[True, False], [True, True], [True, False], [True, False]]
    assert coded.slot.tolist() == [[0, -1], [1, 1], [0, -1], [0, -1]]
    np.testing.assert_allclose(coded.weight, [[0.75, 0], [0.75, 0.25], [0.75, 0], [0.75, 0]], rtol=1e-14)


def test_second_policies_of_mesh_tensorflow() -> None:
    # Second gates after division: 0.25 and 0.1.
    x = np.eye(2)
    w_router = np.log(np.array([[0.6, 0.2, 0.2], [0.9, 0.1, 1e-9]]))
    w_router[0, 2] = -50.0
    kept = {
        policy: gshard_as_coded_routing(
            x, w_router, capacity=9, second_policy=policy, threshold=0.2, uniforms=np.array([0.9, 0.6])
        ).kept[:, 1].tolist()
        for policy in ("all", "threshold", "random")
    }  # fmt: skip
    # threshold: 0.25 > 0.2 > 0.1; random: 0.25 / 0.2 > 1 always sent, 0.1 / 0.2 = 0.5 < 0.6 not sent.
    assert kept == {"all": [True, True], "threshold": [True, False], "random": [True, False]}


def test_surest_tokens_come_first() -> None:
    # Gates of expert 0: 0.6 0.9 0.7 0.8; two places.
    x = np.eye(4)
    w_router = np.log(np.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]]))
    routing = batch_priority_routing(x, w_router, capacity=2)
    assert routing.slot[:, 0].tolist() == [-1, 0, -1, 1]
    np.testing.assert_allclose(routing.weight[:, 0], [0, 0.9, 0, 0.8], rtol=1e-14)
    # With two choices all first ones go before any second one: expert 1 has its places left for 1 and 3.
    both = batch_priority_routing(x, w_router, k=2, capacity=2)
    assert both.slot.tolist() == [[-1, -1], [0, 0], [-1, -1], [1, 1]]


def test_gates_that_underflow_do_not_tie() -> None:
    # Logits of thousands: all gates but the first are 0, and the second choice is still the second logit.
    routing = gshard_as_coded_routing(np.ones((1, 1)), np.array([[0.0, 3e3, 5e3, 4e3]]), capacity=1)
    assert routing.expert.tolist() == [[2, 3]]


def test_router_computes_in_float32_for_narrow_tokens() -> None:
    # 2049 is no float16: summed there the two logits would tie, and the lowest expert be taken.
    x = np.ones((1, 2049), np.float16)
    w_router = np.zeros((2049, 2), np.float16)
    w_router[:2048, 0] = 1.0
    w_router[:, 1] = 1.0
    assert switch_routing(x, w_router, capacity=1).expert.item() == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_by_indices_equal_dispatch_by_products(groups: int) -> None:
    case = sample_routed(np.random.default_rng(3), capacity=2, groups=groups, T=6, D=3, E=3, F=4)
    x, w_router, *experts = case.args
    routing = switch_routing(x, w_router, capacity=2, groups=groups)
    combine, mask = combine_tensor(
        routing.expert, routing.slot, routing.weight, groups=groups, experts=3, capacity=2
    )
    assert mask.sum() == routing.kept.sum()
    for f in (dispatch, dispatch_by_indices):
        y = f(x.reshape(groups, -1, 3), combine, *experts, dispatch_mask=mask)
        np.testing.assert_allclose(y.reshape(x.shape), case.call(switch), rtol=0, atol=1e-13)


def test_products_cost_what_indices_do_not() -> None:
    # G = 1, S = 8, E = 4, C = 2, D = 3, F = 5: experts 4*8*3*5 = 480; two products of 2*8*8*3 = 384 each.
    rng = np.random.default_rng(0)
    combine = np.zeros((1, 8, 4, 2))
    combine[0, np.arange(8), np.arange(8) // 2, np.arange(8) % 2] = 0.5
    x, w_in, w_out = (rng.standard_normal(shape) for shape in ((1, 8, 3), (4, 3, 5), (4, 5, 3)))
    counted = []
    for f in (dispatch, dispatch_by_indices):
        memory = Memory()
        f(x, combine, w_in, w_out, memory=memory)
        counted.append(memory.flops)
    assert counted == [480 + 768, 480]


def test_jitter_is_drawn_again_from_its_seed() -> None:
    case = sample_layer(np.random.default_rng(0), T=4, D=2, E=2, F=2)
    one, two = (case.replace(jitter=0.5, rng=7).call(switch) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    uniforms = np.random.default_rng(7).random((4, 2))
    np.testing.assert_array_equal(one, case.replace(jitter=0.5, uniforms=uniforms).call(switch))
    dy = np.ones((4, 2))
    a = switch_vjp(*case.args, dy, jitter=0.5, rng=7)
    b = switch_vjp(*case.args, dy, jitter=0.5, uniforms=uniforms)
    np.testing.assert_array_equal(a.dw_router, b.dw_router)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_narrow_dtypes_come_back_as_they_were(dtype: type) -> None:
    case = sample_layer(np.random.default_rng(0), T=5, D=3, E=3, F=4, experts="gated silu")
    narrow = case.map_arrays(lambda array: round_to(array, dtype))
    y = narrow.call(switch)
    assert y.dtype == dtype
    exact = narrow.map_arrays(lambda array: array.astype(np.float64)).call(switch)
    error = np.abs(y - exact).max() / np.abs(exact).max()
    # A handful of roundings to the dtype: of hidden units, outputs, and their weighted sum.
    assert 0 < error < 8 * np.finfo(dtype).eps
    back = switch_vjp(*narrow.args, y, **narrow.kwargs)
    assert {gradient.dtype for gradient in back} == {np.dtype(dtype)}
