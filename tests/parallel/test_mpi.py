"""The same programs on real MPI processes, started by mpiexec; skipped where mpi4py or mpiexec is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.errors import BackendUnavailableError
from refimpl.parallel import mpi

BESIDE = Path(sys.executable).parent
MPIEXEC = shutil.which("mpiexec", path=f"{BESIDE}{os.pathsep}{os.environ.get('PATH', '')}")
ROOT = Path(__file__).resolve().parents[2]
MISSING = MPIEXEC is None or importlib.util.find_spec("mpi4py") is None
needs_mpi = pytest.mark.skipif(
    MISSING and "FRUGAL_TEST_MPI" not in os.environ,  # the stage of CI that must not skip sets it
    reason="needs mpi4py and mpiexec: pip install 'frugal-lm[mpi]'",
)

EQUAL = """
import numpy as np
from refimpl import registry
from refimpl.errors import UnsupportedError
from refimpl.parallel import Traffic, array_collectives, data_parallel, mpi
from refimpl.parallel.zero import zero

registry.load()
runs = 0
for ranks in (1, 3, 4):
    cases = [("parallel.collectives", array_collectives.all_reduce, {"n": 5, "algorithm": a})
             for a in ("ring", "recursive", "tree")]
    cases += [("parallel.collectives.all_to_all", array_collectives.all_to_all, {"n": 2})]
    shape = {"steps": 1, "micro": 2, "B": 1, "T": 3, "width": 3, "extra": "clip"}
    cases += [("parallel.zero", zero, {**shape, "stage": stage}) for stage in (1, 2, 3)]
    cases += [("parallel.data", data_parallel, shape)]
    for name, function, axes in cases:
        case = registry.get(name).sample(np.random.default_rng(ranks), ranks=ranks, **axes)
        threads, processes = Traffic(), Traffic()
        expected = case.replace(traffic=threads).call(function)
        found = case.replace(traffic=processes, launch=mpi.run_ranks).call(function)
        pairs = zip(expected, found) if isinstance(expected, tuple) else [(expected, found)]
        assert all(np.array_equal(a, b) for a, b in pairs), name
        assert threads.counts == processes.counts, name
        runs += 1
try:
    mpi.run_ranks(5, lambda comm: None)
except UnsupportedError as error:
    refused = str(error)
if mpi.world().rank == 0:
    print(runs, "runs equal;", refused)
"""

FAILING = """
from refimpl.parallel import DeadlockError, mpi
import numpy as np

def program(comm):
    if comm.rank == 1:
        comm.send(0, np.zeros(3), tag=9)  # nobody receives it: the next run must not either
        raise ValueError("no")
    comm.recv(1)

def deadlock(comm):
    comm.recv((comm.rank + 1) % comm.size, tag=9)

told = []
for run, kind, timeout in ((program, ValueError, 30.0), (deadlock, DeadlockError, 0.5)):
    try:
        mpi.run_ranks(3, run, timeout=timeout)
    except kind as error:
        told.append(f"{error} {error.__notes__[0][:16]}")
after = mpi.run_ranks(4, lambda comm: comm.rank)
import sys
sys.stdout.write(f"{told[0]}; {told[1][:32]}; {after}\\n")
"""

STALLING = """
import time
from refimpl.parallel import mpi
mpi.run_ranks(3, lambda comm: time.sleep(60) if comm.rank == 1 else comm.recv(1), timeout=0.5)
"""

# How rank 1 goes: killed in the middle of a run, by an error before its first, quietly before its first.
GONE = """
import os, signal, sys, time
from refimpl.parallel import mpi

how = sys.argv[1]
def program(comm):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.recv(1)

if how != "killed" and mpi.world().rank == 1:
    if how == "failed":
        raise RuntimeError("lost before the run")
    sys.exit(0)
mpi.run_ranks(3, program, timeout=1.0)
"""

VERIFY = """
import sys
from refimpl import registry
from refimpl.parallel import mpi
from refimpl.testing import check

registry.load()
lines = []
shape = {"ranks": 3, "steps": 1, "micro": 1, "B": 1, "T": 3, "width": 2, "extra": "clip"}
mesh = {"tensor": 2, "pipeline": 1, "data": 2, "steps": 1, "micro": 2, "B": 1, "tokens": 2}
mesh |= {"make": "mixture", "schedule": "1f1b", "stage": 3, "split": "sequence", "extra": "clip"}
named = {"parallel.collectives": None, "parallel.data": shape, "parallel.zero": {**shape, "stage": 3}}
named |= {"parallel.mesh": mesh, "parallel.tensor.cross_entropy": {"ranks": 4, "B": 1, "T": 2}}
named |= {"parallel.pipeline.pipedream": {"ranks": 4, "micro": 3, "layers": 2, "B": 1, "T": 1}}
for name, axes in named.items():
    (item,) = [item for item in registry.implementations_of(name) if "mpi" in item.backends]
    report = check(name, item.load(), backend="mpi", dtypes=("float64",), examples=2, axes=axes)
    assert report.ok, report.failed[:1]
    assert axes or report.counts()["refused"], "cases with more ranks than processes are refused, not passed"
    lines.append(f"{name} {report.ok}")
if mpi.world().rank == 0:
    print("; ".join(lines))
"""


def start(program: str, *arguments: str, ranks: int = 4) -> subprocess.CompletedProcess[str]:
    return launch("-W", "error", "-c", program, *arguments, ranks=ranks)


def launch(*arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    assert MPIEXEC is not None
    return subprocess.run(
        [MPIEXEC, "-n", str(ranks), sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )


@needs_mpi
def test_processes_equal_threads_bit_for_bit() -> None:
    done = start(EQUAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "24 runs equal; 5 ranks need as many processes; mpiexec started 4"


@needs_mpi
def test_every_process_raises_what_one_raised() -> None:
    done = start(FAILING)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("no raised in rank 1; no message for 0.5 s: rank"), line
        assert line.endswith("[0, 1, 2, 3]")


@needs_mpi
def test_a_process_that_stalls_ends_the_program_with_one_message() -> None:
    begin = time.monotonic()
    done = start(STALLING)
    assert time.monotonic() - begin < 30
    assert done.returncode != 0
    assert done.stderr.count("rank 1 has not returned") == 1
    assert re.search(r"no message for 0.5 s: rank [02] waits for rank 1", done.stderr)
    assert "Traceback" not in done.stderr


@needs_mpi
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "Killed"),  # mpiexec sees it and says so
        ("failed", "RuntimeError: lost before the run"),
        ("left", "not every process began its first run within 1 s"),
    ],
)
def test_a_process_that_is_gone_ends_the_program(how: str, message: str) -> None:
    begin = time.monotonic()
    done = start(GONE, how)
    assert time.monotonic() - begin < 30
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(message) == 1


@needs_mpi
def test_ten_steps_of_zero_on_four_processes_from_the_command() -> None:
    done = launch(
        "-m", "cli.main", "parallel", "train", "--ranks", "4", "--backend", "mpi", "--json", ranks=4
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]  # one process speaks
    assert [(row["stage"], row["owned_once"], row["over_data_parallel"]) for row in rows] == [
        (1, 350, 1.0),
        (2, 350, 1.0),
        (3, 350, 1.5),
    ]
    for row in rows:
        assert row["difference"] <= 1e-12
        assert row["held_bytes"] == row["model_held_bytes"]
        assert row["sent_bytes"] == row["model_sent_bytes"]
        assert row["sent_messages"] == row["model_sent_messages"]


@needs_mpi
@pytest.mark.parametrize(
    "options",
    [["--tp", "2", "--pp", "1", "--dp", "2", "--stage", "1,3"], ["--tp", "1", "--pp", "2", "--dp", "2"]],
)
def test_ten_steps_of_a_mesh_on_four_processes_from_the_command(options: list[str]) -> None:
    command = ["-m", "cli.main", "parallel", "mesh", *options, "--backend", "mpi", "--json"]
    done = launch(*command, ranks=4)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]  # one process speaks
    assert {row["steps"] for row in rows} == {10}
    for row in rows:
        assert row["difference"] <= 1e-10
        assert row["copies_differ"] == 0
        assert row["last_loss"] < row["first_loss"]
        for name in ("held_bytes", "in_flight", "sent_bytes", "sent_messages"):
            assert row[name] == row[f"model_{name}"], (row["collective"], name)


@needs_mpi
def test_states_saved_by_processes_are_resumed_by_others(tmp_path: Path) -> None:
    folder = str(tmp_path / "states")
    options = ["-m", "cli.main", "parallel", "train", "--backend", "mpi", "--stage", "2"]
    saved = launch(*options, "--ranks", "3", "--steps", "2", "--save", folder, ranks=3)
    assert saved.returncode == 0, saved.stderr
    resumed = launch(*options, "--ranks", "2", "--steps", "4", "--resume", folder, "--json", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    (row,) = json.loads(resumed.stdout)["rows"]
    assert (row["resumed_after"], row["agrees"]) == (2, True)


@needs_mpi
def test_what_fails_on_all_processes_is_said_once() -> None:
    done = launch("-m", "cli.main", "parallel", "train", "--ranks", "4", "--backend", "mpi", ranks=2)
    assert done.returncode == 2  # usage
    assert done.stderr.count("Error: 4 ranks need as many processes; mpiexec started 2") == 1


@needs_mpi
def test_records_hold_on_processes() -> None:
    done = start(VERIFY)
    assert done.returncode == 0, done.stderr
    names = ("collectives", "data", "zero", "mesh", "tensor.cross_entropy", "pipeline.pipedream")
    assert done.stdout.strip() == "; ".join(f"parallel.{name} True" for name in names)


def test_without_mpi4py_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(BackendUnavailableError, match=r"frugal-lm\[mpi\]"):
        mpi.world()
