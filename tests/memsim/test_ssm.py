"""Prices of state space models: known sizes, formulas against sums by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from memsim import mamba_flops, mamba_parameters, mamba_state, mamba_traffic, scan_flops, scan_traffic
from refimpl.errors import OptionError

PUBLISHED = {"M": 768, "D": 1536, "N": 16, "R": 48, "k": 4}


@pytest.mark.parametrize(
    ("layers", "M", "vocabulary", "total"),
    [  # the released checkpoints state-spaces/mamba-*, their embedding padded to a multiple of 8
        (24, 768, 50280, 129_135_360),
        (48, 1024, 50280, 371_516_416),
        (48, 1536, 50280, 793_204_224),
        (48, 2048, 50280, 1_372_178_432),
        (64, 2560, 50280, 2_768_345_600),
    ],
)
def test_released_models(layers: int, M: int, vocabulary: int, total: int) -> None:
    assert layers * (mamba_parameters(M=M).total + M) + M + vocabulary * M == total


def test_parameters_are_some_six_squares() -> None:
    assert mamba_parameters(M=4096).total / 4096**2 == pytest.approx(6, rel=0.1)


def test_operations_of_a_token_are_twice_its_weights_and_its_state() -> None:
    weights = mamba_parameters(M=768).total
    uncounted = 16 * 1536 + 3 * 1536  # A_log, D and two biases take part in no product here
    assert mamba_flops(T=1, **PUBLISHED).total == 2 * (weights - uncounted) + 8 * 1536 * 16


def test_everything_grows_linearly_but_the_state() -> None:
    def growth(price: Callable[..., Any], **sizes: int) -> int:
        one, two, three = (int(price(T=T, **sizes).total) for T in (1000, 2000, 3000))
        assert three - two == two - one > 0
        return two - one

    assert growth(scan_flops, D=1536) == 8 * 1000 * 1536 * 16
    assert growth(scan_traffic, D=1536) == 2 * 1000 * (4 * 1536 + 2 * 16)
    growth(mamba_traffic, **PUBLISHED)
    assert mamba_state(D=1536).total == 1536 * (16 + 3)


def test_fusing_saves_a_factor_of_the_states() -> None:
    """Section 3.3.2: fewer by O(N): here six states of 4 bytes against four channels of 2."""
    fused, materialized = (
        scan_traffic(T=10**6, D=4096, N=16, algorithm=name).total for name in ("fused", "materialized")
    )
    assert materialized / fused == pytest.approx(6 * 16 * 4 / (4 * 2) + 5 / 4, rel=0.01)


def test_terms_say_what_they_are() -> None:
    found = scan_traffic(T=8, D=4, N=2, B=3)
    assert found["scan: read delta"] == 3 * 8 * 4 * 2
    assert found.explain()[0] == "scan: read A: D*N*e = 4*2*2 = 16 B"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan_traffic(T=8, D=4, algorithm="flash"), "algorithm: expected one of fused, materialized"),
        (lambda: scan_flops(T=-1, D=4), "T: expected an integer of at least 0; got -1"),
        (lambda: mamba_parameters(M=-8), "M: expected an integer of at least 0"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
