"""Ranks that pass messages, every message counted: what a distributed reference is written on.

A distributed reference is one function that every rank runs (SPMD), with a `Comm` as its first argument.
`run_ranks` runs it with one thread a rank; `refimpl.parallel.mpi.run_ranks` runs it on MPI's processes.

>>> def right_neighbour(comm):
...     comm.send((comm.rank - 1) % comm.size, np.array([comm.rank]))
...     return int(comm.recv((comm.rank + 1) % comm.size)[0])
>>> traffic = Traffic()
>>> run_ranks(3, right_neighbour, traffic=traffic), traffic.sent(0)
([1, 2, 0], Sent(messages=1, bytes=8))
"""

from __future__ import annotations

import contextvars
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np

from refimpl.errors import DeadlockError, OptionError
from refimpl.numerics import Array
from refimpl.parallel.traffic import Sent, Traffic
from refimpl.validation import as_array

__all__ = ["Comm", "Launch", "Sent", "ThreadComm", "Traffic", "run_ranks", "say_waits"]

Result = TypeVar("Result")
TIMEOUT = 30.0  # seconds without a message before a run is given up
_GRACE = 0.2  # seconds that ranks get to end once one of them has failed


class Comm(ABC):
    """One rank's end of the network.

    `send` never blocks and takes a copy; messages between two ranks under one tag arrive in the order in
    which they were sent.  A subclass says how a message travels (`_post`, `_take`); counting is done here.

    Attributes
    ----------
    rank, size : int
        This rank, from 0, and how many there are.
    traffic : Traffic
        Where messages are counted.
    """

    def __init__(self, rank: int, size: int, traffic: Traffic) -> None:
        self.rank = rank
        self.size = size
        self.traffic = traffic
        self._phase = ""
        traffic.join(rank)

    def send(self, dest: int, array: Array, tag: int = 0) -> None:
        """Send a copy of `array` to rank `dest`.

        Raises
        ------
        OptionError
            If `dest` is not another rank.
        """
        self._check_peer("dest", dest)
        array = as_array("array", array)
        self.traffic.add(self.rank, self._phase, array.nbytes)
        self._post(dest, array, tag)

    def recv(self, source: int, tag: int = 0) -> Array:
        """Return the next array that rank `source` sent here under `tag`, waiting for it.

        Raises
        ------
        OptionError
            If `source` is not another rank.
        DeadlockError
            If it cannot come any more, or did not come in time.
        """
        self._check_peer("source", source)
        return self._take(source, tag)

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """Count what is sent inside the block under `label`; of nested labels the innermost counts."""
        before, self._phase = self._phase, label
        try:
            yield
        finally:
            self._phase = before

    def _check_peer(self, what: str, rank: int) -> None:
        if not 0 <= rank < self.size or rank == self.rank:
            raise OptionError(f"{what}: expected another rank below {self.size}; rank {self.rank} got {rank}")

    @abstractmethod
    def _post(self, dest: int, array: Array, tag: int) -> None: ...

    @abstractmethod
    def _take(self, source: int, tag: int) -> Array: ...


class Launch(Protocol):
    """How ranks are started: `run_ranks` here, or that of `refimpl.parallel.mpi`."""

    def __call__(
        self,
        size: int,
        function: Callable[..., Result],
        /,
        *args: Any,
        traffic: Traffic | None = None,
        timeout: float = TIMEOUT,
    ) -> list[Result]:
        """Return ``function(comm, *args)`` of every rank, in order of rank."""
        ...


def run_ranks(
    size: int,
    function: Callable[..., Result],
    /,
    *args: Any,
    traffic: Traffic | None = None,
    timeout: float = TIMEOUT,
) -> list[Result]:
    """Run ``function(comm, *args)`` on `size` ranks, one thread each, and return what each returned.

    Parameters
    ----------
    size : int
        Number of ranks, at least 1.
    function : callable
        The SPMD program.
    *args
        Given to every rank as they are: ranks must not write to them.
    traffic : Traffic, optional
        Counts what is sent.
    timeout : float
        Seconds without any message or ending rank after which the run is given up.

    Returns
    -------
    list
        One result a rank.

    Raises
    ------
    OptionError
        If `size` is below 1.
    DeadlockError
        At once if every rank that still runs waits for a message that is not on its way, and after `timeout`
        if one stalls.  The message says who waits for whom.
    BaseException
        What a rank raised first, noting the rank; the others are stopped.

    Examples
    --------
    >>> run_ranks(2, lambda comm: comm.recv(1 - comm.rank))
    Traceback (most recent call last):
    refimpl.errors.DeadlockError: deadlock: rank 0 waits for rank 1 (tag 0), rank 1 waits for rank 0 (tag 0)
    """
    if size < 1:
        raise OptionError(f"size: expected at least 1 rank, got {size}")
    post = _PostOffice(size)
    counter = Traffic() if traffic is None else traffic
    results: dict[int, Result] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadComm(rank, size, counter, post), *args)
        except _StoppedError:
            pass
        except BaseException as error:  # whatever it is, it ends the run and is raised again there
            error.add_note(f"raised in rank {rank} of {size}")
            post.fail(error)
        finally:
            post.leave(rank)

    threads = [
        # Each in a copy of this context, so that np.errstate holds inside the ranks too.
        threading.Thread(target=contextvars.copy_context().run, args=(work, rank), daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    try:
        failure = post.wait(timeout)
    finally:
        post.fail(_StoppedError())  # no effect on a run that has ended
    end = time.monotonic() + _GRACE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if failure is not None:
        raise failure
    return [results[rank] for rank in range(size)]


class ThreadComm(Comm):
    """The end of a rank that is a thread; `run_ranks` makes them."""

    def __init__(self, rank: int, size: int, traffic: Traffic, post: _PostOffice) -> None:
        super().__init__(rank, size, traffic)
        self._office = post

    def _post(self, dest: int, array: Array, tag: int) -> None:
        self._office.put(self.rank, dest, tag, np.array(array))

    def _take(self, source: int, tag: int) -> Array:
        return self._office.get(source, self.rank, tag)


class _StoppedError(Exception):
    """Ends a rank because another one failed."""


class _PostOffice:
    """Messages on their way between threads, and who waits for which.

    One lock; a condition for each rank and one for the caller, so that a message wakes its receiver alone.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.Lock()
        self.news = [threading.Condition(self.lock) for _ in range(size)]
        self.ended = threading.Condition(self.lock)
        self.boxes: dict[tuple[int, int, int], deque[Array]] = defaultdict(deque)
        self.waiting: dict[int, tuple[int, int]] = {}
        self.left: set[int] = set()
        self.failure: BaseException | None = None
        self.last = time.monotonic()

    def put(self, source: int, dest: int, tag: int, array: Array) -> None:
        with self.lock:
            if self.failure is not None:
                raise _StoppedError
            self.boxes[source, dest, tag].append(array)
            self.last = time.monotonic()
            if self.waiting.get(dest) == (source, tag):
                del self.waiting[dest]
                self.news[dest].notify()

    def get(self, source: int, dest: int, tag: int) -> Array:
        with self.lock:
            box = self.boxes[source, dest, tag]
            while not box:
                self.waiting[dest] = source, tag
                self._look_for_deadlock()
                if self.failure is not None:
                    raise _StoppedError
                self.news[dest].wait()
            return box.popleft()

    def leave(self, rank: int) -> None:
        with self.lock:
            self.left.add(rank)
            self.waiting.pop(rank, None)
            self.last = time.monotonic()
            self._look_for_deadlock()
            if len(self.left) == self.size:
                self.ended.notify()

    def fail(self, error: BaseException) -> None:
        """End the run because of `error`, unless it has ended already."""
        with self.lock:
            self._fail(error)

    def wait(self, timeout: float) -> BaseException | None:
        """Return what ended the run: None once every rank has returned."""
        with self.lock:
            while self.failure is None and len(self.left) < self.size:
                silence = time.monotonic() - self.last
                if silence >= timeout:
                    self._fail(self._stalled(timeout))
                else:
                    self.ended.wait(timeout - silence)
            return self.failure

    def _fail(self, error: BaseException) -> None:
        if self.failure is None and len(self.left) < self.size:
            self.failure = error
            for condition in (self.ended, *self.news):
                condition.notify()

    def _look_for_deadlock(self) -> None:
        """Fail if no rank can go on: each has returned or waits, and `put` would have ended its wait."""
        if self.waiting and len(self.waiting) + len(self.left) == self.size:
            self._fail(DeadlockError(f"deadlock: {say_waits(self.waiting, self.left)}"))

    def _stalled(self, timeout: float) -> DeadlockError:
        busy = sorted(set(range(self.size)) - set(self.waiting) - self.left)
        text = f"no message for {timeout:g} s: " + ", ".join(f"rank {rank} has not returned" for rank in busy)
        waits = say_waits(self.waiting, self.left)
        return DeadlockError(f"{text}, {waits}" if waits else text)


def say_waits(waiting: dict[int, tuple[int, int]], left: set[int]) -> str:
    """Return who waits for whom, in words.

    Examples
    --------
    >>> say_waits({1: (0, 7)}, {0})
    'rank 1 waits for rank 0 (tag 7), which has returned'
    """
    return ", ".join(
        f"rank {rank} waits for rank {source} (tag {tag})" + (", which has returned" * (source in left))
        for rank, (source, tag) in sorted(waiting.items())
    )
