"""Shared set-up: the simulator unless a GPU run is asked for, hypothesis profiles, and times by stage."""

from __future__ import annotations

import os
from collections import defaultdict

# Before anything imports numba: CI has no GPU.  A GPU run says FRUGAL_TEST_GPU=1 and selects `-m cuda`.
if os.environ.get("FRUGAL_TEST_GPU") != "1":
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
# Before anything imports numpy: arrays are small, and the workers of ``-n auto`` take the cores already.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# Hypothesis loads its own "ci" profile where CI is set, so ours is registered under that name and loaded.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=12, print_blob=True, **_COMMON)
settings.register_profile("dev", max_examples=12, **_COMMON)
settings.register_profile("nightly", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

STAGES = ("cudasim", "aot", "aot_full", "cuda", "mpi")
_seconds: dict[str, float] = defaultdict(float)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot run, and the full compile grid unless it was asked for."""
    chosen = config.getoption("-m") or ""
    gpu = os.environ.get("FRUGAL_TEST_GPU") == "1"
    for item in items:
        item.user_properties.append(("stage", _stage(item)))
        if item.get_closest_marker("cuda") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: FRUGAL_TEST_GPU=1 pytest -m cuda"))
        if item.get_closest_marker("cudasim") and gpu:
            item.add_marker(pytest.mark.skip(reason="this run uses the GPU, not the simulator"))
        if item.get_closest_marker("aot_full") and "aot_full" not in chosen:
            item.add_marker(pytest.mark.skip(reason="the full grid: pytest -m aot_full"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a phase of a test to its stage; with ``-n`` the reports of all workers arrive here."""
    stage = dict(report.user_properties).get("stage", "CPU tests")
    _seconds[str(stage)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the time of each stage, summed over workers."""
    parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in sorted(_seconds.items()))
    terminalreporter.write_line(f"time by stage: {parts}")


def _stage(item: pytest.Item) -> str:
    if isinstance(item, pytest.DoctestItem):
        return "doctests"
    return next((name for name in STAGES if item.get_closest_marker(name)), "CPU tests")
