"""Tasks on streams: what a device runs one after the other, what runs beside it, and what waits for what.

A stream of a rank runs its tasks in the order given; a task starts when its stream is free and what it needs
has ended.  Computation and communication on two streams thus overlap as far as dependencies allow.

>>> tasks = [
...     Task("gather 0", 0, "data", 2),
...     Task("layer 0", 0, "compute", 3, (0,)),
...     Task("gather 1", 0, "data", 2),
...     Task("layer 1", 0, "compute", 3, (1, 2)),
... ]
>>> events = play(tasks)
>>> [(event.start, event.end) for event in events]
[(0, 2), (2, 5), (2, 4), (5, 8)]
>>> usage(events)[0]
Usage(computing=6, exposed=2, idle=0)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from memsim.units import Number
from refimpl.errors import OptionError

__all__ = ["COMPUTE", "Event", "Task", "Usage", "chrome_trace", "makespan", "play", "usage"]

COMPUTE = "compute"


class Task(NamedTuple):
    """What one stream of one rank does at a time.

    Attributes
    ----------
    name : str
        What it is.
    rank : int
        Whose.
    stream : str
        ``"compute"``, or what runs beside it.
    duration : number
        In seconds, or any unit.
    after : tuple of int
        Places of the tasks that must have ended.
    """

    name: str
    rank: int
    stream: str
    duration: Number
    after: tuple[int, ...] = ()


class Event(NamedTuple):
    """A task, from start to end."""

    task: Task
    start: Number
    end: Number


class Usage(NamedTuple):
    """Time of a rank: computing, communicating without computing, and doing neither."""

    computing: Number
    exposed: Number
    idle: Number


def play(tasks: Sequence[Task]) -> list[Event]:
    """Return when each task runs, in the order of the tasks.

    Raises
    ------
    OptionError
        If a duration is negative, or tasks wait for each other for ever.

    Notes
    -----
    Exact if durations are whole numbers or fractions.  Every task is looked at once it can start: the time
    taken is proportional to tasks and dependencies.
    """
    queues: dict[tuple[int, str], list[int]] = {}
    for place, task in enumerate(tasks):
        if task.duration < 0:
            raise OptionError(f"{task.name}: expected a duration from 0; got {task.duration}")
        queues.setdefault((task.rank, task.stream), []).append(place)
    before = {place: last for queue in queues.values() for last, place in itertools.pairwise(queue)}
    waits = [len(task.after) + (place in before) for place, task in enumerate(tasks)]
    followers: list[list[int]] = [[] for _ in tasks]
    for place, task in enumerate(tasks):
        for need in (*task.after, *((before[place],) if place in before else ())):
            followers[need].append(place)
    ready = [place for place, count in enumerate(waits) if not count]
    starts: list[Number] = [0] * len(tasks)
    played = 0
    while ready:
        place = ready.pop()
        played += 1
        end = starts[place] + tasks[place].duration
        for follower in followers[place]:
            starts[follower] = max(starts[follower], end)
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
    if played < len(tasks):
        stuck = next(place for place, count in enumerate(waits) if count)
        raise OptionError(f"tasks: {tasks[stuck].name} of rank {tasks[stuck].rank} waits for ever")
    return [Event(task, start, start + task.duration) for task, start in zip(tasks, starts, strict=True)]


def makespan(events: Iterable[Event]) -> Number:
    """Return when the last task ends."""
    return max((event.end for event in events), default=0)


def usage(events: Sequence[Event]) -> list[Usage]:
    """Return how each rank spends the time until the last one is done."""
    whole = makespan(events)
    found = []
    for rank in range(1 + max((event.task.rank for event in events), default=-1)):
        own = [event for event in events if event.task.rank == rank]
        computing = _covered(event for event in own if event.task.stream == COMPUTE)
        busy = _covered(own)
        found.append(Usage(computing, busy - computing, whole - busy))
    return found


def _covered(events: Iterable[Event]) -> Number:
    """Return how long at least one of the events runs."""
    total: Number = 0
    until: Number = 0
    for event in sorted(events, key=lambda event: event.start):
        if event.end > until:
            total += event.end - max(event.start, until)
            until = event.end
    return total


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """Return the events as a browser's tracing page reads them: a process a rank, a thread a stream.

    References
    ----------
    .. [1] Google, "Trace Event Format": complete events (``"ph": "X"``), times in microseconds.

    Examples
    --------
    >>> trace = chrome_trace(play([Task("forward", 0, "compute", 1)]))
    >>> [event["name"] for event in trace["traceEvents"]], trace["traceEvents"][-1]["dur"]
    (['process_name', 'thread_name', 'forward'], 1000000.0)
    """
    streams: dict[tuple[int, str], int] = {}
    shown: list[dict[str, Any]] = []
    named: list[dict[str, Any]] = []
    for event in events:
        rank, stream = event.task.rank, event.task.stream
        if (rank, stream) not in streams:
            thread = streams[rank, stream] = sum(1 for known, _ in streams if known == rank)
            if not thread:
                named.append(_named("process_name", rank, 0, f"rank {rank}"))
            named.append(_named("thread_name", rank, thread, stream))
        if event.task.duration:
            shown.append(
                {
                    "name": event.task.name,
                    "cat": stream,
                    "ph": "X",
                    "pid": rank,
                    "tid": streams[rank, stream],
                    "ts": float(event.start * 10**6),
                    "dur": float(event.task.duration * 10**6),
                }
            )
    return {"traceEvents": [*named, *shown], "displayTimeUnit": "ms"}


def _named(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
