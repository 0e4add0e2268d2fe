"""Exceptions that callers see.

Every message says what was wrong, what was expected, what was given, and where, in one line:
``k: axis Hkv must divide Hq; got Hkv=3, Hq=8 (q has shape (2, 5, 8, 64))``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendUnavailableError",
    "CapacityError",
    "DTypeError",
    "DeadlockError",
    "FrugalError",
    "Inconclusive",
    "LawViolation",
    "LostGradientError",
    "OptionError",
    "ShapeError",
    "SlowPathWarning",
    "UnknownNameError",
    "UnsupportedError",
]


class FrugalError(Exception):
    """Base of every exception that this project raises on purpose."""


class ShapeError(FrugalError, ValueError):
    """An array has the wrong number of axes, or axes that do not fit together."""


class DTypeError(FrugalError, TypeError):
    """An argument has a type or dtype that the function does not take."""


class OptionError(FrugalError, ValueError):
    """An option has a value outside its range, or contradicts another one."""


class CapacityError(FrugalError, ValueError):
    """Tiles held on chip exceed the capacity of the modelled SRAM."""


class BackendUnavailableError(FrugalError, RuntimeError):
    """A backend was asked for that this machine or installation does not have."""


class DeadlockError(FrugalError, RuntimeError):
    """Ranks wait for messages that will not come, or that did not come in time."""


class UnsupportedError(FrugalError, NotImplementedError):
    """An implementation refuses a valid case, with its reasons; nothing falls back silently."""


class LostGradientError(UnsupportedError):
    """A tensor requires a gradient that nothing would record: no other kernel would do better."""


class SlowPathWarning(UserWarning):
    """A call left the choice of kernels, the fast ones refused it, and slow ones run."""


class LawViolation(FrugalError, AssertionError):  # noqa: N818 (it is a verdict on the function under test)
    """An implementation breaks a law of its technique."""


class Inconclusive(FrugalError, NotImplementedError):  # noqa: N818 (it is a verdict, on the case)
    """A law has nothing to say of a case; the implementation under test did not refuse it."""


FEW = 24  # names that one line of an error message may list


class UnknownNameError(FrugalError, KeyError):
    """A name that nothing is registered under; the message offers the nearest ones, or all if they are few.

    Parameters
    ----------
    what : str
        What was looked up, for example ``"technique"``.
    name : str
        The name that was given.
    known : iterable of str
        The names that exist.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        if names and not close and len(names) <= FEW:
            hint = f"; there are {', '.join(names)}"
        self.message = f"unknown {what} {name!r}{hint}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message
