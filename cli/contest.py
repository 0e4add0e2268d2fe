"""How ``frugal bench`` runs a problem: ours are held to their definition first, then all are timed."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cli.problems import Arrays, Problem, total_bytes
from refimpl import registry

if TYPE_CHECKING:
    from cli.projections import Layer
    from cuda_backend.timing import Timing
    from cuda_backend.torch_rivals import Rival
    from memsim.hardware import Hardware
    from refimpl.numerics import Array

__all__ = ["Supply", "labels", "rates", "result_rows", "supply_of", "tiers"]

EXAMPLES = {"cuda": 4, "cudasim": 1}  # small cases on which a function obeys every law of its record


class Supply(NamedTuple):
    """Where arrays come from: ``draw(shape, dtype, seed, outliers=0)`` and ``to_host(array, dtype)``."""

    draw: Callable[..., Any]
    to_host: Callable[[Any, str], Array]
    no_rivals: str | None


def supply_of(backend: str) -> Supply:
    """Return PyTorch's arrays on a GPU if it is installed, else Numba's; NumPy's in the simulator."""
    from cuda_backend.torch_ops import draw, missing, to_host
    from refimpl.testing import dtype_named

    if backend == "cudasim":
        return Supply(_draw_on_host, lambda array, _: array, "the simulator runs kernels of Numba only")
    reason = missing()
    if reason is None:
        return Supply(draw, lambda tensor, dtype: to_host(tensor, dtype_named(dtype)), None)
    from cuda_backend._numba import cuda

    def uploaded(shape: tuple[int, ...], dtype: str, seed: int, outliers: int = 0) -> Any:
        return cuda.to_device(_draw_on_host(shape, dtype, seed, outliers))

    return Supply(uploaded, lambda array, _: array.copy_to_host(), reason)


def result_rows(
    problem: Problem,
    backend: str,
    supply: Supply,
    *,
    tier: str | None,
    rivals: Sequence[str],
    rounds: int,
    card: Hardware | None,
) -> list[dict[str, Any]]:
    """Return one row for each function: its times, or why there are none.

    Of ours those of `tier`, or all; of others those whose name contains one of `rivals`.
    """
    ours, theirs = problem.operands(supply.draw, 0)
    rows: list[dict[str, Any]] = []
    ready: dict[str, Callable[..., Any]] = {}
    rival_of: dict[str, Rival] = {}
    for name, f in _our_functions(problem, backend, tier):
        call = functools.partial(f, **problem.options)
        status, detail, error = _verified(problem, f, call, ours, backend, supply)
        row = _row(problem, name, ours=True, status=status, detail=detail)
        rows.append(row | {"rms_error": error})
        if status == "verified":
            ready[name] = call
    if rivals:
        for name, rival in _rivals(problem, supply):
            if not any(part in name for part in rivals):
                continue
            status, detail = ("missing", rival) if isinstance(rival, str) else _tried(rival, theirs)
            rows.append(_row(problem, name, ours=False, status=status, detail=detail))
            if status == "verified" and not isinstance(rival, str):
                ready[name], rival_of[name] = rival.function, rival
    if backend == "cudasim":
        for row in rows:
            if row["function"] in ready:
                start = time.perf_counter()
                ready[row["function"]](*ours)
                row |= {"status": "timed", "simulator_s": time.perf_counter() - start}
        return rows
    if any(row["ours"] and row["status"] == "verified" for row in rows):
        _time(problem, rows, ready, rival_of, (ours, theirs), supply, rounds, card)
    return rows


def _our_functions(
    problem: Problem, backend: str, tier: str | None
) -> Iterator[tuple[str, Callable[..., Any]]]:
    if problem.functions is not None:
        for name, function in problem.functions(backend).items():
            if tier is None or name == f"frugal {tier}":
                yield name, function
        return
    for item in registry.implementations_of(problem.technique):
        if backend in item.backends and tier in (None, item.tier):
            yield f"frugal {item.tier}".rstrip(), item.load()


def tiers(problem: Problem, backend: str) -> set[str]:
    """Return the tiers of ours that `problem` has on a backend, whether or not it is here."""
    if problem.functions is not None:
        return {name.removeprefix("frugal ") for name in problem.functions(backend)}
    found = registry.implementations_of(problem.technique)
    return {item.tier for item in found if backend in item.backends}


def _rivals(problem: Problem, supply: Supply) -> Iterator[tuple[str, Rival | str]]:
    """Yield every rival, or why it is missing."""
    found = problem.rivals() if supply.no_rivals is None else {}
    for name in problem.rival_names:
        yield name, found.get(name) or supply.no_rivals or "the installed version has no such function"


def _verified(
    problem: Problem,
    f: Callable[..., Any],
    call: Callable[..., Any],
    operands: Arrays,
    backend: str,
    supply: Supply,
) -> tuple[str, str, float | None]:
    """Hold a function to its record on small cases, and sampled rows of the case to be timed."""
    from cuda_backend.arrays import poisoned_outputs

    with poisoned_outputs():
        try:
            output = call(*operands)
        except NotImplementedError as error:
            return "refused", str(error), None
        wrong = problem.check(operands, output, supply.to_host)
        if wrong is None and problem.functions is None:
            axes = tuple(problem.axes.items())
            wrong = _law_broken(problem.technique, f, problem.dtype, backend, axes)
    if wrong:
        return "failed", wrong, None
    found = None if problem.error is None else problem.error(operands, output, supply.to_host)
    return "verified", "", found


@functools.cache
def _law_broken(
    technique: str, f: Callable[..., Any], dtype: str, backend: str, axes: tuple[tuple[str, Any], ...]
) -> str | None:
    """Return what is wrong with a function on small cases, or None."""
    from refimpl.testing import check

    report = check(
        technique,
        f,
        backend=backend,
        examples=EXAMPLES[backend],
        axes=dict(axes),
        dtypes=["float32" if dtype == "int8" else dtype],  # codes stay codes
        edges=False,
    )
    if report.failed:
        return f"{report.failed[0].check}: {report.failed[0].detail}"
    return None if report.counts()["passed"] else "no small case could be checked"


def _tried(rival: Rival, operands: Arrays) -> tuple[str, str]:
    try:
        with rival.context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend refuses; that it does is an exception
            rival.function(*rival.prepare(*operands))
    except Exception as error:  # what a library refuses it says in ways of its own
        return "refused", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "verified", ""


def _time(
    problem: Problem,
    rows: list[dict[str, Any]],
    ready: Mapping[str, Callable[..., Any]],
    rival_of: Mapping[str, Rival],
    first: tuple[Arrays, Arrays],
    supply: Supply,
    rounds: int,
    card: Hardware | None,
) -> None:
    """Time what is ready, and fill in the rows."""
    from cuda_backend.timing import input_sets, interleaved

    count = input_sets(total_bytes(first[0]))
    sets = [first, *(problem.operands(supply.draw, seed) for seed in range(1, count))]

    def rotating(name: str, f: Callable[..., Any]) -> Callable[[int], Any]:
        operands = [ours for ours, _ in sets]
        if name in rival_of:
            with rival_of[name].context():
                operands = [rival_of[name].prepare(*theirs) for _, theirs in sets]
        return lambda index: f(*operands[index % count])

    calls = {name: rotating(name, f) for name, f in ready.items()}
    contexts = {name: rival.context for name, rival in rival_of.items()}
    timings = interleaved(calls, contexts=contexts, rounds=rounds)
    best = min(timings[row["function"]].device_s for row in rows if row["ours"] and row["function"] in ready)
    for row in rows:
        if row["function"] in ready:
            row |= rates(problem, timings[row["function"]], best, card)


def rates(problem: Problem, timing: Timing, best_s: float, card: Hardware | None) -> dict[str, Any]:
    """Return what a time means: rates, shares of the card's ceilings, and the ratio to the best of ours."""
    seconds = timing.device_s
    rate, bandwidth = problem.work / seconds, problem.compulsory_bytes / seconds
    found = {
        "status": "timed",
        "time_s": seconds,
        "least_s": timing.least_s,
        "host_s": timing.host_s,
        "rate_op_per_s": rate,
        "bandwidth_byte_per_s": bandwidth,
        "frugal_speedup": seconds / best_s,
    }
    if card is not None:
        if problem.precision in card.peaks:
            found["peak_share"] = rate / card.peak(problem.precision).value
        found["bandwidth_share"] = bandwidth / card.hbm_bandwidth.value
    return found


def labels(layer: Layer | None) -> dict[str, Any]:
    """Return what a row says of whose layers it is about."""
    if layer is None:
        return {"model": None, "layers": None}
    return {"model": layer.model, "layers": list(layer.names)}


def _row(problem: Problem, name: str, *, ours: bool, status: str, detail: str) -> dict[str, Any]:
    return {
        "operation": problem.operation,
        **labels(problem.layer),
        "shape": list(problem.shape),
        "dtype": problem.dtype,
        "causal": problem.causal,
        "function": name,
        "ours": ours,
        "status": status,
        "detail": detail,
        "work_op": problem.work,
        "compulsory_bytes": problem.compulsory_bytes,
        **dict.fromkeys(
            (
                "time_s",
                "least_s",
                "host_s",
                "simulator_s",
                "rate_op_per_s",
                "bandwidth_byte_per_s",
                "peak_share",
                "bandwidth_share",
                "frugal_speedup",
                "apart_s",
                "rms_error",
            )
        ),
    }


def _draw_on_host(shape: tuple[int, ...], dtype: str, seed: int, outliers: int = 0) -> Array:
    """Return what `cuda_backend.torch_ops.draw` does, as a NumPy array."""
    import numpy as np

    from refimpl.numerics import round_to
    from refimpl.testing import dtype_named

    rng = np.random.default_rng(seed)
    if dtype == "int8":
        return rng.integers(-127, 128, shape, dtype=np.int8)
    if dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    array = np.clip(rng.standard_normal(shape, dtype=np.float32), -5, 5)
    array[..., :outliers] = 20
    return round_to(array, dtype_named(dtype))
