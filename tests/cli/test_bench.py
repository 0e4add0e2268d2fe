"""``frugal bench``: what is refused, what is verified, and what the numbers mean, with times made up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuda_backend
from cli import contest
from cli.backward_problem import attention_backward_problem
from cli.commands import bench
from cli.contest import Supply
from cli.int8_problems import int8_problems
from cli.problems import attention_problem
from cuda_backend.timing import Timing
from cuda_backend.torch_rivals import Rival
from memsim.hardware import hardware
from refimpl import registry
from refimpl.attention import flash_attention, flash_attention_vjp
from refimpl.numerics import round_to
from refimpl.quant import int8_matmul
from refimpl.registry import Case
from refimpl.testing import Report
from refimpl.tolerances import baseline_limits, exact_copy, mismatch

bfloat16 = np.dtype(ml_dtypes.bfloat16)

SHAPE = ("--shape", "2,3,20,8")


class Registered:
    """An implementation of whatever technique."""

    backends = ("cuda", "cudasim")

    def __init__(self, tier: str, function: Callable[..., Any]) -> None:
        self.tier, self.function = tier, function

    def load(self) -> Callable[..., Any]:
        return self.function


def right(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    return flash_attention(q, k, v, **options)


def last_row_wrong(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
    out = flash_attention(q, k, v, **options)
    if not hasattr(out, "_fields"):
        out[:, -1] = 0
    return out


def refusing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("the GPU has compute capability 8.0")


Times = dict[str, float]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Times]]:
    """``gpu({tier: function}, {rival: function}, {function: seconds})``: a GPU that NumPy plays."""
    times: Times = {}

    def interleaved(
        contestants: Mapping[str, Callable[[int], Any]], *, contexts: Mapping[str, Any], rounds: int
    ) -> dict[str, Timing]:
        assert rounds == 9
        assert set(contexts) == {name for name in contestants if "torch" in name}
        for call in contestants.values():
            assert np.array_equal(call(0), call(2))  # two sets of inputs, in turn
            assert not np.array_equal(call(0), call(1))
        return {name: Timing(times[name], times[name] / 2, 5e-6) for name in contestants}

    def arrange(
        ours: Mapping[str, Callable[..., Any]], rivals: Mapping[str, Callable[..., Any]], seconds: Times
    ) -> Times:
        times.update(seconds)
        listed = [Registered(tier, function) for tier, function in ours.items()]
        monkeypatch.setattr(registry, "implementations_of", lambda _: listed)
        found = {name: Rival(function) for name, function in rivals.items()}
        monkeypatch.setattr("cuda_backend.torch_rivals.attention_rivals", lambda _causal: found)
        return times

    monkeypatch.setattr(bench, "why_not", lambda _: None)
    supply = Supply(contest._draw_on_host, lambda array, _: array, None)
    monkeypatch.setattr(contest, "supply_of", lambda _: supply)
    monkeypatch.setattr("cuda_backend.timing.interleaved", interleaved)
    monkeypatch.setattr("cuda_backend.timing.input_sets", lambda _: 2)
    monkeypatch.setattr("cuda_backend.timing.device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("refimpl.testing.check", functools.partial(passed, Report()))
    contest._law_broken.cache_clear()
    return arrange  # type: ignore[return-value]


def passed(report: Report, *_: Any, **__: Any) -> Report:
    """Stand in for the check of small cases, which has tests of its own."""
    from refimpl.testing import Outcome

    report.outcomes.append(Outcome("t", "i", "cuda", "float16", "reference", "passed", "", ""))
    return report


def test_without_a_gpu_the_exit_code_is_3(run: Callable[..., Any]) -> None:
    result = run("bench", "attention", code=3)
    assert "backend cuda: NUMBA_ENABLE_CUDASIM is set" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("attention", "--shape", "1,2,3"), "--shape of attention is B,H,N,D; got 1x2x3"),
        (("attention", "--shape", "1,4,3,8,8"), "Hkv must divide H"),
        (("attention", "--pass", "bwd", "--shape", "1,4,3,8,8"), "Hkv must divide H"),
        (("int8", "--shape", "1,2,3,4"), "--shape of int8 is M,K,N; got 1x2x3x4"),
        (("int8", "--dtype", "fp32"), "--dtype of int8 is float16 or bfloat16"),
        (("int8", "--tokens", "16"), "the rows of a --model"),
        (("attention", "--model", "llama-2-7b"), "options of int8"),
        (("int8", "--causal"), "option of attention"),
        (("int8", "--pass", "bwd"), "int8 has no backward pass"),
        (("decode", "--causal"), "option of attention"),
        (("decode", "--pass", "both"), "decode has no backward pass"),
        (("decode", "--shape", "1,4,3,8,8"), "Hkv must divide H"),
        (("decode", "--shape", "1,4,8,8"), "--shape of decode is B,H,Hkv,Tk,D; got 1x4x8x8"),
        (("attention", "--form", "sliding"), "options of flexible"),
        (("flexible", "--splits", "4"), "option of decode"),
        (
            ("linear",),
            "Invalid value for '{attention|int8|weight-only|int8-attention|flexible|decode|growth}'",
        ),
        (("attention", "--shape", "1,2,0,4"), "at least 1"),
    ],
)
def test_usage(run: Callable[..., Any], arguments: tuple[str, ...], said: str) -> None:
    assert said in run("bench", *arguments, code=2).stderr


def test_rates_shares_and_ratios(gpu: Callable[..., Times], rows: Callable[..., Any]) -> None:
    gpu(
        {"portable": right, "hopper": right},
        {"torch SDPA FLASH_ATTENTION": right, "torch SDPA CUDNN_ATTENTION": refusing},
        {"frugal portable": 8e-6, "frugal hopper": 2e-6, "torch SDPA FLASH_ATTENTION": 3e-6},
    )
    document = rows("bench", "attention", *SHAPE, "--causal", "--rivals")
    found = {row["function"]: row for row in document["rows"]}
    ours = found["frugal hopper"]
    assert ours["work_op"] == 4 * 2 * 3 * 20 * 20 * 8 // 2
    assert ours["compulsory_bytes"] == 4 * (2 * 3 * 20 * 8) * 2
    assert ours["rate_op_per_s"] == pytest.approx(38400 / 2e-6)
    assert ours["bandwidth_byte_per_s"] == pytest.approx(7680 / 2e-6)
    assert ours["peak_share"] == pytest.approx(38400 / 2e-6 / 989.5e12)
    assert ours["bandwidth_share"] == pytest.approx(7680 / 2e-6 / 4.8e12)
    assert (ours["time_s"], ours["least_s"], ours["host_s"]) == (2e-6, 1e-6, 5e-6)
    speedups = {name: row["frugal_speedup"] for name, row in found.items()}
    assert speedups["frugal hopper"] == 1
    assert speedups["frugal portable"] == pytest.approx(4)
    assert speedups["torch SDPA FLASH_ATTENTION"] == pytest.approx(1.5)
    assert found["torch SDPA CUDNN_ATTENTION"]["status"] == "refused"
    assert "compute capability 8.0" in found["torch SDPA CUDNN_ATTENTION"]["detail"]
    assert found["torch SDPA default"]["status"] == "missing"
    assert document["totals"] == {"timed": 3, "failed": 0}
    assert any("H200" in source for source in document["sources"])


def test_a_tier_that_nothing_has_is_refused(gpu: Callable[..., Times], run: Callable[..., Any]) -> None:
    gpu({"portable": right, "hopper": right}, {}, {"frugal hopper": 1e-6})
    done = run("bench", "attention", *SHAPE, "--tier", "fastest", code=2)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "--tier: expected one of hopper, portable; got 'fastest'" in done.stderr
    assert "frugal portable" not in run("bench", "attention", *SHAPE, "--tier", "hopper").stdout


def test_without_a_mask_there_is_twice_the_work(gpu: Callable[..., Times], rows: Callable[..., Any]) -> None:
    gpu({"portable": right}, {}, {"frugal portable": 1e-6})
    masked, full = (
        rows("bench", "attention", *SHAPE, flag)["rows"][0] for flag in ("--causal", "--no-causal")
    )
    assert full["work_op"] == 2 * masked["work_op"]
    assert (masked["causal"], full["causal"]) == (True, False)


def test_a_wrong_kernel_is_not_timed(gpu: Callable[..., Times], rows: Callable[..., Any]) -> None:
    gpu({"portable": right, "hopper": last_row_wrong}, {}, {"frugal portable": 8e-6})
    document = rows("bench", "attention", *SHAPE, "--no-causal", code=1)
    good, bad = document["rows"]
    assert (good["status"], bad["status"]) == ("timed", "failed")
    assert bad["rate_op_per_s"] is None
    assert "batch 0, head 0" in bad["detail"]


def test_a_kernel_that_breaks_a_law_is_not_timed(
    gpu: Callable[..., Times], rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refimpl.testing import Outcome

    broken = Report(
        [Outcome("t", "i", "cuda", "float16", "keys_commute", "failed", "by 0.5", "frugal verify")]
    )
    gpu({"portable": right}, {}, {})
    monkeypatch.setattr("refimpl.testing.check", lambda *_, **__: broken)
    (row,) = rows("bench", "attention", *SHAPE, "--causal", code=1)["rows"]
    assert (row["status"], row["detail"]) == ("failed", "keys_commute: by 0.5")


def test_what_a_tier_refuses_is_no_failure(gpu: Callable[..., Times], rows: Callable[..., Any]) -> None:
    gpu({"portable": right, "hopper": refusing}, {}, {"frugal portable": 1e-6})
    document = rows("bench", "attention", *SHAPE, "--causal")
    assert [row["status"] for row in document["rows"]] == ["timed", "refused"]


def test_if_all_refuse_the_exit_code_is_1(gpu: Callable[..., Times], run: Callable[..., Any]) -> None:
    gpu({"hopper": refusing}, {}, {})
    assert "nothing of ours was timed" in run("bench", "attention", *SHAPE, "--causal", code=1).stderr


def test_the_picture_has_a_bar_for_each_function(
    gpu: Callable[..., Times], run: Callable[..., Any], tmp_path: Any
) -> None:
    pytest.importorskip("matplotlib")
    gpu(
        {"portable": right},
        {"torch SDPA default": right},
        {"frugal portable": 1e-6, "torch SDPA default": 2e-6},
    )
    run("bench", "attention", *SHAPE, "--rivals", "--plot", str(tmp_path / "bench.svg"))
    assert "torch SDPA default" in (tmp_path / "bench.svg").read_text()


def test_an_unknown_gpu_has_no_ceilings(
    gpu: Callable[..., Times], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu({"portable": right}, {}, {"frugal portable": 1e-6})
    monkeypatch.setattr("cuda_backend.timing.device_name", lambda: "NVIDIA H9000")
    assert "No ceilings" in run("bench", "attention", *SHAPE, "--causal").stdout
    assert "No ceilings" not in run("bench", "attention", *SHAPE, "--causal", "--hardware", "h200").stdout


def test_the_sampled_rows_of_a_product_are_exact() -> None:
    product, _, linear, _ = int8_problems((40, 12, 5))
    operands, _ = product.operands(contest._draw_on_host, 0)
    out = int8_matmul(*operands)
    assert product.check(operands, out, lambda array, _: array) is None
    out[-1, 2] += 1
    assert product.check(operands, out, lambda array, _: array) == "1 of 80 sampled cells differ"
    assert (linear.work, linear.compulsory_bytes) == (
        2 * 40 * 12 * 5,
        2 * 40 * 12 + 12 * 5 + 4 * 5 + 2 * 40 * 5,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_sampled_rows_of_attention_catch_a_shifted_mask(dtype: str, causal: bool) -> None:
    problem = attention_problem((1, 2, 50, 16), dtype, causal)
    operands, theirs = problem.operands(contest._draw_on_host, 1)
    assert all(a is b for a, b in zip(operands, theirs, strict=True))
    keep = lambda array, _: array  # noqa: E731
    assert problem.check(operands, flash_attention(*operands, causal=causal), keep) is None
    mask = np.tril(np.ones((50, 50), bool), 1 if causal else 48)
    assert problem.check(operands, flash_attention(*operands, attn_mask=mask), keep) is not None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_sampled_rows_of_a_backward_pass(
    dtype: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cuda_backend, "flash_attention", lambda *x, tier, **options: flash_attention(*x, **options)
    )
    problem = attention_backward_problem((1, 4, 2, 50, 16) if causal else (1, 2, 50, 16), dtype, causal)
    operands, theirs = problem.operands(contest._draw_on_host, 1)
    assert [id(x) for x in theirs] == [id(operands[index]) for index in (0, 1, 2, 5)]
    keep = lambda array, _: array  # noqa: E731
    right = flash_attention_vjp(*operands, causal=causal)
    assert problem.check(operands, right, keep) is None
    mask = np.tril(np.ones((50, 50), bool), 1 if causal else 48)
    assert problem.check(operands, flash_attention_vjp(*operands, attn_mask=mask), keep) is not None
    for name in ("dq", "dk", "dv"):
        wrong = getattr(right, name).copy()
        wrong[:, -1] *= 1.1  # the last key of a causal mask is seen by one query
        assert name in str(problem.check(operands, right._replace(**{name: wrong}), keep))


def test_a_backward_pass_that_drops_its_last_keys_is_caught_however_long_the_sequence() -> None:
    """The baseline rounds dQ once: tile by tile its own error, and the limit with it, would grow with N."""
    N, rows, D = 8192, 16, 32
    record = registry.get("attention.flash_backward")
    rng = np.random.default_rng(0)
    shapes = (1, rows, 1, D), (1, N, 1, D), (1, N, 1, D), (1, rows, 1, D)
    q, k, v, do = (round_to(rng.standard_normal(shape), bfloat16) for shape in shapes)
    out, lse = flash_attention(q, k, v, return_lse=True, block_sizes=(rows, N))
    case = Case((q, k, v, out, lse, do), {"block_sizes": (rows, N)})
    truth, _, limits, invalid = baseline_limits(record, case, bfloat16)
    assert invalid is None
    exact = exact_copy(case)
    q, k, v, *rest = exact.args
    dropped = Case((q, k[:, :-32], v[:, :-32], *rest), case.kwargs).call(flash_attention_vjp).dq
    assert mismatch(round_to(truth["dq"], bfloat16), truth["dq"], limits["dq"]) is None
    assert mismatch(round_to(dropped, bfloat16), truth["dq"], limits["dq"]) is not None


def test_a_rival_is_made_ready_once_for_each_set_of_inputs(
    gpu: Callable[..., Times], rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu({"portable": right}, {}, {"frugal portable": 1e-6, "torch SDPA default": 2e-6})
    made = []

    def prepare(*operands: Any) -> tuple[Any, ...]:
        made.append(operands)
        return operands

    found = {"torch SDPA default": Rival(right, prepare=prepare)}
    monkeypatch.setattr("cuda_backend.torch_rivals.attention_rivals", lambda _causal: found)
    rows("bench", "attention", *SHAPE, "--causal", "--rivals")
    assert len(made) == 3  # once to see whether it refuses, then for both sets


def test_a_float32_rate_is_held_to_the_float32_peak() -> None:
    problem = attention_problem((1, 1, 8, 8), "float32", False)
    found = contest.rates(problem, Timing(1.0, 1.0, 1.0), 1.0, hardware("h200"))
    assert found["peak_share"] == pytest.approx(problem.work / 67e12)


def test_the_sampled_cells_of_a_linear_catch_a_lost_outlier() -> None:
    from refimpl.quant import llm_int8_linear_fused, quantize_columns

    linear = int8_problems((30, 24, 7))[2]
    x = contest._draw_on_host((30, 24), "float16", 0, outliers=4)
    stored = quantize_columns(contest._draw_on_host((7, 24), "float16", 1).T)
    keep = lambda array, _: array  # noqa: E731
    assert linear.check((x, stored), llm_int8_linear_fused(x, stored), keep) is None
    assert linear.check((x, stored), llm_int8_linear_fused(x, stored, threshold=None), keep) is not None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sampled_cells_of_a_scaled_product_and_of_rows_are_those_of_the_reference(dtype: str) -> None:
    from refimpl.quant import dequantize_product, quantize_rows
    from refimpl.testing import dtype_named

    _, scaled, _, quantised = int8_problems((30, 24, 7), dtype)
    keep = lambda array, _: array  # noqa: E731
    (a, b, a_absmax, b_absmax), _ = scaled.operands(contest._draw_on_host, 0)
    out = dequantize_product(int8_matmul(a, b), a_absmax, b_absmax, dtype=dtype_named(dtype))
    assert scaled.check((a, b, a_absmax, b_absmax), out, keep) is None
    other = dequantize_product(int8_matmul(a, b), b_absmax[0] * a_absmax, b_absmax, dtype=dtype_named(dtype))
    assert "sampled cells differ" in str(scaled.check((a, b, a_absmax, b_absmax), other, keep))
    operands, _ = quantised.operands(contest._draw_on_host, 0)
    found = quantize_rows(*operands)
    assert quantised.check(operands, found, keep) is None
    found.codes[29, 23] ^= 1
    assert quantised.check(operands, found, keep) == "1 codes or absmax of sampled rows differ"
