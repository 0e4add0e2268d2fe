"""``frugal bench weight-only`` and ``int8-attention``: what is checked, and that wrong outputs are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cli import contest
from cli.int8_attention_problems import int8_attention_problem
from cli.problems import total_bytes
from cli.weight_only_problems import weight_only_problems
from refimpl.attention import flash_attention, int8_attention
from refimpl.quant import int8_weight_linear, nf4_linear


def keep(array: Any, _dtype: str) -> Any:
    return array


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they are stored: packing them is what a GPU, or the simulator, does."""
    import cuda_backend

    for name in ("prepare_int8_groups", "prepare_nf4"):
        monkeypatch.setattr(cuda_backend, name, lambda stored: stored, raising=False)


@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.parametrize("index", [0, 1])
def test_weights_are_held_to_their_definition(index: int) -> None:
    problem = weight_only_problems((3, 256, 20))[index]
    (x, stored, _), (_, dense) = problem.operands(contest._draw_on_host, 0)
    assert dense.shape == (256, 20)
    out = (int8_weight_linear, nf4_linear)[index](x, stored)
    operands = x, stored, stored
    assert problem.check(operands, out, keep) is None
    wrong = out.copy()
    wrong[2, 7] *= np.float16(1.1)
    assert problem.check(operands, wrong, keep) is not None
    assert problem.check(operands, out[::-1], keep) is not None


@pytest.mark.usefixtures("_no_kernels")
def test_bytes_are_those_of_the_arrays() -> None:
    """The price of a layer, and what its operands take, agree."""
    for problem in weight_only_problems((1, 512, 64)):
        (x, stored, _), _ = problem.operands(contest._draw_on_host, 0)
        out = 2 * 64
        assert problem.compulsory_bytes == total_bytes((x, stored)) + out


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_int8_is_held_to_its_codes(causal: bool) -> None:
    problem = int8_attention_problem((1, 2, 150, 16), "float16", causal)
    operands, _ = problem.operands(contest._draw_on_host, 0)
    options: dict[str, Any] = {"causal": causal}
    coded, plain = int8_attention(*operands, **options), flash_attention(*operands, **options)
    assert problem.check(operands, coded, keep) is None
    assert problem.check(operands, plain, keep) is None
    assert problem.error is not None
    assert problem.error(operands, plain, keep) < 1e-3 < problem.error(operands, coded, keep) < 0.03
    rough = int8_attention(*operands, smooth=False, block_sizes=(150, 150), **options)
    assert problem.check(operands, rough, keep) is not None
