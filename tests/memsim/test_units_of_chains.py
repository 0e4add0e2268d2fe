"""Every formula of a chain has the unit that it says: scaling seconds or bytes scales what it should."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from memsim.derivation import Definition, derive
from memsim.inference import Serving
from memsim.planning.division import Division
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import KERNEL_TIME, TIME
from memsim.planning.training_setting import Setting
from memsim.serving_formulas import SERVING

SETTING = Setting("mixtral-8x7b", "h100-sxm", 64, 64, 1024, latency=3e-6, network=0.5, overlap=0.5)
OF_KERNELS = replace(SETTING, start=5e-6)
DIVISIONS = (
    Division(tensor=2, pipeline=4, data=4, context=2, expert=4, interleave=2, zero=1, recompute="full"),
    Division(tensor=2, data=16, context=2, expert=8, zero=3, sequence_parallel=True, offload=True),
    Division(pipeline=2, data=32, micro_batch=2),
)
CHAINS: list[tuple[tuple[Definition, ...], Any]] = [
    *(((*MEMORY, *TIME), SETTING.letters() | division.letters(SETTING)) for division in DIVISIONS),
    *(((*MEMORY, *KERNEL_TIME), OF_KERNELS.letters() | one.letters(OF_KERNELS)) for one in DIVISIONS),
    (
        SERVING,
        Serving(
            "mixtral-8x7b", "h100-sxm", tensor=2, batch=8, prompt=512, generated=64, latency=2e-6
        ).letters(),
    ),
    (SERVING, Serving("deepseek-v2", "h200", tensor=8, batch=64, prompt=4096, generated=512).letters()),
]
RATES = ("R", "R_x", "R_e", "M", "W", "w", "C")
BYTES = ("y", "y_x", "y_w", "y_g", "y_o", "y_h", "y_c", "capacity")


@pytest.mark.parametrize("which", range(len(CHAINS)))
def test_seconds(which: int) -> None:
    """A clock that runs three times as fast: seconds triple, rates are a third, and nothing else changes."""
    chain, letters = CHAINS[which]
    faster = {
        k: Fraction(v) / 3 if k in RATES else 3 * v if k in ("α", "σ") else v for k, v in letters.items()
    }
    before, after = derive(chain, letters), derive(chain, faster)
    factors = {"s": Fraction(3), "B/s": Fraction(1, 3), "1/s": Fraction(1, 3)}
    for name, item in before.items():
        assert after[name].value == factors.get(item.unit, 1) * item.value, (name, item.unit)


@pytest.mark.parametrize("which", range(len(CHAINS)))
def test_bytes(which: int) -> None:
    """Bytes a quarter as large: four times as many, over links that carry four times as many a second.

    What stands in single bytes is scaled by hand: masks are off, and fp32 numbers count 4 bytes each.
    """
    chain, letters = CHAINS[which]
    chain = tuple(item._replace(formula=_in_bytes(item)) for item in chain)
    letters = {**letters, "byte": 1, "δ": 0}
    finer = {k: 4 * v if k in (*BYTES, "M", "W", "w", "C", "byte") else v for k, v in letters.items()}
    before, after = derive(chain, letters), derive(chain, finer)
    for name, item in before.items():
        factor = 4 if item.unit in ("B", "B/s") else 1
        assert after[name].value == factor * item.value, (name, item.unit)


FOUR_BYTES = {"a_s": ("4H", "4byte*H"), "a_out": ("4x*V", "4byte*x*V"), "bytes_head": ("12x", "12byte*x")}


def _in_bytes(item: Definition) -> str:
    return item.formula.replace(*FOUR_BYTES.get(item.name, ("", "")))
