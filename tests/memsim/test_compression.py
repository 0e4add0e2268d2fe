"""What compressed weights and trained parameters take, against the arrays that the references make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.compression import codebook_bits, nf4_bits, nf4_bytes, qmoe_bytes
from memsim.fine_tuning import adapter_parameters, lora_parameters, prefix_parameters, prompt_parameters
from refimpl import registry
from refimpl.cases import draw
from refimpl.consistency import check_price
from refimpl.errors import OptionError
from refimpl.quant import qlora_quantize
from refimpl.quant.codebook import codebook
from refimpl.quant.qmoe import qmoe
from refimpl.tolerances import cast

registry.load()

PRICED = ("peft.adapter", "peft.lora", "peft.lora.merge", "quant.double", "quant.nf4", "quant.qlora")


@pytest.mark.parametrize("name", PRICED)
def test_prices_equal_what_is_counted(name: str) -> None:
    technique = registry.get(name)
    assert technique.sample is not None
    found = [price for price in registry.PRICES if price.technique == name]
    assert found
    for seed in range(25):
        case = technique.sample(np.random.default_rng(seed), **draw(technique, seed))
        for dtype in (np.float64, np.float32, np.float16):
            for price in found:
                assert check_price(price, technique, cast(case, np.dtype(dtype))) is None


def test_a_wrong_price_is_told() -> None:
    technique = registry.get("quant.nf4")
    price = registry.Price("quant.nf4", "storage", lambda case: {"bytes": case.args[0].nbytes})
    assert (
        check_price(price, technique, registry.Case((np.ones(4),), {})) == "bytes: model says 32, counted 10"
    )


@given(K=st.integers(0, 20), N=st.integers(0, 20), block=st.integers(1, 70), scales=st.integers(1, 9))
def test_a_stored_weight_has_the_bytes_that_it_should(K: int, N: int, block: int, scales: int) -> None:
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    stored = qlora_quantize(weight, block_size=block, scale_block_size=scales)
    held = sum(part.nbytes for part in stored if isinstance(part, np.ndarray))
    assert nf4_bytes(n=K * N, block_size=block, scale_block_size=scales).total == held


def test_bytes_tend_to_the_bits_a_parameter() -> None:
    n = 4096 * 4096
    assert 8 * (nf4_bytes(n=n).total - 4) == n * nf4_bits().total
    with pytest.raises(OptionError, match="block_size: expected at least 1"):
        nf4_bytes(n=2, block_size=0)


@given(seed=st.integers(0, 99), rows=st.integers(0, 4), n=st.integers(0, 60))
def test_a_coded_expert_has_the_bytes_that_it_should(seed: int, rows: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    codewords, starts = qmoe(np.where(rng.random((rows, n)) < 0.2, rng.choice([-1, 1], (rows, n)), 0))
    found = qmoe_bytes(codewords=len(codewords), rows=rows)
    assert found["codewords"] + found["row starts"] == codewords.nbytes + starts.nbytes


@pytest.mark.parametrize(("n", "k"), [(100, 16), (33, 5), (8, 1), (0, 3)])
def test_packed_codes_have_the_bits_that_they_should(n: int, k: int) -> None:
    rng = np.random.default_rng(0)
    codes, centroids = codebook(rng.standard_normal((n, 1)), rng.standard_normal((k, 1)))
    bits = (k - 1).bit_length()
    packed = np.packbits(codes[:, None] >> np.arange(bits) & 1)
    estimate = codebook_bits(n=n, k=k, bits=8 * centroids.itemsize)
    assert packed.nbytes == -(-estimate["codes"] // 8)
    assert 8 * centroids.nbytes == estimate["centroids"]


def _trained(name: str, *places: int, **shape: Any) -> int:
    sample = registry.get(name).sample
    assert sample is not None
    case = sample(np.random.default_rng(0), **shape)
    return sum(case.args[place].size for place in places)


def test_trained_parameters_are_those_of_the_references() -> None:
    d = 6
    one = _trained("peft.lora", 1, 2, T=2, K=d, N=d, R=3, extra="none")
    assert lora_parameters(layers=5, width=d, rank=3).total == 5 * 2 * one
    one = _trained("peft.adapter", 1, 2, 3, 4, T=2, D=d, m=4, activation="gelu", start="zero")
    found = adapter_parameters(layers=5, width=d, bottleneck=4)
    assert found["adapters"] == 5 * 2 * one
    assert found["layer norms"] == 5 * 2 * 2 * d
    shape = {"B": 1, "Tq": 2, "Tk": 2, "P": 4, "Hkv": 2, "group": 1, "D": 3}
    assert prefix_parameters(layers=5, width=d, positions=4).total == 5 * _trained(
        "peft.prefix", 3, 4, causal=False, **shape
    )
    assert prompt_parameters(width=d, positions=4).total == _trained(
        "peft.soft_prompt", 0, B=1, T=2, P=4, M=d
    )
    with pytest.raises(OptionError, match="sizes: expected at least 0"):
        prompt_parameters(width=-1, positions=2)
