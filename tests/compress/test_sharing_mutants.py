"""Shared layers and factorised stacks that are wrong in one way: the laws must catch each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.compress.layer_sharing import shared_layers, shared_layers_vjp
from refimpl.compress.tucker import tucker, tucker_factors, tucker_parameters
from refimpl.errors import OptionError
from refimpl.transformer.blocks import encoder, encoder_vjp
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("compress.layer_sharing")
def weights_drift(x: Any, /, *, num_layers: int, **block: Any) -> Any:
    for layer in range(num_layers):
        x = encoder(x, **{**block, "w_1": block["w_1"] * (1 + 0.01 * layer)})
    return x


@mutant("compress.layer_sharing")
def causal_by_accident(x: Any, /, *, num_layers: int, **block: Any) -> Any:
    return shared_layers(x, num_layers=num_layers, causal=True, **block)


@mutant("compress.layer_sharing")
def one_layer_too_few(x: Any, /, *, num_layers: int, **block: Any) -> Any:
    return shared_layers(x, num_layers=max(num_layers - 1, 0), **block)


@mutant("compress.factorization")
def basis_of_the_first_block(blocks: Any, /, *, ranks: Any) -> Any:
    if not blocks.size:
        return blocks
    u = np.linalg.svd(blocks[0])[0][:, : ranks[1]]
    return np.einsum("kb,jb,njm->nkm", u, u, blocks)


@mutant("compress.factorization")
def last_directions_kept(blocks: Any, /, *, ranks: Any) -> Any:
    whole = tucker_factors(blocks, ranks=blocks.shape)
    parts = [basis[:, basis.shape[1] - rank :] for basis, rank in zip(whole[1:], ranks, strict=True)]
    core = np.einsum("nkm,na,kb,mc->abc", blocks, *parts)
    return np.einsum("abc,na,kb,mc->nkm", core, *parts)


@mutant("compress.factorization")
def outputs_and_inputs_exchanged(blocks: Any, /, *, ranks: Any) -> Any:
    n, k, m = ranks
    return tucker(blocks, ranks=(n, min(m, blocks.shape[1]), min(k, blocks.shape[2])))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_gradients_add_over_uses() -> None:
    """Against an encoder whose two layers hold copies."""
    record = registry.get("compress.layer_sharing")
    assert record.sample is not None
    case = record.sample(np.random.default_rng(0), B=1, T=3, D=2, H=2, F=3, layers=2)
    (x,), block = case.args, dict(case.without("num_layers").kwargs)
    dy = np.random.default_rng(1).standard_normal(x.shape)
    middle = encoder(x, **block)
    last = encoder_vjp(middle, dy, **block)
    first = encoder_vjp(x, last.dx, **block)
    shared = shared_layers_vjp(x, dy, num_layers=2, **block)
    assert shared.dw_1 is not None
    assert first.dw_1 is not None
    assert last.dw_1 is not None
    np.testing.assert_allclose(shared.dw_1, first.dw_1 + last.dw_1, atol=1e-12)
    np.testing.assert_allclose(shared.dx, first.dx, atol=1e-12)


def test_parameters_of_the_factors() -> None:
    blocks = np.random.default_rng(0).standard_normal((4, 6, 5))
    factors = tucker_factors(blocks, ranks=(2, 3, 4))
    assert sum(part.size for part in factors) == tucker_parameters((4, 6, 5), (2, 3, 4))
    with pytest.raises(OptionError, match="expected at most 6"):
        tucker(blocks, ranks=(2, 7, 4))
