"""Ranks as MPI processes: the one file that names mpi4py, which it imports when it is used.

Start a program with ``mpiexec -n 4 python program.py`` and give a distributed reference ``launch=run_ranks``
from here.  Every process calls the reference with the same arguments and gets the results of all ranks.

A rank that raises tells the others, and all raise what it raised; one that stalls is given up after the
time-out, with one message, and MPI is told to end the program.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from refimpl.errors import BackendUnavailableError, DeadlockError, OptionError, UnsupportedError
from refimpl.numerics import Array
from refimpl.parallel import array_collectives
from refimpl.parallel.comm import TIMEOUT, Comm, Sent, Traffic, say_waits
from refimpl.parallel.data import data_parallel as _data_parallel
from refimpl.parallel.mesh_training import mesh_training as _mesh_training
from refimpl.parallel.pipedream import pipedream as _pipedream
from refimpl.parallel.pipeline import pipeline_parallel as _pipeline_parallel
from refimpl.parallel.tensor import tensor_parallel as _tensor_parallel
from refimpl.parallel.tensor import tensor_parallel_vjp as _tensor_parallel_vjp
from refimpl.parallel.vocabulary import vocabulary_embedding as _vocabulary_embedding
from refimpl.parallel.vocabulary import vocabulary_loss as _vocabulary_loss
from refimpl.parallel.zero import zero as _zero
from refimpl.registry import add_implementation

__all__ = ["MpiComm", "abort", "executor", "run_ranks", "world"]

Result = TypeVar("Result")
_STOP, _OUTCOME, _MESSAGES = 0, 1, 2  # tags: two of our own, then those of the program
_GRACE = 2.0  # seconds that ranks get to say what they came to, once one has failed
_PAUSE = 2e-5  # seconds between two looks at the network: ranks may share a core


def world() -> Any:
    """Return MPI's communicator of all processes.

    Raises
    ------
    BackendUnavailableError
        If mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        # A RuntimeError lists every place in which mpi4py looked for the library.
        what = "mpi4py finds no MPI library" if isinstance(error, RuntimeError) else str(error)
        raise BackendUnavailableError(
            f"ranks on MPI need mpi4py and an MPI library: pip install 'frugal-lm[mpi]' ({what})"
        ) from None
    return MPI.COMM_WORLD


@contextlib.contextmanager
def executor() -> Iterator[Any]:
    """Give the first process an executor whose `map` runs on all others, and them None when it is done.

    Raises
    ------
    BackendUnavailableError
        If mpi4py or an MPI library is missing.
    """
    communicator = world()
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(communicator, root=0) as pool:
        yield pool


class MpiComm(Comm):
    """The end of a rank that is an MPI process; `run_ranks` makes them.

    Every message carries the number of the run it belongs to: what a failed or careless program left on its
    way is dropped by the next one.

    Parameters
    ----------
    communicator : mpi4py.MPI.Intracomm
        Its first processes are the ranks; nothing but this module uses it.
    size : int
        Number of ranks.
    run : int
        Number of the run, the same on all processes.
    traffic : Traffic
        Where this rank's messages are counted.
    timeout : float
        Seconds that `recv` waits.
    """

    def __init__(self, communicator: Any, size: int, run: int, traffic: Traffic, timeout: float) -> None:
        super().__init__(communicator.rank, size, traffic)
        self._mpi = communicator
        self._run = run
        self._timeout = timeout

    def _post(self, dest: int, array: Array, tag: int) -> None:
        self.post(dest, array, tag + _MESSAGES)

    def _take(self, source: int, tag: int) -> Array:
        array: Array = self.take(source, tag + _MESSAGES, self._timeout)
        return array

    def post(self, dest: int, value: Any, tag: int) -> None:
        """Send any value without waiting: it is pickled at once, so the caller may change it after."""
        _pending[:] = [request for request in _pending if not request.Test()]
        _pending.append(self._mpi.isend((self._run, value), dest, tag))

    def look(self, tag: int, **source: int) -> tuple[bool, Any]:
        """Return whether a message of this run has come, from anyone or from `source`, and its value."""
        while (message := self._mpi.improbe(tag=tag, **source)) is not None:
            run, value = message.recv()
            if run == self._run:
                return True, value
        return False, None

    def take(self, source: int, tag: int, timeout: float) -> Any:
        """Return the next value from `source`, or raise if another rank failed or `timeout` has passed."""
        start = time.monotonic()
        while True:
            come, value = self.look(tag, source=source)
            if come:
                return value
            if tag != _OUTCOME and self.look(_STOP)[0]:
                raise _StoppedError
            waited = time.monotonic() - start
            if waited > timeout:
                waits = say_waits({self.rank: (source, tag - _MESSAGES)}, set())
                raise DeadlockError(f"no message for {timeout:g} s: {waits}")
            time.sleep(_PAUSE)


class _StoppedError(Exception):
    """Ends a rank because another one failed."""


def _channel(timeout: float) -> Any:
    """Return a communicator of all processes that nothing else uses; end the program if one does not come."""
    if _channels:
        return _channels[0]
    everyone = world()
    channel, request = everyone.Idup()
    start = time.monotonic()
    while not request.Test():
        if time.monotonic() - start > timeout:
            abort(f"not every process began its first run within {timeout:g} s")
        time.sleep(_PAUSE)
    _channels.append(channel)
    return channel


_channels: list[Any] = []  # none before the first run, then one
_pending: list[Any] = []  # messages that have not left yet
_runs = itertools.count()


def run_ranks(
    size: int,
    function: Callable[..., Result],
    /,
    *args: Any,
    traffic: Traffic | None = None,
    timeout: float = TIMEOUT,
) -> list[Result]:
    """Run ``function(comm, *args)`` on the first `size` MPI processes; every process gets all results.

    Parameters
    ----------
    size : int
        Number of ranks; the other processes only wait for the results.
    function : callable
        The SPMD program; what it returns must be picklable.
    *args
        Given to every rank as they are.
    traffic : Traffic, optional
        Counts what is sent, by all ranks, on every process.
    timeout : float
        Seconds that a rank waits for a message, and in the first run for the other processes, before the
        run is given up.

    Returns
    -------
    list
        One result a rank, on every process.

    Raises
    ------
    OptionError
        If `size` is below 1.
    UnsupportedError
        If there are fewer processes than `size`.
    BackendUnavailableError
        If mpi4py or an MPI library is missing.
    DeadlockError
        If a rank waited in vain.
    BaseException
        What a rank raised, on every process.
    """
    if size < 1:
        raise OptionError(f"size: expected at least 1 rank, got {size}")
    processes = world().size
    if size > processes:
        raise UnsupportedError(
            f"{size} ranks need as many processes; mpiexec started {processes}"
            if processes > 1
            else f"{size} ranks need as many processes: start the program with mpiexec -n {size}"
        )
    channel = _channel(timeout)
    run, counter = next(_runs), Traffic()
    comm = MpiComm(channel, size, run, counter, timeout)
    if comm.rank < size:
        outcome = _outcome(comm, function, args)
        for rank in range(channel.size):
            if rank != comm.rank:
                comm.post(rank, outcome, _OUTCOME)
        outcomes = _outcomes(comm, outcome, timeout)
    else:  # it has no part in the run, so it waits as long as that takes
        outcomes = _outcomes(comm, None, float("inf"))
    failures = [outcome.value for outcome in outcomes if isinstance(outcome, _Failed)]
    if failures:
        # A rank that waited in vain did so because of another one, if another one raised something else.
        raise next((error for error in failures if not isinstance(error, DeadlockError)), failures[0])
    done = [outcome for outcome in outcomes if isinstance(outcome, _Done)]
    if traffic is not None:
        for rank, outcome in enumerate(done):
            traffic.join(rank)
            for phase, sent in outcome.sent.items():
                traffic.add(rank, phase, sent.bytes, sent.messages)
    return [outcome.value for outcome in done]


class _Done(NamedTuple):
    value: Any
    sent: dict[str, Sent]


class _Failed(NamedTuple):
    value: BaseException


_Outcome = _Done | _Failed | None  # None: stopped, because another rank failed


def _outcome(comm: MpiComm, function: Callable[..., Any], args: tuple[Any, ...]) -> _Outcome:
    """Run this rank's part, and tell the others if it fails."""
    try:
        return _Done(function(comm, *args), comm.traffic.counts[comm.rank])
    except _StoppedError:
        return None
    except BaseException as error:  # whatever it is, every process raises it
        for rank in range(comm.size):
            if rank != comm.rank:
                comm.post(rank, None, _STOP)
        return _Failed(_portable(error, comm))


def _outcomes(comm: MpiComm, own: _Outcome, timeout: float) -> list[_Outcome]:
    """Return what each rank came to; if one does not say within `timeout`, end the program."""
    found: list[_Outcome] = []
    silent = []
    for rank in range(comm.size):
        try:
            found.append(own if rank == comm.rank else comm.take(rank, _OUTCOME, timeout))
        except DeadlockError:
            silent.append(rank)
        if silent or any(isinstance(outcome, _Failed) for outcome in found):
            timeout = min(timeout, _GRACE)  # the run is over: what is still on its way is short
    if silent:
        names = ", ".join(f"rank {rank} has not returned" for rank in silent)
        errors = [str(outcome.value) for outcome in found if isinstance(outcome, _Failed)]
        abort("; ".join([names, *errors]))
    return found


def abort(message: str, code: int = 1) -> None:
    """End all processes of the program, some of which cannot be reached, with one message and exit code."""
    time.sleep(0.5 * world().rank)  # so that the first to get here prints the one message
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    time.sleep(0.3)  # the launcher must forward the message before it kills the processes
    world().Abort(code)
    os._exit(code)  # MPI may take a moment to end this process; nothing more is to be printed


def _portable(error: BaseException, comm: Comm) -> BaseException:
    """Return `error` noting its rank, or its text if it cannot be pickled."""
    error.add_note(f"raised in rank {comm.rank} of {comm.size}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_TECHNIQUES: dict[str, Callable[..., Any]] = {
    "parallel.collectives": array_collectives.all_reduce,
    "parallel.collectives.reduce_scatter": array_collectives.reduce_scatter,
    "parallel.collectives.all_gather": array_collectives.all_gather,
    "parallel.collectives.all_to_all": array_collectives.all_to_all,
    "parallel.collectives.broadcast": array_collectives.broadcast,
    "parallel.collectives.reduce": array_collectives.reduce,
    "parallel.data": _data_parallel,
    "parallel.mesh": _mesh_training,
    "parallel.pipeline": _pipeline_parallel,
    "parallel.pipeline.pipedream": _pipedream,
    "parallel.tensor": _tensor_parallel,
    "parallel.tensor.backward": _tensor_parallel_vjp,
    "parallel.tensor.cross_entropy": _vocabulary_loss,
    "parallel.tensor.embedding": _vocabulary_embedding,
    "parallel.zero": _zero,
}
for _name, _function in _TECHNIQUES.items():
    globals()[_function.__name__] = partial(_function, launch=run_ranks)
    add_implementation(_name, f"refimpl.parallel.mpi:{_function.__name__}", backend="mpi")
