"""Times of kernels: by hand, against what an H200 took, their laws, and the same in a step of training."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.derivation import derive
from memsim.formula import evaluate
from memsim.hardware import hardware
from memsim.kernel_times import KERNELS, Parts, kernel_parts, of_kernels, tiled
from memsim.measured.calibration import calibrations, predicted_seconds
from memsim.measured.kernel_rows import kernel_rows
from memsim.model import dense
from memsim.planning.division import Division
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import KERNEL_TIME, TIME
from memsim.planning.plan_space import space
from memsim.planning.training_setting import Setting
from memsim.planning.training_step import training_step
from refimpl.errors import OptionError

# Microseconds of `frugal calibrate` on an H200, 2026-11-29, PyTorch 2.11, and the most that errors may be, in
# per cent: those that were seen, rounded up.
CALIBRATE = {"copy.1073741824": (508.2, 0.1), "copy.268435456": (132.2, 0.1),
             "product.8192x8192x8192": (1418.8, 1), "product.16384x4096x4096": (725.7, 1),
             "attention.4x16x4096x128": (480.7, 0.1)}  # fmt: skip
HELD_OUT = {
    "copy.2147483648": (1009.6, 0.1),
    "product.4096x4096x4096": (179.1, 3.5), "product.2048x2048x2048": (26.94, 8.5),
    "product.8192x12288x4096": (1060.0, 2), "product.8192x4096x11008": (990.3, 3),
    "product.8192x1536x1536": (62.78, 9.5), "product.2048x28672x8192": (1272.6, 2),
    "attention.1x16x16384x128": (1782.0, 1), "attention.16x16x1024x128": (156.9, 1.5),
    "attention.8x16x4096x64": (626.6, 0.5), "attention.64x16x1024x64": (384.7, 2),
}  # fmt: skip
# TFLOP/s of cuDNN's gradient on an H200, PyTorch 2.11, fp16, causal: docs/performance.md, 2026-11-29.
GRADIENTS = {(8, 16, 4096, 64): 376, (4, 16, 4096, 128): 463, (1, 16, 16384, 128): 552}
NUMBERS: dict[str, Any] = {"compute": 0.8, "scores": 0.9, "memory": 0.85, "start": 5e-6}


def test_what_an_h200_took() -> None:
    """The committed file, its numbers, and every row of the table."""
    (found,) = calibrations()
    assert (found.hardware, found.date) == ("h200", "2026-11-29")
    # 2 GiB more, read and written, took 501.3 us more: 4.28 of 4.8 TB/s.
    share = 2 * (1073741824 - 268435456) / (508.232e-6 - 132.248e-6) / 4.8e12
    assert found.memory == pytest.approx(share, abs=6e-4)
    assert found.start == pytest.approx(508.232e-6 - 2 * 1073741824 / (share * 4.8e12), abs=3e-7)
    rows = {row.id.removeprefix("calibration.h200."): row for row in kernel_rows()}
    assert set(rows) == {*CALIBRATE, *HELD_OUT}
    for use, listed in (("calibration", CALIBRATE), ("held out", HELD_OUT)):
        for name, (microseconds, percent) in listed.items():
            row = rows[name]
            assert (row.use, row.unit) == (use, "ms")
            assert float(row.published) == pytest.approx(microseconds / 1e3, rel=1e-3)
            assert row.predicted == pytest.approx(microseconds / 1e3, rel=percent / 100 + 5e-4), name


def test_gradients_that_were_measured_elsewhere() -> None:
    """No gradient calibrates: it is optimistic, by at most 16 % where there are many blocks."""
    (found,) = calibrations()
    for (B, H, N, D), rate in GRADIENTS.items():
        measured = 10 * B * H * N * N * D / 2 / (rate * 1e12)
        problem = {"kind": "gradient", "B": B, "H": H, "N": N, "D": D}
        assert 0.84 < predicted_seconds(problem, "h200", **found.numbers()) / measured < 1


def test_kernels_by_hand() -> None:
    """H200: 4.8 TB/s, 989.5 TFLOP/s, 132 multiprocessors with 16 exponentials a clock of 1.83 GHz."""
    assert predicted_seconds({"kind": "copy", "bytes": 2_400_000}, "h200") == pytest.approx(1e-6)
    # Three tiles of four of 128 x 128, all 256 rows of Q and O before and after.
    one = {"kind": "attention", "B": 2, "H": 3, "N": 256, "D": 64}
    scores = 2 * 3 * 3 * 128 * 128
    computed = scores * (4 * 64 / 989.5e12 + 1 / (132 * 16 * 1.83e9))
    tensor = 2 * 3 * 256 * 64 * 2 / 4.8e12
    given = {"scores": 0.5, "memory": 0.8, "start": 1e-6}
    assert predicted_seconds(one, "h200", **given) == pytest.approx(2 * computed + 2 * tensor / 0.8 + 1e-6)
    assert predicted_seconds({**one, "kind": "gradient"}, "h200", **given) == pytest.approx(
        5 * computed + 9 * tensor / 0.8 + 3e-6
    )
    # 2 x 2 tiles of 256 x 128 take as long as 132 would.
    product = {"kind": "product", "M": 512, "N": 256, "K": 100}
    whole = 2 * 132 * 256 * 128 * 100 / 989.5e12
    assert predicted_seconds(product, "h200", compute=0.5) == pytest.approx(2 * whole)
    # Hardly anything to compute, but a result to write.
    thin = {"kind": "product", "M": 1 << 13, "N": 1 << 13, "K": 1}
    assert predicted_seconds(thin, "h200") == pytest.approx(2 * (1 << 26) / 4.8e12, rel=1e-3)


@given(tokens=st.integers(1, 2000))
def test_tiles_by_counting(tokens: int) -> None:
    rows = range(0, tokens, 128)
    assert evaluate(tiled("N"), {"N": tokens}) == sum(128 * 128 for i in rows for j in rows if j <= i)


SIZES = {"bytes": 1 << 31, "M": 20_000, "N": 20_000, "K": 20_000, "B": 64, "H": 64, "D": 256}
SHARES = st.floats(0.05, 1)


@given(data=st.data(), kind=st.sampled_from(sorted(KERNELS)))
def test_larger_takes_no_less(data: st.DataObject, kind: str) -> None:
    problem: dict[str, Any] = {"kind": kind}
    problem |= {name: data.draw(st.integers(1, SIZES[name])) for name in KERNELS[kind].sizes}
    before = predicted_seconds(problem, "h200", **NUMBERS)
    name = data.draw(st.sampled_from(KERNELS[kind].sizes))
    grown = {**problem, name: data.draw(st.integers(problem[name], SIZES[name]))}
    assert predicted_seconds(grown, "h200", **NUMBERS) >= before * (1 - 1e-12)


@given(data=st.data(), kind=st.sampled_from(sorted(KERNELS)), factor=st.floats(0.1, 1))
def test_shares_scale_the_time(data: st.DataObject, kind: str, factor: float) -> None:
    """All shares times a factor: the same work takes 1/factor as long, and starts as before."""
    problem: dict[str, Any] = {"kind": kind}
    problem |= {name: data.draw(st.integers(1, SIZES[name])) for name in KERNELS[kind].sizes}
    shares = {name: data.draw(SHARES) for name in ("compute", "scores", "memory")}
    less = {name: factor * share for name, share in shares.items()}
    start = data.draw(st.floats(0, 1e-4))
    fast, slow = (predicted_seconds(problem, "h200", **some) for some in (shares, less))
    assert slow == pytest.approx(fast / factor)
    starts = KERNELS[kind].starts * start
    assert predicted_seconds(problem, "h200", **shares, start=start) == pytest.approx(fast + starts)
    assert predicted_seconds(problem, "h200") <= fast * (1 + 1e-12)


@given(share=SHARES, memory=SHARES, computed=st.floats(0, 1), exposed=st.floats(0, 1), moved=st.floats(0, 1))
def test_nothing_beats_what_must_be_done(
    share: float, memory: float, computed: float, exposed: float, moved: float
) -> None:
    found = Parts(computed, exposed, moved, 1).seconds(share, memory, 0.0)
    assert found >= max(computed / share, moved / memory)


def one_layer(key_heads: int = 16, **more: Any) -> Setting:
    described = dense(
        layers=1, width=2048, heads=16, key_heads=key_heads, ffn=8192, vocabulary=4096, positions=4096
    )
    return Setting(described, "h200", accelerators=1, batch=4, sequence=4096, **more)


def test_a_step_is_made_of_the_same_kernels() -> None:
    """Operators of one layer take what `frugal calibrate` says of the same sizes; bf16 here, fp16 there."""
    step = training_step(one_layer(**NUMBERS), Division(micro_batch=4))
    rows = 4 * 4096
    expected = {
        "qkv": {"kind": "product", "M": rows, "N": 3 * 2048, "K": 2048},
        "out": {"kind": "product", "M": rows, "N": 2048, "K": 2048},
        "up": {"kind": "product", "M": rows, "N": 8192, "K": 2048},
        "down": {"kind": "product", "M": rows, "N": 2048, "K": 8192},
        "core": {"kind": "attention", "B": 4, "H": 16, "N": 4096, "D": 128},
    }
    for name, problem in expected.items():
        seconds = predicted_seconds(problem, "h200", **NUMBERS)
        assert float(step.value(f"f_{name}")) == pytest.approx(seconds, rel=1e-9), name
    gradient = predicted_seconds({**expected["core"], "kind": "gradient"}, "h200", **NUMBERS)
    assert float(step.value("g_core")) == pytest.approx(gradient, rel=1e-9)
    back = (
        predicted_seconds({"kind": "product", "M": m, "N": n, "K": k}, "h200", **NUMBERS)
        for m, n, k in ((rows, 8192, 2048), (8192, 2048, rows))
    )
    assert float(step.value("g_down")) == pytest.approx(sum(back), rel=1e-9)


def test_grouped_keys_are_hidden() -> None:
    """A quarter of the keys: the forward pass takes as long, the gradient moves less before and after."""
    step = training_step(one_layer(key_heads=4, **NUMBERS), Division(micro_batch=4))
    attention = {"kind": "attention", "B": 4, "H": 16, "N": 4096, "D": 128}
    seconds, gradient = (
        predicted_seconds({**attention, "kind": kind}, "h200", **NUMBERS)
        for kind in ("attention", "gradient")
    )
    assert float(step.value("f_core")) == pytest.approx(seconds, rel=1e-9)
    # K, V, dK and dV are a quarter of what they were.
    less = 4 * (3 / 4) * 4 * 4096 * 2048 * 2 / (4.8e12 * NUMBERS["memory"])
    assert float(step.value("g_core")) == pytest.approx(gradient - less, rel=1e-9)


@pytest.mark.parametrize("attention", ["flash", "standard"])
def test_kernels_only_add(attention: str) -> None:
    """With the same shares no operator is faster than its roofline; without a start it is as before."""
    shares: dict[str, Any] = {"compute": 0.8, "scores": 0.8, "memory": 0.85, "attention": attention}
    plain, kernels = (training_step(one_layer(**shares, **more), Division()) for more in ({}, {"start": 0}))
    for name in ("qkv", "core", "softmax", "out", "up", "down", "pointwise", "head"):
        for way in "fg":
            assert kernels.value(f"{way}_{name}") >= plain.value(f"{way}_{name}")
    assert kernels.value("m_core") == plain.value("m_core")
    assert kernels.value("g_pointwise") == plain.value("g_pointwise")
    later = training_step(one_layer(**shares, start=1e-3), Division())
    assert later.value("forward") - kernels.value("forward") == pytest.approx(
        1e-3 * (5 + 5 if attention == "flash" else 7 + 5)
    )


def test_a_plan_computes_the_same_kernels() -> None:
    setting = Setting("gpt2", "h200", accelerators=4, batch=8, sequence=1024, **NUMBERS)
    for grid in space(setting):
        costs = grid.costs(0, len(grid.layouts))
        index = int(costs.valid.argmax())
        exact = training_step(setting, grid.division(index))
        assert float(exact.time.total) == pytest.approx(costs.time.flat[index], rel=1e-12)


def test_kernels_reach_every_operator() -> None:
    plain = {item.name: item.formula for item in TIME}
    changed = {item.name for item in KERNEL_TIME if plain.get(item.name, item.formula) != item.formula}
    names = ("qkv", "core", "softmax", "out", "up", "down", "experts", "pointwise", "head")
    assert changed == {f"{way}_{name}" for way in "fg" for name in names}
    assert list(of_kernels(TIME)) == list(KERNEL_TIME)


def test_what_needs_a_rate_of_exponentials() -> None:
    with pytest.raises(OptionError, match="mi300x"):
        Setting("gpt2", "mi300x", 8, 8, 1024, start=0).letters()
    with pytest.raises(OptionError, match="start"):
        Setting("gpt2", "h200", 8, 8, 1024, start=-1).letters()
    assert Setting("gpt2", "mi300x", 8, 8, 1024).letters()
    assert [field.name for field in fields(Setting)][-1] == "start"
    with pytest.raises(OptionError, match="mi300x"):
        kernel_parts("attention", {"B": 1, "H": 1, "N": 1, "D": 1}, hardware("mi300x"))


def test_the_chain_is_exact() -> None:
    setting = one_layer(**NUMBERS)
    letters = setting.letters() | Division(micro_batch=4).letters(setting)
    found = derive((*MEMORY, *KERNEL_TIME), letters)
    assert found["whole_core"].value * 32 == 33  # 4096 tokens are 32 tiles
    assert found["exp_core"].value == 4 * 16 * 4096 * 4096 / 2
