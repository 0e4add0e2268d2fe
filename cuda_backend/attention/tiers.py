"""Which kernels a call gets: those of any GPU, those of Hopper, or the best that take it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np

from cuda_backend.arrays import dtype_name, is_host
from cuda_backend.context import is_hopper
from refimpl.errors import LostGradientError, OptionError, SlowPathWarning, UnsupportedError

__all__ = ["Tier", "by_tier", "chosen_tier", "known_tier", "refused_by", "warn_slow"]

Tier = Literal["portable", "hopper", "auto"]
Result = TypeVar("Result")


def known_tier(tier: Any) -> Tier:
    """Return `tier`, if there is one of that name.

    Raises
    ------
    OptionError
        If there is not.

    Examples
    --------
    >>> known_tier("auto")
    'auto'
    """
    if isinstance(tier, str) and tier in get_args(Tier):
        return cast("Tier", tier)
    raise OptionError(f"tier: expected one of {', '.join(get_args(Tier))}, got {tier!r}")


def chosen_tier(tier: Tier, q: Any) -> Literal["portable", "hopper"]:
    """Return which kernels a call with queries `q` is for.

    Raises
    ------
    OptionError
        If there is no such tier.

    Examples
    --------
    >>> chosen_tier("auto", np.ones((1, 3, 2, 4), np.float32))
    'portable'
    """
    named = known_tier(tier)
    if named != "auto":
        return named
    dtype = np.asarray(q).dtype.name if is_host(q) else dtype_name("q", q)
    return "hopper" if dtype in ("float16", "bfloat16") and is_hopper() else "portable"


def by_tier(tier: Tier, q: Any, hopper: Callable[[], Result], portable: Callable[[], Result]) -> Result:
    """Run a call by the kernels of its tier; what "auto" asks of Hopper and is refused, by the portable ones.

    On a Hopper GPU the portable ones are 20 to 50 times slower, so a `SlowPathWarning` says why they run.

    Raises
    ------
    OptionError
        If there is no such tier.
    UnsupportedError
        With the reasons of the tier.

    Examples
    --------
    >>> by_tier("portable", np.ones(3), lambda: "fast", lambda: "anywhere")
    'anywhere'
    """
    if chosen_tier(tier, q) == "hopper":
        try:
            return hopper()
        except UnsupportedError as error:
            refused_by(tier, error)
    return portable()


def refused_by(tier: str, error: UnsupportedError) -> None:
    """Say why the fast kernels refuse a call: a warning, if "auto" asked them, else an error with advice.

    Raises
    ------
    UnsupportedError
        If the tier was named.
    LostGradientError
        Itself: the other kernels would lose the gradient, too.
    """
    if isinstance(error, LostGradientError):
        raise error
    if tier != "auto":
        raise UnsupportedError(f"{error}; tier='portable' is slower and takes more") from None
    warn_slow(str(error))


@functools.cache  # but not of a warning that was made an error
def warn_slow(reason: str) -> None:
    """Say that slow kernels run, once for each reason.

    ``warnings.simplefilter("error", SlowPathWarning)`` makes it an error.
    """
    message = f"{reason}; the portable kernels run, which are many times slower"
    warnings.warn(message, SlowPathWarning, stacklevel=5)
