"""GPTQ, ternary experts and their code, wrong in one way: the laws must catch each; and what they gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.linalg import cholesky

from refimpl import registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.quant.gptq import GPTQ, gptq, hessian
from refimpl.quant.qmoe import QMoE, qmoe, qmoe_decode
from refimpl.quant.ternary import Ternary, ternary
from refimpl.testing import check
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


def _gptq(weight: Any, x: Any, bits: int, damping: float, wrong: str) -> Any:
    """GPTQ in plain NumPy with one mistake."""
    w, top = weight.astype(float).copy(), 2 ** (bits - 1) - 1
    largest = np.abs(w).max(axis=0, initial=0.0)
    scale = np.where(largest > 0, largest / top, 1.0)
    if not len(w):
        return GPTQ(w.astype(np.int8), scale)
    h = hessian(x, damping=damping)
    factor = cholesky(np.linalg.inv(h) if wrong != "inverse" else h, lower=False)
    codes = np.zeros(w.shape, np.int8)
    for k in range(len(w)):
        codes[k] = np.clip(np.rint(w[k] / scale), -top, top)
        error = (w[k] - codes[k] * scale) / (1.0 if wrong == "diagonal" else factor[k, k])
        sign = -1 if wrong != "sign" else 1
        w[k + 1 :] += sign * factor[k, k + 1 :, None] * error
        if wrong == "scale moves":
            scale = np.maximum(np.abs(w).max(axis=0) / top, 1e-9)
    return GPTQ(codes, scale)


def gptq_with(wrong: str) -> Callable[..., Any]:
    def f(weight: Any, x: Any, /, *, bits: int = 4, damping: float = 0.01) -> Any:
        return _gptq(weight, x, bits, damping, wrong)

    return f


@mutant("quant.gptq")
def plain_rounding(weight: Any, x: Any, /, *, bits: int = 4, damping: float = 0.01) -> Any:
    return gptq(weight, x[:0], bits=bits)


@mutant("quant.gptq")
def last_feature_first(weight: Any, x: Any, /, *, bits: int = 4, damping: float = 0.01) -> Any:
    q = gptq(weight[::-1], x[:, ::-1], bits=bits, damping=damping)
    return GPTQ(q.codes[::-1], q.scale)


@mutant("quant.gptq")
def one_scale_for_all(weight: Any, x: Any, /, *, bits: int = 4, damping: float = 0.01) -> Any:
    q = gptq(weight, x, bits=bits, damping=damping)
    return GPTQ(q.codes, np.full_like(q.scale, q.scale.max(initial=1.0)))


@mutant("quant.qmoe.ternary")
def one_level(weight: Any, x: Any, /, *, damping: float = 0.1) -> Any:
    q = ternary(weight, x, damping=damping)
    size = np.maximum(-q.low, q.high)
    return Ternary(q.codes, -size, size)


@mutant("quant.qmoe.ternary")
def halves_go_out(weight: Any, x: Any, /, *, damping: float = 0.1) -> Any:
    q = ternary(weight, x, damping=damping)
    codes = np.where((weight >= q.high / 2) & (q.high > 0), 1, np.where(weight <= q.low / 2, -1, 0))
    return Ternary(np.where(q.low < 0, codes, np.maximum(codes, 0)).astype(np.int8), q.low, q.high)


@mutant("quant.qmoe")
def rows_run_together(weights: Any, /, **options: Any) -> Any:
    flat = qmoe(weights.reshape(1, -1), **options)
    return QMoE(flat.codewords, np.linspace(0, len(flat.codewords), len(weights) + 1).astype(np.int64))


@mutant("quant.qmoe")
def odd_weight_lost(weights: Any, /, **options: Any) -> Any:
    return qmoe(weights[:, : weights.shape[1] // 2 * 2], **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


@pytest.mark.parametrize("wrong", ["inverse", "diagonal", "sign", "scale moves"])
def test_mistake_is_caught_by_laws(wrong: str) -> None:
    failed = {outcome.check for outcome in check("quant.gptq", gptq_with(wrong), examples=12).failed}
    assert failed - {"reference"}, f"{wrong} survived the laws; failed: {failed}"


def test_the_unbroken_one_passes() -> None:
    assert check("quant.gptq", gptq_with("nothing"), examples=12).ok


def test_outputs_change_less_than_under_plain_rounding() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 32)) @ rng.standard_normal((32, 32))
    weight = rng.standard_normal((32, 16))
    good, plain = (gptq(weight, data, bits=3) for data in (x, x[:0]))
    loss = [np.sum((x @ (q.codes * q.scale - weight)) ** 2) for q in (good, plain)]
    assert loss[0] < 0.5 * loss[1]


def test_sparse_ternary_weights_take_less_than_a_bit() -> None:
    """Between the entropy, 0.63 bit at 88.5 % zeros, and what 16 bits for every pair would take."""
    rng = np.random.default_rng(0)
    weights = rng.choice([-1, 0, 1], (8, 4096), p=[0.0575, 0.885, 0.0575]).astype(np.int8)
    coded = qmoe(weights)
    rate = 16 * len(coded.codewords) / weights.size
    entropy = -(0.885 * math.log2(0.885) + 0.115 * math.log2(0.0575))
    assert entropy < rate < 0.8
    assert np.array_equal(qmoe_decode(*coded, n=4096), weights)


def test_single_pairs_cost_more() -> None:
    coded = qmoe(np.zeros((1, 56), np.int8))
    assert len(coded.codewords) == 2
    assert len(qmoe(np.zeros((1, 56), np.int8), max_pairs=1).codewords) == 28


def test_bad_input_is_refused() -> None:
    with pytest.raises(OptionError, match="expected -1, 0 and 1"):
        qmoe(np.array([[2]]))
    with pytest.raises(ShapeError, match="codewords: expected 0 to 15"):
        qmoe_decode(np.array([16], np.uint16), np.array([0, 1]), n=2, bits=4)
    with pytest.raises(ShapeError, match="row 0: expected 4 weights"):
        qmoe_decode(np.array([0], np.uint16), np.array([0, 1]), n=4, bits=4)
    with pytest.raises(OptionError, match="bits: expected 2 to 8"):
        gptq(np.ones((2, 2)), np.ones((1, 2)), bits=9)
    with pytest.raises(OptionError, match="damping"):
        gptq(np.ones((2, 2)), np.ones((1, 2)), damping=0)
    with pytest.raises(OptionError, match="weight: expected finite"):
        gptq(np.full((2, 2), np.nan), np.ones((1, 2)))


def test_dead_features_change_nothing_for_the_others() -> None:
    """However large the inputs are: a feature that no input uses only lowers the mean that damping takes."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((6, 4)), rng.standard_normal((9, 6))
    x[:, 1::3] = 0.0
    live = np.any(x, axis=0)
    alone = gptq(weight[live], x[:, live], damping=0.05 * live.mean()).codes
    scale = gptq(weight, x, damping=0.05).scale
    for size in (1e-6, 1.0, 1e6):
        codes, step = gptq(weight, size * x, damping=0.05)
        np.testing.assert_array_equal(step, scale)
        same = np.abs(weight[live]).max(axis=0) == np.abs(weight).max(axis=0)
        np.testing.assert_array_equal(codes[live][:, same], alone[:, same])
        assert same.any()


def test_streams_of_codewords_are_checked() -> None:
    codewords, starts = qmoe(np.array([[0, 0, 1, 0]]))
    for bad in (np.array([0, 9]), np.array([1, len(codewords)]), np.empty(0, np.int32)):
        with pytest.raises(ShapeError, match="row_starts: expected to rise"):
            qmoe_decode(codewords, bad, n=4)
    with pytest.raises(ShapeError, match="codewords: expected 0 to 65535"):
        qmoe_decode(np.array([-1]), np.array([0, 1]), n=2)
    with pytest.raises(DTypeError, match="codewords: expected integers"):
        qmoe_decode(np.array([0.5]), np.array([0, 1]), n=2)
    with pytest.raises(OptionError, match="x: the products of its features overflow"):
        gptq(np.ones((2, 1)), np.full((3, 2), 1e200))
    assert codewords.nbytes + starts.nbytes == 2 * len(codewords) + 4 * 2
